//! Saves the memory of `memtarget` and tells what it has cost; `pause=PHASE` waits for its end there, to be killed.
//! Arguments: those of `memtarget` in one word, separated by commas, then `dir=PATH late=1 copy=1 threads=N`.
#![allow(missing_docs)]

#[path = "../tests/memory/harness.rs"]
#[allow(dead_code)]
mod harness;

use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use snapshot::image::index::Index;
use snapshot::image::pages::PagesWriter;
use snapshot::memory::{Frozen, Options, Tracker, plain};

fn main() {
    let mut args = std::env::args().skip(1);
    let target = args
        .next()
        .expect("arguments of memtarget")
        .replace(',', " ");
    let rest: Vec<String> = args.collect();
    let arg = |name: &str| {
        rest.iter()
            .find_map(|a| a.strip_prefix(&format!("{name}=")))
    };
    let dir = PathBuf::from(arg("dir").expect("dir=PATH"));
    std::fs::create_dir_all(&dir).unwrap();
    let _ = std::fs::remove_file(dir.join("pages"));
    let _ = std::fs::remove_file(dir.join("socket"));
    let mut t = harness::Target::start(&dir, &target);
    let pid = t.pid;
    // Whoever kills this program opens the control page and finds the memory by these.
    println!(
        "pid {pid} control {} start {}",
        t.control.as_raw_fd(),
        t.start
    );
    std::thread::sleep(Duration::from_millis(100));
    let slow = |t: &harness::Target| (t.word(16), t.word(17), t.word(20));
    t.set(18, 0);
    let before = slow(&t);
    let pages = Arc::new(PagesWriter::create(&dir).unwrap());
    if arg("copy") == Some("1") {
        t.stop();
        let begin = Instant::now();
        let entries = plain::copy_all(pid, 0, &pages, None, &t.spans()).unwrap();
        println!(
            "stop-and-copy {:?}, {} entries",
            begin.elapsed(),
            entries.len()
        );
        return;
    }
    let options = Options {
        precopy: arg("late") != Some("1"),
        threads: arg("threads").map_or(2, |n| n.parse().unwrap()),
        ..Options::default()
    };
    let phase = |name: &str| {
        println!("phase {name}");
        std::io::Write::flush(&mut std::io::stdout()).unwrap();
        if arg("pause") == Some(name) {
            std::thread::sleep(Duration::from_secs(60));
        }
    };
    let begin = Instant::now();
    let mut tracker = Tracker::new(pid, t.uffd.take().unwrap(), 0, pages.clone(), options).unwrap();
    t.stop();
    tracker.register(&t.spans()).unwrap();
    t.go();
    phase("registered");
    tracker.track(&mut || harness::spans(pid).into()).unwrap();
    phase("tracked");
    let tracked = begin.elapsed();
    // As a tracer would stop it: little time passes between the last round and the stop.
    snapshot::sys::sched::prefer_this_thread();
    let spans = t.spans();
    tracker.tighten(&mut || spans.clone().into()).unwrap();
    t.stop();
    let fence = match tracker.freeze(&spans.clone().into(), true).unwrap() {
        Frozen::Fixed(f) => f,
        Frozen::Again { .. } => unreachable!("it was forced"),
    };
    phase("frozen");
    tracker.copy_plain(&fence.untracked).unwrap();
    t.go();
    snapshot::sys::sched::prefer_no_more();
    phase("going");
    let after = begin.elapsed();
    tracker.save_rest().unwrap();
    phase("saved");
    let rest = begin.elapsed() - after;
    t.release_storms();
    let saved = tracker.finish().unwrap();
    pages.finish().unwrap();
    Index::new(saved.entries).write(&dir).unwrap();
    let all = begin.elapsed();
    let end = slow(&t);
    let (n, ns, writes) = (end.0 - before.0, end.1 - before.1, end.2 - before.2);
    let s = saved.stats;
    let copied = (s.copied_before + s.copied_after) as f64 * 4096.0 / 1e9;
    println!(
        "freeze {:?} with {} spans, {} pieces, {} MB unsaved\ntracked {tracked:?} rest {rest:?} release {:?} sums {:?} all {all:?}",
        s.freeze,
        spans.len(),
        s.pieces_at_stop,
        fence.unsaved >> 20,
        s.release,
        s.sums
    );
    println!(
        "faults {} missing {} by fault {} pages; copied {copied:.2} GB, {:.2} GB/s overall; writes {writes}, slow {n}, mean of these {:.1} us, of all {:.2} us, max {} us",
        s.faults,
        s.missing,
        s.by_fault,
        copied / all.as_secs_f64(),
        ns as f64 / 1e3 / n.max(1) as f64,
        ns as f64 / 1e3 / writes.max(1) as f64,
        t.word(18) / 1000
    );
    for r in &s.rounds {
        println!(
            "  round copied {} pieces {} {:?}",
            r.copied, r.pieces, r.took
        );
    }
}

//! The memory of a running process is saved as it was at one point in time, whatever the process does.
#![allow(missing_docs)]

mod harness;

use std::path::Path;
use std::sync::Arc;

use harness::{Target, difference, image};
use snapshot::image::index::Index;
use snapshot::image::pages::PagesWriter;
use snapshot::memory::{Frozen, Options, Stats, Tracker};

/// Saves a target's memory to `dir`, and compares the image with what its memory was in the stop.
fn save(t: &mut Target, dir: &Path, options: Options, layers: &[&Path]) -> Stats {
    let uffd = t.uffd.take().unwrap();
    let pages = Arc::new(PagesWriter::create(dir).unwrap());
    let mut tracker = Tracker::new(t.pid, uffd, 0, pages.clone(), options).unwrap();
    let untracked = tracker.set_ranges(&t.spans()).unwrap();
    assert!(untracked.len() < 3, "{untracked:x?}");
    let pid = t.pid;
    tracker.track(&mut || harness::spans(pid)).unwrap();
    let mut force = false;
    let fence = loop {
        t.stop();
        match tracker.freeze(&t.spans(), force).unwrap() {
            Frozen::Fixed(fence) => break fence,
            Frozen::Again { .. } => {
                t.release_storms();
                t.go();
                tracker.tighten(&mut || harness::spans(pid)).unwrap();
                force = true;
            }
        }
    };
    tracker.copy_plain(&fence.untracked).unwrap();
    let memory = t.read_all();
    t.go();
    tracker.save_rest().unwrap();
    assert!(tracker.is_complete());
    t.release_storms();
    let saved = tracker.finish().unwrap();
    pages.finish().unwrap();
    Index::new(saved.entries).write(dir).unwrap();
    let wrong = difference(&image(dir, 0, layers), &memory);
    assert!(
        wrong.is_empty(),
        "{} pages, {:?} {:?}",
        wrong.len(),
        &wrong[..wrong.len().min(9)],
        saved.stats
    );
    assert!(memory.len() > 100);
    saved.stats
}

fn end(mut t: Target, mb: u64, threads: u64) {
    t.set(2, 1);
    let done = std::time::Instant::now();
    while t.word(3) < threads && done.elapsed().as_secs() < 20 {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    t.stop();
    assert_eq!(t.wrong_pages(mb), [0u64; 0]);
}

fn run(args: &str, options: Options) -> Stats {
    let dir = tempfile::tempdir().unwrap();
    let mut t = Target::start(dir.path(), args);
    let stats = save(&mut t, dir.path(), options, &[]);
    let number = |name: &str| {
        let text = args
            .split(name)
            .nth(1)
            .map_or("0", |a| a.split(' ').next().unwrap());
        text.parse::<u64>().unwrap()
    };
    end(t, number("mb="), number("writers=") + number("storm="));
    stats
}

#[test]
fn one_busy_writer() {
    let s = run("mb=64 writers=1", Options::default());
    assert!(
        s.faults > 0,
        "the writer must have met protected pages: {s:?}"
    );
}

#[test]
fn eight_busy_writers() {
    run("mb=64 writers=8", Options::default());
}

#[test]
fn everything_is_copied_after_the_point_in_time() {
    let s = run(
        "mb=64 writers=2 pace_us=50",
        Options {
            precopy: false,
            threads: 1,
            ..Options::default()
        },
    );
    assert_eq!(s.copied_before, 0);
    assert!(s.copied_after >= 64 * 256, "{s:?}");
    assert!(s.by_fault > 0, "{s:?}");
}

#[test]
fn a_storm_of_mappings() {
    for _ in 0..4 {
        run("mb=16 writers=1 storm=1", Options::default());
        run(
            "mb=16 writers=1 storm=1",
            Options {
                precopy: false,
                ..Options::default()
            },
        );
    }
}

#[test]
fn huge_pages() {
    run("mb=64 writers=2 huge=1", Options::default());
}

#[test]
fn a_sparse_terabyte() {
    run("mb=4 writers=1 sparse=1", Options::default());
}

#[test]
fn an_idle_process_is_saved_before_the_stop() {
    let s = run("mb=32 writers=0", Options::default());
    assert!(s.copied_after < 1000, "{s:?}");
}

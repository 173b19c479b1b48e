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
    // Some pages of each mapping, the first one among them, are left open and read in the stop.
    let some = |s: std::ops::Range<u64>| s.step_by(97 << 12).take(200);
    let hot: Vec<u64> = t.spans().into_iter().flat_map(some).collect();
    tracker.set_hot(&hot);
    t.stop();
    // A child that another test is about to make has the descriptor of the save before until it runs its own program.
    let begin = std::time::Instant::now();
    while let Err(e) = tracker.register(&t.spans()) {
        let busy = format!("{e:?}").contains("EBUSY");
        assert!(busy && begin.elapsed().as_secs() < 10, "{e:?}");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    t.go();
    let pid = t.pid;
    tracker.track(&mut || harness::spans(pid).into()).unwrap();
    let mut force = false;
    let fence = loop {
        t.stop();
        match tracker.freeze(&t.spans().into(), force).unwrap() {
            Frozen::Fixed(fence) => break fence,
            Frozen::Again { .. } => {
                t.release_storms();
                t.go();
                tracker.tighten(&mut || harness::spans(pid).into()).unwrap();
                force = true;
            }
        }
    };
    let mut untracked = fence.untracked.clone();
    untracked.retain(|s| !hot.contains(&s.start) || s.end > s.start + 4096);
    assert!(untracked.len() < 3, "{untracked:x?}");
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
    // All but the pages that were left open.
    assert!(s.copied_after >= 64 * 256 * 95 / 97, "{s:?}");
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

/// Starts the saver as a program of its own, kills it in or shortly after a phase, and looks at the target.
fn kill_in(phase: &str, delay_us: u64, pause: bool) {
    use std::io::BufRead;
    let dir = tempfile::tempdir().unwrap();
    let mut saver = std::process::Command::new(harness::example("memsave"))
        .arg("mb=32,writers=3,survive=1")
        .arg(format!("dir={}", dir.path().display()))
        .args(pause.then(|| format!("pause={phase}")))
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("the example memsave, which cargo test builds");
    let mut lines = std::io::BufReader::new(saver.stdout.take().unwrap())
        .lines()
        .map_while(Result::ok);
    let first = lines.next().unwrap();
    let n: Vec<u64> = first.split(' ').filter_map(|w| w.parse().ok()).collect();
    let control = format!("/proc/{}/fd/{}", saver.id(), n[1]);
    let control = std::fs::File::options()
        .read(true)
        .write(true)
        .open(control)
        .unwrap();
    let t = Target::orphan(n[0] as i32, control, n[2]);
    assert!(
        lines.any(|l| l == format!("phase {phase}")),
        "it never came to {phase}"
    );
    std::thread::sleep(std::time::Duration::from_micros(delay_us));
    saver.kill().unwrap();
    saver.wait().unwrap();
    t.go();
    // The writers go on, over all of their memory.
    let before = t.word(20);
    let began = std::time::Instant::now();
    while t.word(20) < before + 20_000 {
        assert!(
            began.elapsed().as_secs() < 30,
            "the writers hang after a death in {phase}"
        );
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    end(t, 32, 3);
}

#[test]
fn the_saver_dies_and_the_target_does_not_notice() {
    for phase in ["registered", "tracked", "frozen", "going", "saved"] {
        kill_in(phase, 0, true);
        kill_in(phase, 700, false);
        kill_in(phase, 5_000, false);
    }
    for delay in [10_000, 20_000, 30_000, 40_000] {
        kill_in("registered", delay, false);
    }
}

#[test]
fn a_sequel_holds_what_has_changed_only() {
    use snapshot::image::{manifest::Manifest, verify::verify};
    let base = tempfile::tempdir().unwrap();
    let next = tempfile::tempdir().unwrap();
    let mut t = Target::start(base.path(), "mb=32 writers=1 pace_us=100");
    let manifest = |dir: &Path, layers: Vec<snapshot::image::manifest::Layer>| {
        let (_, sum) = Index::open(dir).unwrap();
        let none = serde_json::json!({
            "taken": {"realtime_ns": 0, "monotonic_ns": 0, "boottime_ns": 0},
            "host": {"release": "", "boot_id": "", "vdso": "", "cpu_flags": [], "xcr0": 0},
            "processes": [], "spaces": [], "shared": [], "files": [], "index": "", "layers": [],
        });
        Manifest {
            index: sum.to_hex().to_string(),
            layers,
            ..serde_json::from_value(none).unwrap()
        }
    };
    save(&mut t, base.path(), Options::default(), &[]);
    let first = manifest(base.path(), vec![]);
    let all = verify(base.path(), &first).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    let parent = Arc::new(snapshot::memory::Parent::open(base.path(), &first).unwrap());
    t.uffd = Some(t.more.remove(0));
    save(
        &mut t,
        next.path(),
        Options {
            parent: Some(parent.clone()),
            ..Options::default()
        },
        &[base.path()],
    );
    let (index, _) = Index::open(next.path()).unwrap();
    let own: usize = index
        .entries()
        .iter()
        .filter(|e| e.layer == 0)
        .map(|e| e.pages.count())
        .sum();
    let second = manifest(next.path(), parent.layers().to_vec());
    assert_eq!(verify(next.path(), &second).unwrap().pages, all.pages);
    assert!(
        own > 0 && own < all.pages as usize / 2,
        "{own} of {}",
        all.pages
    );

    // One byte of the parent's memory, or of the index, is noticed.
    let pages = base.path().join("pages");
    let entry = index.entries().iter().find(|e| e.layer == 1).unwrap();
    let at = entry.slot * (2 << 20) + entry.pages.byte_runs().next().unwrap().start as u64;
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&pages)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at + 5).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at + 5).unwrap();
    let e = verify(next.path(), &second).unwrap_err().to_string();
    assert!(
        e.contains("is not what was saved") && e.contains(pages.to_str().unwrap()),
        "{e}"
    );
    file.set_len(4096).unwrap();
    let e = verify(next.path(), &second).unwrap_err().to_string();
    assert!(e.contains("the index names"), "{e}");
    std::fs::write(base.path().join("index"), b"UMLINDX\n\x01\0\0\0\0\0\0\0").unwrap();
    let e = verify(next.path(), &second).unwrap_err().to_string();
    assert!(e.contains("the manifest says"), "{e}");
    end(t, 32, 1);
}

#[test]
fn a_shared_object_is_copied_with_its_holes() {
    use std::os::unix::fs::FileExt;
    let dir = tempfile::tempdir().unwrap();
    let object =
        nix::sys::memfd::memfd_create(c"object", nix::sys::memfd::MFdFlags::empty()).unwrap();
    let object = std::fs::File::from(object);
    object.set_len((1 << 30) + 100).unwrap();
    object.write_all_at(&[7; 5000], 3 << 21).unwrap();
    object.write_all_at(&[9; 100], 1 << 30).unwrap();
    let pages = Arc::new(PagesWriter::create(dir.path()).unwrap());
    let pid = std::process::id() as i32;
    let entries = snapshot::memory::plain::copy_object(pid, 5, &pages, None, &object).unwrap();
    pages.finish().unwrap();
    Index::new(entries).write(dir.path()).unwrap();
    let found = image(dir.path(), 5, &[]);
    let page = |value: u8, n: usize| {
        let mut p = [0; 4096];
        p[..n].fill(value);
        blake3::hash(&p)
    };
    let wanted = [
        (3 << 21, page(7, 4096)),
        ((3 << 21) + 4096, page(7, 904)),
        (1 << 30, page(9, 100)),
    ];
    assert_eq!(found.into_iter().collect::<Vec<_>>(), wanted);
}

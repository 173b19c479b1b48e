//! Mounts that keep what is written in the kernel (`-o writeback`): nothing that a write(2) returned from is missing in a
//! checkpoint, nothing of an old state gets into a new one, and sizes, holes and times are as on other mounts.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use cowfs_tests::live::Live;

fn live() -> Live {
    Live::with_options("writeback")
}

fn open(l: &Live, name: &str) -> File {
    File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(l.at(name))
        .expect("it opens")
}

/// A file as a checkpoint has it.
fn in_checkpoint(l: &Live, checkpoint: &str, name: &str) -> Vec<u8> {
    let at = l.beside("at");
    let dir = at.display().to_string();
    let store = l.store().display().to_string();
    l.run(&["mount", &store, &dir, "--at", checkpoint]);
    let bytes = fs::read(at.join(name)).expect("it is there");
    l.run(&["unmount", &dir]);
    bytes
}

#[test]
fn a_checkpoint_has_what_was_written_a_moment_before() {
    let l = live();
    let f = open(&l, "file");
    let mut want = vec![0; 300_000];
    // Whole pages, parts of pages, behind a hole, past the end; nothing is synced or closed.
    for (at, len, byte) in [
        (0, 8192, 1),
        (100, 50, 2),
        (8190, 10, 3),
        (200_000, 4097, 4),
        (299_999, 1, 5),
    ] {
        f.write_all_at(&vec![byte; len], at as u64).expect("room");
        want[at..at + len].fill(byte);
    }
    l.run(&["checkpoint", &l.mnt(), "one"]);
    assert!(in_checkpoint(&l, "one", "file") == want);
    f.write_all_at(&[9; 4096], 4096).expect("room");
    f.set_len(150).expect("it is cut");
    f.write_all_at(b"tail", 250).expect("room");
    l.run(&["checkpoint", &l.mnt(), "two"]);
    let mut short = want[..150].to_vec();
    short.resize(250, 0);
    short.extend_from_slice(b"tail");
    assert!(in_checkpoint(&l, "two", "file") == short);
    // What is written now belongs to the state that is left behind, or to nothing.
    f.write_all_at(b"left", 0).expect("room");
    l.run(&["rollback", &l.mnt(), "one"]);
    assert!(fs::read(l.at("file")).expect("there") == want);
    let lost = f.write_all_at(b"lost", 0).and_then(|()| f.sync_all());
    assert!(lost.is_err(), "an old state takes nothing");
    l.run(&["checkpoint", &l.mnt(), "three"]);
    assert!(in_checkpoint(&l, "three", "file") == want);
    let list = l.run(&["list", &l.mnt(), "--no-headers", "-o", "name"]);
    let left = list.lines().find(|n| n.starts_with("left-"));
    short[..4].copy_from_slice(b"left");
    assert!(in_checkpoint(&l, left.expect("a name for what was left"), "file") == short);
    drop(f);
    l.check();
}

/// Pages of a writer's file.
const PAGES: u64 = 2048;

/// Writes numbers, each into every word of a page, and tells what has been written.
fn write_numbers(f: &File, done: &AtomicU64, stop: &AtomicBool) {
    let mut n = done.load(Ordering::SeqCst);
    while !stop.load(Ordering::SeqCst) {
        n += 1;
        let page: Vec<u8> = std::iter::repeat_n(n.to_le_bytes(), 512)
            .flatten()
            .collect();
        // Scattered, so that hardly two pages come in one request.
        let place = n.wrapping_mul(1_234_567) % PAGES;
        f.write_all_at(&page, place * 4096).expect("room");
        done.store(n, Ordering::SeqCst);
    }
}

/// The last number up to `n` that went to each page; 0 if none did.
fn last_numbers(n: u64) -> Vec<u64> {
    let mut last = vec![0; usize::try_from(PAGES).expect("few")];
    // 1,234,567 is odd, so every page gets one within PAGES numbers.
    for k in n.saturating_sub(PAGES) + 1..=n {
        last[usize::try_from(k.wrapping_mul(1_234_567) % PAGES).expect("few")] = k;
    }
    last
}

#[test]
fn checkpoints_among_writers_have_all_that_was_written_before() {
    let l = live();
    let files: Vec<File> = (0..3).map(|i| open(&l, &format!("f{i}"))).collect();
    let done: Vec<AtomicU64> = (0..3).map(|_| AtomicU64::new(0)).collect();
    let stop = AtomicBool::new(false);
    let mut takings = Vec::new();
    std::thread::scope(|s| {
        for (f, d) in files.iter().zip(&done) {
            s.spawn(|| write_numbers(f, d, &stop));
        }
        let now = || -> Vec<u64> { done.iter().map(|d| d.load(Ordering::SeqCst)).collect() };
        for i in 0..8 {
            std::thread::sleep(Duration::from_millis(150));
            let before = now();
            let name = format!("c{i}");
            let out = l.try_run(&["checkpoint", &l.mnt(), &name], &[]);
            let after = now();
            if !out.status.success() {
                stop.store(true, Ordering::SeqCst);
                panic!("{}", String::from_utf8_lossy(&out.stderr));
            }
            takings.push((name, before, after));
        }
        stop.store(true, Ordering::SeqCst);
    });
    for (name, before, after) in &takings {
        for (i, (b, a)) in before.iter().zip(after).enumerate() {
            let bytes = in_checkpoint(&l, name, &format!("f{i}"));
            for (page, (least, chunk)) in
                last_numbers(*b).iter().zip(bytes.chunks(4096)).enumerate()
            {
                for word in chunk.chunks_exact(8) {
                    let n = u64::from_le_bytes(word.try_into().expect("eight"));
                    // One write was under way when the call returned.
                    assert!(
                        n >= *least && n <= a + 1,
                        "{name}, f{i}, page {page}: {n}, not {least} to {a}"
                    );
                }
            }
        }
    }
    drop(files);
    l.check();
}

#[test]
fn a_rollback_among_writers_leaves_no_trace_in_the_new_state() {
    let l = live();
    let first = vec![7; usize::try_from(PAGES * 4096).expect("small")];
    fs::write(l.at("file"), &first).expect("room");
    l.run(&["checkpoint", &l.mnt(), "one"]);
    for _ in 0..5 {
        let f = open(&l, "file");
        let (done, stop) = (AtomicU64::new(0), AtomicBool::new(false));
        std::thread::scope(|s| {
            s.spawn(|| write_numbers(&f, &done, &stop));
            std::thread::sleep(Duration::from_millis(100));
            l.run(&["rollback", &l.mnt(), "one", "--discard"]);
            assert!(fs::read(l.at("file")).expect("there") == first);
            std::thread::sleep(Duration::from_millis(50));
            l.run(&["checkpoint", &l.mnt()]);
            stop.store(true, Ordering::SeqCst);
        });
        assert!(f.sync_all().is_err(), "it wrote to a state that was left");
        drop(f);
        assert!(fs::read(l.at("file")).expect("there") == first);
        assert!(in_checkpoint(&l, "latest", "file") == first);
    }
    l.check();
}

#[test]
#[allow(unsafe_code, reason = "a memory map is what this is about")]
fn maps_and_writes_of_one_file_are_both_in_a_checkpoint() {
    let l = live();
    let f = open(&l, "file");
    f.write_all_at(&[1; 64 << 10], 0).expect("room");
    // SAFETY: a new map of a file that stays as long; nobody truncates it.
    let map = unsafe {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let p = libc::mmap(
            std::ptr::null_mut(),
            64 << 10,
            prot,
            libc::MAP_SHARED,
            f.as_raw_fd(),
            0,
        );
        assert!(p != libc::MAP_FAILED);
        std::slice::from_raw_parts_mut(p.cast::<u8>(), 64 << 10)
    };
    let mut want = vec![1; 64 << 10];
    for round in 2..12_u8 {
        let at = usize::from(round) * 4096 + 10;
        map[at] = round;
        f.write_all_at(&[round; 3], at as u64 + 1).expect("room");
        map[at + 4] = round;
        want[at..at + 5].fill(round);
        want[at + 3] = round;
        let name = format!("c{round}");
        l.run(&["checkpoint", &l.mnt(), &name]);
        assert!(in_checkpoint(&l, &name, "file") == want, "round {round}");
    }
    // SAFETY: the map from above, not used any more.
    unsafe { libc::munmap(map.as_mut_ptr().cast(), map.len()) };
    drop(f);
    l.check();
}

#[test]
fn what_has_not_come_yet_is_found_and_copied() {
    let l = live();
    let f = open(&l, "file");
    f.write_all_at(&[1; 4096], 0).expect("room");
    f.write_all_at(&[2; 4096], 1 << 20).expect("room");
    let seek = |at: i64, whence| nix::unistd::lseek(&f, at, whence);
    use nix::unistd::Whence::{SeekData, SeekHole};
    assert_eq!(seek(0, SeekData), Ok(0));
    assert_eq!(seek(4096, SeekData), Ok(1 << 20));
    assert_eq!(
        seek((1 << 20) + 4096, SeekData),
        Err(nix::errno::Errno::ENXIO)
    );
    f.write_all_at(&[3; 4096], 2 << 20).expect("room");
    assert_eq!(seek(1 << 20, SeekHole), Ok((1 << 20) + 4096));
    assert_eq!(seek((1 << 20) + 4096, SeekData), Ok(2 << 20));
    f.write_all_at(&[4; 100], 3 << 20).expect("room");
    assert_eq!(seek(3 << 20, SeekHole), Ok((3 << 20) + 100));
    // A copy of a part in front, while the end is only in the kernel.
    f.write_all_at(&[5; 4096], 9 << 20).expect("room");
    let to = open(&l, "copy");
    // As cp(1) does: copy_file_range(2) until all of it is there.
    let (mut source, mut target) = (&f, &to);
    std::io::Seek::rewind(&mut source).expect("it seeks");
    let part = std::io::Read::take(&mut source, 5 << 20);
    let copied = std::io::copy(&mut { part }, &mut target).expect("it copies");
    assert_eq!(copied, 5 << 20);
    drop(to);
    let all = fs::read(l.at("file")).expect("there");
    assert_eq!(all.len(), (9 << 20) + 4096);
    assert!(fs::read(l.at("copy")).expect("there") == all[..5 << 20]);
    // Through a handle that cannot read, into the middle of a page that is not cached.
    drop(f);
    fs::write("/proc/sys/vm/drop_caches", "3").expect("root");
    let w = File::options()
        .write(true)
        .open(l.at("file"))
        .expect("it opens");
    w.write_all_at(b"middle", 4000).expect("room");
    let mut all = all;
    all[4000..4006].copy_from_slice(b"middle");
    assert!(fs::read(l.at("file")).expect("there") == all);
    drop(w);
    l.check();
}

#[test]
fn times_are_those_of_the_writes_and_stay() {
    let l = live();
    let f = open(&l, "file");
    let before = SystemTime::now() - Duration::from_millis(20);
    f.write_all_at(b"x", 0).expect("room");
    let m = f.metadata().expect("there");
    let written = (m.mtime(), m.mtime_nsec());
    assert!(m.modified().expect("a time") >= before);
    std::thread::sleep(Duration::from_millis(30));
    l.run(&["checkpoint", &l.mnt(), "one"]);
    let time = |l: &Live| {
        let m = fs::metadata(l.at("file")).expect("there");
        (m.mtime(), m.mtime_nsec())
    };
    drop(f);
    l.run(&["rollback", &l.mnt(), "one"]);
    assert_eq!(time(&l), written, "as the checkpoint has it");
    let f = open(&l, "file");
    f.write_all_at(b"y", 0).expect("room");
    let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
    f.set_times(fs::FileTimes::new().set_modified(old))
        .expect("ours");
    drop(f);
    fs::write("/proc/sys/vm/drop_caches", "3").expect("root");
    assert_eq!(time(&l), (1_000_000, 0));
    let f = open(&l, "file");
    f.set_len(0).expect("it is cut");
    let cut = time(&l);
    assert_ne!(cut, (1_000_000, 0));
    drop(f);
    fs::write("/proc/sys/vm/drop_caches", "3").expect("root");
    assert_eq!(time(&l), cut);
    l.check();
}

#[test]
fn a_killed_daemon_leaves_what_was_synced_and_what_was_written_long_before() {
    let l = live();
    let (synced, waits, closed) = (open(&l, "synced"), open(&l, "waits"), open(&l, "closed"));
    waits.write_all_at(b"waits", 0).expect("room");
    closed.write_all_at(b"closed", 0).expect("room");
    drop(closed);
    // Asked for within five seconds, flushed within five more.
    std::thread::sleep(Duration::from_secs(12));
    synced.write_all_at(b"synced", 0).expect("room");
    synced.sync_all().expect("it syncs");
    l.kill();
    drop((synced, waits));
    l.mount(&[]);
    for name in ["synced", "waits", "closed"] {
        assert_eq!(fs::read_to_string(l.at(name)).expect("there"), name);
    }
    l.check();
}

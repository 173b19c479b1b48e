//! What POSIX and Linux promise and a conformance suite does not look at, on a real mount.
#![allow(unsafe_code, reason = "memory maps are part of what this is about")]

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::num::NonZeroUsize;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::process::{Command, Output};
use std::ptr::NonNull;

use cowfs_tests::live::{Live, nobody};
use nix::fcntl::{Flock, FlockArg, RenameFlags, renameat2};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use nix::unistd::{Whence, lseek64};

/// A shared map of a whole file.
struct Map {
    at: NonNull<u8>,
    len: usize,
}

impl Map {
    fn new(f: &File, len: usize) -> Self {
        let n = NonZeroUsize::new(len).expect("not empty");
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh map at a place of the kernel's choice; unmapped when dropped.
        let at = unsafe { mmap(None, n, prot, MapFlags::MAP_SHARED, f, 0) }.expect("a map");
        Self { at: at.cast(), len }
    }

    fn fill(&self, from: usize, to: usize, byte: u8) {
        assert!(from <= to && to <= self.len);
        // SAFETY: within the map, and nothing else refers to its memory.
        unsafe { self.at.as_ptr().add(from).write_bytes(byte, to - from) };
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, not used afterwards.
        unsafe { munmap(self.at.cast(), self.len) }.expect("mapped");
    }
}

fn rw(l: &Live, name: &str) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(l.at(name))
        .expect("it opens")
}

fn sh(script: &str) -> Output {
    Command::new("sh")
        .args(["-c", script])
        .output()
        .expect("sh runs")
}

/// Lets others in down to the mount.
fn open_to_all(l: &Live) {
    for p in [l.at("").parent().expect("a parent").to_path_buf(), l.at("")] {
        fs::set_permissions(p, Permissions::from_mode(0o755)).expect("ours");
    }
}

#[test]
fn a_checkpoint_has_all_that_was_stored_through_a_large_map() {
    let l = Live::new();
    const LEN: usize = 96 << 20;
    let f = rw(&l, "file");
    f.set_len(LEN as u64).expect("room");
    let map = Map::new(&f, LEN);
    for (round, byte) in [b'a', b'b', b'c'].into_iter().enumerate() {
        map.fill(0, LEN, byte);
        l.run(&["checkpoint", &l.mnt(), &format!("c{round}")]);
        // Stored again while the pages of the checkpoint may still be on their way.
        map.fill(0, 4096, b'!');
    }
    drop((map, f));
    let at = l.beside("at");
    for (round, byte) in [b'a', b'b', b'c'].into_iter().enumerate() {
        let (store, dir) = (l.store().display().to_string(), at.display().to_string());
        l.run(&["mount", &store, &dir, "--at", &format!("c{round}")]);
        let got = fs::read(at.join("file")).expect("there");
        let wrong = got.iter().skip(4096).filter(|b| **b != byte).count();
        assert!(
            got.len() == LEN && wrong == 0,
            "c{round}: {wrong} bytes are not {byte}"
        );
        l.run(&["unmount", &dir]);
    }
    l.check();
}

#[test]
fn data_in_what_looks_like_a_hole_is_found() {
    let l = Live::new();
    let f = rw(&l, "sparse");
    f.set_len(1 << 20).expect("room");
    assert_eq!(
        lseek64(&f, 0, Whence::SeekData),
        Err(nix::errno::Errno::ENXIO)
    );
    assert_eq!(lseek64(&f, 0, Whence::SeekHole), Ok(0));
    let map = Map::new(&f, 1 << 20);
    map.fill(8192, 8200, b'x');
    assert_eq!(lseek64(&f, 0, Whence::SeekData), Ok(8192));
    assert_eq!(lseek64(&f, 8192, Whence::SeekHole), Ok(12288));
    let copy = sh(&format!(
        "cp --sparse=always {m}/sparse {m}/copy && cmp {m}/sparse {m}/copy",
        m = l.mnt()
    ));
    assert!(
        copy.status.success(),
        "{}",
        String::from_utf8_lossy(&copy.stderr)
    );
    drop((map, f));
    l.check();
}

#[test]
fn a_write_with_o_dsync_survives_the_daemon() {
    let l = Live::new();
    let mut f = OpenOptions::new()
        .write(true)
        .create_new(true)
        .custom_flags(libc::O_DSYNC)
        .open(l.at("synced"))
        .expect("room");
    f.write_all(b"on disk").expect("room");
    drop(f);
    l.kill();
    l.mount(&[]);
    assert_eq!(fs::read(l.at("synced")).expect("there"), b"on disk");
    l.check();
}

#[test]
fn set_id_bits_go_before_the_next_exec() {
    let l = Live::new();
    open_to_all(&l);
    let m = l.mnt();
    fs::copy("/usr/bin/id", l.at("s")).expect("room");
    fs::set_permissions(l.at("s"), Permissions::from_mode(0o4777)).expect("ours");
    let before = nobody(&format!("{m}/s -u"));
    assert_eq!(
        String::from_utf8_lossy(&before.stdout).trim(),
        "0",
        "set-id works"
    );
    // Nobody looks at the attributes in between.
    let after = nobody(&format!(
        "dd if=/usr/bin/id of={m}/s conv=notrunc 2>/dev/null; {m}/s -u"
    ));
    assert_eq!(String::from_utf8_lossy(&after.stdout).trim(), "65534");
    // Root may keep them.
    fs::set_permissions(l.at("s"), Permissions::from_mode(0o4755)).expect("ours");
    assert!(sh(&format!("fallocate -l 1M {m}/s")).status.success());
    assert_eq!(
        fs::metadata(l.at("s")).expect("there").mode() & 0o7777,
        0o4755
    );
    // Owner and size changes take them from everybody else's files.
    fs::set_permissions(l.at("s"), Permissions::from_mode(0o6777)).expect("ours");
    assert!(nobody(&format!(": > {m}/s")).status.success());
    assert_eq!(
        fs::metadata(l.at("s")).expect("there").mode() & 0o7777,
        0o777
    );
    fs::set_permissions(l.at("s"), Permissions::from_mode(0o6755)).expect("ours");
    std::os::unix::fs::chown(l.at("s"), Some(1), None).expect("ours");
    assert_eq!(
        fs::metadata(l.at("s")).expect("there").mode() & 0o7777,
        0o755
    );
    l.check();
}

#[test]
fn capabilities_go_with_a_write() {
    let l = Live::new();
    let m = l.mnt();
    fs::copy("/usr/bin/id", l.at("s")).expect("room");
    let name = c"security.capability";
    let path = std::ffi::CString::new(format!("{m}/s")).expect("a path");
    // VFS_CAP_REVISION_2 with cap_net_raw.
    let mut cap = [0u8; 20];
    cap[3] = 2;
    cap[5] = 0x20;
    // SAFETY: both names end in a zero and the value is 20 bytes long.
    let set = unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), cap.as_ptr().cast(), 20, 0) };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
    rw(&l, "s").write_all_at(b"x", 0).expect("room");
    // SAFETY: as above; no value is asked for.
    let got = unsafe { libc::getxattr(path.as_ptr(), name.as_ptr(), std::ptr::null_mut(), 0) };
    assert_eq!(got, -1, "the capability is still there");
    l.check();
}

#[test]
fn renames_of_three_kinds() {
    let l = Live::new();
    fs::write(l.at("a"), "a").expect("room");
    fs::write(l.at("b"), "b").expect("room");
    let rename = |flags| {
        renameat2(
            nix::fcntl::AT_FDCWD,
            &l.at("a"),
            nix::fcntl::AT_FDCWD,
            &l.at("b"),
            flags,
        )
    };
    assert_eq!(
        rename(RenameFlags::RENAME_NOREPLACE),
        Err(nix::errno::Errno::EEXIST)
    );
    rename(RenameFlags::RENAME_EXCHANGE).expect("both are there");
    assert_eq!(fs::read(l.at("a")).expect("there"), b"b");
    rename(RenameFlags::empty()).expect("allowed");
    assert_eq!(fs::read(l.at("b")).expect("there"), b"b");
    assert!(!l.at("a").exists());
    l.check();
}

#[test]
fn locks_hold_between_processes() {
    let l = Live::new();
    let path = l.at("lock");
    let held = Flock::lock(rw(&l, "lock"), FlockArg::LockExclusive).expect("free");
    let other = sh(&format!("flock -n {} true", path.display()));
    assert_eq!(other.status.code(), Some(1), "flock(2) of another process");
    drop(held);
    assert!(
        sh(&format!("flock -n {} true", path.display()))
            .status
            .success()
    );
    let f = rw(&l, "lock");
    let fl = libc::flock {
        l_type: libc::F_WRLCK as i16,
        l_whence: 0,
        l_start: 0,
        l_len: 10,
        l_pid: 0,
    };
    // SAFETY: fcntl reads the structure only.
    let locked = unsafe { libc::fcntl(f.as_raw_fd(), libc::F_SETLK, &raw const fl) };
    assert_eq!(locked, 0);
    let script = "import fcntl,sys\nf=open(sys.argv[1],'r+')\ntry:\n fcntl.lockf(f,fcntl.LOCK_EX|fcntl.LOCK_NB,5)\n sys.exit(0)\nexcept OSError:\n sys.exit(7)";
    let python = Command::new("python3")
        .args(["-c", script])
        .arg(&path)
        .output();
    if let Ok(out) = python {
        assert_eq!(
            out.status.code(),
            Some(7),
            "fcntl(2) lock of another process"
        );
    }
    drop(f);
    l.check();
}

#[test]
fn acls_are_kept_and_inherited() {
    let l = Live::new();
    open_to_all(&l);
    let m = l.mnt();
    let done = sh(&format!(
        "set -e; mkdir {m}/d; setfacl -m u:65534:rwx,d:u:65534:rw,d:m::rw {m}/d; umask 077; echo x > {m}/d/f; getfacl -cp {m}/d/f"
    ));
    let text = String::from_utf8_lossy(&done.stdout);
    assert!(
        done.status.success(),
        "{}",
        String::from_utf8_lossy(&done.stderr)
    );
    assert!(
        text.contains("user:nobody:rw-") || text.contains("user:65534:rw-"),
        "{text}"
    );
    assert!(
        nobody(&format!("cat {m}/d/f && echo y >> {m}/d/f"))
            .status
            .success()
    );
    assert!(
        sh(&format!("setfacl -b {m}/d/f && chmod 600 {m}/d/f"))
            .status
            .success()
    );
    assert!(!nobody(&format!("cat {m}/d/f")).status.success());
    l.check();
}

#[test]
fn listing_is_stable_while_names_come_and_go() {
    let l = Live::new();
    fs::create_dir(l.at("d")).expect("room");
    const STAY: usize = 6000;
    for i in 0..STAY {
        File::create(l.at(&format!("d/stays-{i}"))).expect("room");
    }
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|s| {
        let (l, stop) = (&l, &stop);
        s.spawn(move || {
            let mut i = 0u64;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                i += 1;
                let p = l.at(&format!("d/comes-{}", i % 500));
                File::create(&p).expect("room");
                fs::remove_file(&p).expect("there");
            }
        });
        for _ in 0..20 {
            let mut seen = HashSet::new();
            for e in fs::read_dir(l.at("d")).expect("there").flatten() {
                let name = e.file_name().into_string().expect("text");
                if name.starts_with("stays-") {
                    assert!(seen.insert(name.clone()), "{name} twice");
                }
            }
            assert_eq!(seen.len(), STAY);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    l.check();
}

#[test]
fn long_names_large_offsets_and_special_files() {
    let l = Live::new();
    let long = "n".repeat(255);
    fs::write(l.at(&long), "x").expect("255 bytes are allowed");
    let e = fs::write(l.at(&"n".repeat(256)), "x").expect_err("256 are not");
    assert_eq!(e.raw_os_error(), Some(libc::ENAMETOOLONG));
    let mut f = rw(&l, "large");
    f.seek(SeekFrom::Start(6 << 30)).expect("it seeks");
    f.write_all(b"beyond 4 GiB").expect("room");
    let m = f.metadata().expect("there");
    assert_eq!(m.len(), (6 << 30) + 12);
    assert!(
        m.blocks() <= 16,
        "a sparse file takes {} blocks",
        m.blocks()
    );
    let mut b = [1; 12];
    f.read_exact_at(&mut b, 6 << 30).expect("it reads");
    assert_eq!(&b, b"beyond 4 GiB");
    f.read_exact_at(&mut b, 3 << 30).expect("it reads");
    assert_eq!(b, [0; 12]);
    let m = l.mnt();
    let made = sh(&format!(
        "set -e; mkfifo {m}/fifo; mknod {m}/null c 1 3; mknod {m}/blk b 7 0; echo x > {m}/null; (echo through > {m}/fifo &); cat {m}/fifo"
    ));
    assert_eq!(
        String::from_utf8_lossy(&made.stdout),
        "through\n",
        "{}",
        String::from_utf8_lossy(&made.stderr)
    );
    let socket = std::os::unix::net::UnixListener::bind(l.at("socket")).expect("a socket");
    std::os::unix::net::UnixStream::connect(l.at("socket")).expect("it listens");
    drop(socket);
    drop(f);
    l.check();
}

#[test]
fn appends_of_several_writers_do_not_mix() {
    let l = Live::new();
    const EACH: usize = 400;
    std::thread::scope(|s| {
        for t in 0..4u8 {
            let l = &l;
            s.spawn(move || {
                let mut f = OpenOptions::new()
                    .append(true)
                    .create(true)
                    .open(l.at("log"))
                    .expect("room");
                for i in 0..EACH {
                    f.write_all(format!("{t} {i:06} {}\n", "z".repeat(80)).as_bytes())
                        .expect("room");
                }
            });
        }
    });
    let text = fs::read_to_string(l.at("log")).expect("there");
    assert_eq!(text.lines().count(), 4 * EACH);
    assert!(text.lines().all(|line| line.len() == 89), "a torn line");
    l.check();
}

#[test]
fn copies_across_a_rollback_and_within_a_file() {
    let l = Live::new();
    fs::write(l.at("old"), "kept by an open file").expect("room");
    let mut open = File::open(l.at("old")).expect("there");
    let empty = l.run(&["checkpoint", &l.mnt(), "one"]);
    drop(empty);
    fs::write(l.at("old"), "something else").expect("room");
    l.run(&["rollback", &l.mnt(), "one", "--discard"]);
    let mut copy = File::create(l.at("saved")).expect("room");
    std::io::copy(&mut open, &mut copy).expect("a copy out of the old state");
    let mut s = String::new();
    File::open(l.at("saved"))
        .and_then(|mut f| f.read_to_string(&mut s))
        .expect("there");
    assert_eq!(
        s, "something else",
        "the file that was open keeps what it was"
    );
    let m = l.mnt();
    let reflink = sh(&format!(
        "head -c 3000000 /dev/urandom > {m}/x && cp {m}/x {m}/y && cmp {m}/x {m}/y"
    ));
    assert!(reflink.status.success());
    drop((open, copy));
    l.check();
}

#[test]
fn large_reads_of_pieces_holes_and_ends_are_right() {
    let l = Live::new();
    let mut want: Vec<u8> = (0..9_000_001_u32)
        .map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let f = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(l.at("file"))
        .expect("room");
    f.write_all_at(&want, 0).expect("room");
    // Pieces at odd places, in one part many small ones, and holes.
    let mut put = |at: usize, len: usize, byte: u8| {
        f.write_all_at(&vec![byte; len], at as u64).expect("room");
        want[at..at + len].fill(byte);
    };
    put(1_000_001, 100_001, 1);
    put(1_600_000, 600_000, 2);
    for i in 0..50_u8 {
        put(3_000_000 + usize::from(i) * 9_001, 4_097, i);
    }
    let hole = nix::fcntl::FallocateFlags::FALLOC_FL_PUNCH_HOLE
        | nix::fcntl::FallocateFlags::FALLOC_FL_KEEP_SIZE;
    nix::fcntl::fallocate(&f, hole, 5_000_000, 300_000).expect("a hole");
    want[5_000_000..5_300_000].fill(0);
    f.sync_all().expect("it syncs");
    drop(f);
    for _ in 0..2 {
        fs::write("/proc/sys/vm/drop_caches", "3").expect("root");
        assert!(fs::read(l.at("file")).expect("there") == want);
        let f = File::open(l.at("file")).expect("there");
        for at in [0, 4096, 999_999, 4_900_000, 8_500_000] {
            let mut part = vec![0; 700_000.min(want.len() - at)];
            f.read_exact_at(&mut part, at as u64).expect("it reads");
            assert!(part == want[at..at + part.len()], "at {at}");
        }
    }
    l.check();
}

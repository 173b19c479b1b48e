//! What programs see of a rollback under a live mount. `docs/semantics.md` says it in words.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};

use cowfs_tests::live::Live;

fn read(l: &Live, p: &str) -> String {
    fs::read_to_string(l.at(p)).expect("it can be read")
}

#[test]
fn names_attributes_and_contents_change_at_once() {
    let l = Live::new();
    fs::write(l.at("file"), "old").expect("room");
    fs::create_dir(l.at("dir")).expect("room");
    fs::write(l.at("dir/gone later"), "here").expect("room");
    symlink("old target", l.at("link")).expect("room");
    l.run(&["checkpoint", &l.mnt(), "one"]);
    fs::write(l.at("file"), "new and longer").expect("room");
    fs::remove_file(l.at("dir/gone later")).expect("it is there");
    fs::write(l.at("dir/new"), "x").expect("room");
    fs::remove_file(l.at("link")).expect("it is there");
    symlink("new target", l.at("link")).expect("room");
    // Everything is cached now, also that there is no such name.
    assert!(fs::metadata(l.at("dir/gone later")).is_err());
    assert_eq!(fs::metadata(l.at("file")).expect("there").len(), 14);
    assert_eq!(read(&l, "file"), "new and longer");
    l.run(&["rollback", &l.mnt(), "one"]);
    assert_eq!(fs::metadata(l.at("file")).expect("there").len(), 3);
    assert_eq!(read(&l, "file"), "old");
    assert_eq!(read(&l, "dir/gone later"), "here");
    assert!(fs::metadata(l.at("dir/new")).is_err());
    assert_eq!(
        fs::read_link(l.at("link")).expect("there").to_str(),
        Some("old target")
    );
    let names: Vec<_> = fs::read_dir(l.at("dir"))
        .expect("there")
        .flatten()
        .map(|e| e.file_name())
        .collect();
    assert_eq!(names, ["gone later"]);
    // What was left is a checkpoint too, and going there and back again works.
    let list = l.run(&["list", &l.mnt(), "--no-headers", "-o", "name"]);
    let left = list
        .lines()
        .find(|n| n.starts_with("left-"))
        .expect("a name for what was left");
    l.run(&["rollback", &l.mnt(), left]);
    assert_eq!(read(&l, "file"), "new and longer");
    l.run(&["rollback", &l.mnt(), "latest"]);
    assert_eq!(read(&l, "file"), "old");
    l.check();
}

#[test]
fn an_open_file_stays_what_it_was_and_cannot_be_written() {
    let l = Live::new();
    fs::write(l.at("file"), "first").expect("room");
    l.run(&["checkpoint", &l.mnt(), "one"]);
    let mut f = File::options()
        .read(true)
        .write(true)
        .open(l.at("file"))
        .expect("it opens");
    f.write_all(b"later").expect("room");
    l.run(&["rollback", &l.mnt(), "one", "--discard"]);
    assert_eq!(read(&l, "file"), "first");
    let mut s = String::new();
    f.seek(SeekFrom::Start(0)).expect("it seeks");
    f.read_to_string(&mut s).expect("it reads");
    assert_eq!(s, "later");
    // Where the kernel keeps what is written it hears of the rollback only then.
    let refused = f.write_all_at(b"later", 0).and_then(|()| f.sync_all());
    let errno = refused.expect_err("it was left behind").raw_os_error();
    assert!(errno == Some(libc::ESTALE) || l.writes_back());
    assert_eq!(read(&l, "file"), "first");
    // Still there after what it shows has been collected as far as it may be.
    l.run(&["gc", &l.mnt()]);
    let mut b = [0; 5];
    f.read_exact_at(&mut b, 0).expect("it reads");
    assert_eq!(&b, b"later");
    drop(f);
    l.check();
}

#[test]
fn an_unlinked_open_file_lives_on_and_is_in_the_checkpoint_of_its_time() {
    let l = Live::new();
    let f = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(l.at("file"))
        .expect("room");
    f.write_all_at(b"unlinked", 0).expect("room");
    fs::remove_file(l.at("file")).expect("it is there");
    l.run(&["checkpoint", &l.mnt(), "one"]);
    f.write_all_at(b"UNLINKED", 0).expect("still open");
    l.run(&["rollback", &l.mnt(), "one"]);
    let mut b = [0; 8];
    f.read_exact_at(&mut b, 0).expect("it reads");
    assert_eq!(&b, b"UNLINKED");
    assert_eq!(fs::read_dir(l.at("")).expect("there").count(), 0);
    drop(f);
    l.check();
}

#[test]
#[allow(unsafe_code, reason = "a memory map is what this is about")]
fn a_memory_map_is_in_the_checkpoint_and_stays_after_a_rollback() {
    let l = Live::new();
    fs::write(l.at("file"), vec![b'a'; 8192]).expect("room");
    let f = File::options()
        .read(true)
        .write(true)
        .open(l.at("file"))
        .expect("it opens");
    let len = std::num::NonZeroUsize::new(8192).expect("not zero");
    // SAFETY: a fresh shared map of a file that nobody truncates; it is unmapped below.
    let map = unsafe {
        nix::sys::mman::mmap(
            None,
            len,
            nix::sys::mman::ProtFlags::PROT_READ | nix::sys::mman::ProtFlags::PROT_WRITE,
            nix::sys::mman::MapFlags::MAP_SHARED,
            &f,
            0,
        )
    }
    .expect("a map");
    // SAFETY: the map is 8,192 bytes long and lives until the end of this function; volatile, as the kernel looks on.
    let poke = |at: usize, v: u8| unsafe { map.as_ptr().cast::<u8>().add(at).write_volatile(v) };
    // SAFETY: as above.
    let peek = |at: usize| unsafe { map.as_ptr().cast::<u8>().add(at).read_volatile() };
    poke(0, b'b');
    l.run(&["checkpoint", &l.mnt(), "one"]);
    poke(0, b'c');
    poke(5000, b'c');
    l.run(&["rollback", &l.mnt(), "one"]);
    assert_eq!(
        fs::read(l.at("file")).expect("there")[0],
        b'b',
        "a store before the checkpoint is in it"
    );
    assert_eq!(peek(0), b'c', "the map stays what it was");
    poke(1, b'd');
    assert_eq!(fs::read(l.at("file")).expect("there")[..2], *b"ba");
    // SAFETY: unmapped once, not used afterwards.
    unsafe { nix::sys::mman::munmap(map, 8192) }.expect("mapped");
    drop(f);
    l.run(&["unmount", "--lazy", &l.mnt()]);
    l.clear();
    l.check_only();
}

#[test]
fn a_working_directory_is_stale_until_it_is_entered_again() {
    let l = Live::new();
    fs::create_dir(l.at("dir")).expect("room");
    fs::write(l.at("dir/file"), "old").expect("room");
    l.run(&["checkpoint", &l.mnt(), "one"]);
    fs::write(l.at("dir/file"), "new").expect("room");
    let script = format!(
        "cd {m}/dir && read go; cat file 2>&1; cd {m}/dir && cat file",
        m = l.mnt()
    );
    let mut sh = std::process::Command::new("sh")
        .args(["-c", &script])
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .expect("sh");
    std::thread::sleep(std::time::Duration::from_millis(200));
    l.run(&["rollback", &l.mnt(), "one"]);
    sh.stdin
        .take()
        .expect("a pipe")
        .write_all(b"go\n")
        .expect("it waits");
    let out = String::from_utf8(sh.wait_with_output().expect("it ends").stdout).expect("text");
    assert!(out.contains("tale file handle"), "{out}");
    assert!(out.ends_with("old"), "{out}");
    l.check();
}

#[test]
fn a_hundred_rollbacks_with_files_open_never_mix() {
    let l = Live::new();
    for i in 0..20 {
        fs::write(l.at(&format!("f{i}")), "0").expect("room");
    }
    l.run(&["checkpoint", &l.mnt(), "zero"]);
    for i in 0..20 {
        fs::write(l.at(&format!("f{i}")), "1").expect("room");
    }
    l.run(&["checkpoint", &l.mnt(), "one"]);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|s| {
        let readers: Vec<_> = (0..3)
            .map(|t| {
                let (l, stop) = (&l, &stop);
                s.spawn(move || {
                    let mut n = 0u64;
                    while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                        for i in 0..20 {
                            // ESTALE may come when a rollback falls between looking up and reading.
                            if let Ok(v) =
                                fs::read_to_string(l.at(&format!("f{}", (i + t * 7) % 20)))
                            {
                                assert!(v == "0" || v == "1", "{v:?}");
                                n += 1;
                            }
                        }
                    }
                    n
                })
            })
            .collect();
        for i in 0..100 {
            let name = if i % 2 == 0 { "zero" } else { "one" };
            l.run(&["rollback", &l.mnt(), name, "--discard"]);
            let want = if i % 2 == 0 { "0" } else { "1" };
            for k in 0..20 {
                assert_eq!(read(&l, &format!("f{k}")), want);
            }
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        for r in readers {
            assert!(r.join().expect("no reader failed") > 0);
        }
    });
    l.check();
}

#[test]
fn heads_and_checkpoints_side_by_side() {
    let l = Live::new();
    fs::write(l.at("file"), "old").expect("room");
    l.run(&["checkpoint", &l.mnt(), "one"]);
    l.run(&["clone", &l.mnt(), "one", "second"]);
    let (other, at) = (l.beside("other"), l.beside("at"));
    let (o, a) = (other.display().to_string(), at.display().to_string());
    let store = l.store().display().to_string();
    l.run(&["mount", &store, &o, "--head", "second"]);
    fs::write(l.at("file"), "main goes on").expect("room");
    fs::write(other.join("file"), "so does the second").expect("room");
    l.run(&["mount", &store, &a, "--at", "one"]);
    assert_eq!(fs::read_to_string(at.join("file")).expect("there"), "old");
    assert_eq!(read(&l, "file"), "main goes on");
    assert_eq!(
        fs::read_to_string(other.join("file")).expect("there"),
        "so does the second"
    );
    let refused = fs::write(at.join("file"), "no").map_err(|e| e.raw_os_error());
    assert_eq!(refused, Err(Some(libc::EROFS)));
    l.run(&["restore", &l.mnt(), "one", "file"]);
    assert_eq!(read(&l, "file"), "old");
    l.run(&["unmount", &a]);
    l.run(&["unmount", &o]);
    l.check();
}

#[test]
fn birth_times_tmpfiles_and_set_id_bits() {
    let l = Live::new();
    fs::write(l.at("file"), "x").expect("room");
    let m = fs::metadata(l.at("file")).expect("there");
    assert!(m.created().expect("a birth time") <= m.modified().expect("a time"));
    let tmp = File::options()
        .write(true)
        .custom_flags_tmp()
        .open(l.at(""))
        .expect("O_TMPFILE works");
    tmp.write_all_at(b"no name", 0).expect("room");
    assert_eq!(tmp.metadata().expect("there").nlink(), 0);
    drop(tmp);
    l.check();
}

/// Adds O_TMPFILE.
trait Tmp {
    fn custom_flags_tmp(&mut self) -> &mut Self;
}

impl Tmp for fs::OpenOptions {
    fn custom_flags_tmp(&mut self) -> &mut Self {
        use std::os::unix::fs::OpenOptionsExt;
        self.custom_flags(libc::O_TMPFILE)
    }
}

//! Images that are refused, saying which and what to do; and what locks, crashes and hostile headers come to.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use cowfs::image;
use cowfs_tests::Rng;
use cowfs_tests::image::{Images, holds, random_disk, write_sectors, write_with_holes};
use cowfs_tests::live::binary;
use nix::fcntl::{FcntlArg, fcntl};

/// A base, a COW file `cow` with a few sectors, and what a guest sees.
fn pair() -> (Images, Vec<u8>) {
    let i = Images::new();
    let mut disk = random_disk(&mut Rng(7), 1000);
    write_with_holes(&i.at("base"), &disk);
    i.image(&["create", "cow", "base"]);
    write_sectors(&i.at("cow"), &mut disk, 500, &[3; 2048]);
    (i, disk)
}

fn patch(path: &Path, at: u64, bytes: &[u8]) {
    let f = File::options().write(true).open(path).expect("ours");
    f.write_all_at(bytes, at).expect("room");
}

/// Every verb that reads through `cow` must refuse it.
fn all_refuse(i: &Images, says: &[&str]) {
    for args in [
        &["merge", "cow", "out"][..],
        &["merge", "cow", "--in-place"],
        &["export", "cow", "out"],
        &["export", "cow", "-"],
        &["rebase", "cow", "base"],
    ] {
        let said = i.refused(args, 1);
        for s in says {
            assert!(said.contains(s), "{args:?}, {s}: {said}");
        }
    }
    let e = image::check(&i.at("cow"))
        .map(drop)
        .map_err(|e| e.in_full());
    if let Err(e) = e {
        assert!(says.iter().all(|s| e.contains(s)), "{e}");
    }
    let out = i.try_image(&["verify", "cow"]);
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert_eq!(out.status.code(), Some(1), "{said}");
    assert!(says.iter().all(|s| said.contains(s)), "{said}");
}

#[test]
fn headers_that_are_not_version_3() {
    for (at, bytes, says) in [
        (4, &[0, 0, 0, 1][..], "version 1"),
        (4, &[0, 0, 0, 2], "version 2"),
        (4, &[0, 0, 0, 4], "version 4"),
        (0, b"MOOO\x01\0\0\0", "version 1"),
        (12, &[0; 8], "0 bytes"),
        (12, &[0xff; 8], "18446744073709551615"),
        (12, &[0, 0, 8, 0, 0, 0, 0, 0], "8796093022208"),
        (20, &[0, 0, 4, 0], "sectors of 1024"),
        (24, &[0, 0, 0, 0], "alignment of 0"),
        (24, &[0, 0, 0x30, 0], "alignment of 12288"),
        (28, &[0, 0, 0, 1], "COW format 1"),
        (32, b"base\0", "no absolute path"),
        (32, b"\0\0\0\0/base\0", "before 2006"),
    ] {
        let (i, _) = pair();
        patch(&i.at("cow"), at, bytes);
        all_refuse(&i, &["cow", says]);
        i.refused(&["duplicate", "cow", "out"], 1);
        i.refused(&["info", "cow"], 1);
        assert!(i.image(&["list", "."]).contains("broken"));
    }
}

#[test]
fn files_that_are_cut_short() {
    let (i, _) = pair();
    let cut = |to| {
        let f = File::options().write(true).open(i.at("cow"));
        f.and_then(|f| f.set_len(to)).expect("ours");
    };
    let data = 8192 + 4096;
    // The last byte of the last sector that was written.
    cut(data + 504 * 512);
    assert!(
        image::verify(&i.at("cow"))
            .expect("readable")
            .problems
            .is_empty()
    );
    cut(data + 504 * 512 - 1);
    all_refuse(&i, &["cow", "sector 503", "cut short"]);
    cut(8192 + 124);
    all_refuse(&i, &["cow", "the bitmap ends at byte 8317", "cut short"]);
    cut(4100);
    all_refuse(&i, &["cow", "the header ends at byte 4128", "cut short"]);
    i.refused(&["info", "cow"], 1);
}

#[test]
fn bits_behind_the_last_sector() {
    let i = Images::new();
    write_with_holes(&i.at("base"), &vec![1; 9 * 512]);
    i.image(&["create", "cow", "base"]);
    patch(&i.at("cow"), 8193, &[0b1000_0010]);
    let report = image::verify(&i.at("cow")).expect("readable");
    assert_eq!(report.problems.len(), 1);
    assert!(report.problems[0].contains("2 bits"), "{report:?}");
}

#[test]
fn a_base_that_changed() {
    let (i, disk) = pair();
    patch(&i.at("base"), 0, b"x");
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(5);
    File::open(i.at("base"))
        .and_then(|f| f.set_modified(later))
        .expect("ours");
    all_refuse(
        &i,
        &["cow", "base", "has changed since: it was last written"],
    );
    File::options()
        .append(true)
        .open(i.at("base"))
        .and_then(|f| f.set_len(disk.len() as u64 + 512))
        .expect("ours");
    all_refuse(
        &i,
        &[
            "cow",
            "has changed since: its size was 512000, and is 512512",
        ],
    );
    let said = i.refused(&["rebase", "cow", "base", "--unchecked"], 1);
    assert!(said.contains("made for a base of 512000 bytes"), "{said}");
    fs::remove_file(i.at("base")).expect("there");
    i.file("other", &disk);
    for args in [&["merge", "cow", "out"][..], &["rebase", "cow", "other"]] {
        let said = i.refused(args, 1);
        assert!(
            said.contains("cannot be opened") && said.contains("No such file"),
            "{said}"
        );
    }
    // Both say it and go on.
    assert!(i.image(&["info", "cow"]).contains("broken"));
    i.image(&["duplicate", "cow", "two"]);
}

#[test]
fn backing_files_in_a_loop() {
    let (i, _) = pair();
    let name = |n: &str| i.at(n).display().to_string();
    let point = |cow: &str, to: &str| {
        let mut path = name(to).into_bytes();
        path.push(0);
        patch(&i.at(cow), 32, &path);
    };
    i.image(&["duplicate", "cow", "two"]);
    i.image(&["duplicate", "cow", "three"]);
    point("cow", "cow");
    let links = format!("form a loop: {} -> {}", "cow", name("cow"));
    for args in [
        &["merge", "cow", "out"][..],
        &["export", "cow", "-"],
        &["rebase", "cow", "base"],
    ] {
        let said = i.refused(args, 1);
        assert!(said.contains(&links), "{said}");
    }
    point("cow", "two");
    point("two", "three");
    point("three", "cow");
    let said = i.refused(&["merge", "two", "out"], 1);
    let links = ["two", &name("three"), &name("cow"), &name("two")].join(" -> ");
    assert!(said.contains(&links), "{said}");
    // No loop, but one on another.
    point("three", "base");
    let said = i.refused(&["merge", "two", "out"], 1);
    assert!(said.contains("three is itself a COW file"), "{said}");
    for args in [
        &["create", "new", "cow"][..],
        &["import", "cow", ".", "--name", "new"],
        &["rebase", "three", "cow"],
        &["rebase", "three", "cow", "--unchecked"],
    ] {
        let said = i.refused(args, 1);
        assert!(said.contains("cow is itself a COW file"), "{said}");
    }
    // A long chain ends.
    for n in 0..20 {
        i.image(&["duplicate", "three", &format!("c{n}")]);
    }
    for n in 0..19 {
        point(&format!("c{n}"), &format!("c{}", n + 1));
    }
    let e = image::chain(&i.at("c0")).expect_err("too long");
    assert!(e.to_string().contains("more than 16"), "{e}");
}

#[test]
fn targets_and_sources_that_cannot_be() {
    let (i, _) = pair();
    let said = i.refused(&["create", "cow", "base"], 1);
    assert!(
        said.contains("cow is there already") && said.contains("--force"),
        "{said}"
    );
    for args in [
        &["merge", "cow", "base", "--force"][..],
        &["merge", "cow", "cow", "--force"],
        &["duplicate", "cow", "cow", "--force"],
        &["create", "base", "base", "--force"],
        &["export", "base", "base", "--force"],
        &["import", "base", ".", "--force"],
    ] {
        let said = i.refused(args, 1);
        assert!(said.contains("from itself"), "{args:?}: {said}");
    }
    i.file("odd", &[1; 1000]);
    let said = i.refused(&["create", "new", "odd"], 1);
    assert!(said.contains("truncate -s %512"), "{said}");
    i.file("empty", b"");
    i.refused(&["create", "new", "empty"], 1);
    i.refused(&["import", "empty", ".", "--name", "new"], 1);
    fs::create_dir(i.at("dir")).expect("room");
    nix::unistd::mkfifo(&i.at("fifo"), nix::sys::stat::Mode::S_IRWXU).expect("room");
    for odd in ["dir", "fifo"] {
        for args in [
            &["create", "new", odd][..],
            &["info", odd],
            &["merge", odd, "new"],
            &["export", "base", odd, "--force"],
        ] {
            let said = i.refused(args, 1);
            assert!(said.contains("no regular file"), "{args:?}: {said}");
        }
    }
    let said = i.refused(&["merge", "base", "new"], 1);
    assert!(said.contains("base is no COW file"), "{said}");
    i.refused(&["create", "none/new", "base"], 1);
    i.refused(&["list", "none"], 1);
}

/// The kind of lock that the guest kernel takes. Closing any descriptor of the file in this process drops it, so the verbs
/// run as processes of their own.
fn lock(file: &File, kind: i32) {
    let l = libc::flock {
        l_type: i16::try_from(kind).expect("small"),
        l_whence: 0,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_SETLK(&l)).expect("free");
}

#[test]
fn images_in_use() {
    let (i, disk) = pair();
    let open = |name| {
        let f = File::options().read(true).write(true).open(i.at(name));
        f.expect("ours")
    };
    i.file("other", &disk);
    let (cow, base) = (open("cow"), open("base"));
    lock(&cow, libc::F_WRLCK);
    lock(&base, libc::F_RDLCK);
    let me = format!("in use by process {}", std::process::id());
    for args in [
        &["merge", "cow", "out"][..],
        &["merge", "cow", "--in-place"],
        &["export", "cow", "out"],
        &["rebase", "cow", "other"],
        &["rebase", "cow", "other", "--unchecked"],
        &["create", "cow", "base", "--force"],
    ] {
        let said = i.refused(args, 11);
        assert!(
            said.contains(&me) && said.contains("duplicate"),
            "{args:?}: {said}"
        );
    }
    let state = i.image(&["list", ".", "--no-headers", "-o", "name,state"]);
    let pid = std::process::id();
    let wanted = format!("base   in use by {pid}\ncow    in use by {pid}\nother  ok\n");
    assert_eq!(state, wanted);
    // Reading is allowed, and no lock is lost by it.
    i.image(&["duplicate", "cow", "two"]);
    i.image(&["info", "cow"]);
    i.image(&["verify", "cow"]);
    i.image(&["merge", "two", "merged"]);
    holds(&i.at("merged"), &disk, "the duplicate");
    i.image(&["create", "three", "base"]);
    // With its guest gone, others still read the base.
    lock(&cow, libc::F_UNLCK);
    let said = i.refused(&["merge", "cow", "--in-place"], 11);
    assert!(said.contains("base is in use"), "{said}");
    lock(&base, libc::F_UNLCK);
    i.image(&["merge", "cow", "--in-place"]);
}

#[test]
fn a_crash_leaves_the_old_or_the_new() {
    for point in ["written", "synced", "renamed"] {
        for verb in ["create", "merge", "in place", "rebase"] {
            let (i, disk) = pair();
            i.file("other", &vec![5; disk.len()]);
            let old = fs::read(i.at("base")).expect("there");
            let args = match verb {
                "create" => &["image", "create", "new", "base"][..],
                "merge" => &["image", "merge", "cow", "new"],
                "in place" => &["image", "merge", "cow", "--in-place"],
                _ => &["image", "rebase", "cow", "other"],
            };
            let fault = format!("image:{point}");
            let out = i.try_run(&binary(), args, &[("COWFS_FAULT", &fault)]);
            assert!(!out.status.success(), "{verb}, {point}");
            let done = point == "renamed";
            assert_eq!(
                i.at("new").exists(),
                done && matches!(verb, "create" | "merge")
            );
            match verb {
                "in place" => holds(&i.at("base"), if done { &disk } else { &old }, point),
                _ => {
                    holds(&i.at("base"), &old, point);
                    i.image(&["merge", "cow", "after"]);
                    holds(&i.at("after"), &disk, point);
                }
            }
            // The partial file is not taken for an image, and the next attempt does not mind it.
            assert!(!i.image(&["list", "."]).contains("partial"));
            if !done {
                let again = i.try_run(&binary(), args, &[]);
                assert!(again.status.success(), "{verb}, {point}");
            }
        }
    }
}

#[test]
fn huge_headers_take_no_memory() {
    let i = Images::new();
    let size = 4_u64 << 40;
    let sparse = |name: &str, len| {
        let f = File::create(i.at(name)).expect("room");
        f.set_len(len)
            .expect("a filesystem that has files of 4 TiB");
    };
    sparse("base", size);
    i.image(&["create", "cow", "base"]);
    // Something at both ends.
    let (last, data) = (
        size / 512 - 1,
        image::Cow::open(&i.at("cow"))
            .expect("ours")
            .layout()
            .data_offset,
    );
    patch(&i.at("cow"), 8192, &[1]);
    patch(&i.at("cow"), 8192 + last / 8, &[0x80]);
    patch(&i.at("cow"), data + last * 512, &[7; 512]);
    let limited = |args: &[&str]| {
        let cmd = format!(
            "cd {} && ulimit -v 400000 && exec {} image {}",
            i.at("").display(),
            binary().display(),
            args.join(" ")
        );
        let out = Command::new("sh").args(["-c", &cmd]).output().expect("sh");
        let err = String::from_utf8_lossy(&out.stderr).into_owned();
        (out.status.code(), err)
    };
    for args in [
        &["info", "cow"][..],
        &["duplicate", "cow", "two"],
        &["merge", "cow", "merged"],
        &["rebase", "two", "merged"],
    ] {
        assert_eq!(limited(args).0, Some(0), "{args:?}: {}", limited(args).1);
    }
    let merged = File::open(i.at("merged")).expect("there");
    assert_eq!(merged.metadata().expect("there").len(), size);
    assert!(merged.metadata().expect("there").blocks() < 1000);
    let mut end = [0; 512];
    merged.read_exact_at(&mut end, size - 512).expect("whole");
    assert_eq!(end, [7; 512]);
    // A header that promises all this in a small file.
    let mut head = vec![0; 8200];
    File::open(i.at("cow"))
        .and_then(|mut f| f.read_exact(&mut head))
        .expect("whole");
    i.file("small", &head);
    let (code, said) = limited(&["merge", "small", "out"]);
    assert_eq!(code, Some(1));
    assert!(said.contains("cut short"), "{said}");
}

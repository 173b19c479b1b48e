//! What mounting, unmounting and deleting do to each other.

use std::fs;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use cowfs_tests::live::Live;

/// Ends the other threads of a test, also when it fails.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn mounting_what_is_no_store_makes_nothing() {
    let l = Live::new();
    let (no, at) = (l.beside("no"), l.beside("at"));
    let args = [
        "mount",
        no.to_str().expect("a name"),
        at.to_str().expect("a name"),
    ];
    let out = l.try_run(&args, &[]);
    assert_eq!(out.status.code(), Some(10));
    let out = l.try_run(&["doctor", no.to_str().expect("a name")], &[]);
    assert_eq!(out.status.code(), Some(1));
    assert_eq!(fs::read_dir(&no).expect("there").count(), 0);
    l.check();
}

#[test]
fn the_daemon_leaves_the_session() {
    let l = Live::new();
    let pid = l.pid();
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
    let after = stat.rsplit_once(')').expect("a name").1;
    let f: Vec<&str> = after.split_whitespace().collect();
    // State, parent, group, session.
    assert_eq!((f[2], f[3]), (&*pid.to_string(), &*pid.to_string()));
    l.check();
}

#[test]
fn an_unmount_says_who_still_holds_the_mount() {
    let l = Live::new();
    let copy = l.beside("copy").display().to_string();
    let sh = |cmd: &str| {
        assert!(
            Command::new("sh")
                .arg("-c")
                .arg(cmd)
                .status()
                .expect("sh")
                .success()
        )
    };
    sh(&format!("mount --bind {} {copy}", l.mnt()));
    let begun = Instant::now();
    let out = l.try_run(&["unmount", &l.mnt()], &[]);
    assert!(begun.elapsed().as_secs() < 30);
    assert_eq!(out.status.code(), Some(1));
    let err = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(err.contains("still holds") && err.contains(&copy), "{err}");
    sh(&format!("umount {copy}"));
    l.clear();
    l.check_only();
}

#[test]
fn what_is_mounted_is_not_deleted_under_any_name() {
    let l = Live::new();
    let (m, store) = (l.mnt(), l.store().display().to_string());
    let at = l.beside("at").display().to_string();
    l.run(&["checkpoint", &m, "old"]);
    l.run(&["mount", &store, &at, "--at", "old"]);
    l.run(&["rename", &m, "old", "new"]);
    let out = l.try_run(&["delete", &m, "new"], &[]);
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("is mounted"));
    l.run(&["checkpoint", &m, "old"]);
    l.run(&["delete", &m, "old"]);
    l.run(&["unmount", &at]);
    l.run(&["delete", &m, "new"]);
    for bad in ["@x", "HEAD"] {
        assert_eq!(
            l.try_run(&["clone", &m, "latest", bad], &[]).status.code(),
            Some(1)
        );
        assert_eq!(
            l.try_run(&["checkpoint", &m, bad], &[]).status.code(),
            Some(1)
        );
    }
    l.check();
}

#[test]
fn a_diff_with_a_head_that_changes_is_of_one_moment() {
    let l = Live::new();
    let m = l.mnt();
    for d in 0..20 {
        fs::create_dir(l.at(&format!("d{d}"))).expect("room");
    }
    l.run(&["checkpoint", &m, "base"]);
    let end = AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| {
            let mut i = 0_u64;
            while !end.load(Ordering::Relaxed) {
                // A renamed file is always there once.
                let d = i % 20;
                let _ = fs::write(l.at(&format!("d{d}/f{i}")), vec![b'x'; 100]);
                let _ =
                    fs::remove_file(l.at(&format!("d{}/f{}", (i + 7) % 20, i.saturating_sub(13))));
                i += 1;
            }
        });
        let _end = End(&end);
        for i in 0..30 {
            let out = l.try_run(&["diff", &m, "base", "HEAD"], &[]);
            assert!(
                out.status.success(),
                "{}",
                String::from_utf8_lossy(&out.stderr)
            );
            if i % 10 == 0 {
                l.run(&["gc", &m]);
            }
        }
    });
    let names = l.run(&["list", &m, "--no-headers", "-o", "name"]);
    assert_eq!(names, "main\nbase\n", "the diff leaves nothing");
    l.check();
}

/// An inode has a hint at its name, which may have gone wrong: each way in which names come and go, and then a change.
#[test]
fn a_diff_finds_every_name_of_what_has_changed() {
    let l = Live::new();
    let m = l.mnt();
    for d in ["a", "b"] {
        fs::create_dir(l.at(d)).expect("room");
    }
    let names = [
        "a/as-made",
        "a/moved",
        "a/swapped",
        "b/swap",
        "a/one",
        "a/gone",
        "a/over",
    ];
    for n in names {
        fs::write(l.at(n), n).expect("room");
    }
    fs::write(l.at("b/under"), "x").expect("room");
    fs::rename(l.at("a/moved"), l.at("b/moved")).expect("room");
    fs::rename(l.at("a/over"), l.at("b/under")).expect("room");
    nix::fcntl::renameat2(
        nix::fcntl::AT_FDCWD,
        &l.at("a/swapped"),
        nix::fcntl::AT_FDCWD,
        &l.at("b/swap"),
        nix::fcntl::RenameFlags::RENAME_EXCHANGE,
    )
    .expect("supported");
    // Two names; and one name, which is not the latest.
    fs::hard_link(l.at("a/one"), l.at("b/two")).expect("room");
    fs::hard_link(l.at("a/gone"), l.at("b/latest")).expect("room");
    fs::remove_file(l.at("b/latest")).expect("there");
    // A directory that was moved, with a file in it.
    fs::create_dir(l.at("a/dir")).expect("room");
    fs::write(l.at("a/dir/f"), "x").expect("room");
    fs::rename(l.at("a/dir"), l.at("b/new")).expect("room");
    l.run(&["checkpoint", &m, "base"]);
    let changed = [
        "a/as-made",
        "a/gone",
        "a/one",
        "a/swapped",
        "b/moved",
        "b/new/f",
        "b/swap",
        "b/under",
    ];
    for n in changed {
        fs::write(l.at(n), "changed").expect("there");
    }
    let diff: serde_json::Value =
        serde_json::from_str(&l.run(&["diff", &m, "base", "HEAD", "--json"])).expect("JSON");
    let paths: Vec<&str> = diff["entries"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|e| e["path"].as_str().expect("a text"))
        .collect();
    let mut wanted: Vec<String> = changed.iter().map(|n| format!("/{n}")).collect();
    wanted.push("/b/two".into());
    wanted.sort();
    assert_eq!(paths, wanted);
    l.check();
}

#[test]
fn a_checkpoint_that_could_be_mounted_is_whole() {
    let l = Live::new();
    let (m, store) = (l.mnt(), l.store().display().to_string());
    let at = l.beside("at").display().to_string();
    for i in 0..200 {
        fs::write(l.at(&format!("f{i}")), vec![b'y'; 5000]).expect("room");
    }
    let end = AtomicBool::new(false);
    std::thread::scope(|s| {
        // Somebody who deletes it as soon as it is there, and takes the space back.
        s.spawn(|| {
            while !end.load(Ordering::Relaxed) {
                let _ = l.try_run(&["delete", &m, "x"], &[]);
                let _ = l.try_run(&["gc", &m], &[]);
            }
        });
        let _end = End(&end);
        let mut mounted = 0;
        for i in 0..60 {
            fs::write(l.at(&format!("f{}", i % 200)), vec![b'y'; 5000]).expect("room");
            let _ = l.try_run(&["checkpoint", &m, "x"], &[]);
            if l.try_run(&["mount", &store, &at, "--at", "x"], &[])
                .status
                .success()
            {
                mounted += 1;
                for f in 0..200 {
                    let got = fs::read(format!("{at}/f{f}"));
                    assert!(got.is_ok_and(|b| b == vec![b'y'; 5000]), "f{f}");
                }
                // A child of the other thread has our open files until it is another program.
                let gone = (0..100).any(|_| l.try_run(&["unmount", &at], &[]).status.success());
                assert!(gone, "it stays busy");
            }
        }
        assert!(mounted > 0, "it was always too late");
    });
    l.check();
}

//! The command line as scripts see it, and what mounting and unmounting leave.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::process::Command;
use std::time::Instant;

use cowfs_tests::live::{Live, binary};
use serde_json::Value;

fn json(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes)
        .unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(bytes)))
}

#[test]
fn errors_are_json_on_stderr_and_data_on_stdout() {
    let l = Live::new();
    let m = l.mnt();
    for (args, code) in [
        (vec!["no-such-command", "--json"], 2),
        (vec!["rollback", &m, "--json"], 2),
        (vec!["list", &m, "-o", "name,colour", "--json"], 2),
        (vec!["list", "/var", "--json"], 10),
        (vec!["rollback", &m, "none", "--json"], 1),
    ] {
        let out = l.try_run(&args, &[]);
        assert_eq!(out.status.code(), Some(code), "{args:?}");
        assert!(out.stdout.is_empty(), "{args:?}");
        let e = json(&out.stderr);
        assert_eq!((&e["schema"], &e["exit_code"]), (&1.into(), &code.into()));
        assert!(e["error"].is_string());
    }
    let out = l.try_run(&["list", &m, "-o", "name,colour"], &[]);
    let err = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(2));
    assert!(err.contains("colour") && err.contains("mounted"), "{err}");
    for help in ["--help", "--version"] {
        let out = l.try_run(&[help, "--json"], &[]);
        assert_eq!(out.status.code(), Some(0));
        assert!(String::from_utf8_lossy(&out.stdout).contains("cowfs"));
    }
    l.run(&["checkpoint", &m, "one"]);
    let done = json(l.run(&["pin", &m, "one", "--json"]).as_bytes());
    assert_eq!(done, serde_json::json!({"schema": 1, "ok": true}));
    l.run(&["unpin", &m, "one"]);
    l.check();
}

#[test]
fn the_one_mounted_store_needs_no_path() {
    let l = Live::new();
    let b = binary().display().to_string();
    // In a mount namespace of its own it is the only one, and then there is none.
    let others = "grep ' - fuse.cowfs ' /proc/self/mountinfo | cut -d' ' -f5 | grep -vx";
    let script = format!(
        "{others} {m} | xargs -r umount -l; {b} gc && {b} stats >/dev/null && {b} list --no-headers -o name || exit 9; \
         umount {m}; {b} stats; echo $?",
        m = l.mnt()
    );
    let out = Command::new("unshare")
        .args(["-m", "sh", "-c", &script])
        .output()
        .expect("unshare");
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    let err = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(said, "main\n2\n", "{err}");
    assert!(err.contains("no cowfs is mounted"), "{err}");
    l.check();
}

#[test]
fn nothing_is_drawn_where_there_is_no_terminal() {
    let l = Live::new();
    let (m, store) = (l.mnt(), l.store().display().to_string());
    let up = [
        "upgrade", &m, "--stop", "true", "--run", "true", "--start", "true", "--check", "true",
    ];
    let plain = |args: &[&str]| {
        let err = l.try_run(args, &[]).stderr;
        assert!(
            !err.contains(&0x1b) && !err.contains(&b'\r'),
            "{args:?}: {err:?}"
        );
    };
    plain(&["gc", &m]);
    plain(&up);
    l.run(&["unmount", &m]);
    plain(&["check", &store]);
}

#[test]
fn a_list_is_aligned() {
    let l = Live::new();
    let m = l.mnt();
    l.run(&["checkpoint", &m, "a", "--tag", "k=v"]);
    l.run(&["checkpoint", &m, "a-much-longer-name"]);
    l.run(&["pin", &m, "a"]);
    let text = l.run(&["list", &m]);
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 4);
    for column in ["KIND", "HEAD", "CREATED"] {
        let at = lines[0].find(column).expect(column);
        for line in &lines[1..] {
            assert_eq!(line.as_bytes()[at - 1], b' ', "{text}");
            assert_ne!(line.as_bytes()[at], b' ', "{text}");
        }
    }
    l.check();
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
fn doctor_touches_nothing() {
    let l = Live::new();
    let victim = l.beside("victim").join("file");
    fs::write(&victim, "precious").expect("room");
    symlink(&victim, l.store().join(".doctor")).expect("room");
    let out = l.try_run(&["doctor", &l.store().display().to_string()], &[]);
    assert!(String::from_utf8_lossy(&out.stdout).contains("can make holes: yes"));
    assert_eq!(fs::read_to_string(&victim).expect("there"), "precious");
    fs::remove_file(l.store().join(".doctor")).expect("it is still there");
    l.check();
}

#[test]
fn a_store_is_made_only_in_a_directory_of_ones_own() {
    let l = Live::new();
    let theirs = l.beside("theirs");
    chown(&theirs, Some(65534), Some(65534)).expect("ours");
    let name = theirs.display().to_string();
    assert_eq!(l.try_run(&["init", &name], &[]).status.code(), Some(1));
    assert_eq!(theirs.metadata().expect("there").mode() & 0o777, 0o755);
    let ours = l.beside("ours");
    let link = l.beside("links").join("link");
    symlink(&ours, &link).expect("room");
    std::os::unix::fs::lchown(&link, Some(65534), Some(65534)).expect("ours");
    assert_eq!(
        l.try_run(&["init", &link.display().to_string()], &[])
            .status
            .code(),
        Some(1)
    );
    l.run(&["init", &ours.display().to_string()]);
    let new = l.beside("links").join("a/b");
    l.run(&["init", &new.display().to_string()]);
    assert_eq!(
        fs::metadata(&new).expect("there").permissions().mode() & 0o777,
        0o700
    );
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
    let end = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|s| {
        s.spawn(|| {
            let mut i = 0_u64;
            while !end.load(std::sync::atomic::Ordering::Relaxed) {
                // A renamed file is always there once.
                let d = i % 20;
                let _ = fs::write(l.at(&format!("d{d}/f{i}")), vec![b'x'; 100]);
                let _ =
                    fs::remove_file(l.at(&format!("d{}/f{}", (i + 7) % 20, i.saturating_sub(13))));
                i += 1;
            }
        });
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
        end.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    let names = l.run(&["list", &m, "--no-headers", "-o", "name"]);
    assert_eq!(names, "main\nbase\n", "the diff leaves nothing");
    l.check();
}

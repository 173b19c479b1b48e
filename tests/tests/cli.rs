//! The command line as scripts see it, and what mounting and unmounting leave.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::process::Command;

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
fn a_list_is_the_same_with_and_without_a_daemon() {
    let l = Live::new();
    let (m, store) = (l.mnt(), l.store().display().to_string());
    for i in 0..150 {
        l.run(&["checkpoint", &m, &format!("c{i:03}")]);
    }
    let list = |of: &str| -> serde_json::Value {
        let mut list = serde_json::from_str(&l.run(&["list", of, "--json"])).expect("JSON");
        // Without a daemon nothing is mounted.
        let heads: &mut serde_json::Value = &mut list;
        heads["heads"][0]["mounted_at"].take();
        list
    };
    // Each change is in the very next list, also in what depends on another checkpoint.
    let first = list(&m);
    assert_eq!(first["checkpoints"].as_array().map(Vec::len), Some(150));
    assert_eq!(first["checkpoints"][100]["parent"], "c099");
    l.run(&["rename", &m, "c099", "other"]);
    assert_eq!(list(&m)["checkpoints"][100]["parent"], "other");
    l.run(&["tag", &m, "c070", "why=\"no, [reason]\""]);
    assert_eq!(
        list(&m)["checkpoints"][70]["tags"]["why"],
        "\"no, [reason]\""
    );
    l.run(&["pin", &m, "c070"]);
    assert_eq!(list(&m)["checkpoints"][70]["pinned"], true);
    l.run(&["rollback", &m, "c010"]);
    let after = list(&m);
    assert_eq!(after["checkpoints"][150]["origin"], "left_behind");
    assert_eq!(after["heads"][0]["parent"], "c010");
    l.run(&["delete", &m, "c020"]);
    assert_eq!(list(&m)["checkpoints"][20]["parent"], "c019");
    let at = l.beside("at").display().to_string();
    l.run(&["mount", &store, &at, "--at", "c140"]);
    let shown = list(&m);
    let last = &shown["checkpoints"][139];
    assert_eq!(
        (&last["name"], &last["mounted_at"][0]),
        (&"c140".into(), &at.as_str().into())
    );
    l.run(&["unmount", &at]);
    let mounted = list(&m);
    l.run(&["unmount", &m]);
    assert_eq!(list(&store), mounted);
    l.mount(&[]);
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

//! The command line and the daemon: exit codes, permissions, and what a killed daemon leaves.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use cowfs_tests::Rng;
use cowfs_tests::live::{Live, binary, nobody};

#[test]
fn exit_codes() {
    let l = Live::new();
    let code = |args: &[&str]| l.try_run(args, &[]).status.code();
    let (store, mnt) = (l.store().display().to_string(), l.mnt());
    assert_eq!(code(&["list", "/var"]), Some(10));
    assert_eq!(code(&["rollback", &mnt]), Some(2));
    assert_eq!(code(&["check", &store]), Some(11));
    assert_eq!(code(&["rollback", &mnt, "no such"]), Some(1));
    assert_eq!(code(&["init", &store]), Some(1));
    let other = l.beside("other").display().to_string();
    assert_eq!(code(&["mount", "--foreground", &store, &other]), Some(11));
    assert_eq!(
        code(&["mount", &store, &other]),
        Some(1),
        "the head is mounted already"
    );
    l.check();
}

#[test]
fn names_pins_tags_and_json() {
    let l = Live::new();
    let mnt = l.mnt();
    let json =
        |args: &[&str]| -> serde_json::Value { serde_json::from_str(&l.run(args)).expect("JSON") };
    let c = json(&[
        "checkpoint",
        &mnt,
        "one",
        "--tag",
        "who=me",
        "--json",
        "--wait",
    ]);
    assert_eq!(c["name"], "one");
    assert_eq!(c["durable"], true);
    assert!(c["elapsed_us"].is_u64() && c["schema"] == 1);
    l.run(&["checkpoint", &mnt, "two"]);
    l.run(&["pin", &mnt, "one"]);
    assert_eq!(
        l.try_run(&["delete", &mnt, "one"], &[]).status.code(),
        Some(1)
    );
    l.run(&["unpin", &mnt, "one"]);
    l.run(&["rename", &mnt, "one", "first"]);
    l.run(&["tag", &mnt, "first", "who-", "why=test"]);
    let list = json(&["list", &mnt, "--json"]);
    assert_eq!(list["checkpoints"][0]["name"], "first");
    assert_eq!(list["checkpoints"][0]["tags"]["why"], "test");
    assert!(list["checkpoints"][0]["tags"]["who"].is_null());
    fs::write(l.at("new"), "x").expect("room");
    let d = l.run(&["diff", &mnt, "first", "HEAD"]);
    assert_eq!(d, "+ /new\n");
    let plan = l.run(&["rollback", &mnt, "@{-1}", "--dry-run"]);
    assert!(plan.contains("two"), "{plan}");
    assert!(l.at("new").exists());
    l.run(&["rollback", &mnt, "fir"]);
    assert!(!l.at("new").exists());
    l.run(&["delete", &mnt, "two"]);
    l.run(&["gc", &mnt]);
    l.check();
}

#[test]
fn only_the_owner_gets_at_the_store() {
    let l = Live::new();
    let mode = |p: &std::path::Path| fs::metadata(p).expect("there").mode() & 0o777;
    assert_eq!(mode(&l.store()), 0o700);
    assert_eq!(mode(&l.store().join("control.sock")), 0o600);
    fs::write(l.at("secret"), "x").expect("room");
    fs::set_permissions(l.at("secret"), fs::Permissions::from_mode(0o600)).expect("ours");
    fs::write(l.at("open"), "y").expect("room");
    fs::set_permissions(l.at(""), fs::Permissions::from_mode(0o755)).expect("ours");
    let dir = std::path::Path::new(&l.mnt())
        .parent()
        .expect("a parent")
        .to_path_buf();
    fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).expect("ours");
    let m = l.mnt();
    assert!(nobody(&format!("cat {m}/open")).status.success());
    assert!(!nobody(&format!("cat {m}/secret")).status.success());
    assert!(!nobody(&format!("echo > {m}/mine")).status.success());
    let b = binary();
    assert!(
        !nobody(&format!("{} checkpoint {m} theirs", b.display()))
            .status
            .success()
    );
    // A set-user-id bit goes when somebody else writes.
    fs::write(l.at("suid"), "z").expect("room");
    fs::set_permissions(l.at("suid"), fs::Permissions::from_mode(0o4777)).expect("ours");
    assert!(nobody(&format!("echo w >> {m}/suid")).status.success());
    assert_eq!(
        fs::metadata(l.at("suid")).expect("there").mode() & 0o7777,
        0o777
    );
    l.check();
}

/// Writes numbered files, each synced and then noted outside of the mount; kills the daemon at some moment; all that
/// was noted must be there.
fn killed_once(l: &Live, rng: &mut Rng, round: u64, fault: Option<&str>) {
    let env: Vec<(&str, &str)> = fault.map(|f| ("COWFS_FAULT", f)).into_iter().collect();
    l.mount(&env);
    let name = format!("c{round}");
    let mut noted = Vec::new();
    let limit = 20 + rng.below(60);
    let mut checkpointed = false;
    for i in 0..limit {
        let path = l.at(&format!("r{round}-{i}"));
        let text = format!("{round} {i} {}", "x".repeat(rng.below(9000) as usize));
        let done = File::create(&path).and_then(|mut f| {
            f.write_all(text.as_bytes())?;
            f.sync_all()
        });
        if done.is_err() {
            break;
        }
        noted.push((path, text));
        if i == limit / 2 {
            let out = l.try_run(&["checkpoint", &l.mnt(), &name, "--wait"], &[]);
            checkpointed = out.status.success();
        }
    }
    if fault.is_none() {
        l.kill();
    } else {
        // A point that was not reached yet is reached when it ends.
        let _ = l.try_run(&["unmount", &l.mnt()], &[]);
        l.clear();
    }
    l.check_only();
    l.mount(&[]);
    for (path, text) in &noted {
        let got = fs::read_to_string(path).unwrap_or_default();
        assert!(
            got == *text,
            "{} was synced and is not what it was (fault {fault:?})",
            path.display()
        );
    }
    if checkpointed {
        let list = l.run(&["list", &l.mnt(), "--no-headers", "-o", "name"]);
        assert!(
            list.lines().any(|n| n == name),
            "checkpoint {name} was on disk and is gone"
        );
    }
    l.run(&["unmount", &l.mnt()]);
}

#[test]
fn a_killed_daemon_loses_nothing_that_was_synced() {
    let l = Live::new();
    l.run(&["unmount", &l.mnt()]);
    let mut rng = Rng(5);
    let rounds = std::env::var("COWFS_KILLS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(4);
    for round in 0..rounds {
        killed_once(&l, &mut rng, round, None);
    }
    let points = [
        "flush:data@9",
        "flush:chunk@7",
        "flush:done@11",
        "commit:begin",
        "commit:pages",
        "commit:superblock",
        "commit:written",
    ];
    for (i, p) in points.iter().enumerate() {
        killed_once(&l, &mut rng, 1000 + i as u64, Some(p));
    }
}

#[test]
fn an_upgrade_that_fails_is_taken_back_and_one_that_was_killed_can_be() {
    let l = Live::new();
    let m = l.mnt();
    fs::write(l.at("version"), "1").expect("room");
    let upgrade = |run: &str, check: &str, env: &[(&str, &str)]| {
        let args = [
            "upgrade",
            &m,
            "--stop",
            "true",
            "--run",
            run,
            "--start",
            "true",
            "--check",
            check,
            "--check-timeout",
            "1",
            "--json",
        ];
        l.try_run(&args, env)
    };
    let good = upgrade(&format!("echo 2 > {m}/version"), "true", &[]);
    assert_eq!(good.status.code(), Some(0));
    assert_eq!(fs::read_to_string(l.at("version")).expect("there"), "2\n");
    let bad = upgrade(
        &format!("echo 3 > {m}/version"),
        &format!("grep -q 2 {m}/version"),
        &[],
    );
    assert_eq!(
        bad.status.code(),
        Some(12),
        "{}",
        String::from_utf8_lossy(&bad.stderr)
    );
    let v: serde_json::Value = serde_json::from_slice(&bad.stdout).expect("JSON");
    assert!(v["why"].as_str().is_some_and(|w| w.contains("check")));
    assert_eq!(fs::read_to_string(l.at("version")).expect("there"), "2\n");
    let never = upgrade(&format!("echo 4 > {m}/version"), "false", &[]);
    assert_eq!(never.status.code(), Some(13));
    for step in [
        "stopped",
        "checkpointed",
        "running",
        "starting",
        "checking",
        "rolling_back",
        "restarting",
    ] {
        let fault = format!("upgrade:{step}");
        let rolls_back = step.starts_with('r') && step != "running";
        let check = if rolls_back { "false" } else { "true" };
        let killed = upgrade(
            &format!("echo 5 > {m}/version"),
            check,
            &[("COWFS_FAULT", &fault)],
        );
        assert_eq!(killed.status.code(), None, "{step}: it was not killed");
        let refused = upgrade("true", "true", &[]);
        assert_eq!(
            refused.status.code(),
            Some(1),
            "{step}: another one while one is unfinished"
        );
        let resumed = l.try_run(&["upgrade", &m, "--resume"], &[]);
        let want = if rolls_back { 13 } else { 12 };
        assert_eq!(
            resumed.status.code(),
            Some(want),
            "{step}: {}",
            String::from_utf8_lossy(&resumed.stderr)
        );
        assert_eq!(
            fs::read_to_string(l.at("version")).expect("there"),
            "2\n",
            "{step}"
        );
    }
    l.check();
}

//! Upgrades: what they start, what is in their way, and how they come back.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Output;

use cowfs_tests::live::Live;
use serde_json::Value;

const TRUE: [&str; 8] = [
    "--stop",
    "true",
    "--start",
    "true",
    "--check",
    "true",
    "--check-timeout",
    "1",
];

fn upgrade(l: &Live, args: &[&str], env: &[(&str, &str)]) -> Output {
    let mnt = l.mnt();
    let mut all = vec!["upgrade", &mnt, "--json"];
    // The last one of an option counts, so these are only given where the test does not.
    for pair in TRUE.chunks(2) {
        if !args.contains(&pair[0]) && !args.contains(&"--resume") {
            all.extend(pair);
        }
    }
    all.extend(args);
    l.try_run(&all, env)
}

fn json(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap_or_else(|e| {
        panic!("{e}: {}", String::from_utf8_lossy(bytes));
    })
}

fn checkpoint(l: &Live, name: &str) -> Option<Value> {
    let list = json(l.run(&["list", &l.mnt(), "--json"]).as_bytes());
    let all = list["checkpoints"].as_array().expect("a list").clone();
    all.into_iter().find(|c| c["name"] == name)
}

fn version(l: &Live) -> String {
    fs::read_to_string(l.at("version")).expect("there")
}

fn set(l: &Live, v: &str) -> String {
    format!("printf {v} > {}/version", l.mnt())
}

#[test]
fn a_name_left_by_an_earlier_failure_does_not_pass_for_a_rollback() {
    let l = Live::new();
    fs::write(l.at("version"), "1").expect("room");
    let bad = || {
        upgrade(
            &l,
            &[
                "--name",
                "up",
                "--run",
                &set(&l, "2"),
                "--check",
                &format!("grep -q 1 {}/version", l.mnt()),
            ],
            &[],
        )
    };
    let first = bad();
    assert_eq!(first.status.code(), Some(12));
    assert_eq!(json(&first.stdout)["kept_as"], "failed-up");
    l.run(&["delete", &l.mnt(), "up"]);
    assert!(checkpoint(&l, "failed-up").is_some());
    let second = bad();
    assert_eq!(second.status.code(), Some(12));
    assert_eq!(version(&l), "1");
    assert_eq!(json(&second.stdout)["kept_as"], "failed-up-2");
    l.check();
}

#[test]
fn started_services_can_be_stopped_by_signals() {
    let l = Live::new();
    let seen = l.beside("seen").join("status");
    let start = format!("grep SigBlk /proc/self/status > {}", seen.display());
    let out = upgrade(&l, &["--run", "true", "--start", &start], &[]);
    assert_eq!(out.status.code(), Some(0));
    let status = fs::read_to_string(seen).expect("it was started");
    assert_eq!(
        status.trim().trim_start_matches("SigBlk:").trim(),
        "0000000000000000"
    );
    l.check();
}

#[test]
fn a_taken_name_is_noticed_before_the_service_is_stopped() {
    let l = Live::new();
    l.run(&["checkpoint", &l.mnt(), "mine"]);
    let stopped = l.beside("log").join("stopped");
    for name in ["mine", "main", "a b", &"n".repeat(200)] {
        let stop = format!("touch {}", stopped.display());
        let out = upgrade(&l, &["--name", name, "--run", "true", "--stop", &stop], &[]);
        assert_eq!(out.status.code(), Some(1), "{name}");
        assert!(json(&out.stderr)["error"].is_string());
        assert!(!stopped.exists(), "{name}");
    }
    l.check();
}

#[test]
fn the_checkpoint_is_pinned_until_the_end() {
    let l = Live::new();
    let m = l.mnt();
    fs::write(l.at("version"), "1").expect("room");
    let b = cowfs_tests::live::binary().display().to_string();
    // Neither deletion nor another name keeps it from going back.
    let run = format!(
        "printf 2 > {m}/version; {b} delete {m} up; {b} rename {m} up other; {b} checkpoint {m} up2"
    );
    let out = upgrade(
        &l,
        &[
            "--name",
            "up",
            "--run",
            &run,
            "--check",
            &format!("grep -q 1 {m}/version"),
        ],
        &[],
    );
    assert_eq!(
        out.status.code(),
        Some(12),
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    assert_eq!(version(&l), "1");
    assert_eq!(checkpoint(&l, "other").expect("there")["pinned"], false);
    let good = upgrade(&l, &["--name", "good", "--run", "true"], &[]);
    assert_eq!(good.status.code(), Some(0));
    assert_eq!(checkpoint(&l, "good").expect("there")["pinned"], false);
    let lost = upgrade(
        &l,
        &["--name", "lost", "--run", "true", "--check", "false"],
        &[],
    );
    assert_eq!(lost.status.code(), Some(13));
    assert_eq!(checkpoint(&l, "lost").expect("there")["pinned"], false);
    // Both say how: the steps on stdout, the error on stderr.
    let report = json(&lost.stdout);
    assert_eq!(report["state"], "failed");
    assert_eq!(report["exit_code"], 13);
    assert!(
        report["steps"]
            .as_array()
            .is_some_and(|s| s.iter().any(|s| s["step"] == "rollback"))
    );
    assert_eq!(json(&lost.stderr)["exit_code"], 13);
    l.check();
}

#[test]
fn one_found_good_is_not_taken_back() {
    let l = Live::new();
    fs::write(l.at("version"), "1").expect("room");
    let killed = upgrade(
        &l,
        &["--name", "up", "--run", &set(&l, "2")],
        &[("COWFS_FAULT", "upgrade:checked")],
    );
    assert_eq!(killed.status.code(), None);
    assert_eq!(checkpoint(&l, "up").expect("there")["pinned"], true);
    let resumed = upgrade(&l, &["--resume"], &[]);
    assert_eq!(
        resumed.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&resumed.stderr)
    );
    assert_eq!(json(&resumed.stdout)["state"], "done");
    assert_eq!(version(&l), "2");
    assert_eq!(checkpoint(&l, "up").expect("there")["pinned"], false);
    l.check();
}

#[test]
fn a_rollback_that_was_done_is_not_done_again() {
    let l = Live::new();
    fs::write(l.at("version"), "1").expect("room");
    let check = format!("grep -q 1 {}/version", l.mnt());
    let killed = upgrade(
        &l,
        &["--name", "up", "--run", &set(&l, "2"), "--check", &check],
        &[("COWFS_FAULT", "upgrade:restarting")],
    );
    assert_eq!(killed.status.code(), None);
    assert_eq!(version(&l), "1");
    fs::write(l.at("since"), "x").expect("room");
    let resumed = upgrade(&l, &["--resume"], &[]);
    assert_eq!(resumed.status.code(), Some(12));
    assert!(
        l.at("since").exists(),
        "what came after the rollback is still there"
    );
    assert!(checkpoint(&l, "failed-up-2").is_none());
    l.check();
}

#[test]
fn an_unfinished_one_belongs_to_its_head_wherever_that_is_mounted() {
    let l = Live::new();
    fs::write(l.at("version"), "1").expect("room");
    let killed = upgrade(
        &l,
        &["--name", "up", "--run", &set(&l, "2")],
        &[("COWFS_FAULT", "upgrade:starting")],
    );
    assert_eq!(killed.status.code(), None);
    let store = l.store().display().to_string();
    let other = l.beside("other").display().to_string();
    l.run(&["unmount", &l.mnt()]);
    l.run(&["mount", &store, &other]);
    let try_at = |args: &[&str]| {
        let mut all = vec!["upgrade", other.as_str()];
        all.extend(args);
        l.try_run(&all, &[]).status.code()
    };
    let new = [
        "--stop", "true", "--run", "true", "--start", "true", "--check", "true",
    ];
    assert_eq!(try_at(&new), Some(1));
    assert_eq!(try_at(&["--resume"]), Some(12));
    assert_eq!(
        fs::read_to_string(Path::new(&other).join("version")).expect("there"),
        "1"
    );
    // One that cannot be read may be just that one.
    fs::write(l.store().join("upgrades/odd.json"), "{").expect("room");
    let out = l.try_run(&["upgrade", &other, "--resume"], &[]);
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("odd.json"));
    l.run(&["unmount", &other]);
    l.check_only();
}

#[test]
fn a_full_disk_does_not_keep_it_from_going_back() {
    let l = Live::small(64);
    fs::write(l.at("version"), "1").expect("room");
    let m = l.mnt();
    // The new version fills the store's disk, by the mount and beside it, to the last block.
    let disk = l.store().parent().expect("a disk").display().to_string();
    let run = format!(
        "printf 2 > {m}/version; head -c 80M /dev/zero | tr '\\0' x > {disk}/full; head -c 80M /dev/urandom > {m}/full; \
         n=0; while printf x > {disk}/f$n && [ -s {disk}/f$n ]; do n=$((n+1)); [ $n -lt 20000 ] || break; done; true"
    );
    let check = format!("echo looking; grep -q 1 {m}/version");
    let out = upgrade(&l, &["--name", "up", "--run", &run, "--check", &check], &[]);
    let report = json(&out.stdout);
    assert_eq!(
        out.status.code(),
        Some(12),
        "{report} {}",
        String::from_utf8_lossy(&out.stderr)
    );
    assert_eq!(version(&l), "1");
    assert_eq!(report["state"], "rolled_back");
    let log = fs::read_to_string(l.store().join("upgrades/up.rollback.log")).expect("a log");
    assert!(log.contains("looking"), "{log}");
    let reserved = l.store().join("upgrades/up.rollback.log").metadata();
    assert!(reserved.expect("a log").blocks() < 100, "it is given back");
    let record = fs::read(l.store().join("upgrades/up.json")).expect("a record");
    assert_eq!(json(&record)["state"], "rolled_back", "{report}");
    for f in fs::read_dir(&disk).expect("a disk").flatten() {
        if f.path().is_file() {
            fs::remove_file(f.path()).expect("ours");
        }
    }
    l.run(&["delete", &m, "failed-up"]);
    l.run(&["gc", &m]);
    l.check();
}

#[test]
fn a_command_that_outlived_its_upgrade_is_not_rolled_back_under() {
    let l = Live::new();
    fs::write(l.at("version"), "1").expect("room");
    let mnt = l.mnt();
    let mut upgrade_process = std::process::Command::new(cowfs_tests::live::binary())
        .args(["upgrade", &mnt, "--name", "x", "--run", "sleep 60"])
        .args(TRUE)
        .stderr(std::process::Stdio::null())
        .spawn()
        .expect("it runs");
    let group = l.store().join("upgrades/x.group");
    let running = || fs::read_to_string(l.store().join("upgrades/x.json")).unwrap_or_default();
    while !(running().contains("\"running\"") && group.exists()) {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    // The record is written before the command begins.
    std::thread::sleep(std::time::Duration::from_millis(300));
    upgrade_process.kill().expect("it is there");
    upgrade_process.wait().expect("it ended");
    let refused = upgrade(&l, &["--resume"], &[]);
    assert_eq!(refused.status.code(), Some(1));
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(why.contains("still at work"), "{why}");
    let text = fs::read_to_string(&group).expect("noted");
    let pid: i32 = text
        .split(' ')
        .nth(1)
        .and_then(|p| p.parse().ok())
        .expect("a number");
    let pid = nix::unistd::Pid::from_raw(pid);
    nix::sys::signal::killpg(pid, nix::sys::signal::Signal::SIGKILL).expect("it is there");
    std::thread::sleep(std::time::Duration::from_millis(200));
    assert_eq!(upgrade(&l, &["--resume"], &[]).status.code(), Some(12));
    l.check();
}

#[test]
fn others_cannot_disturb_a_checkpoint_by_names() {
    let l = Live::new();
    // Names like those of the barrier files, looked up and made by somebody else.
    for i in 0..50 {
        assert!(fs::metadata(l.at(&format!(".cowfs.barrier.{i}"))).is_err());
        assert!(fs::metadata(l.at(&format!(".cowfs.barrier.0.{i}"))).is_err());
    }
    let made = std::process::Command::new("mkfifo")
        .arg(l.at(".cowfs.barrier.3"))
        .status();
    assert!(made.expect("mkfifo runs").success());
    for i in 0..20 {
        l.run(&["checkpoint", &l.mnt(), &format!("c{i}")]);
    }
    l.check();
}

//! The pager under a program that does all it can to its memory, and with kills at any time.

mod common;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::path::Path;
use std::process::{Command, Stdio};

fn captured(dir: &Path, arguments: &[&str]) {
    let mut command = Command::new(common::compile("storm", dir));
    command.args(arguments);
    let mut target = common::start(command, &dir.join("out"), "ready");
    common::capture(&mut target, dir);
    // The program goes on once it finds that it was away for this long.
    std::thread::sleep(std::time::Duration::from_millis(100));
}

#[test]
fn what_a_program_gives_up_does_not_come_back() {
    let dir = tempfile::tempdir().unwrap();
    captured(dir.path(), &["64", "1"]);
    for _ in 0..3 {
        let (code, out, err) = common::resume(dir.path(), &[]);
        assert_eq!((code, out.as_str()), (0, "all right\n"), "{err}");
    }
}

/// With several threads the kernel may tell of their changes in another order than they happened in, so all is filled
/// before the first instruction.
#[test]
fn several_threads_are_filled_at_once() {
    let dir = tempfile::tempdir().unwrap();
    captured(dir.path(), &["64"]);
    for _ in 0..3 {
        let (code, out, err) = common::resume(dir.path(), &[]);
        assert_eq!((code, out.as_str()), (0, "all right\n"), "{err}");
        assert!(err.contains("pager 0"), "{err}");
    }
}

/// The pager is killed again and again while the program checks its memory; each time its standby goes on.
#[test]
fn the_pager_may_be_killed_at_any_time() {
    let dir = tempfile::tempdir().unwrap();
    captured(dir.path(), &["128", "1"]);
    let mut kills = 0;
    for round in 0..5u64 {
        let err = dir.path().join("killed.err");
        let out = dir.path().join("killed.out");
        let mut resumer = Command::new("timeout")
            .args(["-s", "KILL", "300"])
            .arg(common::resumer())
            .arg(dir.path())
            .stdin(Stdio::null())
            .stdout(std::fs::File::create(&out).unwrap())
            .stderr(std::fs::File::create(&err).unwrap())
            .spawn()
            .unwrap();
        let mut pager = loop {
            let text = std::fs::read_to_string(&err).unwrap();
            if let Some(p) = text.trim_end().rsplit("pager ").next()
                && let Ok(p) = p.parse::<i32>()
                && text.ends_with('\n')
            {
                break p;
            }
            assert!(resumer.try_wait().unwrap().is_none(), "{text}");
        };
        for i in 0..12u64 {
            std::thread::sleep(std::time::Duration::from_micros(
                500 + (round * 977 + i * 1713) % 7000,
            ));
            let standby = snapshot::proc::children(pager).unwrap_or_default();
            if let Some(&s) = standby.first()
                && kill(Pid::from_raw(pager), Signal::SIGKILL).is_ok()
            {
                pager = s;
                kills += 1;
            }
        }
        let status = resumer.wait().unwrap();
        let text = |p| std::fs::read_to_string(p).unwrap();
        assert_eq!(text(&out), "all right\n", "{} {status:?}", text(&err));
    }
    assert!(kills > 10, "the pager was killed only {kills} times");
}

//! `kill -9` of umlctl at every named point and at any moment.

use crate::common::*;
use nix::sys::signal::{SIGKILL, kill};
use nix::unistd::Pid;
use std::process::{Child, Command};
use std::time::Duration;

const POINTS: [&str; 19] = [
    "driver.enter",
    "driver.loop",
    "driver.scratch",
    "driver.table",
    "driver.running",
    "driver.done",
    "driver.back",
    "userfault.made",
    "snapshot.prepared",
    "snapshot.tracked",
    "snapshot.stopped",
    "snapshot.marked",
    "driver.enter:2",
    "driver.unmapped",
    "driver.back:2",
    "snapshot.fixed",
    "snapshot.running",
    "snapshot.publish",
    "publish.rename",
];

fn clean(t: &Target, before: &(Vec<String>, Vec<String>), when: &str) {
    let after = traces(t.pid);
    let differ = |a: &[String], b: &[String]| -> Vec<String> {
        a.iter().filter(|m| !b.contains(m)).cloned().collect()
    };
    let (new, gone) = (differ(&after.0, &before.0), differ(&before.0, &after.0));
    assert!(
        new.is_empty() && gone.is_empty(),
        "{when}: {new:?} {gone:?}"
    );
    assert_eq!(after.1, before.1, "{when}: descriptors");
    assert!(t.is_repaired(), "{when}");
}

/// A target that makes no mappings of its own while it runs.
fn target() -> (Target, (Vec<String>, Vec<String>), Vec<String>) {
    let t = Target::start(&["busy", "4", "16"]);
    // Its allocations are made in the first rounds.
    until("rounds", || t.status()[4] > 500);
    let (traces, masks) = (traces(t.pid), masks(t.pid));
    (t, traces, masks)
}

#[test]
fn at_every_point_with_the_guardian() {
    let (t, before, quiet) = target();
    for (i, point) in POINTS.repeat(count("HOSTILE_ROUNDS", 2)).iter().enumerate() {
        let mut c = t.snapshot(&format!("s{i}"));
        c.env("SNAPSHOT_FAULT", point);
        let (status, _, err) = run(c);
        assert!(was_killed(status), "{point} was not reached: {err}");
        until(&format!("the guardian, {point}"), || {
            !t.journal().exists() && masks(t.pid) == quiet
        });
        t.check(point);
        clean(&t, &before, point);
    }
    good(t.snapshot("last"));
    clean(&t, &before, "at the end");
}

#[test]
fn at_every_point_without_the_guardian() {
    let (t, before, quiet) = target();
    for (i, point) in POINTS.repeat(count("HOSTILE_ROUNDS", 2)).iter().enumerate() {
        let (mut timeout, saver) = stopped_at(t.snapshot(&format!("s{i}")), &with_number(point));
        let guardian = child_of(saver);
        kill(Pid::from_raw(guardian), SIGKILL).unwrap();
        until("the guardian's end", || "ZX?".contains(state(guardian)));
        kill(Pid::from_raw(saver), SIGKILL).unwrap();
        timeout.wait().unwrap();
        until("the saver's end", || state(saver) == '?');
        let mut c = umlctl();
        c.args(["rescue", "--pid", &t.pid.to_string()]);
        good(c);
        until("masks", || masks(t.pid) == quiet);
        t.check(point);
        clean(&t, &before, point);
    }
    good(t.snapshot("last"));
}

#[test]
fn at_any_moment() {
    let (t, before, quiet) = target();
    let mut seed = 7u64;
    let mut published = 0;
    for i in 0..count("HOSTILE_KILLS", 60) {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let name = format!("s{i}");
        let mut c = t.snapshot(&name);
        let mut timeout = c
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let saver = child_of(timeout.id().cast_signed());
        std::thread::sleep(Duration::from_micros((seed >> 33) % 400_000));
        let _ = kill(Pid::from_raw(saver), SIGKILL);
        timeout.wait().unwrap();
        until("the guardian", || t.is_repaired() && masks(t.pid) == quiet);
        t.check(&name);
        clean(&t, &before, &name);
        if t.dir.path().join(&name).join("manifest").exists() {
            published += 1;
            let mut c = umlctl();
            c.arg("verify").arg(t.dir.path().join(&name));
            good(c);
        }
        let _ = std::fs::remove_dir_all(t.dir.path().join(&name));
    }
    println!("{published} were published before the kill");
}

/// Many threads make the journal longer than a page.
#[test]
fn with_a_hundred_threads() {
    let t = Target::start(&["busy", "100", "20"]);
    let mut last = traces(t.pid);
    until("the last thread's memory", || {
        std::thread::sleep(Duration::from_millis(500));
        let before = std::mem::replace(&mut last, traces(t.pid));
        before == last
    });
    let (before, quiet) = (traces(t.pid), masks(t.pid));
    for (i, point) in [
        "driver.enter:2",
        "driver.table",
        "driver.unmapped",
        "driver.back:2",
    ]
    .iter()
    .enumerate()
    {
        let mut c = t.snapshot(&format!("s{i}"));
        c.env("SNAPSHOT_FAULT", point);
        assert!(was_killed(run(c).0), "{point}");
        until("the guardian", || {
            !t.journal().exists() && masks(t.pid) == quiet
        });
        t.check(point);
        clean(&t, &before, point);
    }
    good(t.snapshot("last"));
    t.check("at the end");
}

/// Talks with itself all the time, by two threads, neither of which is the first; its first word is the number of rounds.
const TALKER: &str = r#"
import os, socket, struct, threading, time
status = os.open("@/status", os.O_CREAT | os.O_RDWR, 0o600)
listener = socket.create_server(("127.0.0.1", 0))
a = socket.create_connection(listener.getsockname())
b, _ = listener.accept()
def receive(s):
    got = b""
    while len(got) < 800:
        piece = s.recv(800 - len(got))
        assert piece
        got += piece
    return got
def give_back():
    while True:
        b.sendall(receive(b))
def talk():
    n = 0
    while True:
        word = struct.pack("<Q", n)
        a.sendall(word * 100)
        assert receive(a) == word * 100
        n += 1
        os.pwrite(status, struct.pack("<Q", n), 0)
def end(what):
    threading.__excepthook__(what)
    os._exit(1)
threading.excepthook = end
threading.Thread(target=give_back).start()
threading.Thread(target=talk).start()
time.sleep(1000)
"#;

/// While a connection is read it can neither send nor receive: a thread that is let go by the kernel must find it as it was.
#[test]
fn while_connections_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let program = TALKER.replace('@', &dir.path().display().to_string());
    let t = Target::python(&program, dir);
    let goes_on = |when: &str| {
        let n = t.status()[0];
        until(&format!("more rounds, {when}"), || t.status()[0] > n + 5);
    };
    goes_on("at first");
    for i in 0..count("HOSTILE_ROUNDS", 2) * 10 {
        let mut c = t.snapshot(&format!("s{i}"));
        // The last two are the connection's ends.
        let points = ["driver.fastened", "tcp.repair:1", "tcp.repair:2"];
        c.env("SNAPSHOT_FAULT", points[i % points.len()]);
        let (status, _, err) = run(c);
        assert!(was_killed(status), "{i}: {err}");
        until("the guardian", || !t.journal().exists());
        goes_on(&format!("round {i}"));
    }
    // Nobody is left to put it right: it stands still until somebody does.
    for i in 0..3 {
        let (mut timeout, saver) = stopped_at(t.snapshot(&format!("both{i}")), "tcp.repair:1");
        let guardian = child_of(saver);
        kill(Pid::from_raw(guardian), SIGKILL).unwrap();
        until("the guardian's end", || "ZX?".contains(state(guardian)));
        kill(Pid::from_raw(saver), SIGKILL).unwrap();
        timeout.wait().unwrap();
        until("the stop", || state(t.pid) == 'T');
        let n = t.status()[0];
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(t.status()[0], n, "it runs on");
        let mut c = umlctl();
        c.args(["rescue", "--pid", &t.pid.to_string()]);
        good(c);
        goes_on("after the rescue");
    }
    good(t.snapshot("last"));
    goes_on("at the end");
}

fn with_number(point: &str) -> String {
    if point.contains(':') {
        point.to_owned()
    } else {
        format!("{point}:1")
    }
}

/// Starts a snapshot that stops itself at a point; `timeout`, which watches over it, and the saver.
pub fn stopped_at(mut snapshot: Command, point: &str) -> (Child, i32) {
    snapshot.env("SNAPSHOT_FAULT", format!("{point}:stop"));
    let timeout = snapshot.spawn().unwrap();
    let saver = child_of(timeout.id().cast_signed());
    until(&format!("the stop at {point}"), || state(saver) == 'T');
    (timeout, saver)
}

pub fn child_of(pid: i32) -> i32 {
    let mut child = 0;
    until("a child", || {
        let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
        child = text
            .unwrap_or_default()
            .split_whitespace()
            .next()
            .map_or(0, |w| w.parse().unwrap());
        child != 0 || state(pid) == 'Z'
    });
    child
}

pub fn state(pid: i32) -> char {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    text.rsplit(") ")
        .next()
        .and_then(|t| t.chars().next())
        .unwrap_or('?')
}

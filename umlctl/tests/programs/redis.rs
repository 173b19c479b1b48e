//! Redis under load.

use super::common::{Lines, Program, port};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

fn ask(to: &mut Lines, what: &str) -> String {
    to.send(&format!("{what}\r\n"));
    let first = to.line();
    match first.strip_prefix('$') {
        Some(_) => to.line(),
        None => first,
    }
}

/// A Redis that keeps nothing on disk, and its port.
fn start(dir: &Path) -> (Program, u16) {
    let port = port();
    let mut command = Command::new("redis-server");
    command.args(["--port", &port.to_string(), "--bind", "127.0.0.1"]);
    command.args(["--save", "", "--appendonly", "no"]);
    command.args(["--enable-debug-command", "local"]);
    (Program::start(command, dir), port)
}

/// Counts on a connection of its own until told to end; how far it got.
fn count(connection: &mut Lines, key: &str, stop: &AtomicBool) -> u64 {
    let mut last = 0;
    while !stop.load(Ordering::Relaxed) {
        let answer = ask(connection, &format!("INCR {key}"));
        let now = answer[1..].parse().unwrap();
        assert!(last == 0 || now == last + 1, "{key}: {now} after {last}");
        last = now;
    }
    last
}

#[test]
fn redis_goes_on_where_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let (mut redis, port) = start(dir.path());
    let mut main = Lines::connect(port);
    for i in 0..2000 {
        assert_eq!(ask(&mut main, &format!("SET key:{i} {i:0100}")), "+OK");
    }
    let mut others: Vec<Lines> = (0..4).map(|_| Lines::connect(port)).collect();
    let stop = AtomicBool::new(false);
    let ended = &stop;
    let counts: Vec<u64> = thread::scope(|s| {
        let work: Vec<_> = others
            .iter_mut()
            .enumerate()
            .map(|(i, c)| s.spawn(move || count(c, &format!("count:{i}"), ended)))
            .collect();
        for _ in 0..10 {
            redis.snapshot(dir.path(), &[]);
            thread::sleep(Duration::from_millis(50));
        }
        // What they send while nobody is there is lost, and sent again.
        for _ in 0..3 {
            let from = redis.end(dir.path());
            thread::sleep(Duration::from_millis(300));
            redis.resume(&from);
            thread::sleep(Duration::from_millis(300));
        }
        stop.store(true, Ordering::Relaxed);
        work.into_iter().map(|w| w.join().unwrap()).collect()
    });
    let digest = ask(&mut main, "DEBUG DIGEST");
    let id = ask(&mut main, "CLIENT ID");

    let from = redis.end(dir.path());
    redis.resume(&from);

    assert_eq!(ask(&mut main, "CLIENT ID"), id);
    assert_eq!(ask(&mut main, "DEBUG DIGEST"), digest);
    for (i, (connection, count)) in others.iter_mut().zip(counts).enumerate() {
        let answer = ask(connection, &format!("INCR count:{i}"));
        assert_eq!(answer, format!(":{}", count + 1));
    }
    assert_eq!(
        ask(&mut Lines::connect(port), "GET key:1999"),
        format!("{:0100}", 1999)
    );
}

/// Of a snapshot that was taken under load: what was acknowledged before it began is there, and nothing from after it.
#[test]
fn a_snapshot_under_load_is_one_point_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let (mut redis, port) = start(dir.path());
    let mut main = Lines::connect(port);
    let stop = AtomicBool::new(false);
    let (before, from, after) = thread::scope(|s| {
        let work = s.spawn(|| {
            let mut c = Lines::connect(port);
            // Both in one transaction: they are the same at every moment.
            while !stop.load(Ordering::Relaxed) {
                c.send("MULTI\r\nINCR a\r\nINCR b\r\nEXEC\r\n");
                (0..6).for_each(|_| drop(c.line()));
            }
        });
        thread::sleep(Duration::from_millis(300));
        let before: u64 = ask(&mut main, "GET a").parse().unwrap();
        let from = redis.snapshot(dir.path(), &[]);
        let after: u64 = ask(&mut main, "GET a").parse().unwrap();
        stop.store(true, Ordering::Relaxed);
        work.join().unwrap();
        (before, from, after)
    });
    // The clients of then are gone; what is left of their connections at the other end is reset.
    drop(main);
    redis.end(dir.path());
    redis.resume(&from);
    let mut main = Lines::connect(port);
    let (a, b) = (ask(&mut main, "GET a"), ask(&mut main, "GET b"));
    assert_eq!(a, b);
    let a: u64 = a.parse().unwrap();
    assert!((before..=after).contains(&a), "{before} <= {a} <= {after}");
}

//! Python with threads.

use super::common::{Program, until};
use std::fs;
use std::process::Command;

/// Eight threads pass numbers round through queues and move amounts between accounts under locks; one adds up.
const WORK: &str = r#"
import os, queue, random, threading, time
accounts = [1000] * 16
locks = [threading.Lock() for _ in accounts]
queues = [queue.Queue() for _ in range(8)]
rounds = [0] * 8
big = {i: str(i) * 20 for i in range(50000)}
def work(n):
    rng = random.Random(n)
    while True:
        token = queues[n].get()
        a, b = sorted(rng.sample(range(16), 2))
        with locks[a], locks[b]:
            amount = rng.randrange(10)
            accounts[a] -= amount
            accounts[b] += amount
        i = rng.randrange(50000)
        assert big[i] == str(i) * 20
        rounds[n] += 1
        queues[(n + 1) % 8].put(token + 1)
def audit():
    while True:
        for l in locks: l.acquire()
        total = sum(accounts)
        for l in locks: l.release()
        with open("state.new", "w") as f:
            f.write("%d %d %d\n" % (total, sum(rounds), threading.active_count()))
        os.replace("state.new", "state")
        time.sleep(0.01)
for n in range(8):
    threading.Thread(target=work, args=(n,), daemon=True).start()
threading.Thread(target=audit, daemon=True).start()
for t in range(3):
    queues[t].put(0)
while True:
    time.sleep(1)
"#;

#[test]
fn python_with_threads_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new("/usr/bin/python3");
    command.args(["-c", WORK]);
    let mut python = Program::start(command, dir.path());
    let state = || -> Option<[u64; 3]> {
        let text = fs::read_to_string(dir.path().join("state")).ok()?;
        let words: Vec<u64> = text
            .split_whitespace()
            .map(|w| w.parse().unwrap())
            .collect();
        words.try_into().ok()
    };
    let goes_on = |when: &str| {
        let before = state().map_or(0, |s| s[1]);
        until(&format!("it works on, {when}"), || {
            state().is_some_and(|s| s[1] > before + 1000)
        });
        let [total, _, threads] = state().unwrap();
        assert_eq!((total, threads), (16000, 10), "{when}");
    };
    goes_on("at first");
    for round in 0..3 {
        python.snapshot(dir.path(), &[]);
        goes_on(&format!("after snapshot {round}"));
    }
    for round in 0..3 {
        let from = python.end(dir.path());
        let before = state().unwrap()[1];
        python.resume(&from);
        goes_on(&format!("resumed {round}"));
        assert!(state().unwrap()[1] > before);
    }
    let said = fs::read_to_string(dir.path().join("said")).unwrap();
    assert_eq!(said, "");
}

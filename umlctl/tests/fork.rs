//! Copies beside a running original.

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

const TARGET: &str = r#"
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static volatile sig_atomic_t asked;
static void on(int s) { (void)s; asked = 1; }
int main(int argc, char **argv) {
    (void)argc;
    enum { N = 1 << 22 };
    unsigned *m = malloc(N * 4);
    for (unsigned i = 0; i < N; i++) m[i] = i * 2654435761u;
    int pid = getpid();
    signal(SIGUSR1, on);
    printf("ready\n"); fflush(stdout);
    char end[300];
    snprintf(end, sizeof end, "%s/end", argv[1]);
    while (!asked && access(end, F_OK)) usleep(10000);
    for (unsigned i = 0; i < N; i++) if (m[i] != i * 2654435761u) return 1;
    char self[32] = {0};
    if (pid != getpid() || readlink("/proc/self", self, 31) < 0 || atoi(self) != pid) return 2;
    snprintf(end, sizeof end, "%s/right-XXXXXX", argv[1]);
    close(mkstemp(end));
    return 42;
}
"#;

fn umlctl(args: &[&str]) -> Output {
    Command::new("timeout")
        .args(["-s", "KILL", "60", env!("CARGO_BIN_EXE_umlctl")])
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn target(dir: &Path) -> Child {
    let source = dir.join("target.c");
    std::fs::write(&source, TARGET).unwrap();
    let exe = dir.join("target");
    let cc = Command::new("cc")
        .arg("-O1")
        .arg("-o")
        .args([&exe, &source])
        .status();
    assert!(cc.unwrap().success());
    let out = std::fs::File::create(dir.join("out")).unwrap();
    let mut command = Command::new(exe);
    let child = command.arg(dir).stdin(Stdio::null()).stdout(out).spawn();
    let child = child.unwrap();
    while !std::fs::read_to_string(dir.join("out"))
        .unwrap()
        .contains("ready")
    {
        std::thread::sleep(Duration::from_millis(10));
    }
    child
}

fn right(dir: &Path) -> usize {
    let names = std::fs::read_dir(dir).unwrap().flatten();
    names
        .filter(|e| e.file_name().to_string_lossy().starts_with("right-"))
        .count()
}

fn text(o: &Output) -> String {
    String::from_utf8_lossy(&[&o.stdout[..], &o.stderr[..]].concat()).into_owned()
}

#[test]
fn twins_run_beside_the_original() {
    let dir = tempfile::tempdir().unwrap();
    let mut original = target(dir.path());
    let pid = original.id().to_string();
    let out = umlctl(&["fork", "--pid", &pid, "--count", "3", "--json"]);
    assert!(out.status.success(), "{}", text(&out));
    let list: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let list = list.as_array().unwrap();
    assert_eq!(list.len(), 3);
    for twin in list {
        assert!(twin["resume_us"].is_u64());
        let host = twin["pid"].as_i64().unwrap();
        let status = std::fs::read_to_string(format!("/proc/{host}/status")).unwrap();
        let numbers = status.lines().find(|l| l.starts_with("NSpid")).unwrap();
        assert_eq!(numbers.split_whitespace().last(), Some(&*pid));
        // 16 MB are the same pages in all of them.
        let rollup = std::fs::read_to_string(format!("/proc/{host}/smaps_rollup")).unwrap();
        let own: u64 = rollup
            .lines()
            .filter(|l| l.starts_with("Private_"))
            .filter_map(|l| l.split_whitespace().nth(1)?.parse::<u64>().ok())
            .sum();
        assert!(own < 2048, "{rollup}");
    }
    // Not before: what all but one have left is that one's own.
    for twin in list {
        let host = twin["pid"].as_i64().unwrap();
        let kill = Command::new("kill")
            .args(["-USR1", &host.to_string()])
            .status();
        assert!(kill.unwrap().success());
    }
    for _ in 0..1000 {
        if right(dir.path()) == 3 {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(right(dir.path()), 3);
    assert!(original.try_wait().unwrap().is_none());
    std::fs::write(dir.path().join("end"), "").unwrap();
    assert_eq!(original.wait().unwrap().code(), Some(42));
    assert!(!Path::new(&format!("/run/umlctl/fork/{pid}")).exists());
}

#[test]
fn copies_end_as_the_processes_end() {
    let dir = tempfile::tempdir().unwrap();
    let mut original = target(dir.path());
    let snap = dir.path().join("snap");
    let snap = snap.to_str().unwrap();
    let out = umlctl(&["snapshot", "--pid", &original.id().to_string(), snap]);
    assert!(out.status.success(), "{}", text(&out));
    std::fs::write(dir.path().join("end"), "").unwrap();
    // The number is taken; then many at once.
    for (count, sum) in [("1", 1), ("3", 4)] {
        let out = umlctl(&["resume", snap, "--count", count]);
        assert_eq!(out.status.code(), Some(42), "{}", text(&out));
        // The original has seen the file too by then, or not yet.
        let right = right(dir.path());
        assert!(right == sum || right == sum + 1, "{right}");
    }
    let _ = std::io::stdout().flush();
    let _ = original.kill();
    let _ = original.wait();
}

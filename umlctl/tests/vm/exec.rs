//! Programs in the guest. One VM for all.

use crate::common::{Home, end_of, err, noise, out, until};
use std::io::Read;
use std::process::Stdio;

#[test]
fn exec() {
    let home = Home::new();
    home.boot("v");
    codes(&home);
    streams(&home);
    at_once(&home);
    stopped_reader(&home);
    signals(&home);
    left_alone(&home);
    assert_eq!(home.sh("v", "echo well"), "well");
}

fn codes(home: &Home) {
    home.ok(&["exec", "v", "true"]);
    home.fails(&["exec", "v", "--", "sh", "-c", "exit 7"], 7);
    home.fails(&["exec", "v", "--", "sh", "-c", "kill -9 $$"], 137);
    let text = home.fails(&["exec", "v", "no-such-program"], 127);
    assert!(text.contains("no-such-program"), "{text}");
    home.fails(&["exec", "v", "/root"], 126);
    let long = "x".repeat(100_000);
    let text = home.fails(&["exec", "v", "echo", &long], 1);
    assert!(text.contains("too long"), "{text}");
    assert_eq!(
        home.ok(&[
            "exec",
            "-e",
            "A=b c",
            "v",
            "--",
            "sh",
            "-c",
            "echo \"$A\"; pwd"
        ]),
        "b c\n/root"
    );
    home.fails(&["exec", "-e", "A", "v", "true"], 1);
    home.fails(&["exec", "v"], 2);
}

fn streams(home: &Home) {
    let output = home.umlctl(&[
        "exec",
        "v",
        "--",
        "sh",
        "-c",
        "echo to-out; echo to-err >&2",
    ]);
    assert_eq!(
        (out(&output), err(&output)),
        ("to-out".into(), "to-err\n".into())
    );
    // Much out.
    let output = home.umlctl(&[
        "exec",
        "v",
        "--",
        "sh",
        "-c",
        "yes 0123456789 | head -c 8000000",
    ]);
    assert!(output.status.success());
    assert!(
        output.stdout.len() == 8_000_000
            && output
                .stdout
                .chunks(11)
                .all(|l| b"0123456789\n".starts_with(l))
    );
    // Much in and out at the same time, of all bytes.
    let bytes = noise(300_000, 1);
    let output = home.with_input(&["exec", "v", "cat"], &bytes);
    assert!(output.stdout == bytes, "{} bytes", output.stdout.len());
    // More in than is wanted.
    let output = home.with_input(&["exec", "v", "--", "head", "-c", "3"], &bytes);
    assert_eq!(output.stdout, bytes[..3]);
    // No standard input at all.
    let mut command = std::process::Command::new("sh");
    command
        .args([
            "-c",
            "exec \"$0\" \"$@\" <&-",
            env!("CARGO_BIN_EXE_umlctl"),
            "exec",
            "v",
            "cat",
        ])
        .env("UMLCTL_HOME", home.dir.path().join("home"));
    assert!(end_of(&mut command.spawn().unwrap()).success());
}

fn at_once(home: &Home) {
    std::thread::scope(|s| {
        for i in 0..12 {
            s.spawn(move || {
                let bytes = noise(20_000 + i, i as u64 + 1);
                let output = home.with_input(
                    &["exec", "v", "--", "sh", "-c", &format!("cat; exit {i}")],
                    &bytes,
                );
                assert_eq!(output.status.code(), Some(i as i32));
                assert!(output.stdout == bytes);
            });
        }
    });
}

fn stopped_reader(home: &Home) {
    let mut slow = home
        .command(&["exec", "v", "--", "sh", "-c", "yes | head -c 2000000"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // Nobody reads: others are not held up, and nothing is lost.
    for _ in 0..5 {
        let output = home.umlctl(&["exec", "v", "--", "sh", "-c", "yes | head -c 200000"]);
        assert_eq!(output.stdout.len(), 200_000);
    }
    let mut bytes = Vec::new();
    slow.stdout.take().unwrap().read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len(), 2_000_000);
    assert!(end_of(&mut slow).success());
    // A reader that goes away.
    let mut gone = home
        .command(&["exec", "v", "yes"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    drop(gone.stdout.take());
    assert_eq!(end_of(&mut gone).code(), Some(141));
    until("the end of yes", || {
        home.sh("v", "pidof yes || true").is_empty()
    });
}

fn signals(home: &Home) {
    let sleeping = |n: &str| home.sh("v", &format!("ps | grep -c '[s]leep {n}' || true")) == "1";
    let mut child = home
        .command(&["exec", "v", "sleep", "1001"])
        .spawn()
        .unwrap();
    until("the start of sleep", || sleeping("1001"));
    let kill = |signal: &str, pid: u32| {
        let status = std::process::Command::new("kill")
            .args([signal, &pid.to_string()])
            .status();
        assert!(status.unwrap().success());
    };
    kill("-TERM", child.id());
    assert_eq!(end_of(&mut child).code(), Some(143));
    // Killed without a word: its program is hung up.
    let mut child = home
        .command(&["exec", "v", "sleep", "1002"])
        .spawn()
        .unwrap();
    until("the start of sleep", || sleeping("1002"));
    kill("-KILL", child.id());
    end_of(&mut child);
    until("the end of sleep", || !sleeping("1002"));
}

fn left_alone(home: &Home) {
    // What a program leaves behind does not hold it up, and stays.
    assert_eq!(home.sh("v", "setsid sleep 1003 & echo done"), "done");
    assert_eq!(home.sh("v", "ps | grep -c '[s]leep 1003'"), "1");
}

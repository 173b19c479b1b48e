//! Console and logs.

use crate::common::{Home, end_of, err, out, until};
use std::io::{Read, Write};
use std::process::Stdio;

#[test]
fn console_and_logs() {
    let home = Home::new();
    home.boot("v");
    let mut child = home
        .command(&["console", "v"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"echo $((40+2))-answer\n").unwrap();
    let mut stdout = child.stdout.take().unwrap();
    let mut seen = Vec::new();
    while !String::from_utf8_lossy(&seen).contains("42-answer") {
        let mut bytes = [0; 1024];
        let n = stdout.read(&mut bytes).unwrap();
        assert!(n > 0, "{}", String::from_utf8_lossy(&seen));
        seen.extend(&bytes[..n]);
    }
    // The end of our input is not the end.
    drop(stdin);
    home.sh("v", "echo said > /dev/console");
    until("the console's log", || {
        home.ok(&["logs", "v"]).contains("said")
    });
    assert!(home.ok(&["logs", "v"]).contains("42-answer"));
    let kernel = home.ok(&["logs", "--kernel", "v"]);
    assert!(kernel.contains("Linux version") && !kernel.contains("42-answer"));

    // Who follows sees the end, and so does the console.
    let mut follower = home
        .command(&["logs", "-f", "v"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    home.sh("v", "echo later > /dev/console");
    home.ok(&["kill", "v"]);
    let mut text = String::new();
    follower
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert!(end_of(&mut follower).success());
    assert!(text.contains("later"), "{text}");
    stdout.read_to_end(&mut seen).unwrap();
    assert!(String::from_utf8_lossy(&seen).contains("said"));
    assert!(end_of(&mut child).success());
    home.fails(&["console", "v"], 1);
    home.ok(&["rm", "v"]);
}

#[test]
fn attached() {
    let home = Home::new();
    let image = home.image();
    let args = [
        "run",
        "v",
        "--image",
        image.to_str().unwrap(),
        "--net",
        "none",
    ];
    // What is typed before anybody reads it is not lost.
    let output = home.with_input(&args, b"echo $((40+2)); poweroff -f\n");
    assert!(output.status.success(), "{}", err(&output));
    assert!(out(&output).contains("42"), "{}", out(&output));
    assert_eq!(home.info("v")["state"], "ended");
    // A signal ends the VM, in good order.
    let mut child = home
        .command(&["run", "v"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    until("the agent", || home.info("v")["state"] == "running");
    let status = std::process::Command::new("kill")
        .arg(child.id().to_string())
        .status();
    assert!(status.unwrap().success());
    assert_eq!(end_of(&mut child).code(), Some(0));
    home.ok(&["rm", "v"]);
}

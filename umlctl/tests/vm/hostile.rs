//! Whoever may connect to a control socket may send what he likes: the VM goes on.

#![allow(unsafe_code)]

use crate::common::{Home, noise, until};
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;
use umlctl_agent::wire::{Frame, Kind};

fn message(text: &[u8]) -> Vec<u8> {
    let mut bytes = u32::try_from(text.len()).unwrap().to_le_bytes().to_vec();
    bytes.extend(text);
    bytes
}

fn connect(path: &Path) -> UnixStream {
    let stream = UnixStream::connect(path).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(120)))
        .unwrap();
    stream
}

/// Sends something, and what is answered until the connection ends.
fn answer(path: &Path, bytes: &[u8]) -> String {
    let mut stream = connect(path);
    let _ = stream.write_all(bytes);
    let mut text = Vec::new();
    let _ = stream.read_to_end(&mut text);
    String::from_utf8_lossy(&text).into_owned()
}

#[test]
fn control_socket() {
    let home = Home::new();
    home.boot("v");
    let path = home.vm_dir("v").join("control.sock");
    let mode = |p: &Path| std::fs::metadata(p).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&path), mode(&home.vm_dir("v"))), (0o600, 0o700));
    let alive = |what: &str| assert_eq!(home.sh("v", "echo alive"), "alive", "after {what}");

    // No messages.
    for bytes in [
        vec![0xff; 4],
        vec![0xff; 100_000],
        message(b""),
        message(b"null"),
        message(b"{\"version\":1}"),
        message(b"{\"version\":2,\"request\":\"info\"}"),
        message(b"{\"version\":1,\"request\":\"fly\"}"),
        message(&noise(5000, 3)),
        message(&[b'['; 60_000]),
    ] {
        let text = answer(&path, &bytes);
        assert!(text.contains("error"), "{text}");
    }
    alive("what is no message");

    // Half a message, and many connections that say nothing.
    let half = &message(b"{\"version\":1,\"request\":\"info\"}")[..9];
    let quiet: Vec<UnixStream> = (0..300)
        .map(|_| {
            let mut s = connect(&path);
            let _ = s.write_all(half);
            s
        })
        .collect();
    drop(quiet);
    until("room for others", || {
        home.umlctl(&["exec", "v", "true"]).status.success()
    });
    alive("many connections");

    streams(&path);
    alive("streams that are none");

    // A console that is flooded, and one that nobody reads.
    let mut console = connect(&path);
    console
        .write_all(&message(b"{\"version\":1,\"request\":\"console\"}"))
        .unwrap();
    home.sh("v", "yes | head -c 3000000 > /dev/console");
    alive("a console that nobody reads");
    drop(console);
    foreign(&home, &path);
    alive("a foreign user");
    home.ok(&["stop", "v"]);
}

/// Connections for a stream that carry something else.
fn streams(path: &Path) {
    let open = message(b"{\"version\":1,\"request\":\"agent\"}");
    let frame = |kind, payload: Vec<u8>| {
        let mut bytes = Vec::new();
        Frame::new(kind, 77, payload).encode(&mut bytes);
        bytes
    };
    for garbage in [
        noise(50_000, 5),
        umlctl_agent::wire::reset().to_vec(),
        frame(Kind::Hello, vec![9; 4]),
        frame(Kind::Exec, noise(100, 7)),
        frame(Kind::Exec, vec![]),
        frame(Kind::Stdin, vec![0; 4096]),
        frame(Kind::Credit, vec![1, 0xff, 0xff, 0xff, 0xff]),
        frame(Kind::Signal, vec![0; 3]),
        frame(Kind::WinSize, vec![1]),
        frame(Kind::TimeSet, vec![1; 5]),
        frame(Kind::Ping, vec![1; 60_000]),
    ] {
        let mut stream = connect(path);
        stream.write_all(&open).unwrap();
        let _ = stream.write_all(&garbage);
        // What comes does not matter; that something came or not neither.
        stream
            .set_read_timeout(Some(Duration::from_millis(50)))
            .unwrap();
        let _ = stream.read(&mut [0; 4096]);
    }
    // More input than was allowed: that stream ends, and no other.
    let mut stream = connect(path);
    stream.write_all(&open).unwrap();
    let sleep = umlctl_agent::exec::Exec::new(
        umlctl_agent::exec::What::Command,
        vec![b"sleep".to_vec(), b"1000".to_vec()],
    );
    let _ = stream.write_all(&frame(Kind::Exec, sleep.encode().unwrap()));
    for _ in 0..64 {
        let _ = stream.write_all(&frame(Kind::Stdin, vec![0; 4096]));
    }
    let _ = stream.read_to_end(&mut Vec::new());
}

/// Another user is turned away, even where the modes would let him in.
fn foreign(home: &Home, path: &Path) {
    let open = |p: &Path, mode| {
        std::fs::set_permissions(p, std::fs::Permissions::from_mode(mode)).unwrap()
    };
    let (root, vm) = (home.dir.path(), home.vm_dir("v"));
    let dirs = [
        root.to_owned(),
        root.join("home"),
        root.join("home/vms"),
        vm,
    ];
    dirs.iter().for_each(|d| open(d, 0o755));
    open(path, 0o666);
    let at = path.to_owned();
    let text = std::thread::spawn(move || {
        // SAFETY: numbers only. The raw call concerns this thread alone.
        let r = unsafe { libc::syscall(libc::SYS_setresuid, -1, 65534, -1) };
        assert_eq!(r, 0);
        answer(&at, &message(b"{\"version\":1,\"request\":\"kill\"}"))
    })
    .join()
    .unwrap();
    assert_eq!(text, "");
    open(path, 0o600);
    dirs.iter().for_each(|d| open(d, 0o700));
}

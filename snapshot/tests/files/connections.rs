//! Established TCP connections, with a peer outside: the driver. Both sides send a known stream, and each checks that
//! it gets every byte once. At the capture both queues of both sides are full.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, poll};
use nix::sys::signal::{Signal, raise};
use snapshot::files::{Capture, Connections, Held, Options, rescue_connections};
use snapshot::sys::{descriptor, sockopt};

use crate::{Captured, Target, at, restore, take};

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("tcp::original_goes_on", || all(original_goes_on)),
    ("tcp::resumed", || all(resumed)),
    ("tcp::resumed_as_reset", resumed_as_reset),
    ("tcp::rescued", rescued),
];

/// How a connection stands at the capture.
#[derive(Debug, Clone, Copy)]
struct Shape {
    name: &'static str,
    address: &'static str,
    /// Bytes that the target sends, and the peer sends, in all.
    totals: (usize, usize),
    /// The target has closed its direction; the peer has.
    closed: (bool, bool),
    /// Bytes that the peer sends before the capture.
    early: usize,
}

const BIG: usize = 12 << 20;
const SMALL: usize = 50_000;

const SHAPES: &[Shape] = &[
    Shape {
        name: "idle",
        address: "127.0.0.1:0",
        totals: (SMALL, SMALL),
        closed: (false, false),
        early: 0,
    },
    Shape {
        name: "v4",
        address: "127.0.0.1:0",
        totals: (BIG, BIG),
        closed: (false, false),
        early: 300_000,
    },
    Shape {
        name: "v6",
        address: "[::1]:0",
        totals: (BIG, BIG),
        closed: (false, false),
        early: 300_000,
    },
    Shape {
        name: "peer_closed",
        address: "127.0.0.1:0",
        totals: (BIG, SMALL),
        closed: (false, true),
        early: SMALL,
    },
    Shape {
        name: "peer_closed6",
        address: "[::1]:0",
        totals: (BIG, SMALL),
        closed: (false, true),
        early: SMALL,
    },
    Shape {
        name: "we_closed",
        address: "127.0.0.1:0",
        totals: (SMALL, BIG),
        closed: (true, false),
        early: SMALL,
    },
    Shape {
        name: "we_closed_full",
        address: "127.0.0.1:0",
        totals: (BIG, BIG),
        closed: (true, false),
        early: SMALL,
    },
    Shape {
        name: "both_closed",
        address: "127.0.0.1:0",
        totals: (BIG, SMALL),
        closed: (true, true),
        early: SMALL,
    },
];

fn byte(at: usize, salt: usize) -> u8 {
    (at.wrapping_mul(31) ^ (at >> 11) ^ salt) as u8
}

fn stream(from: usize, to: usize, salt: usize) -> Vec<u8> {
    (from..to).map(|at| byte(at, salt)).collect()
}

/// Sends and receives until both directions have ended.
fn converse(
    mut socket: &TcpStream,
    (mut sent, total): (usize, usize),
    (mut got, expected): (usize, usize),
    salt: usize,
) {
    socket.set_nonblocking(true).unwrap();
    let (mut open, mut ended) = (true, false);
    let mut buffer = vec![0; 1 << 16];
    while open || !ended {
        if open && sent == total {
            // It may have been closed before.
            let _ = socket.shutdown(Shutdown::Write);
            open = false;
        }
        let mut wanted = PollFlags::empty();
        if open {
            wanted |= PollFlags::POLLOUT;
        }
        if !ended {
            wanted |= PollFlags::POLLIN;
        }
        if wanted.is_empty() {
            break;
        }
        assert_eq!(
            poll(&mut [PollFd::new(socket.as_fd(), wanted)], 30_000u16).unwrap(),
            1,
            "{sent} {got}: nothing moves"
        );
        if open {
            match socket.write(&stream(sent, total.min(sent + (1 << 16)), salt)) {
                Ok(n) => sent += n,
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock, "after {sent} bytes"),
            }
        }
        match socket.read(&mut buffer) {
            Ok(0) => ended = true,
            Ok(n) => {
                assert!(
                    buffer[..n] == stream(got, got + n, !salt),
                    "wrong bytes after {got}"
                );
                got += n;
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock, "after {got} bytes"),
        }
    }
    assert_eq!((sent, got), (total, expected));
}

fn shape(name: &str) -> &'static Shape {
    SHAPES.iter().find(|shape| shape.name == name).unwrap()
}

/// What the target is, and what it is after the resume.
pub(crate) fn role(role: &str, name: &str, dir: &Path) {
    let socket = |fd: OwnedFd| TcpStream::from(fd);
    let progress = dir.join("progress");
    let shape = shape(name);
    if role == "peer-target" {
        let address: std::net::SocketAddr = std::fs::read_to_string(dir.join("address"))
            .unwrap()
            .parse()
            .unwrap();
        let connection = TcpStream::connect(address).unwrap();
        connection.set_nonblocking(true).unwrap();
        connection.set_nodelay(true).unwrap();
        let mut sent = 0;
        // Until nothing more goes in, which leaves some that was never sent.
        let early = if shape.early == 0 { 1 } else { shape.totals.0 };
        let full = if shape.closed.0 { 2 << 20 } else { early };
        while sent < full.min(shape.totals.0) {
            match (&connection).write(&stream(sent, full.min(shape.totals.0), 0)) {
                Ok(n) => sent += n,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error}"),
            }
        }
        if shape.closed.0 {
            connection.shutdown(Shutdown::Write).unwrap();
        }
        std::fs::write(progress, sent.to_string()).unwrap();
        at(100, connection);
        raise(Signal::SIGSTOP).unwrap();
    } else if role == "peer-resumed" {
        let reset = dir.join("reset").exists();
        let connections = if reset {
            Connections::Reset
        } else {
            Connections::Repair
        };
        let before = || {
            // The driver's own duplicate keeps the old connection until it is closed.
            while !dir.join("go").exists() {
                std::thread::sleep(Duration::from_millis(1));
            }
            Held::from_sockets(vec![descriptor::adopt(0).unwrap()]).discard();
        };
        restore(
            dir,
            Some(0),
            connections,
            if reset { None } else { Some(&before) },
        );
        if reset {
            let socket = TcpStream::from(take(100));
            socket.set_nonblocking(false).unwrap();
            assert_eq!(
                (&socket).read(&mut [0]).unwrap_err().kind(),
                ErrorKind::ConnectionReset
            );
            return;
        }
    }
    let sent: usize = std::fs::read_to_string(dir.join("progress"))
        .unwrap()
        .parse()
        .unwrap();
    let connection = socket(take(100));
    assert!(connection.nodelay().unwrap());
    let total = if shape.closed.0 { sent } else { shape.totals.0 };
    converse(&connection, (sent, total), (0, shape.totals.1), 0);
}

/// A target with a connection to us, stopped, with data under way; and our end.
fn start(shape: &Shape, dir: &Path) -> (Target, TcpStream) {
    let listener = TcpListener::bind(shape.address).unwrap();
    std::fs::write(
        dir.join("address"),
        listener.local_addr().unwrap().to_string(),
    )
    .unwrap();
    let target = Target::start("peer-target", shape.name, dir);
    let (mut peer, _) = listener.accept().unwrap();
    peer.write_all(&stream(0, shape.early, !0)).unwrap();
    if shape.closed.1 {
        peer.shutdown(Shutdown::Write).unwrap();
    }
    // Let what is under way arrive: the states to be tested are the settled ones.
    std::thread::sleep(Duration::from_millis(50));
    (target, peer)
}

/// Our side of the rest, in another thread.
fn peer(shape: Shape, socket: TcpStream, dir: &Path) -> std::thread::JoinHandle<()> {
    let sent: usize = std::fs::read_to_string(dir.join("progress"))
        .unwrap()
        .parse()
        .unwrap();
    let expected = if shape.closed.0 { sent } else { shape.totals.0 };
    std::thread::spawn(move || converse(&socket, (shape.early, shape.totals.1), (0, expected), !0))
}

fn all(test: fn(Shape)) {
    let only = std::env::var("SHAPE").ok();
    for shape in SHAPES {
        if only.as_ref().is_some_and(|only| only != shape.name) {
            continue;
        }
        println!("  {}", shape.name);
        test(*shape);
    }
}

fn original_goes_on(shape: Shape) {
    let dir = tempfile::tempdir().unwrap();
    let (target, socket) = start(&shape, dir.path());
    for _ in 0..3 {
        target.captured();
    }
    let pump = peer(shape, socket, dir.path());
    target.captured();
    target.finish();
    pump.join().unwrap();
}

fn hold(target: &Target) -> (Captured, Held) {
    let shared = |_, _, _: std::os::fd::BorrowedFd| None;
    let options = Options {
        stdio: true,
        hold_connections: true,
        ..Options::new(&target.dir, &shared)
    };
    let mut capture = Capture::prepare(&[target.pid().as_raw()], &options).unwrap();
    let mut frozen = capture.freeze().unwrap();
    let held = frozen.held();
    (frozen.finish().unwrap(), held)
}

fn resumed(shape: Shape) {
    let dir = tempfile::tempdir().unwrap();
    let (mut target, socket) = start(&shape, dir.path());
    let (captured, held) = hold(&target);
    assert_eq!(held.len(), 1);
    // The peer goes on sending and reading; nothing of that may be answered now.
    let pump = peer(shape, socket, dir.path());
    target.kill();
    std::thread::sleep(Duration::from_millis(100));
    std::fs::write(
        dir.path().join("captured.json"),
        serde_json::to_vec(&captured).unwrap(),
    )
    .unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["peer-resumed", shape.name]).arg(dir.path());
    command.stdin(Stdio::from(held.into_sockets().pop().unwrap()));
    let mut child = command.spawn().unwrap();
    drop(command);
    std::fs::write(dir.path().join("go"), "").unwrap();
    assert!(
        child.wait().unwrap().success(),
        "the resumed process lost its connection"
    );
    pump.join().unwrap();
}

fn resumed_as_reset() {
    let shape = *shape("v4");
    let dir = tempfile::tempdir().unwrap();
    let (target, socket) = start(&shape, dir.path());
    let captured = target.captured();
    std::fs::write(dir.path().join("reset"), "").unwrap();
    crate::resume("peer-resumed", shape.name, dir.path(), &captured);
    let pump = peer(shape, socket, dir.path());
    target.finish();
    pump.join().unwrap();
}

fn rescued() {
    let shape = *shape("v4");
    let dir = tempfile::tempdir().unwrap();
    let (target, socket) = start(&shape, dir.path());
    // As if the saver had been killed: its descriptors are gone, and the connection is left deaf and in repair mode.
    let held = hold(&target).1.into_sockets();
    sockopt::set_int(held[0].as_fd(), libc::IPPROTO_TCP, 19, 1).unwrap();
    drop(held);
    rescue_connections(target.pid().as_raw()).unwrap();
    let pump = peer(shape, socket, dir.path());
    target.finish();
    pump.join().unwrap();
}

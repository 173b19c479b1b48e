//! What the stop costs, for each descriptor. Prints; asserts no times.

use std::fs::File;
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, raise};
use snapshot::files::{Capture, Options};
use snapshot::sys::descriptor;

use crate::{Target, at};

pub(crate) const TESTS: &[(&str, fn())] = &[("figures::freeze", freeze)];

const MANY: i32 = 200;

pub(crate) fn target(kind: &str, dir: &Path) {
    let mut number = 100;
    let mut put = |fd: OwnedFd| {
        at(number, fd);
        number += 1;
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    std::fs::write(dir.join("file"), "x").unwrap();
    for _ in 0..MANY / 2 {
        let (a, b): (OwnedFd, OwnedFd) = match kind {
            "regular" => (
                File::open(dir.join("file")).unwrap().into(),
                File::open("/dev/null").unwrap().into(),
            ),
            "eventfd" => (
                descriptor::eventfd(0).unwrap(),
                descriptor::eventfd(0).unwrap(),
            ),
            "pipe" => nix::unistd::pipe2(OFlag::empty()).unwrap(),
            "full_pipe" => {
                let (read, write) = nix::unistd::pipe2(OFlag::empty()).unwrap();
                nix::unistd::write(&write, &[7; 60_000]).unwrap();
                (read, write)
            }
            "unix" => {
                let (a, b) = UnixStream::pair().unwrap();
                (a.into(), b.into())
            }
            _ => {
                let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
                (client.into(), listener.accept().unwrap().0.into())
            }
        };
        put(a);
        put(b);
    }
    raise(Signal::SIGSTOP).unwrap();
}

fn freeze() {
    for kind in ["regular", "eventfd", "pipe", "full_pipe", "unix", "tcp"] {
        let dir = tempfile::tempdir().unwrap();
        let target = Target::start("many", kind, dir.path());
        let shared = |_, _, _: std::os::fd::BorrowedFd| None;
        let options = Options {
            stdio: true,
            ..Options::new(dir.path(), &shared)
        };
        let start = Instant::now();
        let mut capture = Capture::prepare(&[target.pid().as_raw()], &options).unwrap();
        let prepare = start.elapsed();
        let mut times = Vec::new();
        let mut fds = 0;
        for _ in 0..15 {
            let start = Instant::now();
            let frozen = capture.freeze().unwrap();
            times.push(start.elapsed());
            fds = frozen.finish().unwrap().1[0].len();
        }
        times.sort();
        let each = times[7] / u32::try_from(fds).unwrap();
        println!(
            "  {kind}: {fds} descriptors: prepare {prepare:?}, freeze {:?} ({each:?} each)",
            times[7]
        );
        assert!(fds >= MANY as usize);
    }
}

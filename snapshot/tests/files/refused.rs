//! What cannot be captured is refused, all of it in one list, and nothing is disturbed.

use std::fs::{File, OpenOptions};
use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::sys::signal::{Signal, raise};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use snapshot::files::{Capture, Error, Options};
use snapshot::sys::descriptor;

use crate::{Target, at, take};

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("refused::all_in_one_list", all),
    ("refused::in_the_stop", in_the_stop),
];

pub(crate) fn target(dir: &Path) {
    if dir.join("stop").exists() {
        // Nothing of this is seen before the stop.
        let inotify = descriptor::inotify(libc::IN_NONBLOCK).unwrap();
        let path = std::ffi::CString::new(dir.to_str().unwrap()).unwrap();
        descriptor::inotify_watch(inotify.as_fd(), &path, libc::IN_CREATE).unwrap();
        at(100, inotify);
        let (a, b) = UnixStream::pair().unwrap();
        let numbers = [a.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&numbers)];
        sendmsg::<()>(
            a.as_raw_fd(),
            &[IoSlice::new(b"x")],
            &rights,
            MsgFlags::empty(),
            None,
        )
        .unwrap();
        at(101, a);
        at(102, b);
        raise(Signal::SIGSTOP).unwrap();
        assert!(nix::unistd::read(take(100), &mut [0; 64]).is_ok());
        return;
    }
    at(
        100,
        OpenOptions::new()
            .write(true)
            .open(dir.join("fifo"))
            .unwrap(),
    );
    at(101, UnixStream::connect(dir.join("socket")).unwrap());
    at(
        102,
        OpenOptions::new().write(true).open("/dev/kmsg").unwrap(),
    );
    let leased = File::create(dir.join("leased")).unwrap();
    descriptor::fcntl(leased.as_fd(), libc::F_SETLEASE, libc::F_WRLCK).unwrap();
    at(103, leased);
    std::env::set_current_dir(dir).unwrap();
    at(104, UnixListener::bind("relative").unwrap());
    at(
        105,
        snapshot::sys::sockopt::socket(libc::AF_PACKET, libc::SOCK_RAW, 0).unwrap(),
    );
    std::fs::write("moved", "").unwrap();
    std::fs::hard_link("moved", "other-name").unwrap();
    at(106, File::open("moved").unwrap());
    std::fs::remove_file("moved").unwrap();
    at(107, descriptor::pidfd_open(1, 0).unwrap());
    raise(Signal::SIGSTOP).unwrap();
    assert_eq!(nix::unistd::write(take(101), b"still").unwrap(), 5);
}

fn refused(error: Error) -> Vec<(i32, String)> {
    let Error::Refused(list) = error else {
        panic!("{error}")
    };
    for refusal in &list {
        assert!(!refusal.reason.is_empty() && !refusal.advice.is_empty() && refusal.pid > 0);
    }
    let number = |object: &str| object.split(' ').nth(1).unwrap().parse().unwrap();
    list.into_iter()
        .map(|refusal| (number(&refusal.object), refusal.reason))
        .collect()
}

fn all() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    // The driver does not count as outside, being the saver: another process has the FIFO open.
    let holder = File::options().read(true).write(true).open(&fifo).unwrap();
    let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
    let mut other = std::process::Command::new("sleep")
        .arg("60")
        .stdin(holder)
        .spawn()
        .unwrap();
    let target = Target::start("refused", "list", dir.path());
    let shared = |_, _, _: std::os::fd::BorrowedFd| None;
    let options = Options {
        stdio: true,
        ..Options::new(dir.path(), &shared)
    };
    let result = Capture::prepare(&[target.pid().as_raw()], &options);
    other.kill().unwrap();
    other.wait().unwrap();
    let mut list = refused(result.unwrap_err());
    list.sort();
    let numbers: Vec<i32> = list.iter().map(|(fd, _)| *fd).collect();
    assert_eq!(
        numbers,
        [100, 101, 102, 103, 104, 105, 106, 107],
        "{list:?}"
    );
    target.finish();
    drop(listener);
}

fn in_the_stop() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("stop"), "").unwrap();
    let target = Target::start("refused", "stop", dir.path());
    let shared = |_, _, _: std::os::fd::BorrowedFd| None;
    let options = Options {
        stdio: true,
        ..Options::new(dir.path(), &shared)
    };
    let mut capture = Capture::prepare(&[target.pid().as_raw()], &options).unwrap();
    std::fs::write(dir.path().join("event"), "").unwrap();
    let list = refused(capture.freeze().unwrap_err());
    assert_eq!(
        list.iter().map(|(fd, _)| *fd).collect::<Vec<_>>(),
        [100, 102],
        "{list:?}"
    );
    target.finish();
}

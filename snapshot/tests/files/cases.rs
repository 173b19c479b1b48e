//! One case a kind.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::signal::{SigSet, Signal, raise};
use nix::unistd::pipe2;
use snapshot::sys::{descriptor, fdioctl, sockopt};

use crate::{Case, at, take};

pub(crate) const ALL: &[Case] = &[
    Case {
        name: "regular",
        make: make_regular,
        check: check_regular,
    },
    Case {
        name: "unlinked",
        make: make_unlinked,
        check: check_unlinked,
    },
    Case {
        name: "memfd",
        make: make_memfd,
        check: check_memfd,
    },
    Case {
        name: "locks",
        make: make_locks,
        check: check_locks,
    },
    Case {
        name: "paths",
        make: make_paths,
        check: check_paths,
    },
    Case {
        name: "pipe",
        make: make_pipe,
        check: check_pipe,
    },
    Case {
        name: "fifo",
        make: make_fifo,
        check: check_fifo,
    },
    Case {
        name: "events",
        make: make_events,
        check: check_events,
    },
    Case {
        name: "epoll",
        make: make_epoll,
        check: check_epoll,
    },
    Case {
        name: "inotify",
        make: make_inotify,
        check: check_inotify,
    },
    Case {
        name: "unix_pairs",
        make: make_pairs,
        check: check_pairs,
    },
    Case {
        name: "unix_names",
        make: make_names,
        check: check_names,
    },
    Case {
        name: "internet",
        make: make_internet,
        check: check_internet,
    },
    Case {
        name: "netlink",
        make: make_netlink,
        check: check_netlink,
    },
    Case {
        name: "terminal",
        make: make_terminal,
        check: check_terminal,
    },
    Case {
        name: "owner",
        make: make_owner,
        check: check_owner,
    },
];

fn flags(fd: &impl AsFd) -> i32 {
    descriptor::fcntl(fd.as_fd(), libc::F_GETFL, 0).unwrap()
}

fn make_regular(dir: &Path) {
    let path = dir.join("file");
    fs::write(&path, "hello world").unwrap();
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    file.seek(SeekFrom::Start(5)).unwrap();
    at(102, file.try_clone().unwrap());
    at(3, file);
    at(
        101,
        OpenOptions::new()
            .append(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_SYNC)
            .open(&path)
            .unwrap(),
    );
    // A file that goes on growing (a log) is the same file.
    at(4, File::open(&path).unwrap());
    fs::write(dir.join("other"), "x").unwrap();
}

fn check_regular(dir: &Path) {
    let (mut first, mut twin, mut append) = (
        File::from(take(3)),
        File::from(take(102)),
        File::from(take(101)),
    );
    let mut three = [0; 3];
    first.read_exact(&mut three).unwrap();
    assert_eq!(&three, b" wo");
    // Duplicates share their offset.
    twin.read_exact(&mut three).unwrap();
    assert_eq!(&three, b"rld");
    let expected = libc::O_APPEND | libc::O_NONBLOCK | libc::O_SYNC | libc::O_WRONLY;
    assert_eq!(flags(&append) & (expected | libc::O_RDWR), expected);
    append.write_all(b"!").unwrap();
    assert!(
        fs::read_to_string(dir.join("file"))
            .unwrap()
            .starts_with("hello world!")
    );
}

fn make_unlinked(dir: &Path) {
    let path = dir.join("gone");
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o640)
        .open(&path)
        .unwrap();
    at(101, OpenOptions::new().read(true).open(&path).unwrap());
    fs::remove_file(&path).unwrap();
    file.write_all(b"start").unwrap();
    file.write_all_at(b"end", 10 << 20).unwrap();
    at(100, file);
}

fn check_unlinked(_: &Path) {
    let (mut file, other) = (File::from(take(100)), File::from(take(101)));
    let stat = other.metadata().unwrap();
    assert_eq!(
        (stat.nlink(), stat.len(), stat.mode() & 0o777),
        (0, (10 << 20) + 3, 0o640)
    );
    assert_eq!(stat.ino(), file.metadata().unwrap().ino());
    assert!(stat.blocks() * 512 < 1 << 20, "the hole was filled");
    assert_eq!(file.stream_position().unwrap(), 5);
    let mut data = [0; 5];
    other.read_exact_at(&mut data, 0).unwrap();
    assert_eq!(&data, b"start");
    file.write_all(b"!").unwrap();
    other.read_exact_at(&mut data[..3], 10 << 20).unwrap();
    assert_eq!(&data[..3], b"end");
    other.read_exact_at(&mut data, 1).unwrap();
    assert_eq!(&data, b"tart!");
}

fn make_memfd(_: &Path) {
    let fd = descriptor::memfd(c"name", libc::MFD_ALLOW_SEALING).unwrap();
    let mut file = File::from(fd);
    file.write_all(b"sealed").unwrap();
    descriptor::fcntl(
        file.as_fd(),
        libc::F_ADD_SEALS,
        libc::F_SEAL_SHRINK | libc::F_SEAL_GROW,
    )
    .unwrap();
    at(100, file);
}

fn check_memfd(_: &Path) {
    let mut file = File::from(take(100));
    assert!(file.set_len(0).is_err());
    assert!(file.write_all(b"x").is_err());
    file.rewind().unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "sealed");
}

fn open_both(path: &Path) -> File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .unwrap()
}

fn make_locks(dir: &Path) {
    let (records, whole) = (
        open_both(&dir.join("records")),
        open_both(&dir.join("whole")),
    );
    at(100, records);
    at(101, whole);
    // Only now: closing any descriptor of the file drops its record locks.
    let (records, whole) = (
        descriptor::borrow(100).unwrap(),
        descriptor::borrow(101).unwrap(),
    );
    descriptor::record_lock(records, false, libc::F_WRLCK, 0, 10).unwrap();
    descriptor::record_lock(records, true, libc::F_WRLCK, 20, 0).unwrap();
    descriptor::flock(whole, libc::LOCK_SH).unwrap();
}

fn check_locks(dir: &Path) {
    // What another description may lock shows what is locked. It must outlive the check: closing drops record locks.
    let other = open_both(&dir.join("records"));
    let may = |start, len| {
        descriptor::record_lock(other.as_fd(), true, libc::F_RDLCK, start, len).is_ok()
    };
    assert_eq!(
        [
            may(0, 1),
            may(9, 1),
            may(10, 10),
            may(20, 1),
            may(1 << 40, 1)
        ],
        [false, false, true, false, false]
    );
    let whole = open_both(&dir.join("whole"));
    assert!(descriptor::flock(whole.as_fd(), libc::LOCK_SH).is_ok());
    assert!(descriptor::flock(whole.as_fd(), libc::LOCK_EX).is_err());
    std::mem::forget(other);
}

fn make_paths(dir: &Path) {
    at(
        100,
        OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/null")
            .unwrap(),
    );
    at(101, File::open("/dev/zero").unwrap());
    at(102, File::open(dir).unwrap());
    let path = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH)
        .open(dir)
        .unwrap();
    at(103, path);
    let mut kernel = File::open("/proc/sys/kernel/ostype").unwrap();
    kernel.read_exact(&mut [0; 2]).unwrap();
    at(104, kernel);
    at(105, File::open("/proc/self/ns/net").unwrap());
}

fn check_paths(dir: &Path) {
    let (mut null, mut zero) = (File::from(take(100)), File::from(take(101)));
    null.write_all(b"x").unwrap();
    assert_eq!(null.read(&mut [1]).unwrap(), 0);
    zero.read_exact(&mut [1; 9]).unwrap();
    assert_eq!(
        File::from(take(102)).metadata().unwrap().ino(),
        dir.metadata().unwrap().ino()
    );
    assert_ne!(flags(&take(103)) & libc::O_PATH, 0);
    let mut rest = String::new();
    File::from(take(104)).read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "nux\n");
    assert_eq!(
        File::from(take(105)).metadata().unwrap().ino(),
        fs::metadata("/proc/self/ns/net").unwrap().ino()
    );
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 251) as u8).collect()
}

fn make_pipe(_: &Path) {
    let (read, write) = pipe2(OFlag::O_NONBLOCK).unwrap();
    descriptor::fcntl(write.as_fd(), libc::F_SETPIPE_SZ, 1 << 18).unwrap();
    assert_eq!(
        nix::unistd::write(&write, &pattern(200_000)).unwrap(),
        200_000
    );
    at(200, read);
    at(100, write);
    let (read, write) = pipe2(OFlag::O_DIRECT).unwrap();
    for packet in [&b"one"[..], b"three", b"x"] {
        nix::unistd::write(&write, packet).unwrap();
    }
    at(101, read);
    at(102, write);
    // The other end is closed: what is in it can be read, then comes the end.
    let (read, write) = pipe2(OFlag::empty()).unwrap();
    nix::unistd::write(&write, b"last").unwrap();
    at(103, read);
    // An empty one, of which only the writing end is left.
    at(104, pipe2(OFlag::empty()).unwrap().1);
}

fn check_pipe(_: &Path) {
    let (read, mut write) = (take(200), File::from(take(100)));
    assert_eq!(
        descriptor::fcntl(read.as_fd(), libc::F_GETPIPE_SZ, 0).unwrap(),
        1 << 18
    );
    let mut data = vec![0; 300_000];
    let mut len = 0;
    while let Ok(n) = nix::unistd::read(&read, &mut data[len..]) {
        len += n;
    }
    assert!(data[..len] == pattern(200_000));
    write.write_all(b"more").unwrap();
    assert_eq!(nix::unistd::read(&read, &mut data).unwrap(), 4);
    drop(write);
    assert_eq!(nix::unistd::read(&read, &mut data).unwrap(), 0);
    let read = take(101);
    for len in [3, 5, 1] {
        assert_eq!(nix::unistd::read(&read, &mut data).unwrap(), len);
    }
    nix::unistd::write(take(102), b"packet").unwrap();
    assert_eq!(nix::unistd::read(&read, &mut data).unwrap(), 6);
    let mut text = String::new();
    File::from(take(103)).read_to_string(&mut text).unwrap();
    assert_eq!(text, "last");
    assert_eq!(
        File::from(take(104)).write(b"x").unwrap_err().kind(),
        ErrorKind::BrokenPipe
    );
}

fn make_fifo(dir: &Path) {
    let path = dir.join("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::from_bits_truncate(0o600)).unwrap();
    let both = open_both(&path);
    at(100, File::open(&path).unwrap());
    at(101, OpenOptions::new().write(true).open(&path).unwrap());
    drop(both);
    nix::unistd::write(descriptor::borrow(101).unwrap(), b"waiting").unwrap();
}

fn check_fifo(_: &Path) {
    let mut read = File::from(take(100));
    let mut data = [0; 7];
    read.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"waiting");
    drop(take(101));
    assert_eq!(read.read(&mut data).unwrap(), 0);
}

fn make_events(_: &Path) {
    let event = descriptor::eventfd(libc::EFD_SEMAPHORE | libc::EFD_NONBLOCK).unwrap();
    nix::unistd::write(&event, &3u64.to_ne_bytes()).unwrap();
    at(100, event);
    use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
    let timer = |clock, when, how| {
        let timer = TimerFd::new(clock, TimerFlags::TFD_NONBLOCK).unwrap();
        timer.set(when, how).unwrap();
        timer
    };
    let (soon, often) = (
        Duration::from_millis(1).into(),
        Duration::from_secs(1000).into(),
    );
    let ticked = timer(
        ClockId::CLOCK_MONOTONIC,
        Expiration::IntervalDelayed(soon, often),
        TimerSetTimeFlags::empty(),
    );
    std::thread::sleep(Duration::from_millis(20));
    at(101, ticked);
    let later = Duration::from_secs(5000).into();
    at(
        102,
        timer(
            ClockId::CLOCK_BOOTTIME,
            Expiration::OneShot(later),
            TimerSetTimeFlags::empty(),
        ),
    );
    let now = std::time::UNIX_EPOCH.elapsed().unwrap();
    let due = (now + Duration::from_secs(300)).into();
    at(
        103,
        timer(
            ClockId::CLOCK_REALTIME,
            Expiration::OneShot(due),
            TimerSetTimeFlags::TFD_TIMER_ABSTIME,
        ),
    );
    let soon = Duration::from_millis(300).into();
    at(
        104,
        timer(
            ClockId::CLOCK_MONOTONIC,
            Expiration::OneShot(soon),
            TimerSetTimeFlags::empty(),
        ),
    );
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGUSR1);
    mask.thread_block().unwrap();
    at(
        105,
        descriptor::signalfd(1 << (Signal::SIGUSR1 as i32 - 1), libc::SFD_NONBLOCK).unwrap(),
    );
}

fn number(fd: &OwnedFd) -> nix::Result<u64> {
    let mut word = [0; 8];
    nix::unistd::read(fd, &mut word)?;
    Ok(u64::from_ne_bytes(word))
}

fn check_events(_: &Path) {
    let event = take(100);
    assert_eq!(
        [number(&event), number(&event), number(&event)],
        [Ok(1), Ok(1), Ok(1)]
    );
    assert_eq!(number(&event), Err(nix::Error::EAGAIN));
    let timer = take(101);
    assert_eq!(number(&timer), Ok(1));
    assert_eq!(number(&timer), Err(nix::Error::EAGAIN));
    let line = |fd: i32| fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap();
    assert!(line(101).contains("it_interval: (1000, 0)") && line(101).contains("it_value: (999, "));
    let left = line(102);
    let left: u64 = left
        .split("it_value: (")
        .nth(1)
        .unwrap()
        .split(',')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    assert!((4000..5000).contains(&left) && line(102).contains("clockid: 7"));
    assert!(line(103).contains("settime flags: 01"));
    // The one that comes soon ticks here too.
    let soon = take(104);
    let mut poll = [nix::poll::PollFd::new(
        soon.as_fd(),
        nix::poll::PollFlags::POLLIN,
    )];
    assert_eq!(nix::poll::poll(&mut poll, 20_000u16).unwrap(), 1);
    assert_eq!(number(&soon), Ok(1));
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGUSR1);
    mask.thread_block().unwrap();
    raise(Signal::SIGUSR1).unwrap();
    let mut info = [0; 128];
    assert_eq!(nix::unistd::read(take(105), &mut info).unwrap(), 128);
    assert_eq!(info[0], Signal::SIGUSR1 as u8);
}

fn make_epoll(_: &Path) {
    let (read, write) = pipe2(OFlag::O_NONBLOCK).unwrap();
    at(100, read);
    at(101, write);
    let event = descriptor::eventfd(libc::EFD_NONBLOCK).unwrap();
    at(102, event);
    let epoll = Epoll::new(EpollCreateFlags::empty()).unwrap();
    let add = |epoll: &Epoll, fd: i32, events, data| {
        epoll
            .add(
                descriptor::borrow(fd).unwrap(),
                EpollEvent::new(events, data),
            )
            .unwrap();
    };
    add(&epoll, 100, EpollFlags::EPOLLIN, 77);
    add(
        &epoll,
        102,
        EpollFlags::EPOLLIN | EpollFlags::EPOLLET,
        u64::MAX,
    );
    // The same pipe under a number that is then closed, and another file under that number later.
    descriptor::place(descriptor::borrow(100).unwrap(), 103, false).unwrap();
    add(&epoll, 103, EpollFlags::EPOLLIN, 78);
    descriptor::place(descriptor::borrow(102).unwrap(), 103, false).unwrap();
    add(&epoll, 103, EpollFlags::EPOLLOUT, 79);
    // A set in a set, at a number that the resumed process uses while it makes things.
    at(4, epoll.0);
    let outer = Epoll::new(EpollCreateFlags::empty()).unwrap();
    add(&outer, 4, EpollFlags::EPOLLIN, 5);
    at(5, outer.0);
    // A descriptor of a process, ourselves.
    let own = descriptor::pidfd_open(std::process::id().cast_signed(), 0).unwrap();
    at(104, own);
    add(
        &Epoll(descriptor::duplicate_number(4, 0).unwrap()),
        104,
        EpollFlags::EPOLLIN,
        80,
    );
}

fn wait(epoll: &Epoll) -> Vec<u64> {
    let mut events = [EpollEvent::empty(); 8];
    let n = epoll.wait(&mut events, EpollTimeout::ZERO).unwrap();
    let mut data: Vec<u64> = events[..n].iter().map(EpollEvent::data).collect();
    data.sort_unstable();
    data
}

fn check_epoll(_: &Path) {
    let (epoll, outer) = (Epoll(take(4)), Epoll(take(5)));
    let info = |fd: i32| fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap();
    assert!(info(104).contains(&format!("Pid:\t{}\n", std::process::id())));
    assert!(
        info(4)
            .lines()
            .any(|line| line.starts_with("tfd:      104 "))
    );
    assert_eq!(wait(&epoll), [79]);
    assert_eq!(wait(&outer), [5]);
    let writer = take(101);
    nix::unistd::write(&writer, b"x").unwrap();
    assert_eq!(wait(&epoll), [77, 78, 79]);
    nix::unistd::write(take(102), &1u64.to_ne_bytes()).unwrap();
    assert_eq!(wait(&epoll), [77, 78, 79, u64::MAX]);
    assert_eq!(wait(&epoll), [77, 78, 79]);
    // The number that a watch was added under still names it.
    epoll
        .modify(
            descriptor::borrow(100).unwrap(),
            &mut EpollEvent::new(EpollFlags::EPOLLOUT, 1),
        )
        .unwrap();
    assert_eq!(wait(&epoll), [78, 79]);
}

fn make_inotify(dir: &Path) {
    fs::create_dir(dir.join("watched")).unwrap();
    let inotify = descriptor::inotify(libc::IN_NONBLOCK).unwrap();
    let path = |path: &Path| std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    fs::write(dir.join("first"), "").unwrap();
    descriptor::inotify_watch(inotify.as_fd(), &path(&dir.join("first")), libc::IN_OPEN).unwrap();
    let wd = descriptor::inotify_watch(
        inotify.as_fd(),
        &path(&dir.join("watched")),
        libc::IN_CREATE,
    )
    .unwrap();
    assert_eq!(wd, 2);
    at(100, inotify);
}

fn check_inotify(dir: &Path) {
    let inotify = take(100);
    File::open(dir.join("first")).unwrap();
    let name = dir.join("watched").join(std::process::id().to_string());
    fs::write(name, "").unwrap();
    let mut events = [0; 512];
    let n = nix::unistd::read(&inotify, &mut events).unwrap();
    let word = |at: usize| u32::from_ne_bytes(events[at..at + 4].try_into().unwrap());
    assert_eq!((word(0), word(4), word(12)), (1, libc::IN_OPEN, 0));
    assert_eq!((word(16), word(20)), (2, libc::IN_CREATE));
    assert!(n > 32);
}

fn make_pairs(_: &Path) {
    let (a, b) = UnixStream::pair().unwrap();
    (&a).write_all(&pattern(100_000)).unwrap();
    (&b).write_all(b"back").unwrap();
    b.shutdown(std::net::Shutdown::Write).unwrap();
    at(100, a);
    at(101, b);
    for (kind, number) in [(libc::SOCK_DGRAM, 102), (libc::SOCK_SEQPACKET, 104)] {
        let (a, b) = sockopt::pair(kind | libc::SOCK_NONBLOCK).unwrap();
        for message in [&b"one"[..], b"", b"three"] {
            let skip_empty = kind == libc::SOCK_SEQPACKET && message.is_empty();
            if !skip_empty {
                sockopt::send(a.as_fd(), message, &[]).unwrap();
            }
        }
        at(number, a);
        at(number + 1, b);
    }
    let (a, b) = UnixStream::pair().unwrap();
    (&b).write_all(b"bye").unwrap();
    at(106, a);
}

fn check_pairs(_: &Path) {
    let (mut a, mut b) = (UnixStream::from(take(100)), UnixStream::from(take(101)));
    let mut data = vec![0; 100_000];
    b.read_exact(&mut data).unwrap();
    assert!(data == pattern(100_000));
    let mut text = String::new();
    a.read_to_string(&mut text).unwrap();
    assert_eq!(text, "back");
    a.write_all(b"on").unwrap();
    b.read_exact(&mut data[..2]).unwrap();
    assert_eq!(b.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    for (number, lengths) in [(102, &[3, 0, 5][..]), (104, &[3, 5])] {
        let (a, b) = (take(number), take(number + 1));
        for len in lengths {
            assert_eq!(nix::unistd::read(&b, &mut data).unwrap(), *len);
        }
        assert_eq!(nix::unistd::read(&b, &mut data), Err(nix::Error::EAGAIN));
        sockopt::send(a.as_fd(), b"again", &[]).unwrap();
        assert_eq!(nix::unistd::read(&b, &mut data).unwrap(), 5);
    }
    let mut text = String::new();
    UnixStream::from(take(106))
        .read_to_string(&mut text)
        .unwrap();
    assert_eq!(text, "bye");
}

fn abstract_name(dir: &Path) -> SocketAddr {
    SocketAddr::from_abstract_name(dir.to_str().unwrap()).unwrap()
}

fn make_names(dir: &Path) {
    at(100, UnixListener::bind(dir.join("listener")).unwrap());
    at(101, UnixListener::bind_addr(&abstract_name(dir)).unwrap());
    let server = UnixDatagram::bind(dir.join("log")).unwrap();
    let client = UnixDatagram::unbound().unwrap();
    client.connect(dir.join("log")).unwrap();
    client.send(b"queued").unwrap();
    at(102, server);
    at(103, client);
    // A connection that was accepted.
    let client = UnixStream::connect(dir.join("listener")).unwrap();
    let listener = UnixListener::from(descriptor::duplicate_number(100, 0).unwrap());
    let (server, _) = listener.accept().unwrap();
    (&client).write_all(b"request").unwrap();
    at(104, client);
    at(105, server);
}

fn check_names(dir: &Path) {
    let mut data = [0; 16];
    for (number, address) in [
        (
            100,
            SocketAddr::from_pathname(dir.join("listener")).unwrap(),
        ),
        (101, abstract_name(dir)),
    ] {
        let listener = UnixListener::from(take(number));
        let mut client = UnixStream::connect_addr(&address).unwrap();
        client.write_all(b"x").unwrap();
        listener
            .accept()
            .unwrap()
            .0
            .read_exact(&mut data[..1])
            .unwrap();
    }
    let (server, client) = (UnixDatagram::from(take(102)), UnixDatagram::from(take(103)));
    assert_eq!(server.recv(&mut data).unwrap(), 6);
    client.send(b"next!").unwrap();
    assert_eq!(server.recv(&mut data).unwrap(), 5);
    let (client, mut server) = (UnixStream::from(take(104)), UnixStream::from(take(105)));
    server.read_exact(&mut data[..7]).unwrap();
    assert_eq!(&data[..7], b"request");
    drop(client);
    assert_eq!(server.read(&mut data).unwrap(), 0);
}

fn make_internet(dir: &Path) {
    let (v4, v6) = (
        TcpListener::bind("127.0.0.1:0").unwrap(),
        TcpListener::bind("[::1]:0").unwrap(),
    );
    sockopt::set_int(v4.as_fd(), libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT, 3).unwrap();
    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
    sender.connect(udp.local_addr().unwrap()).unwrap();
    sender.send(b"first").unwrap();
    sender.send(b"second").unwrap();
    let ports = [
        v4.local_addr().unwrap(),
        v6.local_addr().unwrap(),
        udp.local_addr().unwrap(),
    ];
    fs::write(dir.join("ports"), serde_json::to_string(&ports).unwrap()).unwrap();
    sockopt::set_int(udp.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUF, 70_000).unwrap();
    at(100, v4);
    at(101, v6);
    at(102, udp);
    at(
        103,
        sockopt::socket(libc::AF_INET, libc::SOCK_STREAM, 0).unwrap(),
    );
}

fn check_internet(dir: &Path) {
    let ports: [std::net::SocketAddr; 3] =
        serde_json::from_slice(&fs::read(dir.join("ports")).unwrap()).unwrap();
    let v4 = take(100);
    assert_ne!(
        sockopt::get_int(v4.as_fd(), libc::IPPROTO_TCP, libc::TCP_DEFER_ACCEPT).unwrap(),
        0
    );
    for (listener, port) in [(v4, ports[0]), (take(101), ports[1])] {
        let mut client = TcpStream::connect(port).unwrap();
        client.write_all(b"x").unwrap();
        TcpListener::from(listener)
            .accept()
            .unwrap()
            .0
            .read_exact(&mut [0])
            .unwrap();
    }
    let udp = UdpSocket::from(take(102));
    assert_eq!(udp.local_addr().unwrap(), ports[2]);
    assert_eq!(
        sockopt::get_int(udp.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUF).unwrap(),
        140_000
    );
    let mut data = [0; 16];
    assert_eq!(udp.recv(&mut data).unwrap(), 5);
    assert_eq!(udp.recv(&mut data).unwrap(), 6);
    sockopt::listen(take(103).as_fd(), 1).unwrap();
}

fn make_netlink(_: &Path) {
    let fd = sockopt::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE).unwrap();
    let mut address = [0; 12];
    address[0] = libc::AF_NETLINK as u8;
    address[8] = 1;
    sockopt::bind(fd.as_fd(), &address).unwrap();
    at(100, fd);
}

fn check_netlink(_: &Path) {
    let address = sockopt::own_address(take(100).as_fd()).unwrap();
    assert_ne!(address[4..8], [0; 4]);
    assert_eq!(address[8..12], [1, 0, 0, 0]);
}

fn make_terminal(_: &Path) {
    let master = open_both(Path::new("/dev/ptmx"));
    fdioctl::lock_pty(master.as_fd(), false).unwrap();
    let slave = fdioctl::open_slave(master.as_fd(), libc::O_RDWR | libc::O_NOCTTY).unwrap();
    fdioctl::set_window_size(master.as_fd(), [40, 120, 1, 2]).unwrap();
    let mut raw = nix::sys::termios::tcgetattr(&slave).unwrap();
    nix::sys::termios::cfmakeraw(&mut raw);
    nix::sys::termios::tcsetattr(&slave, nix::sys::termios::SetArg::TCSANOW, &raw).unwrap();
    at(100, master);
    at(101, slave);
}

fn check_terminal(_: &Path) {
    let (mut master, mut slave) = (File::from(take(100)), File::from(take(101)));
    assert_eq!(
        fdioctl::window_size(slave.as_fd()).unwrap(),
        [40, 120, 1, 2]
    );
    // Raw: no echo, no line by line.
    master.write_all(b"ab").unwrap();
    let mut two = [0; 2];
    slave.read_exact(&mut two).unwrap();
    slave.write_all(b"c\n").unwrap();
    master.read_exact(&mut two).unwrap();
    assert_eq!(&two, b"c\n");
    assert!(slave.as_raw_fd() == 101);
}

fn make_owner(_: &Path) {
    let (a, b) = UnixStream::pair().unwrap();
    let parent = nix::unistd::getppid().as_raw();
    descriptor::set_owner(a.as_fd(), 1, parent).unwrap();
    descriptor::fcntl(a.as_fd(), 10, libc::SIGURG).unwrap();
    descriptor::fcntl(a.as_fd(), libc::F_SETFL, libc::O_ASYNC).unwrap();
    at(100, a);
    at(101, b);
}

fn check_owner(_: &Path) {
    let fd = take(100);
    assert_eq!(
        descriptor::owner(fd.as_fd()).unwrap(),
        (1, nix::unistd::getppid().as_raw())
    );
    assert_eq!(descriptor::fcntl(fd.as_fd(), 11, 0).unwrap(), libc::SIGURG);
    assert_ne!(flags(&fd) & libc::O_ASYNC, 0);
}

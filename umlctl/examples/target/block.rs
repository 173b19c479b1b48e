//! One thread sits in a system call; another ends the call as soon as a file appears.

use super::Status;
use std::ffi::CString;
use std::path::Path;
use std::time::Duration;

const LONG: i64 = 2;

fn last() -> i64 {
    i64::from(std::io::Error::last_os_error().raw_os_error().unwrap_or(0))
}

fn pair(how: unsafe extern "C" fn(*mut i32) -> i32) -> (i32, i32) {
    let mut fds = [0; 2];
    // SAFETY: room for two numbers.
    assert_eq!(unsafe { how(fds.as_mut_ptr()) }, 0);
    (fds[0], fds[1])
}

fn sockets() -> (i32, i32) {
    let mut fds = [0; 2];
    // SAFETY: room for two numbers.
    let r = unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, fds.as_mut_ptr()) };
    assert_eq!(r, 0);
    (fds[0], fds[1])
}

fn put(fd: i32) {
    // SAFETY: a byte that lives.
    unsafe { libc::write(fd, b"x".as_ptr().cast(), 1) };
}

type Call = Box<dyn FnOnce() -> i64 + Send>;
type End = Box<dyn FnOnce() + Send>;

extern "C" fn nothing(_: i32) {}

/// The call, and what ends it.
#[allow(clippy::too_many_lines)]
fn prepare(name: &str, go: &str) -> (Call, End) {
    let none: End = Box::new(|| {});
    let dir = Path::new(go).parent().unwrap().to_owned();
    let mut byte = [0u8; 64];
    // SAFETY: each call gets pointers to what lives through it, or numbers.
    unsafe {
        let me = libc::pthread_self();
        let long = libc::timespec {
            tv_sec: LONG,
            tv_nsec: 0,
        };
        let (r, w) = pair(libc::pipe);
        let read_of = |fd: i32| -> Call {
            Box::new(move || libc::read(fd, byte.as_mut_ptr().cast(), 8) as i64)
        };
        let write_to = |fd: i32| -> End { Box::new(move || put(fd)) };
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        let mut usr: libc::sigset_t = set;
        libc::sigaddset(&raw mut usr, libc::SIGUSR1);
        libc::signal(libc::SIGUSR1, nothing as *const () as usize);
        let signal: End = Box::new(move || {
            libc::pthread_kill(me, libc::SIGUSR1);
        });
        let pollfd = libc::pollfd {
            fd: r,
            events: libc::POLLIN,
            revents: 0,
        };
        let epoll = || {
            let e = libc::epoll_create1(0);
            let mut event = libc::epoll_event {
                events: libc::EPOLLIN as u32,
                u64: 1,
            };
            libc::epoll_ctl(e, libc::EPOLL_CTL_ADD, r, &raw mut event);
            e
        };
        let fd_set = || {
            let mut s: libc::fd_set = std::mem::zeroed();
            libc::FD_SET(r, &raw mut s);
            s
        };
        let futex = |timeout: Option<libc::timespec>| -> (Call, End) {
            let word = Box::leak(Box::new(0u32));
            let at = std::ptr::from_mut(word) as usize;
            (
                Box::new(move || {
                    let t = timeout
                        .as_ref()
                        .map_or(std::ptr::null(), std::ptr::from_ref);
                    libc::syscall(libc::SYS_futex, at, libc::FUTEX_WAIT, 0, t)
                }),
                Box::new(move || {
                    libc::syscall(libc::SYS_futex, at, libc::FUTEX_WAKE, 1);
                }),
            )
        };
        let key = std::process::id() as i32 ^ 0x5a00_0000;
        let sem = |timeout: Option<libc::timespec>| -> (Call, End) {
            let id = libc::semget(key, 1, libc::IPC_CREAT | 0o600);
            let mut op = libc::sembuf {
                sem_num: 0,
                sem_op: -1,
                sem_flg: 0,
            };
            (
                Box::new(move || {
                    let t = timeout
                        .as_ref()
                        .map_or(std::ptr::null(), std::ptr::from_ref);
                    let r = i64::from(if timeout.is_some() {
                        libc::syscall(libc::SYS_semtimedop, id, &raw mut op, 1, t) as i32
                    } else {
                        libc::semop(id, &raw mut op, 1)
                    });
                    let e = last();
                    libc::semctl(id, 0, libc::IPC_RMID);
                    *libc::__errno_location() = e as i32;
                    r
                }),
                Box::new(move || {
                    let mut up = libc::sembuf {
                        sem_num: 0,
                        sem_op: 1,
                        sem_flg: 0,
                    };
                    libc::semop(id, &raw mut up, 1);
                }),
            )
        };
        let path = CString::new(dir.join("lock").to_str().unwrap()).unwrap();
        let two = || {
            let o = || libc::open(path.as_ptr(), libc::O_RDWR | libc::O_CREAT, 0o600);
            (o(), o())
        };
        match name {
            "nanosleep" => (
                Box::new(move || i64::from(libc::nanosleep(&raw const long, std::ptr::null_mut()))),
                none,
            ),
            "clock_nanosleep" => (
                Box::new(move || {
                    let mut t: libc::timespec = std::mem::zeroed();
                    libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut t);
                    t.tv_sec += LONG;
                    let e = libc::clock_nanosleep(
                        libc::CLOCK_MONOTONIC,
                        libc::TIMER_ABSTIME,
                        &raw const t,
                        std::ptr::null_mut(),
                    );
                    *libc::__errno_location() = e;
                    if e == 0 { 0 } else { -1 }
                }),
                none,
            ),
            "poll" | "poll-timeout" => {
                let ms = if name == "poll" {
                    -1
                } else {
                    LONG as i32 * 1000
                };
                let end = if name == "poll" { write_to(w) } else { none };
                let mut p = pollfd;
                (
                    Box::new(move || i64::from(libc::poll(&raw mut p, 1, ms))),
                    end,
                )
            }
            "ppoll" | "ppoll-signal" => {
                let end = if name == "ppoll" {
                    write_to(w)
                } else {
                    libc::pthread_sigmask(libc::SIG_BLOCK, &raw const usr, std::ptr::null_mut());
                    signal
                };
                let mut p = pollfd;
                (
                    Box::new(move || {
                        i64::from(libc::ppoll(&raw mut p, 1, std::ptr::null(), &raw const set))
                    }),
                    end,
                )
            }
            "select" => {
                let mut s = fd_set();
                let n = std::ptr::null_mut;
                (
                    Box::new(move || {
                        i64::from(libc::select(r + 1, &raw mut s, n(), n(), n().cast()))
                    }),
                    write_to(w),
                )
            }
            "pselect6" => {
                let mut s = fd_set();
                let n = std::ptr::null_mut;
                (
                    Box::new(move || {
                        i64::from(libc::pselect(
                            r + 1,
                            &raw mut s,
                            n(),
                            n(),
                            &raw const long,
                            &raw const set,
                        ))
                    }),
                    none,
                )
            }
            "epoll_wait" | "epoll_wait-timeout" => {
                let e = epoll();
                let (ms, end) = if name == "epoll_wait" {
                    (-1, write_to(w))
                } else {
                    (LONG as i32 * 1000, none)
                };
                (
                    Box::new(move || {
                        let mut event: libc::epoll_event = std::mem::zeroed();
                        libc::syscall(libc::SYS_epoll_wait, e, &raw mut event, 1, ms)
                    }),
                    end,
                )
            }
            "epoll_pwait" | "epoll_pwait-signal" => {
                let e = epoll();
                let end = if name == "epoll_pwait" {
                    write_to(w)
                } else {
                    libc::pthread_sigmask(libc::SIG_BLOCK, &raw const usr, std::ptr::null_mut());
                    signal
                };
                (
                    Box::new(move || {
                        let mut event: libc::epoll_event = std::mem::zeroed();
                        i64::from(libc::epoll_pwait(e, &raw mut event, 1, -1, &raw const set))
                    }),
                    end,
                )
            }
            "read-pipe" => (read_of(r), write_to(w)),
            "read-signal" => (read_of(r), {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = nothing as *const () as usize;
                libc::sigaction(libc::SIGUSR1, &raw const action, std::ptr::null_mut());
                signal
            }),
            "read-socket" => {
                let (a, b) = sockets();
                (read_of(a), write_to(b))
            }
            "read-tty" => {
                let (mut m, mut s) = (0, 0);
                let n = std::ptr::null_mut::<i8>();
                libc::openpty(&raw mut m, &raw mut s, n, n.cast(), n.cast());
                (
                    read_of(s),
                    Box::new(move || {
                        libc::write(m, b"x\n".as_ptr().cast(), 2);
                    }),
                )
            }
            "read-inotify" => {
                let i = libc::inotify_init();
                let d = CString::new(dir.join("watched").to_str().unwrap()).unwrap();
                libc::mkdir(d.as_ptr(), 0o700);
                libc::inotify_add_watch(i, d.as_ptr(), libc::IN_CREATE);
                (
                    Box::new(move || libc::read(i, byte.as_mut_ptr().cast(), 64) as i64),
                    Box::new(move || std::fs::write(dir.join("watched/x"), "x").unwrap()),
                )
            }
            "read-eventfd" => {
                let e = libc::eventfd(0, 0);
                (
                    read_of(e),
                    Box::new(move || {
                        libc::write(e, 1u64.to_le_bytes().as_ptr().cast(), 8);
                    }),
                )
            }
            "read-timerfd" => {
                let t = libc::timerfd_create(libc::CLOCK_MONOTONIC, 0);
                let mut when: libc::itimerspec = std::mem::zeroed();
                when.it_value = long;
                libc::timerfd_settime(t, 0, &raw const when, std::ptr::null_mut());
                (read_of(t), none)
            }
            "write-pipe" => {
                let page = vec![0u8; 65536];
                libc::write(w, page.as_ptr().cast(), page.len());
                (
                    Box::new(move || libc::write(w, byte.as_ptr().cast(), 1) as i64),
                    Box::new(move || {
                        let mut room = vec![0u8; 65536];
                        libc::read(r, room.as_mut_ptr().cast(), room.len());
                    }),
                )
            }
            "recvmsg" | "recvmsg-timeout" => {
                let (a, b) = sockets();
                if name == "recvmsg-timeout" {
                    let t = libc::timeval {
                        tv_sec: 30,
                        tv_usec: 0,
                    };
                    libc::setsockopt(
                        a,
                        libc::SOL_SOCKET,
                        libc::SO_RCVTIMEO,
                        (&raw const t).cast(),
                        16,
                    );
                }
                (
                    Box::new(move || {
                        let mut iov = libc::iovec {
                            iov_base: byte.as_mut_ptr().cast(),
                            iov_len: 8,
                        };
                        let mut m: libc::msghdr = std::mem::zeroed();
                        m.msg_iov = &raw mut iov;
                        m.msg_iovlen = 1;
                        libc::recvmsg(a, &raw mut m, 0) as i64
                    }),
                    write_to(b),
                )
            }
            "accept" => {
                let s = libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0);
                libc::listen(s, 5);
                (
                    Box::new(move || {
                        i64::from(libc::accept(s, std::ptr::null_mut(), std::ptr::null_mut()))
                    }),
                    Box::new(move || {
                        let mut a: libc::sockaddr_in = std::mem::zeroed();
                        let mut len = 16;
                        libc::getsockname(s, (&raw mut a).cast(), &raw mut len);
                        let c = libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0);
                        libc::connect(c, (&raw const a).cast(), 16);
                    }),
                )
            }
            "futex" => futex(None),
            "futex-timeout" => (futex(Some(long)).0, none),
            "semop" => sem(None),
            "semtimedop" => sem(Some(libc::timespec {
                tv_sec: 30,
                tv_nsec: 0,
            })),
            "msgrcv" => {
                let id = libc::msgget(key, libc::IPC_CREAT | 0o600);
                (
                    Box::new(move || {
                        let r = libc::msgrcv(id, byte.as_mut_ptr().cast(), 8, 0, 0) as i64;
                        let e = last();
                        libc::msgctl(id, libc::IPC_RMID, std::ptr::null_mut());
                        *libc::__errno_location() = e as i32;
                        r
                    }),
                    Box::new(move || {
                        let m = [1u64, 7];
                        libc::msgsnd(id, m.as_ptr().cast(), 8, 0);
                    }),
                )
            }
            "rt_sigtimedwait" | "rt_sigtimedwait-timeout" => {
                libc::pthread_sigmask(libc::SIG_BLOCK, &raw const usr, std::ptr::null_mut());
                let t = (name != "rt_sigtimedwait").then_some(libc::timespec {
                    tv_sec: 30,
                    tv_nsec: 0,
                });
                (
                    Box::new(move || {
                        let t = t.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
                        libc::syscall(libc::SYS_rt_sigtimedwait, &raw const usr, 0, t, 8)
                    }),
                    signal,
                )
            }
            "sigsuspend" => {
                libc::pthread_sigmask(libc::SIG_BLOCK, &raw const usr, std::ptr::null_mut());
                (
                    Box::new(move || i64::from(libc::sigsuspend(&raw const set))),
                    signal,
                )
            }
            "pause" => (Box::new(|| i64::from(libc::pause())), signal),
            "wait4" => {
                let child = libc::fork();
                if child == 0 {
                    let go = CString::new(go).unwrap();
                    while libc::access(go.as_ptr(), 0) != 0 {
                        libc::usleep(2000);
                    }
                    libc::_exit(0);
                }
                (
                    Box::new(move || {
                        i64::from(libc::waitpid(child, std::ptr::null_mut(), 0) == child) - 1
                    }),
                    none,
                )
            }
            "flock" => {
                let (a, b) = two();
                libc::flock(b, libc::LOCK_EX);
                (
                    Box::new(move || i64::from(libc::flock(a, libc::LOCK_EX))),
                    Box::new(move || {
                        libc::flock(b, libc::LOCK_UN);
                    }),
                )
            }
            "fcntl" => {
                let (a, b) = two();
                let lock = move |fd, kind: i32, how| {
                    let mut l: libc::flock = std::mem::zeroed();
                    l.l_type = kind as i16;
                    libc::fcntl(fd, how, &raw mut l)
                };
                lock(b, libc::F_WRLCK, libc::F_OFD_SETLKW);
                (
                    Box::new(move || i64::from(lock(a, libc::F_WRLCK, libc::F_OFD_SETLKW))),
                    Box::new(move || {
                        lock(b, libc::F_UNLCK, libc::F_OFD_SETLK);
                    }),
                )
            }
            "mq_receive" => {
                let n = CString::new(format!("/target-{}", std::process::id())).unwrap();
                let q = libc::mq_open(
                    n.as_ptr(),
                    libc::O_RDWR | libc::O_CREAT,
                    0o600,
                    std::ptr::null::<libc::mq_attr>(),
                );
                libc::mq_unlink(n.as_ptr());
                (
                    Box::new(move || {
                        let mut room = vec![0u8; 8192];
                        libc::mq_receive(q, room.as_mut_ptr().cast(), 8192, std::ptr::null_mut())
                            as i64
                    }),
                    Box::new(move || {
                        libc::mq_send(q, c"x".as_ptr(), 1, 0);
                    }),
                )
            }
            _ => panic!("no call {name}"),
        }
    }
}

/// Status: 1 before the call; 2, its result and errno after it, and whether a wait with a limit was as long as that.
pub fn run(status: &Status, name: &str, go: &str) {
    let (call, end) = prepare(name, go);
    let path = go.to_owned();
    std::thread::spawn(move || {
        while !Path::new(&path).exists() {
            std::thread::sleep(Duration::from_millis(2));
        }
        end();
        loop {
            std::thread::sleep(Duration::from_secs(1));
        }
    });
    status.put(&[1]);
    let begin = std::time::Instant::now();
    let r = call();
    let e = if r < 0 { last() } else { 0 };
    let full = begin.elapsed() >= Duration::from_secs(LONG as u64);
    status.put(&[2, r as u64, e as u64, u64::from(full)]);
    loop {
        std::thread::sleep(Duration::from_secs(1));
    }
}

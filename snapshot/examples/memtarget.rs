//! A process whose memory is saved by the tests and by `memsave`: writers, and a thread that does all that can happen to
//! mappings. Arguments: `socket=PATH mb=N writers=N storm=0|1 huge=0|1 sparse=0|1 pace_us=N`.
#![allow(unsafe_code, missing_docs, clippy::undocumented_unsafe_blocks)]

use std::io::{IoSlice, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

const P: usize = 4096;
/// Words of the control page: hold storms, a storm's call is under way, end, started writers; from 16 on figures.
const HOLD: usize = 0;
const BUSY: usize = 1;
const END: usize = 2;
const ENDED: usize = 3;
const SLOW_N: usize = 16;
const SLOW_NS: usize = 17;
const SLOW_MAX: usize = 18;
const STORMS: usize = 19;
const WRITES: usize = 20;
const PAGES: usize = 512;

fn map(len: usize, flags: i32, fd: RawFd) -> usize {
    let p = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            fd,
            0,
        )
    };
    assert_ne!(p, libc::MAP_FAILED, "mmap");
    p as usize
}

fn anon(len: usize) -> usize {
    map(
        len,
        libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
        -1,
    )
}

fn put(at: usize, v: u64) {
    unsafe { (at as *mut u64).write_volatile(v) }
}

struct Control(usize);

impl Control {
    fn word(&self, i: usize) -> &AtomicU64 {
        unsafe { &*((self.0 + i * 8) as *const AtomicU64) }
    }

    /// A call that changes mappings: not while they are held.
    fn call<T>(&self, f: impl FnOnce() -> T) -> T {
        loop {
            self.word(BUSY).store(1, SeqCst);
            if self.word(HOLD).load(SeqCst) == 0 {
                break;
            }
            self.word(BUSY).store(0, SeqCst);
            std::thread::sleep(Duration::from_micros(200));
        }
        let r = f();
        self.word(BUSY).store(0, SeqCst);
        r
    }
}

struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) as usize % below.max(1)
    }
}

fn writer(c: &Control, n: usize, start: usize, pages: std::ops::Range<usize>, pace: u64) {
    let mut r = Random(0x9e37_79b9 + n as u64);
    let mut seq = 1;
    let (mut slow, mut slow_ns, mut max) = (0, 0, 0);
    while c.word(END).load(SeqCst) == 0 {
        seq += 1;
        let page = pages.start + r.next(pages.len());
        let begin = Instant::now();
        let at = start + page * P;
        put(at, seq);
        put(at + 8 * (1 + (seq as usize % 510)), seq ^ n as u64);
        put(at + 8 * 511, !seq);
        let ns = begin.elapsed().as_nanos() as u64;
        c.word(PAGES + page).store(seq, SeqCst);
        if ns > 1500 {
            slow += 1;
            slow_ns += ns;
            max = max.max(ns);
            c.word(SLOW_N).fetch_add(1, SeqCst);
            c.word(SLOW_NS).fetch_add(ns, SeqCst);
            c.word(SLOW_MAX).fetch_max(ns, SeqCst);
        }
        c.word(WRITES).fetch_add(1, SeqCst);
        if pace > 0 {
            let until = begin + Duration::from_micros(pace);
            while Instant::now() < until {
                std::hint::spin_loop();
            }
        }
    }
    std::hint::black_box((slow, slow_ns, max));
    c.word(ENDED).fetch_add(1, SeqCst);
}

const PLACES: usize = 24;
const ROOM: usize = 64 * P;

fn storm(c: &Control) {
    let area = anon(PLACES * ROOM + (4 << 20));
    let mut have = [0usize; PLACES];
    let mut r = Random(77);
    c.call(|| unsafe { libc::munmap(area as *mut _, PLACES * ROOM) });
    let mut fds = [0; 2];
    unsafe { libc::pipe(fds.as_mut_ptr()) };
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    while c.word(END).load(SeqCst) == 0 {
        let i = r.next(PLACES);
        let at = (area + i * ROOM) as *mut libc::c_void;
        let n = have[i];
        let page = |r: &mut Random| area + i * ROOM + r.next(n) * P;
        match r.next(12) {
            0 | 1 => {
                let n = 1 + r.next(64);
                have[i] = n;
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
                c.call(|| unsafe { libc::munmap(at, ROOM) });
                c.call(|| unsafe { libc::mmap(at, n * P, rw, flags, -1, 0) });
                for _ in 0..n / 2 {
                    let p = area + i * ROOM + r.next(n) * P;
                    put(p + r.next(512) * 8, p as u64);
                }
            }
            2 if n > 0 => {
                let j = r.next(PLACES);
                if j != i && n > 1 {
                    let to = (area + j * ROOM) as *mut libc::c_void;
                    c.call(|| unsafe { libc::munmap(to, ROOM) });
                    let how = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                    c.call(|| unsafe { libc::mremap(at, n * P, n * P, how, to) });
                    (have[j], have[i]) = (n, 0);
                }
            }
            3 if n > 0 => {
                let more = n + r.next(65 - n);
                if more > n && c.call(|| unsafe { libc::mremap(at, n * P, more * P, 0) }) == at {
                    have[i] = more;
                }
            }
            4 if n > 0 => {
                let (p, how) = (
                    page(&mut r),
                    [libc::MADV_DONTNEED, libc::MADV_FREE][r.next(2)],
                );
                let len = (area + i * ROOM + n * P - p).min((1 + r.next(16)) * P);
                c.call(|| unsafe { libc::madvise(p as *mut _, len, how) });
            }
            5 if n > 0 => {
                // A guard, taken away again half of the time before anything touches it.
                let p = page(&mut r) as *mut libc::c_void;
                c.call(|| unsafe { libc::madvise(p, P, 102) });
                c.call(|| unsafe { libc::madvise(p, P, 103) });
            }
            6 if n > 0 => {
                let p = page(&mut r) as *mut libc::c_void;
                c.call(|| unsafe { libc::mprotect(p, P, libc::PROT_NONE) });
                if r.next(2) == 0 {
                    std::thread::sleep(Duration::from_micros(300));
                }
                c.call(|| unsafe { libc::mprotect(p, P, rw) });
            }
            7 => {
                c.call(|| unsafe {
                    let pid = libc::fork();
                    if pid == 0 {
                        for p in 0..n {
                            put(area + i * ROOM + p * P, 1);
                        }
                        libc::_exit(0);
                    }
                    libc::waitpid(pid, std::ptr::null_mut(), 0);
                });
            }
            8 if n > 0 => {
                // The kernel writes.
                let p = page(&mut r) as *mut libc::c_void;
                let text = [r.next(250) as u8; 300];
                unsafe {
                    libc::write(fds[1], text.as_ptr().cast(), text.len());
                    libc::read(fds[0], p, text.len());
                }
            }
            _ if n > 0 => {
                for _ in 0..8 {
                    let p = page(&mut r);
                    put(p + r.next(512) * 8, r.next(1 << 40) as u64);
                }
            }
            _ => {}
        }
        c.word(STORMS).fetch_add(1, SeqCst);
    }
    c.word(ENDED).fetch_add(1, SeqCst);
}

/// Grows the stack, deeper each time.
fn deep(n: usize) -> usize {
    let room = [n as u8; 16 << 10];
    std::hint::black_box(&room);
    if n == 0 {
        0
    } else {
        deep(n - 1) + room[n % 100] as usize
    }
}

fn main() {
    let arg = |name: &str| {
        let found =
            std::env::args().find_map(|a| a.strip_prefix(&format!("{name}=")).map(str::to_owned));
        found.unwrap_or_else(|| "0".into())
    };
    let num = |name: &str| arg(name).parse::<usize>().unwrap();
    let pages = num("mb") * 256;
    let len = (PAGES + pages) * 8;
    let shared = memfd(len);
    let c: &'static Control = Box::leak(Box::new(Control(map(len, libc::MAP_SHARED, shared))));
    let start = anon(pages * P + (2 << 20)).next_multiple_of(2 << 20);
    let advice = if num("huge") == 1 {
        libc::MADV_HUGEPAGE
    } else {
        libc::MADV_NOHUGEPAGE
    };
    unsafe { libc::madvise(start as *mut _, pages * P, advice) };
    for p in 0..pages {
        for w in 0..512 {
            put(start + p * P + w * 8, (p * 512 + w) as u64 | 1 << 50);
        }
        put(start + p * P, 1);
        c.word(PAGES + p).store(1, SeqCst);
    }
    if num("sparse") == 1 {
        let huge = anon(1 << 40);
        for i in 0..50 {
            put(huge + i * (20 << 30) + 4096 * i, i as u64 + 1);
        }
    }
    let uffd = snapshot::sys::uffd::create().expect("userfaultfd");
    let mut stream = UnixStream::connect(arg("socket")).expect("connect");
    let more = snapshot::sys::uffd::create().expect("userfaultfd");
    let fds = [uffd.as_raw_fd(), shared, more.as_raw_fd()];
    let text = (start as u64).to_le_bytes();
    sendmsg::<()>(
        stream.as_raw_fd(),
        &[IoSlice::new(&text)],
        &[ControlMessage::ScmRights(&fds)],
        MsgFlags::empty(),
        None,
    )
    .expect("sendmsg");
    drop((uffd, more));
    let (writers, pace) = (num("writers"), num("pace_us") as u64);
    for n in 0..writers {
        let share = pages * n / writers..pages * (n + 1) / writers;
        std::thread::spawn(move || writer(c, n, start, share, pace));
    }
    if num("storm") == 1 {
        std::thread::spawn(move || storm(c));
    }
    stream.write_all(b"r").expect("ready");
    // Its memory is looked at after the writers have ended: it goes when the test does.
    stream
        .set_read_timeout(Some(Duration::from_millis(3)))
        .unwrap();
    let mut depth = 1;
    let orphan_too = num("survive") == 1;
    while !matches!(std::io::Read::read(&mut stream, &mut [0]), Ok(0)) || orphan_too {
        if unsafe { libc::getppid() } == 1 || orphan_too {
            std::thread::sleep(Duration::from_millis(3));
        }
        if num("storm") == 1 && depth < 200 {
            deep(depth);
            depth += 1;
        }
    }
}

fn memfd(len: usize) -> RawFd {
    let fd = unsafe { libc::memfd_create(c"control".as_ptr(), 0) };
    assert!(fd >= 0 && unsafe { libc::ftruncate(fd, len as i64) } == 0);
    fd
}

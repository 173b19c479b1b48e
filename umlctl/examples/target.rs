//! What the tests take snapshots of: `busy` checks its own memory all the time, `block` sits in one system call, `rseq` in a
//! restartable sequence. They tell how they are by a status file of eight words.

#![allow(unsafe_code)]

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

#[path = "target/block.rs"]
mod block;

static SIGNALS: AtomicU64 = AtomicU64::new(0);
static DISORDER: AtomicU64 = AtomicU64::new(0);
static ERRORS: AtomicU64 = AtomicU64::new(0);
static ROUNDS: AtomicU64 = AtomicU64::new(0);
/// What each of the extras has done.
static EXTRAS: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];

/// The words of the status file.
#[derive(Debug)]
pub struct Status(File);

impl Status {
    fn new(path: &str) -> Self {
        let f = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .unwrap();
        Self(f)
    }

    fn put(&self, words: &[u64]) {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        self.0.write_all_at(&bytes, 0).unwrap();
    }
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let word = |i: usize| args[i].parse::<u64>().unwrap();
    match args.first().map(String::as_str) {
        Some("busy") => busy(&Status::new(&args[1]), word(2), word(3), &args[4..]),
        Some("block") => block::run(&Status::new(&args[1]), &args[2], &args[3]),
        Some("rseq") => rseq(&Status::new(&args[1])),
        Some("idle") => loop {
            std::thread::sleep(Duration::from_secs(1));
        },
        // As an example without arguments, and for `exec`.
        _ => {}
    }
}

/// Numbers that look random (splitmix64).
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

extern "C" fn on_signal(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid structure.
    let value = unsafe { (*info).si_value().sival_ptr } as u64;
    // Real-time signals come in order, each once.
    if SIGNALS.fetch_add(1, Ordering::SeqCst) != value {
        DISORDER.fetch_add(1, Ordering::SeqCst);
    }
}

fn busy(status: &Status, threads: u64, mb: u64, extras: &[String]) {
    // SAFETY: the handler only uses atomics.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_signal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_RESTART;
        libc::sigaction(
            libc::SIGRTMIN() + 2,
            &raw const action,
            std::ptr::null_mut(),
        );
    }
    // All come to the first thread: so they come in order.
    let mask = |how| {
        // SAFETY: a set that lives through the calls.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigaddset(&raw mut set, libc::SIGRTMIN() + 2);
            libc::pthread_sigmask(how, &raw const set, std::ptr::null_mut());
        }
    };
    mask(libc::SIG_BLOCK);
    for t in 0..threads {
        let pages = mb * 256 / threads;
        std::thread::Builder::new()
            .stack_size(256 << 10)
            .spawn(move || worker(t, pages as usize))
            .unwrap();
    }
    assert!(extras.len() <= EXTRAS.len());
    for (e, done) in extras.iter().zip(&EXTRAS) {
        let what: fn() = match e.as_str() {
            "churn" => churn,
            "maps" => maps,
            "fork" => fork,
            "vfork" => vfork,
            "stack" => stack,
            "dontneed" => dontneed,
            _ => panic!("{e}"),
        };
        std::thread::spawn(move || {
            loop {
                what();
                done.fetch_add(1, Ordering::SeqCst);
                std::thread::sleep(Duration::from_micros(300));
            }
        });
    }
    mask(libc::SIG_UNBLOCK);
    let mut beats = 0;
    loop {
        beats += 1;
        let s = |a: &AtomicU64| a.load(Ordering::SeqCst);
        let [a, b, c] = EXTRAS.each_ref().map(s);
        status.put(&[
            beats,
            s(&ERRORS),
            s(&SIGNALS),
            s(&DISORDER),
            s(&ROUNDS),
            a,
            b,
            c,
        ]);
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn wrong(what: &str) {
    eprintln!("wrong: {what}");
    ERRORS.fetch_add(1, Ordering::SeqCst);
}

/// Each page says which version it has, and what it holds follows from its number and the version, which is kept twice.
fn worker(number: u64, pages: usize) {
    let mut memory = vec![0u64; pages * 512];
    let mut versions = vec![0u64; pages];
    let mut state = number;
    loop {
        for _ in 0..64 {
            let page = (random(&mut state) as usize) % pages;
            let words = &mut memory[page * 512..(page + 1) * 512];
            let mut seed = versions[page] << 32 | page as u64;
            if versions[page] > 0 && words.iter().any(|&w| w != random(&mut seed)) {
                wrong(&format!("page {page} of thread {number}"));
                versions[page] = 0;
                continue;
            }
            if versions[page] == 0 && words.iter().any(|&w| w != 0) {
                wrong(&format!("page {page} of thread {number} is not zero"));
            }
            versions[page] += 1;
            let mut seed = versions[page] << 32 | page as u64;
            words.iter_mut().for_each(|w| *w = random(&mut seed));
        }
        ROUNDS.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_micros(200));
    }
}

fn churn() {
    let all: Vec<_> = (0..4u64)
        .map(|i| std::thread::spawn(move || (0..100).map(|x| x * i).sum::<u64>()))
        .collect();
    for (i, t) in all.into_iter().enumerate() {
        if t.join().unwrap() != 4950 * i as u64 {
            wrong("a thread's result");
        }
    }
}

/// mmap, fill, mremap, check, madvise, munmap.
fn maps() {
    const LEN: usize = 64 << 12;
    // SAFETY: only its own fresh mapping is used.
    unsafe {
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let a = libc::mmap(std::ptr::null_mut(), LEN, rw, flags, -1, 0).cast::<u64>();
        for i in 0..LEN / 8 {
            if *a.add(i) != 0 {
                return wrong("a new mapping is not zero");
            }
            *a.add(i) = i as u64;
        }
        let b = libc::mremap(a.cast(), LEN, 2 * LEN, libc::MREMAP_MAYMOVE).cast::<u64>();
        for i in 0..2 * LEN / 8 {
            if *b.add(i) != if i < LEN / 8 { i as u64 } else { 0 } {
                return wrong("a moved mapping");
            }
        }
        libc::madvise(b.cast(), LEN, libc::MADV_DONTNEED);
        if *b != 0 || *b.add(LEN / 8 - 1) != 0 {
            wrong("given up memory is not zero");
        }
        libc::munmap(b.cast(), 2 * LEN);
    }
}

fn dontneed() {
    maps();
}

/// The child's memory must be that of the moment.
fn fork() {
    let secret: Vec<u64> = (0..4096).collect();
    // SAFETY: the child only reads memory and leaves.
    unsafe {
        let pid = libc::fork();
        if pid == 0 {
            let right = secret.iter().enumerate().all(|(i, &w)| w == i as u64);
            libc::_exit(if right { 7 } else { 8 });
        }
        let mut status = 0;
        while libc::waitpid(pid, &raw mut status, 0) == -1 {}
        if libc::WEXITSTATUS(status) != 7 {
            wrong("a forked child");
        }
    }
}

/// posix_spawn is vfork and exec.
fn vfork() {
    match std::process::Command::new("/bin/true").status() {
        Ok(s) if s.success() => {}
        other => wrong(&format!("a spawned child: {other:?}")),
    }
}

fn stack() {
    fn deep(n: u64) -> u64 {
        let frame = std::hint::black_box([n; 64]);
        if n == 0 {
            0
        } else {
            deep(n - 1) + frame[(n % 64) as usize]
        }
    }
    let t = std::thread::Builder::new().stack_size(8 << 20);
    if t.spawn(|| deep(2000)).unwrap().join().unwrap() != 2000 * 2001 / 2 {
        wrong("a stack");
    }
}

/// Spends nearly all its time inside of restartable sequences, which must be finished whole or aborted.
fn rseq(status: &Status) {
    let area = {
        let offset: isize;
        // SAFETY: glibc (2.35 and later) exports where each thread's area is, relative to the thread pointer.
        unsafe {
            let o = libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()).cast::<isize>();
            if o.is_null() {
                status.put(&[u64::MAX]);
                return;
            }
            offset = *o;
            let tp: *mut u8;
            std::arch::asm!("mov {}, fs:0", out(reg) tp);
            tp.offset(offset)
        }
    };
    let (mut beats, mut aborted) = (0u64, 0u64);
    loop {
        let done: u64;
        // SAFETY: the sequence only counts in a register; the signature in front of the abort address is glibc's.
        unsafe {
            std::arch::asm!(
                "lea {t}, [rip + 77f]",
                "mov [{area} + 8], {t}",
                "2:",
                "mov {n}, 3000000",
                "3: dec {n}",
                "jnz 3b",
                "mov {d}, 1",
                "4:",
                "jmp 6f",
                ".byte 0x0f, 0xb9, 0x3d",
                ".long 0x53053053",
                "5: mov {d}, 0",
                "jmp 6f",
                ".pushsection .data.rseq_target, \"aw\"",
                ".p2align 5",
                "77: .long 0, 0",
                ".quad 2b, 4b - 2b, 5b",
                ".popsection",
                "6:",
                area = in(reg) area,
                t = out(reg) _,
                n = out(reg) _,
                d = out(reg) done,
            );
            // What the kernel has not cleared would make it abort a sequence that is not ours.
            let left = area.add(8).cast::<u64>().read_volatile();
            area.add(8).cast::<u64>().write_volatile(0);
            // Finished although somebody has taken it away from the sequence: the kernel cleared the word meanwhile.
            if done == 1 && left == 0 {
                wrong("a sequence was interrupted and went on");
            }
        }
        aborted += u64::from(done == 0);
        beats += 1;
        status.put(&[beats, ERRORS.load(Ordering::SeqCst), aborted]);
    }
}

//! A naive stop-and-copy capture, for tests of the resume: it stops a process, reads all of it, and ends it.
#![allow(dead_code)]

use base64::Engine;
use snapshot::image::manifest::*;
use snapshot::proc::{self, MapKind};
use snapshot::sys::{clone, cpu, ptrace, remote};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Compiles a C program of `tests/targets/`.
pub fn compile(name: &str, dir: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/targets/{name}.c"));
    let out = dir.join(name);
    let status = Command::new("cc")
        .args(["-O1", "-g", "-pthread", "-Wall", "-o"])
        .args([&out, &source])
        .status()
        .expect("a C compiler is needed");
    assert!(status.success());
    out
}

#[allow(clippy::zombie_processes)]
/// Starts a program with its output in a file, and waits until it has written a line with `ready`.
pub fn start(mut command: Command, out: &Path, ready: &str) -> Child {
    let file = File::create(out).unwrap();
    let child = command
        .stdin(Stdio::null())
        .stdout(file)
        .spawn()
        .expect("starting the target");
    for _ in 0..1000 {
        if lines(out).iter().any(|l| l == ready) {
            return child;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("the target did not become ready");
}

/// The lines of a file.
pub fn lines(path: &Path) -> Vec<String> {
    BufReader::new(File::open(path).unwrap())
        .lines()
        .map(|l| l.unwrap())
        .collect()
}

/// The program that resumes.
pub fn resumer() -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    exe.parent()
        .unwrap()
        .parent()
        .unwrap()
        .join("examples/resume")
}

/// Resumes with a limit on its time; its exit code, and what it printed. Output goes through files: what is resumed may
/// live longer than the program that resumes.
pub fn resume(dir: &Path, args: &[&str]) -> (i32, String, String) {
    let (out, err) = (dir.join("resumed.out"), dir.join("resumed.err"));
    let status = Command::new("timeout")
        .args(["-s", "KILL", "30"])
        .arg(resumer())
        .args(args)
        .arg(dir)
        .stdin(Stdio::null())
        .stdout(File::create(&out).unwrap())
        .stderr(File::create(&err).unwrap())
        .status()
        .unwrap();
    let text = |p| String::from_utf8_lossy(&std::fs::read(p).unwrap()).into_owned();
    (status.code().unwrap_or(-1), text(&out), text(&err))
}

/// Captures a tree into a directory and ends it. The children of the test (`reap`) are waited for.
pub fn capture(root: &mut Child, dir: &Path) -> Manifest {
    let pids = proc::tree(root.id() as i32).unwrap();
    let m = capture_pids(&pids, dir);
    for &p in pids.iter().rev() {
        let _ = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(p),
            nix::sys::signal::Signal::SIGKILL,
        );
    }
    // Traced threads stay as zombies until their tracer has seen their end; the leader ends last.
    for p in &m.processes {
        for t in p.threads.iter().rev() {
            while let Ok(Some((_, r))) = ptrace::wait(t.tid, true) {
                if matches!(r, ptrace::Report::Ended(_)) {
                    break;
                }
            }
        }
        for _ in 0..1000 {
            if !Path::new(&format!("/proc/{}", p.pid)).exists() {
                break;
            }
            let _ = root.try_wait();
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }
    m
}

fn capture_pids(pids: &[i32], dir: &Path) -> Manifest {
    let own = proc::maps(std::process::id() as i32).unwrap();
    let vdso = own
        .iter()
        .find(|m| m.kind == MapKind::Special("[vdso]".into()))
        .unwrap();
    let bytes = clone::own_vdso_bytes(vdso.start, vdso.end);
    let syscall = bytes.windows(2).position(|w| w == [0x0f, 5]).unwrap() as u64;
    let mut pages = Pages::new(dir);
    let mut m = Manifest {
        taken: Taken::default(),
        host: Host {
            release: std::fs::read_to_string("/proc/sys/kernel/osrelease")
                .unwrap()
                .trim()
                .into(),
            boot_id: String::new(),
            vdso: blake3::hash(&bytes).to_hex().to_string(),
            cpu_flags: Vec::new(),
            xcr0: cpu::xcr0(),
        },
        processes: Vec::new(),
        spaces: Vec::new(),
        shared: Vec::new(),
        files: Vec::new(),
        index: String::new(),
        layers: Vec::new(),
    };
    for number in 0..3 {
        m.files.push(outside(number));
    }
    for &pid in pids {
        process(pid, syscall, &mut m, &mut pages);
    }
    pages.finish(dir);
    write(&m, dir);
    m
}

/// A descriptor that stands for the resuming program's of the same number.
fn outside(number: i32) -> snapshot::files::OpenFile {
    let flags = if number == 0 {
        libc::O_RDONLY
    } else {
        libc::O_WRONLY
    };
    serde_json::from_value(serde_json::json!({
        "flags": flags, "offset": 0, "owner": null, "locks": [],
        "kind": { "External": { "number": number, "was": "" } },
    }))
    .unwrap()
}

/// Writes a manifest.
pub fn write(m: &Manifest, dir: &Path) {
    std::fs::write(
        dir.join("manifest.json"),
        serde_json::to_vec_pretty(m).unwrap(),
    )
    .unwrap();
}

struct Pages {
    file: File,
    blocks: BTreeMap<(u32, u64), (u64, [u8; 64])>,
}

impl Pages {
    fn new(dir: &Path) -> Pages {
        Pages {
            file: File::create(dir.join("pages")).unwrap(),
            blocks: BTreeMap::new(),
        }
    }

    fn put(&mut self, space: u32, addr: u64, page: &[u8]) {
        let next = self.blocks.len() as u64;
        let b = self
            .blocks
            .entry((space, addr >> 21))
            .or_insert((next, [0; 64]));
        let i = (addr >> 12 & 511) as usize;
        b.1[i / 8] |= 1 << (i % 8);
        let at = (b.0 << 21) + i as u64 * 4096;
        self.file.write_all_at(page, at).unwrap();
    }

    fn finish(&self, dir: &Path) {
        let mut out = b"UMLINDX\n".to_vec();
        out.extend(1u32.to_le_bytes());
        out.extend((self.blocks.len() as u32).to_le_bytes());
        for (&(space, block), (slot, bits)) in &self.blocks {
            out.extend(space.to_le_bytes());
            out.extend(0u32.to_le_bytes());
            out.extend(block.to_le_bytes());
            out.extend(slot.to_le_bytes());
            out.extend([0; 8]);
            out.extend(bits);
            out.extend([0; 32]);
        }
        let end = (self.blocks.len() as u64) << 21;
        self.file.set_len(end).unwrap();
        std::fs::write(dir.join("index"), out).unwrap();
    }
}

/// Makes a stopped thread make a call.
fn inject(tid: i32, at: u64, nr: i64, args: &[u64]) -> i64 {
    let saved = ptrace::regs(tid).unwrap();
    let mut r = saved;
    let mut a = [0; 6];
    a[..args.len()].copy_from_slice(args);
    [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9] = a;
    r.rip = at;
    r.rax = nr as u64;
    r.orig_rax = u64::MAX;
    ptrace::set_regs(tid, &r).unwrap();
    for _ in 0..2 {
        ptrace::syscall(tid, 0).unwrap();
        let report = ptrace::wait(tid, true).unwrap().unwrap().1;
        assert_eq!(report, ptrace::Report::Syscall);
    }
    let result = ptrace::regs(tid).unwrap().rax as i64;
    ptrace::set_regs(tid, &saved).unwrap();
    result
}

fn stop(pid: i32) -> Vec<i32> {
    let mut tids = proc::threads(pid).unwrap();
    tids.sort_unstable_by_key(|&t| (t != pid, t));
    for &t in &tids {
        ptrace::seize(t, libc::PTRACE_O_TRACESYSGOOD).unwrap();
        ptrace::interrupt(t).unwrap();
    }
    for &t in &tids {
        while let ptrace::Report::Signal(s) = ptrace::wait(t, true).unwrap().unwrap().1 {
            ptrace::cont(t, s).unwrap();
        }
    }
    tids
}

fn process(pid: i32, syscall: u64, m: &mut Manifest, pages: &mut Pages) {
    let stat = proc::stat(pid).unwrap();
    let status = proc::status(pid).unwrap();
    let number = m.spaces.len() as u32;
    let mut p = Process {
        pid,
        ppid: stat.ppid,
        pgid: stat.pgid,
        sid: stat.sid,
        exit_signal: stat.exit_signal,
        zombie: (stat.state == 'Z').then_some(stat.exit_code),
        space: number,
        exe: PathBuf::new(),
        cwd: PathBuf::new(),
        root: "/".into(),
        umask: status.umask,
        credentials: Credentials {
            uid: status.uid,
            gid: status.gid,
            groups: status.groups.clone(),
            caps: status.caps,
            securebits: 0,
        },
        limits: Vec::new(),
        personality: 0,
        oom_score_adj: 0,
        prctl: Prctl {
            dumpable: 1,
            no_new_privs: status.no_new_privs,
            ..Prctl::default()
        },
        actions: Vec::new(),
        pending: Vec::new(),
        itimers: [(0, 0); 3],
        timers: Vec::new(),
        fds: Vec::new(),
        threads: Vec::new(),
        stopped: false,
    };
    if p.zombie.is_some() {
        m.processes.push(p);
        return;
    }
    p.fds = (0..3)
        .map(|n| Fd {
            fd: n,
            cloexec: false,
            file: n as u32,
        })
        .collect();
    p.exe = proc::link(pid, "exe").unwrap();
    p.cwd = proc::link(pid, "cwd").unwrap();
    let tids = stop(pid);
    let maps = proc::maps(pid).unwrap();
    let vdso = maps
        .iter()
        .find(|m| m.kind == MapKind::Special("[vdso]".into()))
        .unwrap();
    let call = vdso.start + syscall;
    let buf = (ptrace::regs(pid).unwrap().rsp - 4096) & !0xfff;
    let mut kept = vec![0; 4096];
    remote::read(pid, buf, &mut kept).unwrap();
    let words = |n: usize| -> Vec<u64> {
        let mut b = vec![0; n * 8];
        remote::read(pid, buf, &mut b).unwrap();
        b.chunks_exact(8)
            .map(|c| u64::from_ne_bytes(c.try_into().unwrap()))
            .collect()
    };
    let saved: Vec<_> = tids
        .iter()
        .map(|&t| {
            let regs = ptrace::regs_to_words(&ptrace::regs(t).unwrap());
            (regs, ptrace::sigmask(t).unwrap())
        })
        .collect();
    for &t in &tids {
        ptrace::set_sigmask(t, !0).unwrap();
    }
    for (&tid, (regs, sigmask)) in tids.iter().zip(saved) {
        let b64 = |b: &[u8]| base64::engine::general_purpose::STANDARD.encode(b);
        let pending = ptrace::pending(tid, false).unwrap();
        inject(tid, call, libc::SYS_sigaltstack, &[0, buf]);
        let alt = words(3);
        inject(tid, call, libc::SYS_prctl, &[40, buf]);
        let clear = words(1)[0];
        let stat = proc::stat(tid).unwrap();
        p.threads.push(Thread {
            tid,
            regs,
            xstate: b64(&ptrace::xstate(tid).unwrap()),
            sigmask,
            altstack: (alt[0], alt[1] as u32, alt[2]),
            robust: remote::robust_list(tid).unwrap(),
            rseq: ptrace::rseq(tid).unwrap(),
            clear_child_tid: clear,
            comm: stat.comm,
            pending: pending.iter().map(|i| b64(i)).collect(),
            sched: (stat.policy, stat.nice, stat.rt_priority),
            affinity: Vec::new(),
        });
    }
    for signal in 1..=64u64 {
        if inject(pid, call, libc::SYS_rt_sigaction, &[signal, 0, buf, 8]) == 0 {
            let w = words(4);
            if w[0] != 0 {
                p.actions.push(SignalAction {
                    signal: signal as i32,
                    handler: w[0],
                    flags: w[1],
                    restorer: w[2],
                    mask: w[3],
                });
            }
        }
    }
    for which in 0..3 {
        inject(pid, call, libc::SYS_getitimer, &[which, buf]);
        let w = words(4);
        p.itimers[which as usize] = (w[0] * 1_000_000 + w[1], w[2] * 1_000_000 + w[3]);
    }
    for id in 0..4u64 {
        if inject(pid, call, libc::SYS_timer_gettime, &[id, buf]) == 0 {
            let w = words(4);
            p.timers.push(PosixTimer {
                id: id as i32,
                clock: libc::CLOCK_MONOTONIC,
                notify: libc::SIGEV_SIGNAL,
                signal: libc::SIGRTMIN() + 3,
                value: 77,
                tid: 0,
                interval_ns: w[0] * 1_000_000_000 + w[1],
                left_ns: w[2] * 1_000_000_000 + w[3],
            });
        }
    }
    for i in 0..16 {
        inject(pid, call, libc::SYS_prlimit64, &[0, i, 0, buf]);
        let w = words(2);
        p.limits.push((w[0], w[1]));
    }
    remote::write(pid, buf, &kept).unwrap();
    let b64 = |b: &[u8]| base64::engine::general_purpose::STANDARD.encode(b);
    let pending = ptrace::pending(pid, true).unwrap();
    p.pending = pending.iter().map(|i| b64(i)).collect();
    let mut layout = stat.layout;
    layout[5] = inject(pid, call, libc::SYS_brk, &[0]) as u64;
    let space = space(pid, number, &maps, layout, pages);
    m.spaces.push(space);
    m.processes.push(p);
}

fn space(pid: i32, number: u32, maps: &[proc::Map], layout: [u64; 11], pages: &mut Pages) -> Space {
    let flags = proc::vm_flags(pid).unwrap();
    let mem = File::open(format!("/proc/{pid}/mem")).unwrap();
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).unwrap();
    let auxv = proc::read_bytes(pid, "auxv").unwrap();
    let mut ranges = Vec::new();
    for m in maps {
        let f = &flags[&m.start];
        let has = |s: &str| f.iter().any(|x| x == s);
        let mut bits = if m.shared {
            libc::MAP_SHARED
        } else {
            libc::MAP_PRIVATE
        };
        for (name, bit) in [
            ("gd", libc::MAP_GROWSDOWN),
            ("nr", libc::MAP_NORESERVE),
            ("lo", libc::MAP_LOCKED),
        ] {
            if has(name) {
                bits |= bit;
            }
        }
        let backing = match &m.kind {
            MapKind::Anonymous(_) => Backing::Anonymous,
            MapKind::File { path, .. } => {
                let meta = std::fs::metadata(path).unwrap();
                Backing::File {
                    path: path.clone(),
                    offset: m.offset,
                    identity: FileIdentity {
                        dev: meta.dev(),
                        ino: meta.ino(),
                        size: meta.size(),
                        mtime_ns: meta.mtime() * 1_000_000_000 + meta.mtime_nsec(),
                    },
                    saved: None,
                }
            }
            MapKind::Special(n) if n == "[vdso]" => Backing::Vdso,
            MapKind::Special(n) if n == "[vsyscall]" => Backing::Vsyscall,
            MapKind::Special(n) => Backing::Vvar(n.clone()),
        };
        let copies = matches!(backing, Backing::Anonymous | Backing::File { .. }) && !m.shared;
        if copies {
            let file = matches!(backing, Backing::File { .. });
            let mut entries = vec![0; ((m.end - m.start) / 512) as usize];
            pagemap.read_exact_at(&mut entries, m.start / 512).unwrap();
            for (i, e) in entries.chunks_exact(8).enumerate() {
                let e = u64::from_ne_bytes(e.try_into().unwrap());
                if e >> 62 == 0 || (file && e >> 61 & 1 == 1) {
                    continue;
                }
                let addr = m.start + i as u64 * 4096;
                let mut page = [0; 4096];
                mem.read_exact_at(&mut page, addr).unwrap();
                if file || page.iter().any(|&b| b != 0) {
                    pages.put(number, addr, &page);
                }
            }
        }
        ranges.push(Range {
            start: m.start,
            end: m.end,
            prot: m.prot,
            flags: bits,
            backing,
            advice: Vec::new(),
            name: None,
        });
    }
    Space {
        layout,
        auxv: auxv
            .chunks_exact(8)
            .map(|c| u64::from_ne_bytes(c.try_into().unwrap()))
            .collect(),
        ranges,
        thp_disabled: false,
    }
}

//! Small snapshots that make sense, as the fuzz targets' starting points.

use std::path::PathBuf;

use serde_json::json;
use snapshot::files::OpenFile;
use snapshot::image::manifest::{
    Backing, Credentials, Fd, FileIdentity, Host, Manifest, PosixTimer, Prctl, Process, Range,
    SharedKind, SharedObject, SignalAction, Space, Taken, Thread,
};
use snapshot::uml::manifest::{Helper, Kernel, Machine, Piece, Stub, User};

fn range(start: u64, end: u64, flags: i32, backing: Backing) -> Range {
    Range {
        start,
        end,
        prot: 3,
        flags,
        backing,
        advice: vec![10],
        name: Some("n".into()),
    }
}

fn thread(tid: i32) -> Thread {
    Thread {
        tid,
        regs: (0..27).map(|i| 0x20_0000 + i * 8).collect(),
        xstate: "AAAA".into(),
        sigmask: 0,
        altstack: (0, 2, 0),
        robust: (0x20_0000, 24),
        rseq: (0x20_1000, 32, 1, 0),
        clear_child_tid: 0,
        comm: "name".into(),
        pending: vec!["A".repeat(170) + "A="],
        sched: (0, 0, 0),
        affinity: vec![3],
    }
}

fn action() -> SignalAction {
    SignalAction {
        signal: 10,
        handler: 0x40_0000,
        flags: 0x400_0000,
        restorer: 0,
        mask: 0,
    }
}

/// A process of two threads.
fn process(pid: i32, ppid: i32, space: u32) -> Process {
    Process {
        pid,
        ppid,
        pgid: 7,
        sid: 7,
        exit_signal: 17,
        zombie: None,
        space,
        exe: PathBuf::from("/bin/x"),
        cwd: PathBuf::from("/"),
        root: PathBuf::from("/"),
        umask: 0o22,
        credentials: Credentials::default(),
        limits: vec![(1, 2); 16],
        personality: 0,
        oom_score_adj: 0,
        prctl: Prctl::default(),
        actions: vec![action()],
        pending: Vec::new(),
        itimers: [(0, 0), (1, 2), (0, 5)],
        timers: vec![PosixTimer {
            id: 0,
            clock: 1,
            notify: 4,
            signal: 14,
            value: 1,
            tid: pid,
            interval_ns: 5,
            left_ns: 6,
        }],
        fds: vec![Fd {
            fd: 0,
            cloexec: false,
            file: 0,
        }],
        threads: vec![thread(pid), thread(pid + 1)],
        stopped: false,
    }
}

/// A process's memory: a range of each kind that needs nothing from outside.
fn space() -> Space {
    Space {
        layout: [0x20_0000; 11],
        auxv: vec![6, 4096, 0, 0],
        ranges: vec![
            range(0x20_0000, 0x20_4000, 2, Backing::Anonymous),
            range(0x40_0000, 0x80_0000, 2 | 0x2000, Backing::Anonymous),
            range(u64::MAX << 23, u64::MAX << 12, 2, Backing::Vsyscall),
        ],
        thp_disabled: true,
    }
}

fn file(kind: serde_json::Value) -> OpenFile {
    let json = json!({"flags": 2, "offset": 5, "owner": null, "locks": [], "kind": kind});
    serde_json::from_value(json).expect("an open file")
}

/// An open file whose content of `size` bytes with `sum` is `files/0`.
pub fn memfd(size: u64, sum: &str) -> OpenFile {
    file(json!({"Memfd": {"name": "m", "seals": 0, "saved": 0, "size": size, "sum": sum}}))
}

/// A process and its child.
pub fn manifest() -> Manifest {
    Manifest {
        taken: Taken::default(),
        host: Host::default(),
        processes: vec![process(7, 1, 0), process(9, 7, 1)],
        spaces: vec![space(), space()],
        shared: vec![SharedObject {
            size: 4096,
            kind: SharedKind::Memfd("s".into(), 0),
        }],
        files: vec![file(json!({"SharedMemory": {"object": 0}})), memfd(0, "")],
        index: String::new(),
        layers: Vec::new(),
    }
}

/// A machine with a user process and a helper, and `len` bytes of memory.
pub fn machine(len: u64) -> Machine {
    let mut main = process(2, 1, 0);
    main.threads.truncate(1);
    let mut memory = range(0x6000_0000, 0x6000_0000 + len, 1, Backing::Anonymous);
    memory.backing = Backing::Shared {
        object: 0,
        offset: 0,
    };
    let identity = FileIdentity::default();
    let program = Backing::File {
        path: PathBuf::from("/bin/linux.uml"),
        offset: 0,
        identity,
        saved: None,
    };
    Machine {
        taken: Taken::default(),
        clock: [0, 0],
        host: Host::default(),
        kernel: Kernel {
            path: PathBuf::from("/bin/linux.uml"),
            sum: String::new(),
        },
        main,
        space: Space {
            ranges: vec![
                range(0x20_0000, 0x20_4000, 2, Backing::Anonymous),
                range(0x40_0000, 0x50_0000, 2, program),
                memory,
            ],
            ..space()
        },
        helpers: vec![Helper {
            thread: thread(3),
            exit_signal: 17,
            caught: 0,
            ignored: 0,
        }],
        users: vec![User {
            pid: 4,
            pieces: vec![Piece {
                start: 0x10_0000,
                len: 4096,
                offset: 0,
                prot: 3,
                shared: true,
            }],
        }],
        stub: Stub {
            segv: action(),
            altstack: (0, 0, 0),
        },
        files: vec![memfd(0, "")],
        memory_fd: 3,
        memory_len: len,
        private: vec![(0x20_0000, 4096)],
        private_sum: String::new(),
        memory_sums: String::new(),
        disk_sums: None,
    }
}

/// What umlctl itself notes of a machine's snapshot.
pub fn about() -> serde_json::Value {
    json!({
        "version": 1,
        "vm": {
            "version": 1, "name": "web-1", "image": "/images/a", "mem_bytes": 64 << 20, "net": "nat", "net_index": 1,
            "kernel": "/bin/linux.uml", "append": ["quiet"], "raid6": false, "created": 1,
        },
        "taken_us": 1,
        "figures": umlctl::snapshots::store::Figures::default(),
    })
}

//! What the corpus of the targets for snapshots and machines begins with: small valid inputs.

use std::fs;
use std::path::Path;

use snapshot::target::journal::{Away, Record};
use umlctl::control::{Answer, Request, WaitFor, encode};
use umlctl::snapshots::store::Figures;
use umlctl::vm::state::{Phase, State};
use umlctl_agent::archive::send;
use umlctl_agent::exec::{Exec, What};
use umlctl_agent::wire::{Frame, Kind, VERSION};

use crate::snap::{self, Dir};
use crate::{Bytes, sample};

/// Where seeds go: target, name, bytes.
pub type Put<'a> = &'a dyn Fn(&str, &str, &[u8]);

/// Snapshots of processes.
pub fn snapshots(put: Put<'_>) {
    let manifest = sample::manifest();
    let whole = snapshot::image::store::encode(&manifest).expect("JSON");
    put("snap_manifest", "whole", &whole);
    put("snap_manifest", "body", &whole[56..]);
    // Entries as `crate::snap::entry` reads them: space, layer, block, slot, first page, pages.
    let entries = [
        [0, 0, 1, 0, 3, 0, 4],
        [0, 1, 1, 0, 9, 0, 4],
        [1, 0, 2, 1, 7, 0, 2],
    ];
    let raw: Vec<u8> = entries
        .iter()
        .flat_map(|e| snap::entry(&mut Bytes(e), 0x5a))
        .collect();
    put("snap_index", "whole", &snap::index(&raw));
    put("snap_index", "entries", &raw);
    let own = |count: u8, only: &[usize]| {
        let mut out = vec![count];
        only.iter().for_each(|i| out.extend(entries[*i]));
        // Slots, and no damage.
        out.extend([2, 0, 0, 0, 0]);
        out
    };
    put("snap_image", "one", &[vec![0], own(2, &[0, 2])].concat());
    let layered = [vec![1], own(2, &[0, 2]), own(3, &[0, 1, 2])].concat();
    put("snap_image", "layer", &layered);
    let content = [vec![2], own(1, &[0]), vec![3, 1, 2, 3, 0, 0]].concat();
    put("snap_image", "content", &content);
    let packed = [vec![4], own(2, &[0, 2]), vec![1, 20, 0]].concat();
    put("snap_image", "packed", &packed);
    let mut frames = Vec::new();
    let mut file = b"UMLPACK\n\x01\0\0\0\x02\0\0\0".to_vec();
    for pages in [2, 1] {
        let frame = zstd::bulk::compress(&vec![0x5a; pages * 4096], 3).expect("it fits");
        frames.extend((frame.len() as u16).to_le_bytes());
        frames.extend(&frame);
        file.extend((frame.len() as u64).to_le_bytes());
        file.extend(&frame);
    }
    put("snap_pack", "frames", &frames);
    put("snap_pack", "whole", &file);
    let mut record = Record::idle(1, 2);
    let mut both = vec![0];
    for (number, active) in [(4, false), (5, true)] {
        record.active = active;
        if active {
            record.away.push(Away {
                tid: 3,
                sigmask: 4,
                regs: vec![5; 27],
            });
        }
        let bytes = record.encode(number);
        both.extend((bytes.len() as u16).to_le_bytes());
        both.extend(bytes);
    }
    for flags in [0, 4, 7] {
        both[0] = flags;
        put("snap_journal", &flags.to_string(), &both);
    }
    for name in [
        "maps",
        "smaps",
        "stat",
        "status",
        "timens_offsets",
        "fdinfo/0",
    ] {
        let text = fs::read(Path::new("/proc/self").join(name)).unwrap_or_default();
        put(
            "snap_proc",
            &name.replace('/', "-"),
            &text[..text.len().min(8192)],
        );
    }
    let timers = "ID: 0\nsignal: 14/00007ffd\nnotify: thread/tid.78\nClockID: 1\n";
    put("snap_proc", "timers", timers.as_bytes());
    let lock = "pos:\t0\nflags:\t02\nlock:\t1: POSIX  ADVISORY  WRITE 1 00:2a:12 0 EOF\nit_value: (1, 2)\n";
    put("snap_proc", "lock", lock.as_bytes());
    let mut perf = vec![0; 7];
    perf.extend([10, 0, 0, 0, 2, 0, 80, 0]);
    perf.resize(7 + 80, 1);
    perf.extend([2, 0, 0, 0, 0, 0, 24, 0]);
    perf.resize(7 + 104, 1);
    put("snap_kernel", "perf", &perf);
    let events: Vec<u8> = (0x12..0x17)
        .flat_map(|kind| [[kind; 32], [0; 32]].concat())
        .collect();
    put("snap_kernel", "events", &events);
    let mut diag = [44u32, 20, 0, 0, 0x0101_0001, 7, 0, 0]
        .map(u32::to_ne_bytes)
        .concat();
    diag.extend([8, 0, 2, 0, 9, 0, 0, 0, 12, 0, 4, 0, 1, 0, 0, 0, 2, 0, 0, 0]);
    diag[0] = diag.len() as u8;
    put("snap_kernel", "diag", &diag);
    put("snap_kernel", "address", &[2, 0, 0x1f, 0x90, 127, 0, 0, 1]);
}

/// Snapshots of machines.
pub fn machines(put: Put<'_>) {
    let whole = snapshot::uml::manifest::encode(&sample::machine(1 << 20)).expect("JSON");
    put("uml_machine", "whole", &whole);
    put("uml_machine", "body", &whole[56..]);
    // Another number of the fortieth value.
    put(
        "uml_machine",
        "edit",
        &[1, 0, 0, 40, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0],
    );
    put(
        "snap_manifest",
        "edit",
        &[1, 0, 0, 40, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0],
    );
    let memory = [&[0, 16][..], &[0x5a; 4096], &[40]].concat();
    for flags in 0..16 {
        let disk = if flags & 1 != 0 {
            &[3, 0, 1, 2, 3][..]
        } else {
            &[]
        };
        let damage = [9, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9];
        let all = [&[flags][..], &memory, disk, &[4, 1, 2, 3, 4], &damage].concat();
        put("uml_snapshot", &flags.to_string(), &all);
    }
    let about = sample::about();
    put("vm_files", "about", about.to_string().as_bytes());
    put("vm_files", "config", about["vm"].to_string().as_bytes());
    put("vm_files", "state", br#"{"version":1,"phase":"ended","supervisor":1,"keeper":null,"main":null,"started_us":1,"boot_us":2,"exit":{"code":0}}"#);
    for (i, text) in ["128M", "web-1", "\x02\x01\0\0\x03\0\x05"]
        .iter()
        .enumerate()
    {
        put("vm_files", &i.to_string(), text.as_bytes());
    }
}

/// What comes from guests and from those who talk to a supervisor.
pub fn guests(put: Put<'_>) {
    let snap = r#"{"version":1,"request":"snapshot","name":"s","kill":false,"stop_and_copy":false,"durable":true}"#;
    let mut stream = Vec::new();
    for request in [
        Request::Info,
        Request::Wait {
            until: WaitFor::Agent,
        },
        Request::Stop { timeout_s: 7 },
    ] {
        stream.extend(encode(&request));
    }
    put("vm_control", "requests", &stream);
    let mut answers = encode(&Answer::State {
        state: State::new(Phase::Running),
    });
    answers.extend(encode(&Answer::Snapshot {
        figures: Figures::default(),
        saved: true,
    }));
    answers.extend(encode(&Answer::Error {
        message: "m".into(),
    }));
    put("vm_control", "answers", &answers);
    let text = [&(snap.len() as u16).to_le_bytes()[..], snap.as_bytes()].concat();
    put("vm_control", "snapshot", &text);
    let mut frames = Vec::new();
    let exec = Exec::new(What::Command, vec![b"ls".to_vec(), b"-l".to_vec()]);
    let exec = exec.encode().expect("it is short");
    put("vm_wire", "exec", &exec);
    for frame in [
        Frame::new(Kind::Hello, 0, VERSION.to_le_bytes()),
        Frame::new(Kind::Exec, 1, exec),
        Frame::credit(1, 0, 300),
        Frame::exit(2, true, 9),
    ] {
        frame.encode(&mut frames);
    }
    put("vm_wire", "frames", &frames);
    // As the target makes them: kind, stream, payload; 0 and noise; 255 for a reset.
    put(
        "vm_wire",
        "made",
        &[
            1, 0, 4, 1, 0, 0, 0, 18, 1, 2, 5, 6, 0, 2, 0xc5, 0x5a, 255, 22, 1, 5, 0, 1, 0, 0, 0,
        ],
    );
    let dir = Dir::new("seeds");
    dir.put("d/file", b"content");
    dir.put("d/e/other", b"");
    std::os::unix::fs::symlink("../outside", dir.path().join("d/link")).expect("room");
    let mut archive = Vec::new();
    send(&dir.path().join("d"), &mut archive, &mut |_| {}).expect("it can be read");
    put("vm_archive", "directory", &archive);
    let mut file = Vec::new();
    send(&dir.path().join("d/file"), &mut file, &mut |_| {}).expect("it can be read");
    put("vm_archive", "file", &file);
    put("vm_archive", "both", &[file, archive].concat());
}

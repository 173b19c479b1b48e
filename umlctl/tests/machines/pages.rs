//! Every page of a machine under load, as it is in the stop, against what was saved.

use super::common::{Echo, Home, wait};
use nix::errno::Errno;
use snapshot::proc;
use snapshot::uml::Error;
use snapshot::uml::capture::{Learned, Request, capture};
use snapshot::uml::image;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The guest's memory and main's own, read in the stop.
#[derive(Default)]
struct Seen {
    memory: Vec<u8>,
    own: Vec<(u64, Vec<u8>)>,
}

impl Seen {
    fn read(main: i32) -> Self {
        let maps = proc::maps(main).unwrap();
        let map = maps
            .iter()
            .find(|m| m.shared && m.end - m.start > 16 << 20)
            .unwrap();
        let link = format!("/proc/{main}/map_files/{:x}-{:x}", map.start, map.end);
        let mem = File::open(format!("/proc/{main}/mem")).unwrap();
        let own = maps
            .iter()
            .filter(|m| !m.shared && m.prot & 2 != 0)
            .map(|m| {
                let mut bytes = vec![0; (m.end - m.start) as usize];
                mem.read_exact_at(&mut bytes, m.start).unwrap();
                (m.start, bytes)
            });
        Self {
            memory: std::fs::read(link).unwrap(),
            own: own.collect(),
        }
    }

    fn compare(&self, dir: &Path, private: &[(u64, u64)]) {
        let saved = std::fs::read(dir.join(image::MEMORY)).unwrap();
        assert_eq!(saved.len(), self.memory.len());
        let page = |i: usize| i * 4096..(i + 1) * 4096;
        let wrong: Vec<usize> = (0..saved.len() / 4096)
            .filter(|&i| saved[page(i)] != self.memory[page(i)])
            .collect();
        assert!(wrong.is_empty(), "pages of the guest's memory: {wrong:x?}");
        let bytes = std::fs::read(dir.join(image::PRIVATE)).unwrap();
        let mut at = 0;
        let mut compared = 0;
        for &(start, len) in private {
            for address in (start..start + len).step_by(4096) {
                let here = self
                    .own
                    .iter()
                    .find(|o| o.0 <= address && address < o.0 + o.1.len() as u64);
                if let Some((base, live)) = here {
                    let offset = (address - base) as usize;
                    let same = bytes[at..at + 4096] == live[offset..offset + 4096];
                    assert!(same, "main's page at {address:x}");
                    compared += 1;
                }
                at += 4096;
            }
        }
        assert!(compared > 50, "{compared} pages of main's own");
    }
}

fn captures(main: i32, count: usize, externals: &[i32], stop_and_copy: bool) {
    let mut learned: Option<Learned> = None;
    for _ in 0..count {
        // Soon after the agent has spoken the VM's supervisor is attached for a moment, and nobody else can be.
        wait("the supervisor", || {
            one(main, externals, stop_and_copy, &mut learned)
        });
    }
}

/// False if somebody else is attached.
fn one(main: i32, externals: &[i32], stop_and_copy: bool, learned: &mut Option<Learned>) -> bool {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let mut seen = Seen::default();
    let mut look = || seen = Seen::read(main);
    let captured = capture(&mut Request {
        main,
        dir: dir.path(),
        externals,
        learned,
        durable: false,
        stop_and_copy,
        kill: None,
        fixed: None,
        disk: None,
        inspect: Some(&mut look),
    });
    if matches!(captured, Err(Error::Ptrace(_, _, Errno::EPERM))) {
        return false;
    }
    let (machine, stats) = captured.unwrap();
    assert!(stats.stop_bytes < if stop_and_copy { u64::MAX } else { 64 << 20 });
    seen.compare(dir.path(), &machine.private);
    true
}

#[test]
fn what_is_saved_is_what_was_there() {
    let home = Home::new();
    home.boot("a");
    let mut echo = Echo::connect(&home, "a");
    let main = home.json(&["info", "a"])["main"].as_i64().unwrap() as i32;
    captures(main, 12, &[0, 1, 2, 3, 4], false);
    echo.ask();
    captures(main, 3, &[0, 1, 2, 3, 4], true);
    echo.ask();
    home.check("a");
    // The same of one that was resumed, whose memory is served from a snapshot.
    home.run(&["snapshot", "a", "s", "--wait"]);
    home.run(&["resume", "s", "--name", "b"]);
    let main = home.json(&["info", "b"])["main"].as_i64().unwrap() as i32;
    captures(main, 5, &[0, 1, 2, 3, 4], false);
    home.check("b");
}

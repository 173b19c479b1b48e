//! Captures a User Mode Linux machine again and again, and compares what was saved with what was there, for experiments:
//! `umltake MAIN-PID DIR COUNT [EXTERNAL-FD...]`. With KILL set, the last capture ends the machine.

use snapshot::proc;
use snapshot::uml::capture::{Request, capture};
use std::os::unix::fs::FileExt;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let main: i32 = args[1].parse().unwrap();
    let dir = std::path::PathBuf::from(&args[2]);
    let count: usize = args[3].parse().unwrap();
    let externals: Vec<i32> = args[4..].iter().map(|a| a.parse().unwrap()).collect();
    let mut learned = None;
    let mut pauses = Vec::new();
    for i in 0..count {
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir_all(&dir).unwrap();
        let (mut memory, mut own) = (Vec::new(), Vec::new());
        let compare = std::env::var_os("COMPARE").is_some();
        let mut look = || {
            let maps = proc::maps(main).unwrap();
            let map = maps
                .iter()
                .find(|m| m.shared && m.start > 0x6000_0000)
                .unwrap();
            let path = format!("/proc/{main}/map_files/{:x}-{:x}", map.start, map.end);
            memory = std::fs::read(path).unwrap();
            let mem = std::fs::File::open(format!("/proc/{main}/mem")).unwrap();
            for m in maps.iter().filter(|m| !m.shared && m.prot & 2 != 0) {
                let mut bytes = vec![0; (m.end - m.start) as usize];
                mem.read_exact_at(&mut bytes, m.start).unwrap();
                own.push((m.start, bytes));
            }
        };
        let kill = std::env::var_os("KILL").is_some() && i == count - 1;
        let mut kill_it = || {
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(main), nix::sys::signal::SIGKILL);
        };
        let mut request = Request {
            main,
            dir: &dir,
            externals: &externals,
            learned: &mut learned,
            stop_and_copy: std::env::var_os("COPY").is_some(),
            kill: if kill { Some(&mut kill_it) } else { None },
            fixed: None,
            durable: true,
            disk: None,
            inspect: if compare { Some(&mut look) } else { None },
        };
        let (m, s) = match capture(&mut request) {
            Ok(r) => r,
            Err(e) => {
                println!("{e:?}");
                std::process::exit(1);
            }
        };
        snapshot::uml::manifest::write(&dir, &m).unwrap();
        if i < 3 {
            println!("{s:?}");
        }
        pauses.push((s.pause, s));
        if compare {
            let saved = std::fs::read(dir.join("memory")).unwrap();
            let bad: Vec<usize> = (0..saved.len() / 4096)
                .filter(|p| saved[p * 4096..][..4096] != memory[p * 4096..][..4096])
                .collect();
            assert!(
                bad.is_empty() && saved.len() == memory.len(),
                "pages {bad:x?}"
            );
            let private = std::fs::read(dir.join("private")).unwrap();
            let mut at = 0;
            for &(start, len) in &m.private {
                for page in (start..start + len).step_by(4096) {
                    let live = own
                        .iter()
                        .find(|o| o.0 <= page && page < o.0 + o.1.len() as u64);
                    if let Some((base, bytes)) = live {
                        let offset = (page - base) as usize;
                        assert_eq!(
                            private[at..at + 4096],
                            bytes[offset..offset + 4096],
                            "{page:x}"
                        );
                    }
                    at += 4096;
                }
            }
        }
    }
    pauses.sort_by_key(|p| p.0);
    let at = |q: usize| pauses[(pauses.len() - 1) * q / 100];
    println!("median {:?}\np99 {:?}\nworst {:?}", at(50), at(99), at(100));
}

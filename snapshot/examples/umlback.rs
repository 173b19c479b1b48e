//! Rebuilds a User Mode Linux machine that `umltake` captured, for experiments: `umlback DIR`, with its console on
//! descriptors 0 to 2. Its memory is a copy in /dev/shm.

use snapshot::sys::clone::{Fork, exit_now, fork};
use snapshot::uml::{image, manifest, rebuild};
use std::collections::BTreeMap;
use std::os::fd::AsFd;

fn main() {
    let dir = std::path::PathBuf::from(std::env::args().nth(1).unwrap());
    let flags = libc::CLONE_NEWPID as u64;
    match fork(flags, libc::SIGCHLD, None).unwrap() {
        Fork::Parent(pid) => {
            let status = nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None);
            println!("{status:?}");
        }
        Fork::Child => {
            let machine = manifest::load(&dir).unwrap();
            let path = format!("/dev/shm/back.{}", machine.taken.realtime_ns);
            std::fs::copy(dir.join(image::MEMORY), &path).unwrap();
            let memory = std::fs::File::options()
                .read(true)
                .write(true)
                .open(&path)
                .unwrap();
            std::fs::remove_file(&path).unwrap();
            let externals: BTreeMap<i32, _> = [0, 1, 2]
                .into_iter()
                .map(|n| {
                    let fd = snapshot::sys::clone::borrow(n);
                    (n, fd.as_fd().try_clone_to_owned().unwrap())
                })
                .collect();
            let start = std::time::Instant::now();
            let made = rebuild::rebuild(rebuild::Plan {
                machine: &machine,
                dir: &dir,
                files: machine.files.clone(),
                memory: memory.into(),
                externals,
            });
            eprintln!("{made:?} {:?}", start.elapsed());
            if made.is_err() {
                exit_now(1);
            }
            while let Ok(s) = nix::sys::wait::wait() {
                eprintln!("{s:?}");
            }
            exit_now(0)
        }
    }
}

//! `cowfs doctor`: what this machine has of what cowfs needs.

use std::path::Path;

use serde_json::json;

use super::args::Cli;
use super::output;
use crate::control::Failure;
use crate::store::{Store, StoreError, superblock};

struct Finding {
    name: &'static str,
    ok: bool,
    needed: bool,
    found: String,
    without: &'static str,
}

fn kernel() -> (u32, u32, String) {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim().to_owned();
    let mut n = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|p| p.parse().unwrap_or(0));
    (n.next().unwrap_or(0), n.next().unwrap_or(0), release)
}

/// Tries it in a file without a name, so that nothing that is there can be meant.
fn can_make_holes(dir: &Path) -> std::io::Result<()> {
    use nix::fcntl::FallocateFlags;
    use std::os::unix::fs::OpenOptionsExt;
    let f = std::fs::File::options()
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .mode(0o600)
        .open(dir)?;
    f.set_len(8192)?;
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    Ok(nix::fcntl::fallocate(&f, flags, 0, 4096)?)
}

/// Prints the table; 1 if something is missing that nothing works without.
pub(super) fn run(cli: &Cli, store: Option<&Path>) -> Result<u8, Failure> {
    let (major, minor, release) = kernel();
    let at_least = |a: u32, b: u32| (major, minor) >= (a, b);
    let fuse = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse");
    let mut list = vec![
        Finding {
            name: "root",
            ok: nix::unistd::geteuid().is_root(),
            needed: true,
            found: format!("uid {}", nix::unistd::geteuid()),
            without: "nothing can be mounted",
        },
        Finding {
            name: "/dev/fuse",
            ok: fuse.is_ok(),
            needed: true,
            found: fuse.map_or_else(|e| e.to_string(), |_| "opens".into()),
            without: "nothing can be mounted ('modprobe fuse')",
        },
        Finding {
            name: "Linux 5.12 (FUSE 7.33)",
            ok: at_least(5, 12),
            needed: true,
            found: release.clone(),
            without: "nothing can be mounted",
        },
        Finding {
            name: "Linux 6.1 (O_TMPFILE)",
            ok: at_least(6, 1),
            needed: false,
            found: release.clone(),
            without: "files cannot be made without a name",
        },
        Finding {
            name: "Linux 6.6 (birth times)",
            ok: at_least(6, 6),
            needed: false,
            found: release.clone(),
            without: "statx(2) tells no birth time",
        },
        Finding {
            name: "Linux 6.16 (name epochs)",
            ok: at_least(6, 16),
            needed: false,
            found: release,
            without: "a rollback drops the names in the root one by one",
        },
        Finding {
            name: "more than one CPU",
            ok: std::thread::available_parallelism().is_ok_and(|n| n.get() > 1),
            needed: false,
            found: std::thread::available_parallelism()
                .map_or(0, std::num::NonZero::get)
                .to_string(),
            without: "every request costs two context switches",
        },
    ];
    if let Some(dir) = store {
        if dir.join(superblock::FILE).is_file() {
            let holes = can_make_holes(dir).map_err(|e| e.to_string());
            list.push(Finding {
                name: "the store's disk can make holes",
                ok: holes.is_ok(),
                needed: false,
                found: holes.map_or_else(|e| e, |()| "yes".into()),
                without: "the space of deleted files is used again only in part",
            });
        }
        let lock = Store::open(dir).map(|_| ());
        list.push(Finding {
            name: "the store opens",
            ok: matches!(lock, Ok(()) | Err(StoreError::Locked)),
            needed: true,
            found: lock.map_or_else(|e| e.to_string(), |()| "yes".into()),
            without: "it cannot be mounted",
        });
    }
    if cli.json {
        let items: Vec<_> = list
            .iter()
            .map(|f| {
                json!({"name": f.name, "ok": f.ok, "needed": f.needed, "found": f.found, "without": f.without})
            })
            .collect();
        output::json(json!({ "findings": items }));
    } else {
        for f in &list {
            let state = match (f.ok, f.needed) {
                (true, _) => "ok     ",
                (false, true) => "MISSING",
                (false, false) => "absent ",
            };
            let lost = if f.ok {
                String::new()
            } else {
                format!("; without it {}", f.without)
            };
            println!("{state}  {}: {}{lost}", f.name, f.found);
        }
    }
    Ok(u8::from(list.iter().any(|f| !f.ok && f.needed)))
}

//! `umlctl inspect` and `umlctl verify`.

use super::bytes;
use anyhow::Result;
use snapshot::image::manifest::{Backing, Manifest};
use snapshot::image::{pack as packing, store, verify as check};
use std::path::Path;

/// Shows what is in a snapshot.
pub fn show(dir: &Path, json: bool) -> Result<u8> {
    let m = store::load(dir)?;
    if json {
        println!("{}", serde_json::to_string(&m)?);
        return Ok(0);
    }
    println!(
        "kernel {}, taken at {} (seconds since 1970)",
        m.host.release,
        m.taken.realtime_ns / 1_000_000_000
    );
    for layer in &m.layers {
        println!("builds on {}", layer.path.display());
    }
    for p in &m.processes {
        if let Some(status) = p.zombie {
            println!(
                "process {} (child of {}): ended, status {status}",
                p.pid, p.ppid
            );
            continue;
        }
        println!(
            "process {} (child of {}): {}, {} threads, {} descriptors, user {}",
            p.pid,
            p.ppid,
            p.exe.display(),
            p.threads.len(),
            p.fds.len(),
            p.credentials.uid[1]
        );
        if let Some(space) = m.spaces.get(p.space as usize) {
            println!(
                "  memory: {} in {} mappings, of it private {}",
                bytes(size(space.ranges.iter())),
                space.ranges.len(),
                bytes(size(
                    space
                        .ranges
                        .iter()
                        .filter(|r| r.backing == Backing::Anonymous)
                ))
            );
        }
        files(&m, p);
    }
    Ok(0)
}

fn size<'a>(ranges: impl Iterator<Item = &'a snapshot::image::manifest::Range>) -> u64 {
    // Nobody has checked them yet.
    ranges.fold(0, |n, r| n.saturating_add(r.end.saturating_sub(r.start)))
}

fn files(m: &Manifest, p: &snapshot::image::manifest::Process) {
    for fd in &p.fds {
        let Some(file) = m.files.get(fd.file as usize) else {
            continue;
        };
        // The kind's own name and fields, as JSON has them.
        let kind = serde_json::to_string(&file.kind).unwrap_or_default();
        let kind: String = kind.chars().take(90).collect();
        println!("  fd {:<4} {kind}", fd.fd);
    }
}

/// Reads all of a snapshot and checks all sums.
pub fn verify(dir: &Path, json: bool) -> Result<u8> {
    let m = store::load(dir)?;
    let v = check::verify(dir, &m)?;
    if json {
        println!(
            "{}",
            serde_json::json!({ "ok": true, "blocks": v.entries, "pages": v.pages })
        );
    } else {
        println!(
            "{}: {} in {} blocks are as they were saved",
            dir.display(),
            bytes(v.pages * 4096),
            v.entries
        );
    }
    Ok(0)
}

/// Compresses a snapshot.
pub fn pack(dir: &Path, level: i32, json: bool) -> Result<u8> {
    let m = store::load(dir)?;
    anyhow::ensure!(
        !packing::is_packed(dir),
        "{} is packed already",
        dir.display()
    );
    let p = packing::pack(dir, &m, level)?;
    if json {
        println!(
            "{}",
            serde_json::json!({ "memory_bytes": p.memory_bytes, "packed_bytes": p.packed_bytes })
        );
    } else {
        println!(
            "{}: {} of memory packed into {}",
            dir.display(),
            bytes(p.memory_bytes),
            bytes(p.packed_bytes)
        );
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use snapshot::image::manifest::Range;

    #[test]
    fn ranges_that_cannot_be_have_no_size() {
        let range = |start, end| Range {
            start,
            end,
            prot: 0,
            flags: 0,
            backing: Backing::Anonymous,
            advice: Vec::new(),
            name: None,
        };
        assert_eq!(size([range(5, 7), range(9, 3)].iter()), 2);
        assert_eq!(size([range(0, u64::MAX), range(0, 9)].iter()), u64::MAX);
    }
}

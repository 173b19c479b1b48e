//! Which snapshots were verified since the machine was started: `docs/snapshot.md`, section 4.4.
//!
//! Manifest and index are checked by their sums whenever they are read. A record says that the pages were found to be what
//! the index says. Its name is a sum over the boot's id, the sums of the indexes, and device, inode, size and change time
//! of each file with pages; so a record of a file that was changed is never found again.

use super::Error;
use super::index::Index;
use super::manifest::Manifest;
use super::pages::PagesReader;
use super::pageset::BLOCK;
use super::verify;
use std::fs::{DirBuilder, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Where the records are. It is empty after a start of the machine.
pub const DIRECTORY: &str = "/run/umlctl/verified";

/// Changes within so short a time may not show in the change time (of older kernels).
const GRAIN: Duration = Duration::from_millis(20);

/// Opens the memory of a snapshot, and reads and checks all of it unless a record says that it was done. With `again` it is
/// done in any case.
pub fn open(
    records: &Path,
    dir: &Path,
    manifest: &Manifest,
    again: bool,
) -> Result<(Index, PagesReader), Error> {
    let (index, pages) = verify::open(dir, manifest)?;
    let before = name(manifest, &pages)?;
    if !again && trusted(records) && records.join(&before.0).exists() {
        return Ok((index, pages));
    }
    let mut room = vec![0; BLOCK as usize];
    for e in index.entries() {
        pages.check(e, &mut room)?;
    }
    let after = name(manifest, &pages)?;
    let settled = SystemTime::now()
        .duration_since(UNIX_EPOCH + after.1)
        .is_ok_and(|age| age > GRAIN);
    if before == after && settled {
        write(records, &after.0);
    }
    Ok((index, pages))
}

/// Notes that a snapshot is what its sums say. For the saver, which made them of the memory that it wrote.
pub fn record(records: &Path, dir: &Path, manifest: &Manifest) -> Result<(), Error> {
    let (_, pages) = verify::open(dir, manifest)?;
    write(records, &name(manifest, &pages)?.0);
    Ok(())
}

/// The record's name, and the time of the last change.
fn name(manifest: &Manifest, pages: &PagesReader) -> Result<(String, Duration), Error> {
    let boot = "/proc/sys/kernel/random/boot_id";
    let boot = std::fs::read(boot).map_err(Error::io(boot, "read it"))?;
    let mut hasher = blake3::Hasher::new();
    hasher.update(&boot);
    hasher.update(manifest.index.as_bytes());
    for layer in &manifest.layers {
        hasher.update(layer.index.as_bytes());
    }
    let mut last = Duration::ZERO;
    for (path, file) in pages.files() {
        let m = file.metadata().map_err(Error::io(path, "look at it"))?;
        for word in [m.dev(), m.ino(), m.size()] {
            hasher.update(&word.to_le_bytes());
        }
        for word in [m.ctime(), m.ctime_nsec()] {
            hasher.update(&word.to_le_bytes());
        }
        let seconds = u64::try_from(m.ctime()).unwrap_or(0);
        let nanos = u32::try_from(m.ctime_nsec()).unwrap_or(0);
        last = last.max(Duration::new(seconds, nanos.min(999_999_999)));
    }
    Ok((hasher.finalize().to_hex().to_string(), last))
}

/// Records that others can make are none.
fn trusted(records: &Path) -> bool {
    std::fs::symlink_metadata(records).is_ok_and(|m| {
        m.is_dir() && m.uid() == nix::unistd::geteuid().as_raw() && m.mode() & 0o022 == 0
    })
}

/// A record that cannot be written only costs time at the next resume.
fn write(records: &Path, name: &str) {
    let _ = DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(records);
    if trusted(records) {
        let mut options = OpenOptions::new();
        let options = options.write(true).create(true).mode(0o600);
        let _ = options
            .custom_flags(libc::O_NOFOLLOW)
            .open(records.join(name));
    }
}

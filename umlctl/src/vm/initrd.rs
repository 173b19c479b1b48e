//! The file system that the guest's kernel starts with: the agent, and the directories it mounts on.

use super::{Error, io};
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// The agent: a static program for the guest, built by build.rs.
pub static AGENT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/agent"));

/// An archive in cpio's `newc` format.
#[derive(Debug, Default)]
struct Cpio {
    bytes: Vec<u8>,
    inode: u32,
}

impl Cpio {
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
        self.inode += 1;
        let length = u32::try_from(data.len()).expect("the agent is smaller than 4 GiB");
        let fields = [
            self.inode,
            mode,
            0,
            0,
            1,
            0,
            length,
            0,
            0,
            device.0,
            device.1,
            u32::try_from(name.len() + 1).expect("a short name"),
            0,
        ];
        self.bytes.extend(b"070701");
        for f in fields {
            self.bytes.extend(format!("{f:08x}").bytes());
        }
        self.bytes.extend(name.bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(data);
        self.pad();
    }
}

/// The archive.
fn archive() -> Vec<u8> {
    let mut cpio = Cpio::default();
    for dir in ["dev", "proc", "root"] {
        cpio.entry(dir, 0o040_755, (0, 0), &[]);
    }
    cpio.entry("dev/console", 0o020_600, (5, 1), &[]);
    cpio.entry("agent", 0o100_755, (0, 0), AGENT);
    cpio.entry("TRAILER!!!", 0, (0, 0), &[]);
    cpio.bytes
}

/// Writes it.
///
/// # Errors
/// The file system's.
pub fn write(path: &Path) -> Result<(), Error> {
    let mut file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .map_err(io("make", path))?;
    file.write_all(&archive()).map_err(io("write", path))
}

#[cfg(test)]
mod tests {
    #[test]
    fn archive_has_all() {
        let a = super::archive();
        assert_eq!(a.len() % 4, 0);
        let count = a.windows(6).filter(|w| w == b"070701").count();
        assert!(count >= 6);
        assert_eq!(&a[..6], b"070701");
    }
}

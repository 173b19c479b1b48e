//! The filesystems under test.

mod btrfs;
mod cowfs;
mod native;
pub mod overlay;

use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, umount2};

use crate::cli::Plan;

pub use btrfs::Btrfs;
pub use cowfs::{Cowfs, WRITEBACK};
pub use native::Native;
pub use overlay::Overlay;

/// A filesystem that rows run on. Dropping it takes everything away again.
pub trait FsUnderTest {
    /// Column in the results.
    fn name(&self) -> &'static str;
    /// Makes and mounts it, empty.
    fn setup(&mut self) -> Result<()>;
    /// Directory to work in.
    fn root(&self) -> &Path;
    /// Unmounts and mounts it again, so that it knows nothing yet. Caches of the host stay.
    fn remount(&mut self) -> Result<()>;
    /// Writes back, and drops all caches of the kernel.
    fn drop_caches(&self) -> Result<()> {
        crate::run::drop_caches()
    }
    /// What went wrong without keeping the rows from being measured.
    fn complaints(&mut self) -> Vec<anyhow::Error> {
        Vec::new()
    }
    /// Unmounts and removes it; best effort.
    fn teardown(&mut self);
}

/// Makes one by name in a directory of its own.
pub fn make(name: &str, plan: &Plan, dir: &Path) -> Result<Box<dyn FsUnderTest>> {
    let dir = dir.join(name);
    Ok(match name {
        "native" => Box::new(Native::new(&dir)),
        "cowfs" => Box::new(Cowfs::new(plan, &dir)?),
        WRITEBACK => Box::new(Cowfs::with_writeback(plan, &dir)?),
        "overlay" => Box::new(Overlay::kernel(&dir)),
        "fuse-overlayfs" => Box::new(Overlay::fuse(&dir)),
        "btrfs" => Box::new(Btrfs::new(&dir)),
        _ => bail!("no such filesystem: {name}"),
    })
}

/// Makes a directory and those above it.
pub fn make_dir(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))
}

/// Removes a directory, but nothing of what may still be mounted in it.
pub fn remove_dir(dir: &Path) {
    let mut c = crate::run::command("rm", &["-rf", "--one-file-system", "--"]);
    if !c.arg(dir).status().is_ok_and(|s| s.success()) {
        eprintln!("bench: could not remove {}", dir.display());
    }
}

/// Unmounts; after a second of "busy" an error.
pub fn unmount(at: &Path) -> Result<()> {
    for _ in 0..100 {
        match umount2(at, MntFlags::empty()) {
            Err(nix::errno::Errno::EBUSY) => {
                std::thread::sleep(std::time::Duration::from_millis(10))
            }
            other => return other.with_context(|| format!("unmounting {}", at.display())),
        }
    }
    bail!("{} is busy", at.display())
}

/// Unmounts whatever happens, if it is mounted.
pub fn unmount_by_force(at: &Path) {
    if is_mounted(at) && unmount(at).is_err() {
        let _ = umount2(at, MntFlags::MNT_DETACH);
    }
}

/// Is something mounted there?
pub fn is_mounted(at: &Path) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mounts
        .lines()
        .any(|l| l.split(' ').nth(1).is_some_and(|m| Path::new(m) == at))
}

/// Processes one of whose arguments is this path.
pub fn pids_with_argument(path: &Path) -> Vec<i32> {
    use std::os::unix::ffi::OsStrExt;
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    let pids = entries.filter_map(|e| e.ok()?.file_name().to_string_lossy().parse::<i32>().ok());
    pids.filter(|pid| {
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|b| *b == 0)
            .any(|a| a == path.as_os_str().as_bytes())
    })
    .collect()
}

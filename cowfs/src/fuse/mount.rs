//! Mounting and unmounting.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, umount2};

use super::{FuseError, splice, sys};

/// How to mount.
#[derive(Debug, Clone)]
pub struct MountOptions {
    /// Shown as the mount's source.
    pub source: String,
    /// Shown behind `fuse.` as its type.
    pub subtype: String,
    /// Read-only.
    pub read_only: bool,
    /// No access times are kept.
    pub noatime: bool,
    /// Set-id bits have no effect.
    pub nosuid: bool,
    /// Devices have no effect.
    pub nodev: bool,
    /// Nothing can be executed.
    pub noexec: bool,
    /// The kernel keeps what is written, so many MiB of it at most, and brings it later; 0: it does not.
    pub writeback_mib: u32,
    /// Largest read or write, bytes.
    pub max_io: u32,
    /// The kernel's read-ahead, KiB.
    pub readahead_kb: u32,
    /// Threads that serve.
    pub threads: usize,
    /// How long a thread looks for the next request before it sleeps, microseconds.
    pub spin_us: u64,
}

impl Default for MountOptions {
    fn default() -> Self {
        Self {
            source: "none".into(),
            subtype: "none".into(),
            read_only: false,
            noatime: false,
            nosuid: false,
            nodev: false,
            noexec: false,
            writeback_mib: 0,
            max_io: 1 << 20,
            readahead_kb: 1024,
            threads: 4,
            spin_us: 60,
        }
    }
}

/// Mounts and returns the device.
pub(super) fn mount_device(target: &Path, o: &MountOptions) -> Result<File, FuseError> {
    let dev = File::options()
        .read(true)
        .write(true)
        .open("/dev/fuse")
        .map_err(FuseError::Device)?;
    let data = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other,max_read={}",
        dev.as_raw_fd(),
        splice::READ_MAX
    );
    let mut flags = MsFlags::empty();
    for (on, flag) in [
        (o.read_only, MsFlags::MS_RDONLY),
        (o.noatime, MsFlags::MS_NOATIME),
        (o.nosuid, MsFlags::MS_NOSUID),
        (o.nodev, MsFlags::MS_NODEV),
        (o.noexec, MsFlags::MS_NOEXEC),
    ] {
        if on {
            flags |= flag;
        }
    }
    let fstype = format!("fuse.{}", o.subtype);
    sys::mount(&o.source, target, &fstype, flags, &data).map_err(|e| FuseError::Mount {
        path: target.display().to_string(),
        source: e.into(),
    })?;
    Ok(dev)
}

/// Sets the read-ahead of a mount's device; a failure only costs speed.
pub(super) fn set_readahead(device: u64, kb: u32) {
    set_device(device, "read_ahead_kb", kb.into());
}

/// Sets how much of written data the kernel may keep for a mount's device: whoever writes more has to wait. A failure
/// only costs speed.
pub fn limit_writeback(device: u64, mib: u32) {
    set_device(device, "max_bytes", u64::from(mib) << 20);
}

/// Sets something of a mount's backing device.
fn set_device(device: u64, name: &str, value: u64) {
    let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
    let path = format!("/sys/class/bdi/{major}:{minor}/{name}");
    if let Err(e) = std::fs::write(&path, value.to_string()) {
        tracing::debug!(path, error = %e, "stays as it is");
    }
}

/// Unmounts; `lazy` also when it is in use.
///
/// # Errors
/// EBUSY, EINVAL (nothing mounted) and the like.
pub fn unmount(target: &Path, lazy: bool) -> std::io::Result<()> {
    let mut flags = MntFlags::UMOUNT_NOFOLLOW;
    if lazy {
        flags |= MntFlags::MNT_DETACH;
    }
    umount2(target, flags).map_err(Into::into)
}

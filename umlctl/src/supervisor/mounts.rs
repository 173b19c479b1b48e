//! The mounts that a VM's mount namespace begins with: copies of the host's. Those that the VM has no use for are let go, as
//! each would keep its filesystem busy for as long as the VM lives.

use cowfs::mountinfo::{self, Entry};
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use std::path::{Path, PathBuf};

/// What programs and their libraries come from, and what the kernel itself shows.
const SYSTEM: [&str; 12] = [
    "/bin", "/dev", "/etc", "/lib", "/lib32", "/lib64", "/libx32", "/proc", "/run", "/sbin",
    "/sys", "/usr",
];

/// Network namespaces of other VMs, which would outlive those.
const NETWORKS: &str = "/run/netns/";

/// Takes the calling process's mount namespace out of the host's, but for the host's own unmounts, and lets go of every mount
/// that none of `needed` (absolute paths) is on.
///
/// # Errors
/// The kernel's.
pub fn leave_behind(needed: &[PathBuf]) -> Result<(), Errno> {
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)?;
    let mut points = points(mountinfo::of("self").unwrap_or_default());
    // What lies deeper goes first.
    points.sort_by_key(|p| std::cmp::Reverse(p.as_os_str().len()));
    for point in points.iter().filter(|p| !is_needed(p, needed)) {
        // One that is gone already went with another.
        let _ = umount2(point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    }
    Ok(())
}

fn points(mounts: Vec<Entry>) -> Vec<PathBuf> {
    mounts.into_iter().map(|m| m.point).collect()
}

fn is_needed(point: &Path, needed: &[PathBuf]) -> bool {
    point == Path::new("/")
        || (SYSTEM.iter().any(|s| point.starts_with(s))
            && (!point.starts_with(NETWORKS) || point == Path::new(NETWORKS)))
        || needed.iter().any(|n| n.starts_with(point))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_needed_stays() {
        let needed = [PathBuf::from("/srv/vm/images/a.img")];
        for (point, stays) in [
            ("/", true),
            ("/usr", true),
            ("/dev/shm", true),
            ("/srv", true),
            ("/srv/vm", true),
            ("/srv/vm/other", false),
            ("/mnt", false),
            ("/srv/v", false),
            ("/run/netns/umlctl-1", false),
            ("/run/netns", true),
        ] {
            assert_eq!(is_needed(Path::new(point), &needed), stays, "{point}");
        }
    }

    #[test]
    fn points_with_blanks() {
        let text = b"22 1 8:1 / / rw - ext4 x rw\n30 22 0:5 / /a\\040b rw - tmpfs t rw\n";
        let points = points(mountinfo::parse(text));
        assert_eq!(points, [PathBuf::from("/"), PathBuf::from("/a b")]);
    }
}

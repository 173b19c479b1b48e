//! Brings single files and directories back from a checkpoint, through the mount, so that the kernel knows of it.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use super::{Service, micros};
use crate::control::{Answer, Failure, MountSpec};

/// A mount of a checkpoint that goes away by itself.
struct Shown<'a> {
    service: &'a Arc<Service>,
    dir: PathBuf,
}

impl Drop for Shown<'_> {
    fn drop(&mut self) {
        if let Err(e) = self.service.unmount(&self.dir, true) {
            tracing::warn!(error = %e, "a checkpoint stays mounted");
        }
        let _ = std::fs::remove_dir(&self.dir);
    }
}

/// A path inside the root, without `..`.
fn inside(path: &str) -> Result<PathBuf, Failure> {
    let mut out = PathBuf::new();
    for c in Path::new(path).components() {
        match c {
            Component::Normal(n) => out.push(n),
            Component::RootDir | Component::CurDir => {}
            _ => return Err(Failure::new(format!("{path}: '..' is not allowed here"))),
        }
    }
    if out.as_os_str().is_empty() {
        return Err(Failure::new(
            "the whole root is not restored but rolled back: use 'cowfs rollback'",
        ));
    }
    Ok(out)
}

pub(super) fn restore(
    service: &Arc<Service>,
    head: &str,
    checkpoint: &str,
    paths: &[String],
) -> Result<Answer, Failure> {
    let start = Instant::now();
    let mount = service
        .mounted(head)
        .ok_or_else(|| Failure::new(format!("head {head} is not mounted")))?;
    let wanted: Vec<PathBuf> = paths.iter().map(|p| inside(p)).collect::<Result<_, _>>()?;
    let dir = std::env::temp_dir().join(format!(
        "cowfs-restore-{}-{}",
        std::process::id(),
        crate::store::now_us()
    ));
    let failed = |what: &str, e: &dyn std::fmt::Display| Failure::new(format!("{what}: {e}"));
    std::fs::create_dir(&dir).map_err(|e| failed("a directory for the checkpoint", &e))?;
    let mounted = service.mount(&MountSpec {
        mountpoint: dir.clone(),
        head: Some(head.to_owned()),
        at: Some(checkpoint.to_owned()),
        options: vec!["noatime".into()],
    });
    let dir = match mounted {
        Ok(d) => d,
        Err(e) => {
            let _ = std::fs::remove_dir(&dir);
            return Err(e);
        }
    };
    let shown = Shown { service, dir };
    for path in &wanted {
        let from = shown.dir.join(path);
        if from.symlink_metadata().is_err() {
            return Err(Failure::new(format!(
                "{} is not in checkpoint {checkpoint}; nothing of it was restored",
                path.display()
            )));
        }
    }
    for path in &wanted {
        one(&shown.dir.join(path), mount.mountpoint(), path)?;
    }
    drop(shown);
    Ok(Answer::Restored {
        paths: wanted.len() as u64,
        elapsed_us: micros(start),
    })
}

/// Copies beside the place, then exchanges: whoever looks sees the old or the new one.
fn one(from: &Path, root: &Path, path: &Path) -> Result<(), Failure> {
    let to = root.join(path);
    let parent = to.parent().unwrap_or(root);
    let show = path.display();
    std::fs::create_dir_all(parent).map_err(|e| Failure::new(format!("{show}: {e}")))?;
    // A symlink in the way could lead out of the root.
    let real = parent
        .canonicalize()
        .map_err(|e| Failure::new(format!("{show}: {e}")))?;
    if real != parent {
        return Err(Failure::new(format!("{show}: a symlink is in the way")));
    }
    let name = to.file_name().unwrap_or(OsStr::new("file"));
    let mut fresh_name = b".cowfs-restore-".to_vec();
    fresh_name.extend_from_slice(&name.as_bytes()[..name.len().min(200)]);
    let fresh = parent.join(OsStr::from_bytes(&fresh_name));
    let clear = |p: &Path| match p.symlink_metadata() {
        Ok(m) if m.is_dir() => std::fs::remove_dir_all(p),
        Ok(_) => std::fs::remove_file(p),
        Err(_) => Ok(()),
    };
    clear(&fresh).map_err(|e| Failure::new(format!("{show}: {e}")))?;
    let copied = Command::new("cp")
        .args(["-a", "--reflink=never", "--"])
        .arg(from)
        .arg(&fresh)
        .current_dir("/")
        .output()
        .map_err(|e| Failure::new(format!("cp: {e}")))?;
    if !copied.status.success() {
        let _ = clear(&fresh);
        return Err(Failure::new(format!(
            "{show}: {}",
            String::from_utf8_lossy(&copied.stderr).trim()
        )));
    }
    let there = to.symlink_metadata().is_ok();
    let flags = if there {
        nix::fcntl::RenameFlags::RENAME_EXCHANGE
    } else {
        nix::fcntl::RenameFlags::RENAME_NOREPLACE
    };
    nix::fcntl::renameat2(
        nix::fcntl::AT_FDCWD,
        &fresh,
        nix::fcntl::AT_FDCWD,
        &to,
        flags,
    )
    .map_err(|e| Failure::new(format!("{show}: {e}")))?;
    if there {
        clear(&fresh).map_err(|e| Failure::new(format!("{show}: {e}")))?;
    }
    Ok(())
}

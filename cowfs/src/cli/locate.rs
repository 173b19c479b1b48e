//! From a path to its store, head and daemon.

use std::path::{Path, PathBuf};

use crate::control::{Answer, Client, Failure, Request};
use crate::service::Service;
use crate::store::superblock;

/// A store, and the mount it was found by.
#[derive(Debug, Clone)]
pub(super) struct Target {
    /// Store.
    pub store: PathBuf,
    /// Mount point and what it shows: a head, or `@CHECKPOINT`.
    pub mount: Option<(PathBuf, String)>,
}

/// Undoes the octal escapes of /proc/self/mountinfo.
fn unescape(s: &str) -> String {
    let b = s.as_bytes();
    let mut out = Vec::with_capacity(b.len());
    let mut i = 0;
    while i < b.len() {
        let octal = b
            .get(i + 1..i + 4)
            .and_then(|d| std::str::from_utf8(d).ok());
        match octal.and_then(|d| u8::from_str_radix(d, 8).ok()) {
            Some(c) if b[i] == b'\\' => {
                out.push(c);
                i += 4;
            }
            _ => {
                out.push(b[i]);
                i += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Store and what is shown, of the cowfs that is mounted at exactly this path (the topmost).
fn mounted_at(path: &Path, mountinfo: &str) -> Option<(PathBuf, String)> {
    mountinfo.lines().rev().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let point = unescape(left.split(' ').nth(4)?);
        if Path::new(&point) != path {
            return None;
        }
        let mut right = right.split(' ');
        if right.next()? != "fuse.cowfs" {
            return None;
        }
        let source = unescape(right.next()?);
        let (store, shown) = source.rsplit_once('#')?;
        Some((PathBuf::from(store), shown.to_owned()))
    })
}

impl Target {
    /// Finds the store that a path means: a mount point, or the store's own directory.
    pub fn of(path: &Path) -> Result<Self, Failure> {
        // A dead mount cannot be looked into, so the path is made absolute by its parent.
        let full = match path.canonicalize() {
            Ok(p) => p,
            Err(_) => match (path.parent(), path.file_name()) {
                (Some(up), Some(name)) => {
                    let up = if up.as_os_str().is_empty() {
                        Path::new(".")
                    } else {
                        up
                    };
                    up.canonicalize()
                        .map_err(|e| Failure {
                            code: 10,
                            message: format!("{}: {e}", path.display()),
                        })?
                        .join(name)
                }
                _ => path.to_path_buf(),
            },
        };
        let info = std::fs::read_to_string("/proc/self/mountinfo")
            .map_err(|e| Failure::new(format!("/proc/self/mountinfo: {e}")))?;
        if let Some((store, shown)) = mounted_at(&full, &info) {
            return Ok(Self {
                store,
                mount: Some((full, shown)),
            });
        }
        if full.join(superblock::FILE).is_file() {
            return Ok(Self {
                store: full,
                mount: None,
            });
        }
        Err(Failure {
            code: 10,
            message: format!(
                "{} is neither a cowfs mount point nor a store; 'cowfs init' makes a store",
                path.display()
            ),
        })
    }

    /// The head that the mount shows, if it is one.
    pub fn mounted_head(&self) -> Option<String> {
        self.mount
            .as_ref()
            .map(|m| m.1.clone())
            .filter(|h| !h.starts_with('@'))
    }

    /// The head that is meant: the mount's, or `main` of a store.
    pub fn head(&self) -> Result<String, Failure> {
        match &self.mount {
            None => Ok("main".into()),
            Some((at, shown)) if shown.starts_with('@') => Err(Failure::new(format!(
                "{} shows a checkpoint, read-only; this needs a mounted head",
                at.display()
            ))),
            Some((_, head)) => Ok(head.clone()),
        }
    }

    /// The store's daemon, if one runs.
    pub fn client(&self) -> Result<Option<Client>, Failure> {
        Client::connect(&self.store)
    }

    /// Asks the daemon, or, if there is none, does it here.
    pub fn ask(&self, request: &Request) -> Result<Answer, Failure> {
        if let Some(mut c) = self.client()? {
            return c.ask(request);
        }
        if self.mount.is_some() {
            return Err(Failure::new(
                "the daemon of this mount is gone; 'cowfs unmount' it, then mount it again",
            ));
        }
        let service = Service::open(&self.store)?;
        let answer = service.call(request.clone());
        service.finish()?;
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_topmost_mount() {
        let info = "36 35 98:0 / /mnt/a\\040b rw - fuse.cowfs /st\\040ore#main rw\n\
                    37 35 98:0 / /mnt/c rw - ext4 /dev/x rw\n\
                    38 35 98:0 / /mnt/a\\040b rw - fuse.cowfs /other#@one rw\n";
        assert_eq!(
            mounted_at(Path::new("/mnt/a b"), info),
            Some(("/other".into(), "@one".into()))
        );
        assert_eq!(mounted_at(Path::new("/mnt/c"), info), None);
    }
}

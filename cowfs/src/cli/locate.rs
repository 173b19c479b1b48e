//! From a path to its store, head and daemon.

use std::path::{Path, PathBuf};

use crate::control::{Answer, Client, Failure, Request};
use crate::mountinfo::{self, Entry};
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

fn mounts() -> Result<Vec<Entry>, Failure> {
    mountinfo::of("self").map_err(|e| Failure::new(format!("/proc/self/mountinfo: {e}")))
}

/// The one store that is mounted, by the first of its mounts.
fn only(mounts: &[Entry]) -> Result<Target, Failure> {
    let mut found: Vec<Target> = Vec::new();
    for m in mounts {
        if let Some((store, shown)) = &m.cowfs
            && !found.iter().any(|t| t.store == *store)
        {
            found.push(Target {
                store: store.clone(),
                mount: Some((m.point.clone(), shown.clone())),
            });
        }
    }
    if found.len() == 1
        && let Some(t) = found.pop()
    {
        return Ok(t);
    }
    let message = if found.is_empty() {
        "no cowfs is mounted: say which store or mount point".into()
    } else {
        format!(
            "{} stores are mounted: say which store or mount point",
            found.len()
        )
    };
    Err(Failure { code: 2, message })
}

impl Target {
    /// As [`Target::of`]; without a path the one store that is mounted on this machine.
    pub fn of_or_only(path: Option<&Path>) -> Result<Self, Failure> {
        match path {
            Some(p) => Self::of(p),
            None => only(&mounts()?),
        }
    }

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
        if let Some((store, shown)) = mountinfo::mounted_at(&full, &mounts()?) {
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

    fn found(info: &str) -> Result<PathBuf, Failure> {
        only(&mountinfo::parse(info.as_bytes())).map(|t| t.store)
    }

    #[test]
    fn without_a_path_there_must_be_one_store() {
        let a = "36 35 98:0 / /a rw - fuse.cowfs /sa#main rw\n";
        let second = "37 35 98:0 / /a2 rw - fuse.cowfs /sa#@one rw\n";
        let other = "38 35 98:0 / /b rw - fuse.cowfs /sb#main rw\n";
        assert_eq!(found(a).expect("one"), PathBuf::from("/sa"));
        assert_eq!(
            found(&format!("{a}{second}")).expect("one"),
            PathBuf::from("/sa")
        );
        for (info, says) in [
            (String::new(), "no cowfs is mounted"),
            (format!("{a}{other}"), "2 stores are mounted"),
        ] {
            let e = found(&info).expect_err("not one");
            assert_eq!(e.code, 2);
            assert!(e.message.contains(says), "{e}");
        }
    }
}

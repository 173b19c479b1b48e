//! A store in service: what the commands ask for, on mounted heads or on a store nobody has mounted.

mod diff;
mod restore;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use crate::control::{Answer, CheckpointInfo, Failure, HeadInfo, MountSpec, Request};
use crate::fuse::{self, MountOptions};
use crate::mount::{Atime, MountFs, Undo, What};
use crate::names;
use crate::store::{Catalog, CatalogOp, Store, StoreError, now_us};

/// A store in service.
#[derive(Debug)]
pub struct Service {
    store: Arc<Store>,
    dir: PathBuf,
    mounts: Mutex<HashMap<PathBuf, Arc<MountFs>>>,
    /// Told when a mount is gone.
    gone: Condvar,
}

fn micros(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX)
}

impl Service {
    /// Opens a store and its background work.
    ///
    /// # Errors
    /// No store, locked, damaged.
    pub fn open(dir: &Path) -> Result<Arc<Self>, Failure> {
        let dir = dir.canonicalize().map_err(|e| Failure {
            code: 10,
            message: format!("{}: {e}", dir.display()),
        })?;
        let store = Store::open(&dir)?;
        store
            .start_background()
            .map_err(|e| Failure::new(format!("no thread for the store: {e}")))?;
        Ok(Arc::new(Self {
            store,
            dir,
            mounts: Mutex::default(),
            gone: Condvar::new(),
        }))
    }

    /// The store.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Mounts, and serves in a thread of its own until the mount is gone.
    ///
    /// # Errors
    /// Not found, mounted already, mount(2)'s.
    pub fn mount(self: &Arc<Self>, spec: &MountSpec) -> Result<PathBuf, Failure> {
        let target = spec.mountpoint.canonicalize().map_err(|e| {
            Failure::new(format!(
                "the mount point {}: {e}",
                spec.mountpoint.display()
            ))
        })?;
        if !target.is_dir() {
            return Err(Failure::new(format!(
                "{} is not a directory",
                target.display()
            )));
        }
        if target.starts_with(&self.dir) || self.dir.starts_with(&target) {
            return Err(Failure::new(
                "the mount point and the store must not hold each other",
            ));
        }
        let mut options = MountOptions {
            subtype: "cowfs".into(),
            ..MountOptions::default()
        };
        let atime = parse_options(&spec.options, &mut options)?;
        let catalog = self.store.catalog()?;
        let what = match (&spec.head, &spec.at) {
            (head, Some(at)) => {
                let c = names::resolve(&catalog, head.as_deref(), at)?;
                What::Fixed(c.root, c.name.clone())
            }
            (head, None) => {
                let head = head.clone().unwrap_or_else(|| "main".into());
                if !catalog.heads.contains_key(&head) {
                    return Err(Failure::new(format!(
                        "there is no head {head}; 'cowfs list' shows them"
                    )));
                }
                What::Head(head)
            }
        };
        let mut mounts = crate::mount::lock(&self.mounts);
        if mounts.contains_key(&target) {
            return Err(Failure::new(format!(
                "{} is mounted already",
                target.display()
            )));
        }
        let shown = match &what {
            What::Head(h) => {
                if let Some(m) = mounts.values().find(|m| !m.is_fixed() && m.name() == h) {
                    return Err(Failure::new(format!(
                        "head {h} is mounted at {} already; a clone can be mounted beside it",
                        m.mountpoint().display()
                    )));
                }
                h.clone()
            }
            What::Fixed(_, name) => {
                options.read_only = true;
                format!("@{name}")
            }
        };
        options.source = format!("{}#{shown}", self.dir.display());
        let fs = MountFs::new(
            Arc::clone(&self.store),
            what,
            target.clone(),
            options.read_only,
            atime,
        )?;
        let session = fuse::mount(&target, &options)?;
        fs.begin_service(session.notifier())
            .map_err(|e| Failure::new(format!("no thread for the mount: {e}")))?;
        mounts.insert(target.clone(), Arc::clone(&fs));
        drop(mounts);
        let service = Arc::clone(self);
        let key = target.clone();
        let spawned = std::thread::Builder::new()
            .name("cowfs-mount".into())
            .spawn(move || {
                if let Err(e) = session.run(fs.clone()) {
                    tracing::error!(error = %e, mountpoint = %key.display(), "the mount ended");
                }
                fs.close();
                crate::mount::lock(&service.mounts).remove(&key);
                service.gone.notify_all();
            });
        if let Err(e) = spawned {
            let _ = fuse::unmount(&target, true);
            return Err(Failure::new(format!("no thread for the mount: {e}")));
        }
        // The first request is answered when the mount works.
        std::fs::metadata(&target)
            .map_err(|e| Failure::new(format!("the mount does not answer: {e}")))?;
        Ok(target)
    }

    /// Waits until the last mount is gone, then makes all durable.
    ///
    /// # Errors
    /// The store's.
    pub fn serve(&self) -> Result<(), Failure> {
        let mut mounts = crate::mount::lock(&self.mounts);
        while !mounts.is_empty() {
            mounts = self
                .gone
                .wait(mounts)
                .unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        drop(mounts);
        self.finish()
    }

    /// Unmounts everything that is mounted, also when it is in use (for SIGTERM).
    pub fn unmount_all(&self) {
        let targets: Vec<PathBuf> = crate::mount::lock(&self.mounts).keys().cloned().collect();
        for t in targets {
            if let Err(e) = fuse::unmount(&t, true) {
                tracing::error!(error = %e, mountpoint = %t.display(), "could not be unmounted");
            }
        }
    }

    /// Ends the background work and commits.
    ///
    /// # Errors
    /// The store's.
    pub fn finish(&self) -> Result<(), Failure> {
        self.store.stop_background();
        Ok(self.store.commit()?)
    }

    fn mounted(&self, head: &str) -> Option<Arc<MountFs>> {
        crate::mount::lock(&self.mounts)
            .values()
            .find(|m| !m.is_fixed() && m.name() == head)
            .map(Arc::clone)
    }

    /// Does what a request asks.
    ///
    /// # Errors
    /// With the exit code that it means.
    pub fn call(self: &Arc<Self>, request: Request) -> Result<Answer, Failure> {
        match request {
            Request::Checkpoint {
                head,
                name,
                tags,
                wait,
            } => self.checkpoint(head, name, tags, wait),
            Request::Rollback {
                head,
                checkpoint,
                discard,
                dry_run,
                keep_as,
            } => self.rollback(head, &checkpoint, discard, dry_run, keep_as),
            Request::Clone {
                head,
                checkpoint,
                new_head,
            } => {
                names::check(&new_head)?;
                self.catalog_op(|c| {
                    free_name(c, &new_head)?;
                    Ok(CatalogOp::Clone {
                        from: names::resolve(c, head.as_deref(), &checkpoint)?.id,
                        id: c.next_head,
                        name: new_head.clone(),
                        created_us: now_us(),
                    })
                })
            }
            Request::List => self.list(),
            Request::Diff { head, a, b } => diff::diff(&self.store, head.as_deref(), &a, &b),
            Request::Restore {
                head,
                checkpoint,
                paths,
            } => restore::restore(self, &head, &checkpoint, &paths),
            Request::Tag {
                head,
                checkpoint,
                set,
                remove,
            } => self.catalog_op(|c| {
                Ok(CatalogOp::Tag {
                    id: names::resolve(c, head.as_deref(), &checkpoint)?.id,
                    set: set.clone(),
                    remove: remove.clone(),
                })
            }),
            Request::Pin {
                head,
                checkpoint,
                on,
            } => self.catalog_op(|c| {
                Ok(CatalogOp::Pin {
                    id: names::resolve(c, head.as_deref(), &checkpoint)?.id,
                    on,
                })
            }),
            Request::Rename { from, to } => self.rename(&from, &to),
            Request::Delete { name } => self.delete(&name),
            Request::Gc => Ok(self.store.gc()?.into()),
            Request::Stats => self.stats(),
            Request::Mount(spec) => Ok(Answer::Mounted {
                mountpoint: self.mount(&spec)?,
            }),
            Request::Unmount { mountpoint, lazy } => self.unmount(&mountpoint, lazy),
        }
    }

    /// A catalog change that is durable when it returns.
    fn catalog_op(
        &self,
        make: impl FnOnce(&Catalog) -> Result<CatalogOp, StoreError>,
    ) -> Result<Answer, Failure> {
        let ((), seq) = self.store.change(|c| Ok((make(c)?, ())), |(), _| ())?;
        self.store.flush(seq)?;
        Ok(Answer::Done)
    }

    fn checkpoint(
        &self,
        head: String,
        name: Option<String>,
        tags: std::collections::BTreeMap<String, String>,
        wait: bool,
    ) -> Result<Answer, Failure> {
        let start = Instant::now();
        if let Some(n) = &name {
            names::check(n)?;
        }
        if let Some(m) = self.mounted(&head) {
            m.sync_kernel()
                .map_err(|e| Failure::new(format!("bringing mapped pages back failed: {e}")))?;
        }
        let (name, seq) = self.store.change(
            |c| {
                let now = now_us();
                let name = match name {
                    Some(n) => n,
                    None => names::automatic(c, "", now),
                };
                free_name(c, &name)?;
                if !c.heads.contains_key(&head) {
                    return Err(StoreError::NotFound(format!("there is no head {head}")));
                }
                let op = CatalogOp::Checkpoint {
                    head: head.clone(),
                    id: c.next_checkpoint,
                    name: name.clone(),
                    tags,
                    created_us: now,
                };
                Ok((op, name))
            },
            |_, _| (),
        )?;
        let elapsed_us = micros(start);
        if wait {
            self.store.flush(seq)?;
        }
        Ok(Answer::Checkpoint {
            name,
            head,
            elapsed_us,
            durable: wait,
        })
    }

    fn rollback(
        &self,
        head: String,
        checkpoint: &str,
        discard: bool,
        dry_run: bool,
        keep_as: Option<String>,
    ) -> Result<Answer, Failure> {
        let start = Instant::now();
        let catalog = self.store.catalog()?;
        if !catalog.heads.contains_key(&head) {
            return Err(Failure::new(format!("there is no head {head}")));
        }
        let target = names::resolve(&catalog, Some(&head), checkpoint)?;
        if let Some(k) = &keep_as {
            names::check(k)?;
            free_name(&catalog, k)?;
        }
        let undo = match (discard, keep_as) {
            (true, _) => Undo::Discard,
            (false, Some(k)) => Undo::Keep(k),
            (false, None) => Undo::Keep(names::automatic(&catalog, "left-", now_us())),
        };
        let left_behind = match &undo {
            Undo::Keep(n) => Some(n.clone()),
            Undo::Discard => None,
        };
        if dry_run {
            let mut steps = vec![format!(
                "head {head} goes back to checkpoint {} of {}",
                target.name,
                names::timestamp(target.created_us)
            )];
            steps.push(match &left_behind {
                Some(_) => "its present state stays as a checkpoint named left-<time>".into(),
                None => "its present state is discarded".into(),
            });
            return Ok(Answer::Plan { steps });
        }
        let (seq, elapsed_us) = if let Some(m) = self.mounted(&head) {
            let done = m.rollback(target.id, &undo, start)?;
            (done.seq, done.elapsed_us)
        } else {
            let id = target.id;
            let ((), seq) = self.store.change(
                |c| {
                    let left = left_behind.clone().map(|n| (c.next_checkpoint, n));
                    let op = CatalogOp::Rollback {
                        head: head.clone(),
                        to: id,
                        left,
                        created_us: now_us(),
                    };
                    Ok((op, ()))
                },
                |(), _| (),
            )?;
            (seq, micros(start))
        };
        self.store.flush(seq)?;
        if discard {
            self.store.want_gc();
        }
        Ok(Answer::Rollback {
            name: target.name.clone(),
            head,
            left_behind,
            elapsed_us,
        })
    }

    fn list(&self) -> Result<Answer, Failure> {
        let c = self.store.catalog()?;
        let name_of = |id: Option<u64>| {
            id.and_then(|id| c.checkpoints.get(&id))
                .map(|k| k.name.clone())
        };
        let heads = c
            .heads
            .iter()
            .map(|(name, h)| HeadInfo {
                name: name.clone(),
                parent: name_of(h.parent),
                created_us: h.created_us,
                mounted_at: self.mounted(name).map(|m| m.mountpoint().to_path_buf()),
            })
            .collect();
        let checkpoints = c
            .checkpoints
            .values()
            .map(|k| CheckpointInfo {
                name: k.name.clone(),
                head: k.head.clone(),
                parent: name_of(k.parent),
                created_us: k.created_us,
                tags: k.tags.clone(),
                pinned: k.pinned,
                origin: k.origin,
            })
            .collect();
        Ok(Answer::List { heads, checkpoints })
    }

    fn rename(&self, from: &str, to: &str) -> Result<Answer, Failure> {
        names::check(to)?;
        if self.mounted(from).is_some() {
            return Err(Failure::new(format!(
                "head {from} is mounted; unmount it first"
            )));
        }
        self.catalog_op(|c| {
            free_name(c, to)?;
            if c.heads.contains_key(from) {
                return Ok(CatalogOp::RenameHead {
                    head: from.to_owned(),
                    name: to.to_owned(),
                });
            }
            Ok(CatalogOp::Rename {
                id: names::resolve(c, None, from)?.id,
                name: to.to_owned(),
            })
        })
    }

    fn delete(&self, name: &str) -> Result<Answer, Failure> {
        if self.mounted(name).is_some() {
            return Err(Failure::new(format!(
                "head {name} is mounted; unmount it first"
            )));
        }
        let shown = crate::mount::lock(&self.mounts)
            .values()
            .any(|m| m.is_fixed() && m.name() == name);
        if shown {
            return Err(Failure::new(format!(
                "checkpoint {name} is mounted; unmount it first"
            )));
        }
        let answer = self.catalog_op(|c| {
            if c.heads.contains_key(name) {
                if c.heads.len() == 1 {
                    return Err(StoreError::Refused(
                        "the last head cannot be deleted".into(),
                    ));
                }
                return Ok(CatalogOp::DeleteHead {
                    head: name.to_owned(),
                });
            }
            // Only a full name: a beginning could come to mean another one.
            let k = c.checkpoint_named(name).ok_or_else(|| {
                StoreError::NotFound(format!("there is no checkpoint or head {name}"))
            })?;
            if k.pinned {
                return Err(StoreError::Refused(format!(
                    "checkpoint {name} is pinned; 'cowfs unpin' it first"
                )));
            }
            Ok(CatalogOp::Delete { id: k.id })
        })?;
        self.store.want_gc();
        Ok(answer)
    }

    fn stats(&self) -> Result<Answer, Failure> {
        let mounts = crate::mount::lock(&self.mounts);
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let rss_kb: u64 = status
            .lines()
            .find_map(|l| l.strip_prefix("VmRSS:"))
            .and_then(|l| l.split_whitespace().next())
            .and_then(|n| n.parse().ok())
            .unwrap_or(0);
        Ok(Answer::Stats {
            store: self.store.stats()?,
            pid: std::process::id(),
            rss_bytes: rss_kb * 1024,
            requests: mounts.values().map(|m| m.requests()).sum(),
            mounts: mounts.keys().cloned().collect(),
        })
    }

    fn unmount(&self, mountpoint: &Path, lazy: bool) -> Result<Answer, Failure> {
        let mounts = crate::mount::lock(&self.mounts);
        if !mounts.contains_key(mountpoint) {
            return Err(Failure::new(format!(
                "{} is not mounted",
                mountpoint.display()
            )));
        }
        drop(mounts);
        fuse::unmount(mountpoint, lazy).map_err(|e| {
            let hint = if e.raw_os_error() == Some(libc::EBUSY) {
                "; programs use it: stop them, or use --lazy"
            } else {
                ""
            };
            Failure::new(format!("{}: {e}{hint}", mountpoint.display()))
        })?;
        // The mount's thread is done when all that it had is in the store.
        let mut mounts = crate::mount::lock(&self.mounts);
        while !lazy && mounts.contains_key(mountpoint) {
            mounts = self
                .gone
                .wait(mounts)
                .unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        drop(mounts);
        self.store.sync()?;
        Ok(Answer::Done)
    }
}

fn free_name(c: &Catalog, name: &str) -> Result<(), StoreError> {
    if c.is_taken(name) {
        return Err(StoreError::Exists(format!("the name {name} is taken")));
    }
    Ok(())
}

/// Reads mount options as behind `-o`.
fn parse_options(list: &[String], o: &mut MountOptions) -> Result<Atime, Failure> {
    let mut atime = Atime::Relative;
    for opt in list {
        match opt.split_once('=') {
            None => match opt.as_str() {
                "ro" => o.read_only = true,
                "rw" | "suid" | "dev" | "exec" | "defaults" => {}
                "noatime" => {
                    o.noatime = true;
                    atime = Atime::None;
                }
                "relatime" => atime = Atime::Relative,
                "strictatime" => atime = Atime::Strict,
                "nosuid" => o.nosuid = true,
                "nodev" => o.nodev = true,
                "noexec" => o.noexec = true,
                _ => return Err(unknown_option(opt)),
            },
            Some(("threads", n)) => {
                o.threads = n
                    .parse()
                    .ok()
                    .filter(|n| (1..=64).contains(n))
                    .ok_or_else(|| unknown_option(opt))?;
            }
            Some(("readahead_kb", n)) => {
                o.readahead_kb = n.parse().map_err(|_| unknown_option(opt))?;
            }
            Some(("spin_us", n)) => o.spin_us = n.parse().map_err(|_| unknown_option(opt))?,
            Some(_) => return Err(unknown_option(opt)),
        }
    }
    Ok(atime)
}

fn unknown_option(opt: &str) -> Failure {
    Failure {
        code: 2,
        message: format!(
            "mount option {opt:?} is not known; there are ro, noatime, relatime, strictatime, nosuid, nodev, noexec, threads=1..64, readahead_kb=N, spin_us=N"
        ),
    }
}

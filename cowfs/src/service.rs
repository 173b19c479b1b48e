//! A store in service: what the commands ask for, on mounted heads or on a store nobody has mounted.

mod changes;
mod diff;
mod history;
mod options;
mod restore;
mod unmount;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicI64;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use crate::control::{Answer, Failure, MountSpec, Reply, Request};
use crate::fuse::{self, MountOptions};
use crate::mount::{MountFs, What};
use crate::names;
use crate::store::{CatalogOp, Store, now_us};
use crate::tree::PageId;
use changes::free_name;
use options::parse_options;

/// A mount in service.
#[derive(Debug)]
struct Served {
    fs: Arc<MountFs>,
    /// The head, or `@CHECKPOINT` as it was named then.
    shown: String,
    /// Number of the checkpoint that is shown.
    checkpoint: Option<u64>,
    /// The kernel let it go; what it had is being written.
    ended: bool,
}

type Mounts = HashMap<PathBuf, Served>;

/// The mount of a head.
fn head_of(mounts: &Mounts, head: &str) -> Option<Arc<MountFs>> {
    mounts
        .values()
        .find(|m| m.checkpoint.is_none() && m.fs.name() == head)
        .map(|m| Arc::clone(&m.fs))
}

/// Keeps a tree from garbage collection for as long as it lives.
struct Pinned<'a> {
    store: &'a Store,
    root: PageId,
}

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        self.store.unpin_root(self.root);
    }
}

/// A store in service.
#[derive(Debug)]
pub struct Service {
    store: Arc<Store>,
    dir: PathBuf,
    mounts: Mutex<Mounts>,
    /// Contents of checkpoints older than this are packed, microseconds; 0: none by themselves.
    pack_age_us: AtomicI64,
    /// One receive at a time.
    receiving: Mutex<()>,
    /// Told when a mount is gone.
    gone: Condvar,
    /// The store's thread.
    background: Mutex<Option<std::thread::JoinHandle<()>>>,
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
        history::drop_stale(&store)?;
        let background = store
            .start_background()
            .map_err(|e| Failure::new(format!("no thread for the store: {e}")))?;
        Ok(Arc::new(Self {
            store,
            dir,
            mounts: Mutex::default(),
            pack_age_us: AtomicI64::new(0),
            receiving: Mutex::default(),
            gone: Condvar::new(),
            background: Mutex::new(Some(background)),
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
        let (pack_age_us, rest) = options::take_pack(&spec.options)?;
        let atime = parse_options(&rest, &mut options)?;
        // Held until the mount is known, so that what is shown cannot be deleted meanwhile.
        let mut mounts = crate::mount::lock(&self.mounts);
        if mounts.contains_key(&target) {
            return Err(Failure::new(format!(
                "{} is mounted already",
                target.display()
            )));
        }
        let mut pinned = None;
        let mut checkpoint = None;
        let (what, shown) = if let Some(at) = &spec.at {
            let (root, (id, name)) = self.store.pin_found(|c| {
                let k = names::resolve(c, spec.head.as_deref(), at)?;
                Ok((k.root, (k.id, k.name.clone())))
            })?;
            pinned = Some(Pinned {
                store: &self.store,
                root,
            });
            checkpoint = Some(id);
            options.read_only = true;
            let shown = format!("@{name}");
            (What::Fixed(root, name), shown)
        } else {
            let head = spec.head.clone().unwrap_or_else(|| "main".into());
            if !self.store.catalog()?.heads.contains_key(&head) {
                return Err(Failure::new(format!(
                    "there is no head {head}; 'cowfs list' shows them"
                )));
            }
            if let Some(m) = head_of(&mounts, &head) {
                return Err(Failure::new(format!(
                    "head {head} is mounted at {} already; a clone can be mounted beside it",
                    m.mountpoint().display()
                )));
            }
            (What::Head(head.clone()), head)
        };
        // Nothing is written there.
        if options.read_only {
            options.writeback_mib = 0;
        }
        options.source = format!("{}#{shown}", self.dir.display());
        let fs = MountFs::new(
            Arc::clone(&self.store),
            what,
            target.clone(),
            options.read_only,
            atime,
        )?;
        // The mount has a pin of its own now.
        drop(pinned);
        let session = match fuse::mount(&target, &options) {
            Ok(s) => s,
            Err(e) => {
                fs.close();
                return Err(e.into());
            }
        };
        if let Err(e) = fs.begin_service(session.notifier(), options.writeback_mib) {
            let _ = fuse::unmount(&target, true);
            fs.close();
            return Err(Failure::new(format!("no thread for the mount: {e}")));
        }
        let served = Served {
            fs: Arc::clone(&fs),
            shown,
            checkpoint,
            ended: false,
        };
        mounts.insert(target.clone(), served);
        drop(mounts);
        let service = Arc::clone(self);
        let key = target.clone();
        let spawned = std::thread::Builder::new()
            .name("cowfs-mount".into())
            .spawn(move || {
                if let Err(e) = session.run(fs.clone()) {
                    tracing::error!(error = %e, mountpoint = %key.display(), "the mount ended");
                }
                if let Some(m) = crate::mount::lock(&service.mounts).get_mut(&key) {
                    m.ended = true;
                }
                fs.close();
                crate::mount::lock(&service.mounts).remove(&key);
                service.gone.notify_all();
            });
        if let Err(e) = spawned {
            let _ = fuse::unmount(&target, true);
            if let Some(m) = crate::mount::lock(&self.mounts).remove(&target) {
                m.fs.close();
            }
            return Err(Failure::new(format!("no thread for the mount: {e}")));
        }
        if let Some(age) = pack_age_us {
            self.pack_by_age(age)
                .map_err(|e| Failure::new(format!("no thread for packing: {e}")))?;
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

    /// Ends the background work and commits. Nobody else has the store then, so it can be opened again.
    ///
    /// # Errors
    /// The store's.
    pub fn finish(&self) -> Result<(), Failure> {
        self.store.stop_background();
        // Each holds the store, and so its lock.
        if let Some(thread) = crate::mount::lock(&self.background).take() {
            let _ = thread.join();
        }
        self.store.join_gc();
        Ok(self.store.commit()?)
    }

    /// The mount of a head, unless it is ending.
    fn mounted(&self, head: &str) -> Option<Arc<MountFs>> {
        let mounts = crate::mount::lock(&self.mounts);
        let live = mounts.values().filter(|m| !m.ended);
        live.filter(|m| m.checkpoint.is_none() && m.fs.name() == head)
            .map(|m| Arc::clone(&m.fs))
            .next()
    }

    /// Does what a request asks, for somebody at the other end of the control socket.
    ///
    /// # Errors
    /// With the exit code that it means.
    pub fn reply(self: &Arc<Self>, request: Request) -> Result<Reply, Failure> {
        match request {
            Request::List => Ok(Reply::Line(self.list_line()?)),
            other => self.call(other).map(Reply::from),
        }
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
            Request::Diff { head, a, b } => diff::diff(self, head.as_deref(), &a, &b),
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
            Request::Gc => self.low(|s| Ok(s.gc()?.into())),
            Request::GcWait => self.low(|s| Ok(s.gc_wait()?.into())),
            Request::Pack {
                head,
                checkpoints,
                level,
            } => self.pack(head.as_deref(), &checkpoints, level),
            Request::Prune { rules, dry_run } => self.prune(&rules, dry_run),
            Request::Send {
                head,
                checkpoint,
                base,
                resume,
                level,
                pipe,
                have,
            } => {
                let what = history::ToSend {
                    head: head.as_deref(),
                    checkpoint: &checkpoint,
                    base: base.as_deref(),
                    resume: resume.as_deref(),
                    level,
                };
                self.send(&what, &pipe, have.as_deref())
            }
            Request::Receive { name, pipe } => self.receive(name.as_deref(), &pipe),
            Request::Chunks { pipe } => self.chunks(&pipe),
            Request::Stats => self.stats(),
            Request::Mount(spec) => Ok(Answer::Mounted {
                mountpoint: self.mount(&spec)?,
            }),
            Request::Unmount { mountpoint, lazy } => self.unmount(&mountpoint, lazy),
        }
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
            requests: mounts.values().map(|m| m.fs.requests()).sum(),
            mounts: mounts.keys().cloned().collect(),
        })
    }
}

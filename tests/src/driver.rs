//! Speaks to a mount as the kernel does, without one.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use cowfs::fuse::{Create, Errno, Filesystem, Op, Reply, Request, Setattr};
use cowfs::mount::{Atime, MountFs, What};
use cowfs::store::{CatalogOp, Store};

/// A mount and a reply to work with.
#[derive(Debug)]
pub struct Driver {
    /// The mount.
    pub fs: Arc<MountFs>,
    reply: Reply,
    /// References held, so that they can be given back.
    held: Vec<u64>,
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    let mut v = [0; 8];
    v.copy_from_slice(&b[at..at + 8]);
    u64::from_le_bytes(v)
}

impl Driver {
    /// Mounts a head, as far as that goes without a kernel.
    pub fn new(store: &Arc<Store>, head: &str) -> Self {
        Self::try_new(store, head).expect("a head that is there")
    }

    /// The same mount, for another thread.
    pub fn beside(&self) -> Self {
        Self {
            fs: Arc::clone(&self.fs),
            reply: Reply::new(1 << 20),
            held: Vec::new(),
        }
    }

    /// As [`Driver::new`], for a disk that may fail.
    pub fn try_new(store: &Arc<Store>, head: &str) -> Option<Self> {
        let what = What::Head(head.to_owned());
        let fs = MountFs::new(
            Arc::clone(store),
            what,
            PathBuf::from("/"),
            false,
            Atime::None,
        )
        .ok()?;
        Some(Self {
            fs,
            reply: Reply::new(1 << 20),
            held: Vec::new(),
        })
    }

    /// Sends a request.
    ///
    /// # Errors
    /// The errno.
    pub fn ask(&mut self, nodeid: u64, op: Op<'_>) -> Result<&[u8], i32> {
        self.reply.clear();
        let req = Request {
            unique: 1,
            nodeid,
            uid: 0,
            gid: 0,
            pid: 1,
            op,
        };
        match self.fs.handle(&req, &mut self.reply) {
            Ok(()) => Ok(self.reply.payload()),
            Err(Errno(e)) => Err(e),
        }
    }

    fn entry(&mut self, nodeid: u64, op: Op<'_>) -> Result<u64, i32> {
        let id = u64_at(self.ask(nodeid, op)?, 0);
        if id == 0 {
            return Err(libc::ENOENT);
        }
        self.held.push(id);
        Ok(id)
    }

    /// Looks a path of names up.
    ///
    /// # Errors
    /// The errno.
    pub fn walk(&mut self, path: &[String]) -> Result<u64, i32> {
        let mut at = 1;
        for name in path {
            at = self.entry(
                at,
                Op::Lookup {
                    name: name.as_bytes(),
                },
            )?;
        }
        Ok(at)
    }

    /// Gives all references back but those to `keep`.
    pub fn forget_all(&mut self, keep: &[u64]) {
        for id in std::mem::take(&mut self.held) {
            if keep.contains(&id) {
                self.held.push(id);
            } else {
                self.fs.forget(id, 1);
            }
        }
    }

    /// Makes a regular file.
    ///
    /// # Errors
    /// The errno.
    pub fn create(&mut self, dir: u64, name: &str) -> Result<u64, i32> {
        let c = Create {
            name: name.as_bytes(),
            flags: 2,
            mode: 0o644,
            umask: 0,
        };
        self.entry(dir, Op::Create(c))
    }

    /// Makes something else that gives an entry.
    ///
    /// # Errors
    /// The errno.
    pub fn make(&mut self, dir: u64, op: Op<'_>) -> Result<u64, i32> {
        self.entry(dir, op)
    }

    /// Reads a whole file.
    ///
    /// # Errors
    /// The errno.
    pub fn read(&mut self, node: u64) -> Result<Vec<u8>, i32> {
        let mut out = Vec::new();
        loop {
            let offset = out.len() as u64;
            let got = self.ask(
                node,
                Op::Read {
                    offset,
                    size: 1 << 20,
                },
            )?;
            if got.is_empty() {
                return Ok(out);
            }
            out.extend_from_slice(got);
        }
    }

    /// Writes.
    ///
    /// # Errors
    /// The errno.
    pub fn write(&mut self, node: u64, offset: u64, data: &[u8]) -> Result<(), i32> {
        self.ask(
            node,
            Op::Write {
                offset,
                data,
                write_flags: 0,
                open_flags: 0,
            },
        )
        .map(drop)
    }

    /// Sets the size.
    ///
    /// # Errors
    /// The errno.
    pub fn truncate(&mut self, node: u64, size: u64) -> Result<(), i32> {
        let s = Setattr {
            size: Some(size),
            ..Setattr::default()
        };
        self.ask(node, Op::Setattr(s)).map(drop)
    }
}

/// Takes a checkpoint of the head `main`.
pub fn checkpoint(store: &Store, name: &str) {
    store
        .change(
            |c| {
                let op = CatalogOp::Checkpoint {
                    head: "main".into(),
                    id: c.next_checkpoint,
                    name: name.into(),
                    tags: BTreeMap::new(),
                    created_us: 0,
                };
                Ok((op, ()))
            },
            |(), _| (),
        )
        .expect("a checkpoint");
}

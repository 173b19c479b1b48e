//! Listing directories.

use std::sync::Arc;
use std::time::Duration;

use super::MountFs;
use super::view::View;
use crate::fs::{self, FsError, Inode, ROOT_INO, dir};
use crate::fuse::{Attr, Entry, Errno, Reply};
use crate::store::ReadTxn;

/// What a listing asks for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Want {
    /// Where it goes on: 0, or what came with the last entry.
    pub offset: u64,
    /// Bytes at most.
    pub size: u32,
    /// With attributes (READDIRPLUS).
    pub plus: bool,
}

/// A name without attributes: the kernel keeps nothing of it.
fn bare(ino: u64, dtype: u8) -> Entry {
    Entry {
        nodeid: 0,
        attr: Attr {
            ino,
            mode: u32::from(dtype) << 12,
            ..Attr::default()
        },
        entry_valid: Duration::ZERO,
        attr_valid: Duration::ZERO,
    }
}

impl MountFs {
    pub(super) fn readdir(&self, nodeid: u64, want: Want, reply: &mut Reply) -> Result<(), Errno> {
        let (view, ino, d) = self.read(nodeid, |t, view, ino| {
            if view.fixed().is_some() && !self.is_fixed() {
                return fs::fail(libc::ESTALE);
            }
            let d = dir::load(t, ino)?;
            let mut given = Vec::new();
            reply.set_len(0);
            let listed = self.list_into(t, view, (ino, &d), want, reply, &mut given);
            if listed.is_err() {
                // The kernel never hears of these.
                for ino in given {
                    view.forget(ino, 1);
                }
            }
            listed?;
            Ok((Arc::clone(view), ino, d))
        })?;
        if want.offset == 0 {
            self.touch(&view, ino, &d, fs::now());
        }
        Ok(())
    }

    /// Puts entries into a reply until it is full; `given` gets the inodes that the kernel will know by it.
    fn list_into(
        &self,
        t: &mut ReadTxn<'_>,
        view: &View,
        (ino, d): (u64, &Inode),
        want: Want,
        reply: &mut Reply,
        given: &mut Vec<u64>,
    ) -> Result<(), FsError> {
        let Want { offset, size, plus } = want;
        // A listing of the root that a rollback overtakes must not leave names of the old state behind as fresh ones: of
        // the root come names only, and each is looked up.
        let nodes = plus && ino != ROOT_INO;
        let most = size as usize / if plus { 160 } else { 32 } + 1;
        let from = if offset <= 2 {
            0
        } else {
            offset.saturating_add(1)
        };
        let entries = dir::list(t, ino, from, most)?;
        let mut out = reply.dir(size);
        const DIR: u8 = 4;
        let parent = if ino == ROOT_INO { ROOT_INO } else { d.parent };
        for (at, ino, name) in [(1, ino, &b"."[..]), (2, parent, &b".."[..])] {
            if offset < at {
                let done = if plus {
                    out.add_plus(&bare(ino, DIR), at, DIR, name)
                } else {
                    out.add(ino, at, DIR, name)
                };
                if !done {
                    return Ok(());
                }
            }
        }
        let mut before = offset.max(2);
        for (k, e) in entries.iter().enumerate() {
            // Of names that share a place all but the last lead back to it: better twice than never.
            let shares = entries.get(k + 1).is_some_and(|n| n.place == e.place);
            let next = if shares { before } else { e.place };
            let (target, dtype) = (e.target.ino, e.target.dtype);
            let done = if nodes {
                if !out.has_room_plus(&e.name) {
                    return Ok(());
                }
                let i = self.find(t, view, target)?;
                given.push(target);
                out.add_plus(&Self::give(view, target, &i), next, dtype, &e.name)
            } else if plus {
                out.add_plus(&bare(target, dtype), next, dtype, &e.name)
            } else {
                out.add(target, next, dtype, &e.name)
            };
            if !done {
                return Ok(());
            }
            before = next;
        }
        Ok(())
    }
}

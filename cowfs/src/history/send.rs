//! Makes a stream of a checkpoint.

use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::ops::ControlFlow;

use super::base::Replaced;
use super::cut;
use super::remote::RemoteError;
use super::repair::Inodes;
use super::stream::{self, Begin, Item, Reached, Record, StreamError, Writer};
use crate::fs::{Extent, key};
use crate::store::packs::frame::Builder;
use crate::store::packs::ranges;
use crate::store::packs::records::Name;
use crate::store::{Checkpoint, Source, Store, StoreError};
use crate::tree::{self, PageId};

/// Names of chunks remembered, so that none is sent twice; more are not, so that memory is bounded.
const SENT_MAX: usize = 1 << 20;
/// Bytes of items in a record.
const ITEMS_BYTES: usize = 256 << 10;
/// Chunks of one item, so that whoever has to find them all at once needs bounded memory.
const RANGE_CHUNKS: usize = 256;
/// To find what of a file the base has, so many bytes of it are read for each byte of the new one, and these at least.
const LEARN: (u64, u64) = (4, 1 << 20);

/// Extents of removed files that are remembered.
const REMOVED_MAX: usize = 1 << 18;

/// What to send.
#[derive(Debug, Clone)]
pub struct SendOptions {
    /// Number of the checkpoint.
    pub checkpoint: u64,
    /// Number of the one that the other side has.
    pub base: Option<u64>,
    /// Where to go on.
    pub resume: Option<Reached>,
    /// Level of compression.
    pub level: i32,
    /// Chunks that the other side has.
    pub have: HashSet<Name>,
}

/// What was sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sent {
    /// Chunks.
    pub chunks: u64,
    /// Their bytes.
    pub chunk_bytes: u64,
    /// Bytes of the stream.
    pub stream_bytes: u64,
}

/// Errors of sending and receiving.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The store's.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The stream's.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// No room for what comes, and what to do.
    #[error("{full}; {advice}", full = StoreError::NoSpace)]
    Full {
        /// What was kept, and how to go on with it.
        advice: String,
    },
    /// That of a store of objects.
    #[error(transparent)]
    Remote(#[from] RemoteError),
}

/// The identity of a checkpoint, the same in every store that has it.
pub(super) fn source_of(store: &Store, c: &Checkpoint) -> Source {
    c.source.clone().unwrap_or_else(|| Source {
        store: store.uuid().iter().map(|b| format!("{b:02x}")).collect(),
        id: c.id,
    })
}

/// Keeps a tree for as long as it is sent.
pub(super) struct Pinned<'a>(&'a Store, pub PageId);

impl Drop for Pinned<'_> {
    fn drop(&mut self) {
        self.0.unpin_root(self.1);
    }
}

pub(super) fn pin(store: &Store, id: u64) -> Result<(Pinned<'_>, Checkpoint), StoreError> {
    let (root, c) = store.pin_found(|c| match c.checkpoints.get(&id) {
        Some(k) => Ok((k.root, k.clone())),
        None => Err(StoreError::NotFound("the checkpoint was deleted".into())),
    })?;
    Ok((Pinned(store, root), c))
}

/// Sends a checkpoint.
///
/// # Errors
/// Not found; damaged contents, named; the other end's.
pub fn send<W: Write>(store: &Store, o: SendOptions, to: W) -> Result<Sent, TransferError> {
    send_some(store, o, None, to)
}

/// As [`send`], but only of some inodes.
pub(super) fn send_some<W: Write>(
    store: &Store,
    o: SendOptions,
    only: Option<&Inodes>,
    to: W,
) -> Result<Sent, TransferError> {
    let (tree, c) = pin(store, o.checkpoint)?;
    let base = o.base.map(|b| pin(store, b)).transpose()?;
    let mut s = Sender {
        store,
        out: match base {
            Some(_) => Writer::of_version(to, stream::VERSION)?,
            None => Writer::new(to)?,
        },
        replaced: base.as_ref().map(|(b, _)| Replaced::new(store, b.1)),
        old: Old::default(),
        removed: HashMap::new(),
        removed_count: 0,
        only: only.cloned(),
        level: o.level,
        have: o.have,
        sent: HashSet::new(),
        frame: Builder::default(),
        items: Vec::new(),
        items_bytes: 0,
        count: 0,
        ino: 0,
        unmap: Vec::new(),
        map: Vec::new(),
        skip: o.resume.unwrap_or((0, 0)),
        report: Sent::default(),
    };
    s.out.write(&Record::Begin(Box::new(Begin {
        source: source_of(store, &c),
        name: c.name.clone(),
        head: c.head.clone(),
        tags: c.tags.clone(),
        created_us: c.created_us,
        next_ino: c.next_ino,
        base: base.as_ref().map(|(_, b)| source_of(store, b)),
        base_name: base.as_ref().map(|(_, b)| b.name.clone()),
        resume: o.resume,
    })))?;
    let from = base.as_ref().map_or(0, |(b, _)| b.1);
    let mut failed = None;
    tree::diff(
        &mut store.quiet(),
        from,
        tree.1,
        &mut |k, old, new| match s.change(k, old, new) {
            Ok(()) => ControlFlow::Continue(()),
            Err(e) => {
                failed = Some(e);
                ControlFlow::Break(())
            }
        },
    )?;
    if let Some(e) = failed {
        return Err(e);
    }
    s.end_inode()?;
    s.emit((u64::MAX, 0))?;
    s.out.write(&Record::End(s.count, s.report.chunks))?;
    s.report.stream_bytes = s.out.bytes;
    Ok(s.report)
}

/// What the base has of the file at hand: nothing of it is looked at before a chunk is to be sent.
#[derive(Default)]
struct Old {
    /// Bytes of the file that are to be sent, and what it had at their places; nothing once it was looked at.
    ahead: Option<(u64, Vec<(u64, Extent)>)>,
    /// Inode, offset and length of chunks.
    chunks: HashMap<Name, (u64, u64, u32)>,
}

struct Sender<'a, W> {
    store: &'a Store,
    /// Only of a difference.
    replaced: Option<Replaced<'a>>,
    old: Old,
    /// Extents of files that have none any more, with their inodes, by the bytes of the file.
    removed: HashMap<u64, Vec<(u64, u64, Extent)>>,
    removed_count: usize,
    /// Nothing of others is sent.
    only: Option<Inodes>,
    out: Writer<W>,
    level: i32,
    have: HashSet<Name>,
    sent: HashSet<Name>,
    frame: Builder,
    items: Vec<Item>,
    items_bytes: usize,
    count: u64,
    /// Inode that changes are of, its ranges that go and those that come.
    ino: u64,
    unmap: Vec<(u64, Extent)>,
    map: Vec<(u64, Extent)>,
    skip: Reached,
    report: Sent,
}

impl<W: Write> Sender<'_, W> {
    fn change(
        &mut self,
        k: &[u8],
        old: Option<&[u8]>,
        new: Option<&[u8]>,
    ) -> Result<(), TransferError> {
        let bad = || StoreError::corrupt("meta", "a record of the checkpoint makes no sense");
        let (ino, kind, _) = key::split(k).ok_or_else(bad)?;
        if ino != self.ino {
            self.end_inode()?;
            self.ino = ino;
        }
        if self.only.as_ref().is_some_and(|only| !only.has(ino)) {
            return Ok(());
        }
        if kind == key::DIRENT
            && let Some(replaced) = &mut self.replaced
            && let Some(new) = new
        {
            let name = key::dirent_parts(k).ok_or_else(bad)?.1;
            replaced.note(ino, name, old, new)?;
        }
        if ino < self.skip.0 {
            return Ok(());
        }
        if kind == key::EXTENT {
            let at = key::extent_offset(k).ok_or_else(bad)?;
            if let Some(e) = old {
                self.unmap.push((at, Extent::decode(e).ok_or_else(bad)?));
            }
            if let Some(e) = new {
                self.map.push((at, Extent::decode(e).ok_or_else(bad)?));
            }
            return Ok(());
        }
        if self.is_begun(ino) {
            return Ok(());
        }
        let item = if kind == key::DIRENT {
            let name = key::dirent_parts(k).ok_or_else(bad)?.1.to_vec();
            match new {
                Some(v) => Item::PutName(ino, name, v.to_vec()),
                None => Item::DeleteName(ino, name),
            }
        } else {
            match new {
                Some(v) => Item::Put(k.to_vec(), v.to_vec()),
                None => Item::Delete(k.to_vec()),
            }
        };
        self.push(item);
        if self.items_bytes >= ITEMS_BYTES {
            self.emit((ino, 0))?;
        }
        Ok(())
    }

    /// True if the other side has all of an inode but contents.
    fn is_begun(&self, ino: u64) -> bool {
        ino == self.skip.0 && self.skip.1 > 0
    }

    fn push(&mut self, item: Item) {
        self.items_bytes += match &item {
            Item::Put(k, v) => k.len() + v.len() + 8,
            Item::Map(_, _, c) => c.len() * 36 + 32,
            Item::PutName(_, n, v) => n.len() + v.len() + 16,
            Item::Delete(k) => k.len() + 8,
            Item::DeleteName(_, n) => n.len() + 16,
            Item::Unmap(..) => 32,
            Item::Base(..) => 56,
        };
        self.count += 1;
        self.items.push(item);
    }

    /// Writes what waits.
    fn emit(&mut self, reached: Reached) -> Result<(), TransferError> {
        if !self.frame.is_empty() {
            let frame = self.frame.close(self.level);
            self.out.write(&Record::Chunks(frame))?;
        }
        if !self.items.is_empty() {
            let items = std::mem::take(&mut self.items);
            self.items_bytes = 0;
            self.out.write(&Record::Items(items, reached))?;
        }
        Ok(())
    }

    /// Contents come last, and what goes before what comes: a new range may lie where two old ones were.
    fn end_inode(&mut self) -> Result<(), TransferError> {
        let ino = self.ino;
        let (unmap, map) = (
            std::mem::take(&mut self.unmap),
            std::mem::take(&mut self.map),
        );
        // A write splits extents: what both sides map to the same place has not changed.
        let same = unchanged(&unmap, &map);
        let of = |v: &[(u64, Extent)]| -> Vec<(u64, u64)> {
            let each = v.iter();
            each.map(|(at, e)| (*at, at + u64::from(e.len))).collect()
        };
        let gone = ranges::split(&of(&unmap), &same).0;
        let come = ranges::split(&of(&map), &same).0;
        self.old = Old {
            ahead: self.replaced.is_some().then(|| {
                let bytes = come.iter().map(|(from, to)| to - from).sum();
                (bytes, parts(&unmap, &gone))
            }),
            ..Old::default()
        };
        if map.is_empty() && self.replaced.is_some() && self.removed_count < REMOVED_MAX {
            // Before what came instead: a newer file has a higher number.
            let bytes = gone.iter().map(|(from, to)| to - from).sum();
            let went = unmap.iter().map(|(at, e)| (ino, *at, *e));
            self.removed.entry(bytes).or_default().extend(went);
            self.removed_count += unmap.len();
        }
        if !self.is_begun(ino) {
            for (from, to) in gone {
                self.push(Item::Unmap(ino, from, to - from));
                if self.items_bytes >= ITEMS_BYTES {
                    self.emit((ino, 0))?;
                }
            }
        }
        let begin = if self.is_begun(ino) { self.skip.1 } else { 0 };
        for (from, part) in parts(&map, &come) {
            let to = from + u64::from(part.len);
            let done = begin.saturating_sub(from).min(to - from);
            if done < to - from {
                self.send_range(ino, from, &part, done)?;
            }
        }
        if self.items_bytes >= ITEMS_BYTES {
            self.emit((ino + 1, 0))?;
        }
        Ok(())
    }

    /// Sends an extent from `done` on.
    fn send_range(
        &mut self,
        ino: u64,
        at: u64,
        e: &Extent,
        done: u64,
    ) -> Result<(), TransferError> {
        let mut start = done;
        let mut chunks: Vec<(u32, Name)> = Vec::new();
        let mut next = done;
        cut::each::<TransferError>(self.store, e, done, &mut { u64::MAX }, &mut |p| {
            if self.is_to_be_sent(&p.name, u64::from(p.len))? {
                match p.bytes {
                    Some(bytes) => self.add(p.name, bytes),
                    None => self.add(p.name, &cut::bytes_of(self.store, ino, e, &p)?),
                }
            }
            chunks.push((p.len, p.name));
            next = p.skip + u64::from(p.len);
            if self.frame.is_full() || chunks.len() >= RANGE_CHUNKS {
                self.push(Item::Map(ino, at + start, std::mem::take(&mut chunks)));
                start = next;
                self.emit((ino, at + next))?;
            }
            Ok(())
        })?;
        if !chunks.is_empty() {
            self.push(Item::Map(ino, at + start, chunks));
        }
        if self.items_bytes >= ITEMS_BYTES {
            self.emit((ino, at + next))?;
        }
        Ok(())
    }

    /// True if a chunk has to be sent. If the base has it, says where.
    fn is_to_be_sent(&mut self, name: &Name, len: u64) -> Result<bool, TransferError> {
        if self.have.contains(name) || self.sent.contains(name) {
            return Ok(false);
        }
        if let Some((bytes, gone)) = self.old.ahead.take() {
            self.learn(bytes, gone)?;
        }
        match self.old.chunks.get(name).copied() {
            Some((ino, at, n)) if u64::from(n) == len => {
                self.push(Item::Base(ino, at, n, *name));
                self.remember(*name);
                Ok(false)
            }
            _ => Ok(true),
        }
    }

    /// Finds the chunks of what was at the places of the file at hand, or else of the file that had its name, or else of
    /// files that went away and had as many bytes: it may be the copy of one, under another name.
    fn learn(&mut self, bytes: u64, gone: Vec<(u64, Extent)>) -> Result<(), TransferError> {
        let mut left = bytes.saturating_mul(LEARN.0).max(LEARN.1);
        let (ino, old) = match &mut self.replaced {
            Some(r) if gone.is_empty() => r.extents(self.ino, left)?,
            _ => (self.ino, gone),
        };
        let found: Vec<(u64, u64, Extent)> = match self.removed.get(&bytes) {
            // Of many that have as many bytes only a few are looked at.
            Some(removed) if old.is_empty() => {
                left = bytes.saturating_mul(LEARN.0);
                let mut most = left;
                let few = removed.iter().take_while(|(_, _, e)| {
                    let more = most > 0;
                    most = most.saturating_sub(u64::from(e.len));
                    more
                });
                few.copied().collect()
            }
            _ => old.into_iter().map(|(at, e)| (ino, at, e)).collect(),
        };
        for (ino, at, e) in found {
            let learned = cut::each::<StoreError>(self.store, &e, 0, &mut left, &mut |p| {
                self.old.chunks.insert(p.name, (ino, at + p.skip, p.len));
                Ok(())
            });
            // What cannot be read does not help; it is not what is sent.
            if learned.is_err() {
                return Ok(());
            }
        }
        Ok(())
    }

    fn remember(&mut self, name: Name) {
        if self.sent.len() < SENT_MAX {
            self.sent.insert(name);
        }
    }

    fn add(&mut self, name: Name, bytes: &[u8]) {
        self.remember(name);
        self.frame.add(name, bytes);
        self.report.chunks += 1;
        self.report.chunk_bytes += bytes.len() as u64;
    }
}

/// The parts of extents that are in these ranges; both lists are in order, and every range is in one extent.
fn parts(all: &[(u64, Extent)], ranges: &[(u64, u64)]) -> Vec<(u64, Extent)> {
    let mut all = all.iter().copied().peekable();
    let mut out = Vec::new();
    for &(from, to) in ranges {
        while all
            .next_if(|(at, e)| at + u64::from(e.len) <= from)
            .is_some()
        {}
        let Some((at, e)) = all.peek().copied() else {
            break;
        };
        let part = Extent {
            off: e.off + (from - at),
            len: u32::try_from(to - from).unwrap_or(e.len),
            ..e
        };
        out.push((from, part));
    }
    out
}

/// Ranges of a file that both sides map to the same place; both lists are in order.
fn unchanged(old: &[(u64, Extent)], new: &[(u64, Extent)]) -> Vec<(u64, u64)> {
    let mut same = Vec::new();
    let mut i = 0;
    for (at, e) in new {
        let end = at + u64::from(e.len);
        while i < old.len() && old[i].0 + u64::from(old[i].1.len) <= *at {
            i += 1;
        }
        for (was, o) in old[i..].iter().take_while(|o| o.0 < end) {
            // Offsets may be smaller than places in the file.
            let here = o.off.wrapping_sub(*was) == e.off.wrapping_sub(*at);
            if o.seg == e.seg && here {
                same.push(((*at).max(*was), end.min(was + u64::from(o.len))));
            }
        }
    }
    same
}

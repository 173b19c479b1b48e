//! The base of a difference: what it holds is not sent again, also where files were replaced whole.
//!
//! Packages replace files by new ones of the same names, most of whose bytes are the old ones. The sender finds out what had
//! the name of a new file in the base, and where in it the chunks of the new one are; the receiver takes them from there.

use std::collections::HashMap;
use std::ops::ControlFlow;

use crate::fs::{self, Extent, Kv, data, dir};
use crate::store::packs::records::{Name, name_of};
use crate::store::packs::unwrap_fs;
use crate::store::pages::PageMap;
use crate::store::segments::Place;
use crate::store::{Quiet, Store, StoreError};
use crate::tree::{self, PageId};

/// Files remembered with what had their names; others are sent whole, so that memory is bounded.
const REPLACED_MAX: usize = 1 << 20;

/// Which file of the base had the name of a new one.
pub(super) struct Replaced<'a> {
    base: QuietKv<'a>,
    was: HashMap<u64, u64>,
}

impl<'a> Replaced<'a> {
    pub fn new(store: &'a Store, root: PageId) -> Self {
        Self {
            base: QuietKv::new(store, root),
            was: HashMap::new(),
        }
    }

    /// Takes notice of a name that is new, or means something else than in the base. A directory comes before what is in
    /// it, if that is new: its number is smaller.
    pub fn note(
        &mut self,
        parent: u64,
        name: &[u8],
        old: Option<&[u8]>,
        new: &[u8],
    ) -> Result<(), StoreError> {
        let Some(new) = dir::decode(new) else {
            return Ok(());
        };
        let old = match (old, self.was.get(&parent)) {
            (Some(old), _) => dir::decode(old),
            // The directory is new as well.
            (None, Some(was)) => {
                let found = dir::lookup(&mut self.base, *was, name);
                found.map_err(unwrap_fs)?
            }
            (None, None) => None,
        };
        if let Some(old) = old
            && old.ino != new.ino
            && old.dtype == new.dtype
            && self.was.len() < REPLACED_MAX
        {
            self.was.insert(new.ino, old.ino);
        }
        Ok(())
    }

    /// The extents of what had a file's name, from its beginning, so many bytes of them and the last one whole.
    pub fn extents(
        &mut self,
        ino: u64,
        bytes: u64,
    ) -> Result<(u64, Vec<(u64, Extent)>), StoreError> {
        let mut out = Vec::new();
        let Some(was) = self.was.get(&ino).copied() else {
            return Ok((0, out));
        };
        let mut left = bytes;
        let each = data::each(&mut self.base, was, 0, fs::FILE_MAX, &mut |m| {
            out.push((m.at, m.extent));
            left = left.saturating_sub(u64::from(m.extent.len));
            match left {
                0 => ControlFlow::Break(()),
                _ => ControlFlow::Continue(()),
            }
        });
        each.map_err(unwrap_fs)?;
        Ok((was, out))
    }
}

/// A chunk of a file of a fixed tree, if that is there and has this name.
pub(super) fn chunk(
    store: &Store,
    root: PageId,
    (ino, at, len): (u64, u64, u32),
    name: &Name,
) -> Result<Option<Vec<u8>>, StoreError> {
    let Some(end) = at
        .checked_add(u64::from(len))
        .filter(|e| *e <= fs::FILE_MAX)
    else {
        return Ok(None);
    };
    let mut bytes = Vec::new();
    let mut next = at;
    let mut kv = QuietKv::new(store, root);
    // A chunk has no holes; a file of a damaged tree may have as many extents as bytes.
    let list = data::list(&mut kv, ino, at, end, len as usize).map_err(unwrap_fs)?;
    for m in list {
        if m.at > next || m.end() <= next {
            return Ok(None);
        }
        let part = usize::try_from(m.end().min(end) - next).unwrap_or(0);
        let have = bytes.len();
        bytes.resize(have + part, 0);
        let place = Place {
            segment: m.extent.seg,
            offset: m.extent.off + (next - m.at),
        };
        let gate = store.gate.read();
        let _gate = gate.unwrap_or_else(std::sync::PoisonError::into_inner);
        store.read_data(place, &mut bytes[have..])?;
        next += part as u64;
    }
    Ok((next == end && name_of(&bytes) == *name).then_some(bytes))
}

/// A fixed tree as key-value pairs, read without holding the store's lock.
pub(super) struct QuietKv<'a> {
    store: &'a Store,
    root: PageId,
    /// Pages that are read instead of those of the store.
    over: Option<&'a PageMap>,
}

impl<'a> QuietKv<'a> {
    pub fn new(store: &'a Store, root: PageId) -> Self {
        Self {
            store,
            root,
            over: None,
        }
    }

    /// The tree as it would be with these pages where some are.
    pub fn with(store: &'a Store, root: PageId, over: &'a PageMap) -> Self {
        Self {
            store,
            root,
            over: Some(over),
        }
    }

    fn pages(&self) -> Quiet<'a> {
        match self.over {
            Some(over) => self.store.quiet_with(over),
            None => self.store.quiet(),
        }
    }
}

impl Kv for QuietKv<'_> {
    fn get(&mut self, key: &[u8], f: &mut dyn FnMut(&[u8])) -> Result<bool, fs::FsError> {
        let got = tree::get(&mut self.pages(), self.root, key, |v| f(v));
        Ok(got?.is_some())
    }

    fn put(&mut self, _: &[u8], _: &[u8]) -> Result<(), fs::FsError> {
        fs::fail(libc::EROFS)
    }

    fn del(&mut self, _: &[u8]) -> Result<bool, fs::FsError> {
        fs::fail(libc::EROFS)
    }

    fn scan(&mut self, from: &[u8], to: &[u8], f: &mut fs::OnEntry<'_>) -> Result<(), fs::FsError> {
        let mut quiet = self.pages();
        Ok(tree::scan(&mut quiet, self.root, from, Some(to), f)?)
    }

    fn last_before(
        &mut self,
        from: &[u8],
        before: &[u8],
    ) -> Result<Option<(Vec<u8>, Vec<u8>)>, fs::FsError> {
        let mut quiet = self.pages();
        Ok(tree::last_before(&mut quiet, self.root, from, before)?)
    }

    fn alloc_ino(&mut self) -> u64 {
        0
    }

    fn generation(&self) -> u64 {
        0
    }

    fn hash_key(&self) -> [u8; 16] {
        self.store.hash_key()
    }

    fn drop_extent(&mut self, _: &Extent) {}
}

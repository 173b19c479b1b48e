//! Checks contents against their sums, names what is damaged, and puts right what can be had from elsewhere.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::ControlFlow;

use super::ranges::{self, Range};
use super::records::{self, CHUNK, ChunkAt, Entry, FRAME, FrameInfo, Name, UNKNOWN, name_of};
use super::{PackOptions, file_name};
use crate::fs::{Extent, ROOT_INO, key};
use crate::store::segments::{self, Place};
use crate::store::{Store, StoreError};
use crate::tree::{self, PageId};

/// Files named for each tree at most.
const NAMED: usize = 100;

/// A damaged file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Damage {
    /// `head NAME` or `checkpoint NAME`.
    pub tree: String,
    /// Path from the root, or the inode's number if no name leads to it.
    pub path: String,
    /// Offset of the first damaged byte that is known, in the file.
    pub offset: u64,
}

impl std::fmt::Display for Damage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { tree, path, offset } = self;
        write!(f, "{tree}: {path}: its bytes from {offset} on are damaged")
    }
}

/// What a check of all contents found.
#[derive(Debug, Clone, Default)]
pub struct DataReport {
    /// Bytes that have their sum.
    pub good_bytes: u64,
    /// Bytes of files that have no sum; `cowfs pack` makes them for what a checkpoint holds.
    pub unsummed_bytes: u64,
    /// Damaged files.
    pub damage: Vec<Damage>,
    /// Damage that no file needs.
    pub other: Vec<String>,
    /// Damaged entries, for [`Store::repair`].
    pub(crate) entries: Vec<(u32, u64, Entry)>,
}

/// What a repair did.
#[derive(Debug, Clone, Default)]
pub struct RepairReport {
    /// Ranges that have their right bytes again.
    pub repaired: u64,
    /// Chunks that nobody has, by name.
    pub missing: Vec<String>,
    /// Where copies of what was changed are, below the store.
    pub kept_in: Option<String>,
}

/// Gives chunks by name, from outside of the store.
pub type Fetch<'a> = dyn FnMut(&Name) -> Result<Option<Vec<u8>>, StoreError> + 'a;

/// Takes copies of what is about to be replaced: a file's name, and its bytes.
pub type Keep<'a> = dyn FnMut(&str, &[u8]) -> Result<(), StoreError> + 'a;

impl Store {
    /// Checks every byte that has a sum. `progress` is told bytes done and bytes in all.
    ///
    /// # Errors
    /// When the index itself cannot be read; damage is reported.
    pub fn check_data(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<DataReport, StoreError> {
        let mut report = DataReport::default();
        let mut total = 0;
        let end = (u32::MAX, u64::MAX);
        let mut each = |_, _, e: Entry| {
            total += if e.packed { 0 } else { u64::from(e.len) };
        };
        self.each_entry((0, 0), end, &mut each)?;
        total += self.packs.stored_bytes();
        let mut done = 0;
        let bad = self.bad_chunks(&mut |n| {
            done += n;
            progress(done, total);
        })?;
        // Entries in slices, and their bytes read in between.
        let mut from = (0, 0);
        let mut damaged: Vec<Range> = Vec::new();
        let mut known: Vec<Range> = Vec::new();
        loop {
            let mut slice: Vec<(u32, u64, Entry)> = Vec::new();
            let first = records::entry_key(from.0, from.1).to_vec();
            let mut txn = match self.has_index()? {
                true => self.read_head(super::HEAD)?,
                false => break,
            };
            let mut wrong = 0;
            let stop = [records::ENTRY + 1];
            crate::fs::Kv::scan(&mut txn, &first, &stop, &mut |k, v| {
                match (records::place_of(records::ENTRY, k), Entry::decode(v)) {
                    (Some((seg, off)), Some(e)) => slice.push((seg, off, e)),
                    _ => wrong += 1,
                }
                if slice.len() < 1000 {
                    ControlFlow::Continue(())
                } else {
                    ControlFlow::Break(())
                }
            })
            .map_err(super::unwrap_fs)?;
            drop(txn);
            if wrong > 0 {
                let what = format!("{wrong} entries of the index of packed contents make no sense");
                report.other.push(what);
            }
            let Some(last) = slice.last() else { break };
            from = (last.0, last.1 + 1);
            for (seg, off, e) in slice {
                let at = ranges::address(seg, off);
                let range = (at, at + u64::from(e.len));
                known.push(range);
                let good = if e.packed {
                    !bad.contains(&e.name) && self.find_chunk(&e.name)?.is_some()
                } else {
                    done += u64::from(e.len);
                    progress(done, total);
                    self.has_sum(seg, off, &e)
                };
                if good {
                    report.good_bytes += u64::from(e.len);
                } else {
                    damaged.push(range);
                    report.entries.push((seg, off, e));
                }
            }
        }
        ranges::disjoint(&mut known);
        self.name_damage(&damaged, &known, &mut report)?;
        let needed: HashSet<Name> = report.entries.iter().map(|e| e.2.name).collect();
        for name in bad.difference(&needed) {
            let name = records::hex(name);
            let what = format!("chunk {name} is damaged; nothing needs it");
            report.other.push(what);
        }
        Ok(report)
    }

    fn has_sum(&self, segment: u32, offset: u64, e: &Entry) -> bool {
        let mut buf = vec![0; e.len as usize];
        let place = Place { segment, offset };
        let read = self.segments.read_unpacked(place, &mut buf);
        read.is_ok() && name_of(&buf) == e.name
    }

    /// Chunks of the index that their frame does not have whole.
    fn bad_chunks(&self, progress: &mut dyn FnMut(u64)) -> Result<HashSet<Name>, StoreError> {
        let mut frames: Vec<(u32, u64, FrameInfo)> = Vec::new();
        self.each_index(vec![FRAME], &[FRAME + 1], &mut |k, v| {
            if let (Some((pack, off)), Some(f)) =
                (records::place_of(FRAME, k), FrameInfo::decode(v))
            {
                frames.push((pack, off, f));
            }
        })?;
        let mut bad: HashSet<Name> = HashSet::new();
        let mut whole: HashSet<(u32, u64)> = HashSet::new();
        for (pack, off, f) in frames {
            if let Ok(frame) = self.packs.frame_of_disk(pack, off, f.bytes) {
                bad.extend(frame.chunks.iter().filter(|c| !c.good).map(|c| c.name));
                whole.insert((pack, off));
            }
            progress(u64::from(f.bytes));
        }
        // A copy of a chunk that a later repair has replaced does not count, and a frame that cannot be opened is missing
        // as a whole.
        let mut really = HashSet::new();
        self.each_index(vec![CHUNK], &[CHUNK + 1], &mut |k, v| {
            if let (Some(name), Some(at)) = (records::chunk_name(k), ChunkAt::decode(v))
                && (bad.contains(&name) || !whole.contains(&(at.pack, at.frame)))
            {
                really.insert(name);
            }
        })?;
        let mut out = HashSet::new();
        for name in really {
            let good = match self.find_chunk(&name)? {
                None => false,
                Some(at) => self
                    .packs
                    .frame_of_disk(at.pack, at.frame, at.frame_bytes)
                    .is_ok_and(|f| f.chunk(&name).is_some()),
            };
            if !good {
                out.insert(name);
            }
        }
        Ok(out)
    }

    /// Names the files that have damaged ranges, and counts what has no sum.
    fn name_damage(
        &self,
        damaged: &[Range],
        known: &[Range],
        report: &mut DataReport,
    ) -> Result<(), StoreError> {
        let catalog = self.catalog()?;
        let heads = catalog.heads.iter();
        let mut trees: Vec<(String, PageId)> =
            heads.map(|(n, h)| (format!("head {n}"), h.root)).collect();
        let checkpoints = catalog.checkpoints.values();
        trees.extend(checkpoints.map(|c| (format!("checkpoint {}", c.name), c.root)));
        let mut held: Vec<Range> = Vec::new();
        let mut seen = crate::store::bitmap::Bitmap::default();
        for (name, root) in &trees {
            let mut files: BTreeMap<u64, u64> = BTreeMap::new();
            let walked = tree::mark(
                &mut self.quiet(),
                *root,
                &mut |id, _| {
                    seen.grow((id + 1).next_multiple_of(1 << 16));
                    // Without damage every page is looked at once; with it, once for each tree.
                    if seen.set(id) || !damaged.is_empty() {
                        tree::Visit::Descend
                    } else {
                        tree::Visit::Skip
                    }
                },
                Some(&mut |k: &[u8], v: &[u8]| {
                    if let Some((ino, key::EXTENT, _)) = key::split(k)
                        && let Some(at) = key::extent_offset(k)
                        && let Some(r) = Extent::decode(v).and_then(|e| ranges::of_extent(&e))
                    {
                        held.push(r);
                        let i = damaged.partition_point(|d| d.1 <= r.0);
                        if let Some(d) = damaged.get(i).filter(|d| d.0 < r.1) {
                            files.entry(ino).or_insert(at + d.0.saturating_sub(r.0));
                        }
                    }
                }),
            );
            if let Err(e) = walked {
                report.other.push(format!("{name}: {e}"));
                continue;
            }
            ranges::disjoint(&mut held);
            if files.is_empty() {
                continue;
            }
            let inos: BTreeSet<u64> = files.keys().copied().take(NAMED).collect();
            let paths = self.paths(*root, &inos)?;
            for (ino, offset) in files {
                let path = paths.get(&ino).cloned();
                report.damage.push(Damage {
                    tree: name.clone(),
                    path: path.unwrap_or_else(|| format!("inode {ino}")),
                    offset,
                });
            }
        }
        let (unsummed, _) = ranges::split(&held, known);
        report.unsummed_bytes = unsummed.iter().map(|r| r.1 - r.0).sum();
        Ok(())
    }

    /// Paths of some inodes of a fixed tree, one each. Looks through all names.
    pub(crate) fn paths(
        &self,
        root: PageId,
        inos: &BTreeSet<u64>,
    ) -> Result<HashMap<u64, String>, StoreError> {
        let mut up: HashMap<u64, (u64, Vec<u8>)> = HashMap::new();
        tree::scan(&mut self.quiet(), root, &[], None, &mut |k, v| {
            if let Some((dir, key::DIRENT, _)) = key::split(k)
                && let Some(ino) = v.first_chunk::<8>().map(|b| u64::from_le_bytes(*b))
                && (v.get(8) == Some(&4) || inos.contains(&ino))
                && let Some((_, name)) = key::dirent_parts(k)
            {
                up.insert(ino, (dir, name.to_vec()));
            }
            ControlFlow::Continue(())
        })?;
        let mut out = HashMap::new();
        for ino in inos {
            let mut parts: Vec<String> = Vec::new();
            let mut at = *ino;
            while at != ROOT_INO && parts.len() < 4096 {
                let Some((dir, name)) = up.get(&at) else {
                    break;
                };
                parts.push(String::from_utf8_lossy(name).into_owned());
                at = *dir;
            }
            if at == ROOT_INO && !parts.is_empty() {
                parts.reverse();
                out.insert(*ino, format!("/{}", parts.join("/")));
            }
        }
        Ok(out)
    }

    /// Gives damaged ranges their right bytes again: from elsewhere in the store, or from `fetch`. What is there is copied
    /// to `keep` first (file name, bytes), and nothing is overwritten: right bytes go to a new place of a pack.
    ///
    /// # Errors
    /// What the host or `fetch` says; what was put right by then stays so.
    pub fn repair(
        &self,
        found: &DataReport,
        fetch: &mut Fetch<'_>,
        keep: &mut Keep<'_>,
    ) -> Result<RepairReport, StoreError> {
        let mut report = RepairReport::default();
        let wanted: HashSet<Name> = found.entries.iter().map(|e| e.2.name).collect();
        // Other places that should have the same bytes, unpacked.
        let damaged: HashSet<(u32, u64)> = found.entries.iter().map(|e| (e.0, e.1)).collect();
        let mut twins: HashMap<Name, (u32, u64, Entry)> = HashMap::new();
        self.each_entry((0, 0), (u32::MAX, u64::MAX), &mut |seg, off, e| {
            if !e.packed && wanted.contains(&e.name) && !damaged.contains(&(seg, off)) {
                twins.insert(e.name, (seg, off, e));
            }
        })?;
        let mut right: HashSet<Name> = HashSet::new();
        let mut lost: BTreeSet<Name> = BTreeSet::new();
        // Without a name there is nothing to ask for; [`crate::history::repair`] knows how to find one.
        let named = found.entries.iter().filter(|e| e.2.name != UNKNOWN);
        for (segment, offset, e) in named {
            if lost.contains(&e.name) {
                continue;
            }
            let packed_elsewhere = !e.packed && self.chunk(&e.name).ok().flatten().is_some();
            let bytes = match twins.get(&e.name) {
                _ if packed_elsewhere || right.contains(&e.name) => None,
                Some((segment, offset, t)) if self.has_sum(*segment, *offset, t) => {
                    let mut buf = vec![0; t.len as usize];
                    let place = Place {
                        segment: *segment,
                        offset: *offset,
                    };
                    self.segments.read_unpacked(place, &mut buf)?;
                    Some(buf)
                }
                _ => match fetch(&e.name)?.filter(|b| name_of(b) == e.name) {
                    Some(b) => Some(b),
                    None => {
                        lost.insert(e.name);
                        continue;
                    }
                },
            };
            self.keep_damaged(*segment, *offset, e, keep)?;
            self.with_writer(PackOptions::LEVEL, |w| {
                if let Some(b) = &bytes {
                    w.put_new(e.name, b)?;
                }
                let entry = Entry { packed: true, ..*e };
                w.entry(*segment, *offset, entry);
                Ok(())
            })?;
            self.packs.forget_all();
            right.insert(e.name);
            report.repaired += 1;
        }
        report.missing = lost.iter().map(records::hex).collect();
        self.sync()?;
        Ok(report)
    }

    /// The bytes of a chunk, from a pack, or from a segment of which the index knows the sum. Looks through the whole index
    /// for the latter.
    ///
    /// # Errors
    /// Corrupt, or what the host says.
    pub fn chunk_anywhere(&self, name: &Name) -> Result<Option<Vec<u8>>, StoreError> {
        if let Some(bytes) = self.chunk(name)? {
            return Ok(Some(bytes));
        }
        let mut found = Vec::new();
        self.each_entry((0, 0), (u32::MAX, u64::MAX), &mut |seg, off, e| {
            if !e.packed && e.name == *name {
                found.push((seg, off, e));
            }
        })?;
        for (segment, offset, e) in found {
            let mut buf = vec![0; e.len as usize];
            let place = Place { segment, offset };
            self.segments.read_unpacked(place, &mut buf)?;
            if name_of(&buf) == *name {
                return Ok(Some(buf));
            }
        }
        Ok(None)
    }

    /// Copies the bytes that are about to be replaced.
    fn keep_damaged(
        &self,
        segment: u32,
        offset: u64,
        e: &Entry,
        keep: &mut Keep<'_>,
    ) -> Result<(), StoreError> {
        let flat = |name: String| name.replace('/', "-");
        if !e.packed {
            let mut buf = vec![0; e.len as usize];
            let place = Place { segment, offset };
            if self.segments.read_unpacked(place, &mut buf).is_err() {
                return Ok(());
            }
            let name = flat(segments::file_name(segment));
            return keep(&format!("{name}@{offset}"), &buf);
        }
        let Some(at) = self.find_chunk(&e.name)? else {
            return Ok(());
        };
        let mut buf = vec![0; (at.frame_bytes as usize).min(8 << 20)];
        let Ok(file) = self.packs.file(at.pack) else {
            return Ok(());
        };
        if file.read_at(&mut buf, at.frame).is_err() {
            return Ok(());
        }
        keep(&format!("{}@{}", flat(file_name(at.pack)), at.frame), &buf)
    }
}

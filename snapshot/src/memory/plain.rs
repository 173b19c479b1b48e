//! Copying in the stop, without tracking: what cannot be tracked, and everything where userfaultfd is missing.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

use super::Span;
use super::copy::{Room, Source};
use super::error::Error;
use super::parent::Parent;
use super::shared::lock;
use super::table::{Block, blocks_of};
use super::tracker::each;
use crate::image::index::Entry;
use crate::image::pages::PagesWriter;
use crate::image::pageset::{BLOCK, PageSet};
use crate::sys::pagemap::{FILE, PRESENT, SWAPPED};

/// Copies all of a stopped process's own pages in `spans` (private mappings, of files too).
pub fn copy_all(
    pid: i32,
    space: u32,
    pages: &Arc<PagesWriter>,
    parent: Option<Arc<Parent>>,
    spans: &[Span],
) -> Result<Vec<Entry>, Error> {
    let source = Source::new(pid, space, pages.clone(), parent)?;
    let mut blocks = BTreeMap::new();
    copy_spans(&source, spans, &mut blocks)?;
    let blocks: Vec<_> = blocks.into_iter().collect();
    entries(&source, &blocks, 2)
}

/// Copies a shared memory object, all of its data, while nobody writes it.
pub fn copy_object(
    pid: i32,
    space: u32,
    pages: &Arc<PagesWriter>,
    parent: Option<Arc<Parent>>,
    object: &File,
) -> Result<Vec<Entry>, Error> {
    let source = Source::new(pid, space, pages.clone(), parent)?;
    let failed = |source| Error::Open {
        pid,
        what: "shared memory",
        source,
    };
    let size = object.metadata().map_err(failed)?.len();
    let mut parts: BTreeMap<u64, PageSet> = BTreeMap::new();
    let mut at = 0;
    while at < size {
        let data = match lseek(object, at as i64, Whence::SeekData) {
            Ok(d) => d as u64,
            Err(Errno::ENXIO) => break,
            Err(e) => return Err(failed(e.into())),
        };
        let hole =
            lseek(object, data as i64, Whence::SeekHole).map_err(|e| failed(e.into()))? as u64;
        for (block, _) in blocks_of(data..hole) {
            *parts.entry(block).or_default() |= PageSet::of_addresses(block, data, hole);
        }
        at = hole.max(at + 1);
    }
    let mut room = Room::new();
    let mut blocks = Vec::new();
    for (number, set) in parts {
        for r in set.byte_runs() {
            let offset = number * BLOCK + r.start as u64;
            // The last page may end beyond the object.
            let have = ((size.saturating_sub(offset)) as usize).min(r.len());
            room.block[r.start + have..r.end].fill(0);
            object
                .read_exact_at(&mut room.block[r.start..r.start + have], offset)
                .map_err(failed)?;
        }
        let c = source.sort(number, set, &set, &mut room)?;
        let mut b = Block::default();
        if let Some(slot) = b.merge(&c, pages) {
            pages.write(slot, &c.own, &room.block)?;
            b.sum = Some(crate::image::pages::sum(&c.own, &room.block));
        }
        blocks.push((number, b));
    }
    entries(&source, &blocks, 1)
}

/// Copies the process's own pages of `spans` into `blocks`.
pub(super) fn copy_spans(
    source: &Source,
    spans: &[Span],
    blocks: &mut BTreeMap<u64, Block>,
) -> Result<(), Error> {
    let mut room = Room::none();
    for span in spans {
        let mut parts: BTreeMap<u64, PageSet> = BTreeMap::new();
        source
            .map
            .scan(span.start, span.end, PRESENT | SWAPPED, FILE, |r| {
                for (block, _) in blocks_of(r.start..r.end) {
                    *parts.entry(block).or_default() |=
                        PageSet::of_addresses(block, r.start, r.end);
                }
            })
            .map_err(|e| source.scan_error(span.start, span.end, e))?;
        for (number, set) in parts {
            if room.block.is_empty() {
                room = Room::new();
            }
            let there = source.existing(number, &set)?;
            let failed = source.fetch(number, &there, &mut room);
            source.must_read(number, &failed)?;
            let seen = PageSet::of_addresses(number, span.start, span.end);
            let c = source.sort(number, seen, &there, &mut room)?;
            let b = blocks.entry(number).or_default();
            b.plain |= seen;
            if let Some(slot) = b.merge(&c, &source.pages) {
                source.pages.write(slot, &c.own, &room.block)?;
            }
        }
    }
    Ok(())
}

/// The index's entries of all blocks, with the sums that are still missing.
pub(super) fn entries(
    source: &Source,
    blocks: &[(u64, Block)],
    threads: usize,
) -> Result<Vec<Entry>, Error> {
    let all = Mutex::new(Vec::with_capacity(blocks.len()));
    let numbers: Vec<u64> = (0..blocks.len() as u64).collect();
    each(&numbers, threads, |i, room| {
        let (number, block) = &blocks[i as usize];
        let mut some = Vec::new();
        source.entries(*number, block, room, &mut some)?;
        lock(&all).append(&mut some);
        Ok(())
    })?;
    Ok(all
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner))
}

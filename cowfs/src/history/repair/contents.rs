//! Ranges of segments whose entries in the index were lost: what they were is found out from checkpoints that were got.

use std::collections::BTreeMap;

use super::pages::pieces;
use super::{Elsewhere, HIDDEN, Inodes, Mended, bring};
use crate::errors::in_full;
use crate::fs::{Extent, data};
use crate::history::TransferError;
use crate::history::base::QuietKv;
use crate::store::packs::records::Name;
use crate::store::packs::{PackOptions, Writer, ranges, unwrap_fs};
use crate::store::{Store, StoreError};
use crate::tree::PageId;

/// Finds out what ranges were whose entries were lost, from checkpoints that have them.
pub(super) fn name_contents(
    store: &Store,
    from: &Elsewhere,
    done: &mut Mended,
) -> Result<(), TransferError> {
    let mut unknown = store.unknown()?;
    for c in store.catalog()?.checkpoints.values() {
        if unknown.is_empty() {
            break;
        }
        // Of a tree that is still damaged nothing is taken.
        let Ok(parts) = store.mapped_in(c.root, &unknown) else {
            continue;
        };
        if parts.is_empty() {
            continue;
        }
        let only = Inodes::new(parts.iter().map(|p| (p.0, p.0)).collect());
        let named = bring(store, from, c, &only)
            .and_then(|root| Ok(name_parts(store, root, &parts, &unknown)?));
        match named {
            Ok(bytes) => done.named_bytes += bytes,
            Err(e @ TransferError::Store(StoreError::NoSpace)) => return Err(e),
            Err(e) => {
                let what = format!("contents of checkpoint {}: {}", c.name, in_full(&e));
                done.refused.push(what);
            }
        }
        store.unhide(HIDDEN)?;
        unknown = store.unknown()?;
    }
    Ok(())
}

/// Inode, offset in the file, addresses.
type Part = (u64, u64, ranges::Range);

fn name_parts(
    store: &Store,
    root: PageId,
    parts: &[Part],
    unknown: &[ranges::Range],
) -> Result<u64, StoreError> {
    store.with_writer(PackOptions::LEVEL, |w| {
        let mut found: BTreeMap<ranges::Range, Vec<(ranges::Range, Name)>> = BTreeMap::new();
        let mut taken: Vec<ranges::Range> = Vec::new();
        let mut bytes = 0;
        for (ino, at, part) in parts {
            // Files may share a range.
            for rest in ranges::split(&[*part], &taken).0 {
                let i = unknown.partition_point(|u| u.1 <= rest.0);
                let Some(whole) = unknown.get(i).filter(|u| u.0 <= rest.0 && rest.1 <= u.1) else {
                    continue;
                };
                let from = at + (rest.0 - part.0);
                let Some(list) = chunks_of(store, w, root, (*ino, from, rest.1 - rest.0))? else {
                    continue;
                };
                let mut next = rest.0;
                for (len, name) in list {
                    let end = next + u64::from(len);
                    found.entry(*whole).or_default().push(((next, end), name));
                    next = end;
                }
                bytes += rest.1 - rest.0;
                taken.push(rest);
                taken.sort_unstable();
            }
        }
        w.finish()?;
        for (whole, mut named) in found {
            named.sort_unstable_by_key(|n| n.0);
            store.name_unknown(whole, &named)?;
        }
        store.sync()?;
        Ok(bytes)
    })
}

/// The chunks of a range of a file that was got, if it has all of that range.
fn chunks_of(
    store: &Store,
    w: &mut Writer<'_>,
    root: PageId,
    (ino, from, len): (u64, u64, u64),
) -> Result<Option<Vec<(u32, Name)>>, StoreError> {
    let mut kv = QuietKv::new(store, root);
    let to = from + len;
    let list = data::list(&mut kv, ino, from, to, usize::MAX).map_err(unwrap_fs)?;
    let (mut next, mut out) = (from, Vec::new());
    for m in list {
        if m.at > next {
            return Ok(None);
        }
        let skip = next - m.at;
        let part = m.end().min(to).saturating_sub(next);
        let e = Extent {
            off: m.extent.off + skip,
            len: u32::try_from(part).unwrap_or(0),
            ..m.extent
        };
        out.extend(pieces(store, w, ino, &e)?);
        next += part;
    }
    Ok((next == to).then_some(out))
}

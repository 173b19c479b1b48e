//! Extents as chunks: those that the index names, and what is between them, cut.

use crate::fs::Extent;
use crate::store::packs::chunker;
use crate::store::packs::records::{Entry, Name, name_of};
use crate::store::segments::{self, Place};
use crate::store::{Store, StoreError};

/// Bytes read at once.
const READ: usize = 1 << 20;

/// A chunk of an extent.
pub(super) struct Piece<'a> {
    /// Offset in the extent.
    pub skip: u64,
    /// Bytes.
    pub len: u32,
    pub name: Name,
    /// The bytes, if it had to be cut. What has a name in the index is not read.
    pub bytes: Option<&'a [u8]>,
}

/// Calls `f` with the chunks of an extent from an offset on. No more than `cut` bytes are read to be cut, but for the chunk
/// at hand; what is behind them is left out.
pub(super) fn each<E: From<StoreError>>(
    store: &Store,
    e: &Extent,
    from: u64,
    cut: &mut u64,
    f: &mut dyn FnMut(Piece<'_>) -> Result<(), E>,
) -> Result<(), E> {
    let place = |skip: u64| Place {
        segment: e.seg,
        offset: e.off + skip,
    };
    for (skip, len, name) in named(store, place(from), u64::from(e.len) - from)? {
        let mut skip = from + skip;
        if let Some(name) = name {
            let len = u32::try_from(len).unwrap_or(u32::MAX);
            let bytes = None;
            f(Piece {
                skip,
                len,
                name,
                bytes,
            })?;
            continue;
        }
        let (mut left, mut buf) = (len, Vec::new());
        while left > 0 && *cut > 0 {
            if buf.len() < chunker::MAX && (buf.len() as u64) < left {
                let have = buf.len();
                buf.resize(usize::try_from(left).unwrap_or(READ).min(READ), 0);
                read(store, place(skip + have as u64), &mut buf[have..])?;
            }
            let n = chunker::cut(&buf[..buf.len().min(chunker::MAX)]);
            f(Piece {
                skip,
                len: u32::try_from(n).unwrap_or(u32::MAX),
                name: name_of(&buf[..n]),
                bytes: Some(&buf[..n]),
            })?;
            buf.drain(..n);
            skip += n as u64;
            left -= n as u64;
            *cut = cut.saturating_sub(n as u64);
        }
    }
    Ok(())
}

/// The bytes of a chunk that the index names, from an extent.
///
/// # Errors
/// The store's; damaged, if they do not have the name.
pub(super) fn bytes_of(
    store: &Store,
    ino: u64,
    e: &Extent,
    p: &Piece<'_>,
) -> Result<Vec<u8>, StoreError> {
    let place = Place {
        segment: e.seg,
        offset: e.off + p.skip,
    };
    let mut buf = vec![0; p.len as usize];
    read(store, place, &mut buf)?;
    if name_of(&buf) == p.name {
        return Ok(buf);
    }
    Err(StoreError::corrupt(
        &segments::file_name(place.segment),
        format!(
            "the bytes at {} of inode {ino} do not have their sum; 'cowfs check --data --repair' may help",
            place.offset
        ),
    ))
}

fn read(store: &Store, place: Place, buf: &mut [u8]) -> Result<(), StoreError> {
    let gate = store.gate.read();
    let _gate = gate.unwrap_or_else(std::sync::PoisonError::into_inner);
    store.read_data(place, buf)
}

/// A piece of a range: offset in it, length, and its name, if it is a whole chunk of the index.
type Named = (u64, u64, Option<Name>);

/// Pieces of a range, in order.
fn named(store: &Store, place: Place, len: u64) -> Result<Vec<Named>, StoreError> {
    let (from, to) = (place.offset, place.offset + len);
    let mut out = Vec::new();
    let mut at = from;
    let mut f = |seg: u32, off: u64, e: Entry| {
        let end = off + u64::from(e.len);
        if seg != place.segment || off < at || end > to {
            return;
        }
        if off > at {
            out.push((at - from, off - at, None));
        }
        out.push((off - from, u64::from(e.len), Some(e.name)));
        at = end;
    };
    store.each_entry((place.segment, from), (place.segment, to), &mut f)?;
    if at < to {
        out.push((at - from, to - at, None));
    }
    Ok(out)
}

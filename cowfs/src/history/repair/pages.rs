//! Pages that are made anew of the records of a checkpoint that was got.

use std::ops::ControlFlow;

use crate::fs::{Extent, data, key};
use crate::history::cut;
use crate::history::receive::REACHED;
use crate::store::packs::Writer;
use crate::store::packs::records::{Entry, Name};
use crate::store::{LostPage, Store, StoreError};
use crate::tree::{self, Filler, Page, PageId};

/// Things of a writer that wait before they are written.
const WAITING: usize = 4096;

/// A range of a file, and where its bytes are.
struct Run {
    ino: u64,
    at: u64,
    parts: Vec<Extent>,
    len: u64,
}

impl Run {
    fn takes(&self, ino: u64, at: u64, e: &Extent) -> bool {
        let len = self.len + u64::from(e.len);
        ino == self.ino && at == self.at + self.len && len <= u64::from(data::EXTENT_MAX)
    }
}

/// A page of what a tree has between the bounds of a damaged one.
pub(super) fn make_page(
    store: &Store,
    w: &mut Writer<'_>,
    root: PageId,
    l: &LostPage,
) -> Result<Page, StoreError> {
    let bad = || StoreError::corrupt("meta", "a record of what was got makes no sense");
    let mut filler = Filler::default();
    let mut place = |page| store.add_page(page);
    let mut run: Option<Run> = None;
    let mut done = Ok(());
    // Contents in one piece each: they were in no more pieces in the page, which must take them.
    let mut end_run = |run: &mut Option<Run>, filler: &mut Filler| match run.take() {
        None => Ok(()),
        Some(run) => {
            let e = settle(store, w, &run)?;
            filler.push(&key::extent(run.ino, run.at), &e.encode(), &mut place)
        }
    };
    let mut each = |k: &[u8], v: &[u8], filler: &mut Filler| {
        let (ino, kind, _) = key::split(k).ok_or_else(bad)?;
        if ino == 0 && kind == REACHED {
            return Ok(());
        }
        if kind != key::EXTENT {
            end_run(&mut run, filler)?;
            return filler.push(k, v, &mut |page| store.add_page(page));
        }
        let at = key::extent_offset(k).ok_or_else(bad)?;
        let e = Extent::decode(v).ok_or_else(bad)?;
        if !run.as_ref().is_some_and(|r| r.takes(ino, at, &e)) {
            end_run(&mut run, filler)?;
        }
        let run = run.get_or_insert_with(|| Run {
            ino,
            at,
            parts: Vec::new(),
            len: 0,
        });
        run.len += u64::from(e.len);
        run.parts.push(e);
        Ok(())
    };
    tree::scan(
        &mut store.quiet(),
        root,
        &l.lost.low,
        l.lost.high.as_deref(),
        &mut |k, v| {
            done = each(k, v, &mut filler);
            match done {
                Ok(()) => ControlFlow::Continue(()),
                Err(_) => ControlFlow::Break(()),
            }
        },
    )?;
    done?;
    end_run(&mut run, &mut filler)?;
    let page = filler.finish(l.lost.level, &mut |page| store.add_page(page))?;
    page.ok_or_else(|| {
        StoreError::Refused(format!(
            "what is there does not fit where page {} was; delete the checkpoint and receive it anew",
            l.lost.page
        ))
    })
}

/// Gives the bytes of a run one place, where nothing is ever written, and entries there.
fn settle(store: &Store, w: &mut Writer<'_>, run: &Run) -> Result<Extent, StoreError> {
    let place = store.segments.allocate_void(run.len)?;
    let mut off = place.offset;
    for e in &run.parts {
        for (len, name) in pieces(store, w, run.ino, e)? {
            let entry = Entry {
                len,
                packed: true,
                name,
            };
            w.entry(place.segment, off, entry);
            off += u64::from(len);
        }
    }
    if w.waiting() > WAITING {
        w.finish()?;
    }
    Ok(Extent {
        seg: place.segment,
        off: place.offset,
        len: u32::try_from(run.len).unwrap_or(u32::MAX),
        flags: 0,
        // No head may take it for its own, as the page is shared.
        birth: 0,
    })
}

/// The chunks that an extent is made of, in packs. Collections are held off.
pub(super) fn pieces(
    store: &Store,
    w: &mut Writer<'_>,
    ino: u64,
    e: &Extent,
) -> Result<Vec<(u32, Name)>, StoreError> {
    let mut out = Vec::new();
    cut::each(store, e, 0, &mut { u64::MAX }, &mut |p| {
        if let Some(bytes) = p.bytes {
            w.put(bytes)?;
        } else if !w.has(&p.name)? {
            w.put_new(p.name, &cut::bytes_of(store, ino, e, &p)?)?;
        }
        out.push((p.len, p.name));
        Ok::<(), StoreError>(())
    })?;
    Ok(out)
}

//! Makes a checkpoint of a stream.
//!
//! It grows in a hidden head, a slice at a time: chunks into packs, entries of the index, then a batch on the head with
//! the place reached. A collection is held off during a slice, so that nothing received looks unused. What is there when a
//! stream breaks stays, and a stream that begins at the place reached goes on with it.

use std::collections::HashMap;
use std::io::Read;

use serde::{Deserialize, Serialize};

use super::base::{self, QuietKv};
use super::send::{Pinned, TransferError, pin, source_of};
use super::stream::{Begin, Item, Reached, Reader, Record, StreamError};
use crate::fs::{self, Extent, INO_END, Inode, Kv, data, key};
use crate::names;
use crate::store::packs::records::{CHUNK_MAX, Entry, Name, name_of};
use crate::store::packs::{PackOptions, frame, unwrap_fs};
use crate::store::segments::Place;
use crate::store::{Catalog, CatalogOp, Checkpoint, Source, Store, StoreError, now_us};

/// Bytes of chunks that wait for their slice.
const SLICE: usize = 16 << 20;
/// Kind of the record that tells the place reached, which no finished tree has.
pub(super) const REACHED: u8 = 0xf0;

/// What was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    /// Name of the new checkpoint.
    pub name: String,
    /// Its number.
    pub id: u64,
    /// Chunks that the store did not have.
    pub new_chunks: u64,
    /// Their bytes.
    pub new_bytes: u64,
}

/// State of a receive, in the hidden tree.
#[derive(Debug, Serialize, Deserialize)]
struct State {
    base: Option<Source>,
    reached: Reached,
}

const PREFIX: &str = "@receive-";

fn hidden_name(source: &Source) -> String {
    format!("{PREFIX}{}-{}", source.store, source.id)
}

/// True for the hidden head of a receive.
pub(crate) fn is_receive(hidden: &str) -> bool {
    hidden.starts_with(PREFIX)
}

/// A place reached, as `cowfs send --resume` takes it.
pub fn token(r: Reached) -> String {
    format!("{:x}-{:x}", r.0, r.1)
}

/// Reads a token.
pub fn parse_token(text: &str) -> Option<Reached> {
    let (a, b) = text.split_once('-')?;
    let n = |s: &str| u64::from_str_radix(s, 16).ok();
    Some((n(a)?, n(b)?))
}

fn damaged(what: impl Into<String>) -> TransferError {
    StreamError::Damaged(what.into()).into()
}

/// Receives a checkpoint. `name` is what it shall be called, instead of its own name.
///
/// # Errors
/// It is here already; its base is not; a name that is taken; a stream that is damaged or cut off, with what to do.
pub fn receive<R: Read>(
    store: &Store,
    from: R,
    name: Option<&str>,
) -> Result<Received, TransferError> {
    let mut stream = Reader::new(from)?;
    let Record::Begin(begin) = stream.read()? else {
        return Err(damaged("it does not begin with what it is about"));
    };
    let mut r = Receiver::start(store, *begin, name)?;
    let done = r.run(&mut stream);
    match done {
        Ok(()) => {}
        Err(TransferError::Stream(e @ (StreamError::CutOff | StreamError::Damaged(_)))) => {
            return Err(StoreError::Refused(format!("{e}; {}", r.advice())).into());
        }
        Err(TransferError::Store(StoreError::NoSpace)) => {
            return Err(TransferError::Full { advice: r.advice() });
        }
        Err(e) => return Err(e),
    }
    r.publish()
}

/// Receives a part of a checkpoint that is here already into a hidden head of this name, for a repair. What of it is in
/// `twins` (chunks that are in no pack, and where they are) need not come.
pub(super) fn receive_part<R: Read>(
    store: &Store,
    from: R,
    want: &Source,
    hidden: &str,
    twins: HashMap<Name, Twin>,
) -> Result<(), TransferError> {
    let mut stream = Reader::new(from)?;
    let Record::Begin(begin) = stream.read()? else {
        return Err(damaged("it does not begin with what it is about"));
    };
    if begin.source != *want || begin.resume.is_some() {
        return Err(damaged("it is not about the checkpoint that was asked for"));
    }
    let catalog = store.catalog()?;
    let base = base_of(store, &catalog, &begin)?;
    store.hide_anew(hidden, base)?;
    let pinned = base.map(|id| pin(store, id)).transpose()?;
    let mut r = Receiver {
        twins,
        ..Receiver::new(store, *begin, String::new(), hidden.to_owned(), pinned)
    };
    r.run(&mut stream)
}

/// Number here of the checkpoint that a stream is the difference to.
fn base_of(store: &Store, catalog: &Catalog, begin: &Begin) -> Result<Option<u64>, TransferError> {
    let Some(b) = &begin.base else {
        return Ok(None);
    };
    match here(store, catalog, b) {
        Some(c) => Ok(Some(c.id)),
        None => {
            let base = begin.base_name.as_deref().unwrap_or("another one");
            Err(StoreError::NotFound(format!(
                "it is the difference to checkpoint {base}, which is not here; receive that first, or send without --from"
            ))
            .into())
        }
    }
}

/// The checkpoint of an identity.
pub(super) fn here<'a>(
    store: &Store,
    catalog: &'a Catalog,
    source: &Source,
) -> Option<&'a Checkpoint> {
    let mut all = catalog.checkpoints.values();
    all.find(|c| source_of(store, c) == *source)
}

/// Segment, offset and length of a chunk that is in no pack.
pub(super) type Twin = (u32, u64, u32);

struct Receiver<'a> {
    store: &'a Store,
    /// The base, and its name here.
    base: Option<(Pinned<'a>, String)>,
    begin: Begin,
    name: String,
    hidden: String,
    reached: Reached,
    frames: Vec<Vec<u8>>,
    waiting: usize,
    new_chunks: u64,
    new_bytes: u64,
    twins: HashMap<Name, Twin>,
}

impl<'a> Receiver<'a> {
    fn new(
        store: &'a Store,
        begin: Begin,
        name: String,
        hidden: String,
        base: Option<(Pinned<'a>, Checkpoint)>,
    ) -> Self {
        Self {
            store,
            base: base.map(|(tree, c)| (tree, c.name)),
            reached: (0, 0),
            name,
            hidden,
            frames: Vec::new(),
            waiting: 0,
            new_chunks: 0,
            new_bytes: 0,
            twins: HashMap::new(),
            begin,
        }
    }

    fn start(store: &'a Store, begin: Begin, name: Option<&str>) -> Result<Self, TransferError> {
        let hex =
            |s: &Source| s.store.len() == 32 && s.store.bytes().all(|b| b.is_ascii_hexdigit());
        if !hex(&begin.source) || begin.next_ino >= INO_END || begin.tags.len() > 1000 {
            return Err(damaged("its beginning makes no sense"));
        }
        let name = name.unwrap_or(&begin.name).to_owned();
        names::check(&name)?;
        if names::check(&begin.head).is_err() {
            return Err(damaged("its head has an impossible name"));
        }
        let catalog = store.catalog()?;
        if let Some(c) = here(store, &catalog, &begin.source) {
            return Err(StoreError::Exists(format!(
                "this checkpoint is here already, as {}",
                c.name
            ))
            .into());
        }
        if catalog.is_taken(&name) {
            return Err(StoreError::Exists(format!(
                "the name {name} is taken; give another with --name"
            ))
            .into());
        }
        let base = base_of(store, &catalog, &begin)?;
        let hidden = hidden_name(&begin.source);
        let pinned = base.map(|id| pin(store, id)).transpose()?;
        let mut r = Self::new(store, begin, name, hidden, pinned);
        let have = r.state()?;
        if let Some(from) = r.begin.resume {
            match have {
                Some(s) if s.base == r.begin.base && s.reached == from => r.reached = from,
                Some(s) if s.base == r.begin.base => {
                    let want = token(s.reached);
                    return Err(StoreError::Refused(format!(
                        "the stream does not go on where the last one broke; send with --resume {want}"
                    ))
                    .into());
                }
                _ => {
                    return Err(StoreError::Refused(
                        "there is nothing that the stream could go on with; send without --resume"
                            .into(),
                    )
                    .into());
                }
            }
            return Ok(r);
        }
        r.forget()?;
        let hidden = r.hidden.clone();
        store.change(
            |c| {
                let op = CatalogOp::Hide {
                    id: c.next_head,
                    name: hidden,
                    from: base,
                    created_us: now_us(),
                };
                Ok((op, ()))
            },
            |(), _| (),
        )?;
        Ok(r)
    }

    fn state(&self) -> Result<Option<State>, StoreError> {
        if self.store.catalog()?.any_head(&self.hidden).is_none() {
            return Ok(None);
        }
        let mut txn = self.store.read_head(&self.hidden)?;
        let mut found = None;
        txn.get(&key::kind(0, REACHED), &mut |v| {
            found = serde_json::from_slice(v).ok();
        })
        .map_err(unwrap_fs)?;
        Ok(found)
    }

    /// Drops what an earlier receive has left.
    fn forget(&self) -> Result<(), StoreError> {
        if self.store.catalog()?.any_head(&self.hidden).is_none() {
            return Ok(());
        }
        let name = self.hidden.clone();
        self.store
            .change(|_| Ok((CatalogOp::Unhide { name }, ())), |(), _| ())?;
        self.store.want_gc();
        Ok(())
    }

    /// What to do when it cannot go on.
    fn advice(&self) -> String {
        // What the tree says is what the next one has to go on with.
        let state = self.state().ok().flatten();
        match state.map_or((0, 0), |s| s.reached) {
            (0, 0) => "nothing of it was kept: send it again".into(),
            reached => format!(
                "what came before is kept: send it again, or the rest only with --resume {}",
                token(reached)
            ),
        }
    }

    fn run<R: Read>(&mut self, stream: &mut Reader<R>) -> Result<(), TransferError> {
        let (mut items_seen, mut waiting) = (0u64, Vec::new());
        let mut reached = self.reached;
        loop {
            let record = match stream.read() {
                Ok(r) => r,
                Err(e) => {
                    // What came whole is worth keeping.
                    self.apply(std::mem::take(&mut waiting), reached)?;
                    return Err(e.into());
                }
            };
            match record {
                Record::Begin(_) => return Err(damaged("it begins twice")),
                Record::Chunks(frame) => {
                    self.waiting += frame.len();
                    self.frames.push(frame);
                    if self.waiting > 8 * SLICE {
                        return Err(damaged("it has chunks that nothing uses"));
                    }
                }
                Record::Items(items, at) => {
                    items_seen += items.len() as u64;
                    // What is taken from the base is as much work as what came.
                    for i in &items {
                        if let Item::Base(_, _, len, _) = i {
                            self.waiting += *len as usize;
                        }
                    }
                    waiting.extend(items);
                    reached = at;
                    if self.waiting >= SLICE / 4 || waiting.len() > 20_000 {
                        self.apply(std::mem::take(&mut waiting), reached)?;
                    }
                }
                Record::End(items, _) => {
                    self.apply(std::mem::take(&mut waiting), reached)?;
                    if items != items_seen {
                        return Err(damaged("records are missing"));
                    }
                    return Ok(());
                }
            }
        }
    }

    /// Makes a slice part of the hidden tree.
    fn apply(&mut self, items: Vec<Item>, reached: Reached) -> Result<(), TransferError> {
        let frames = std::mem::take(&mut self.frames);
        self.waiting = 0;
        if items.is_empty() {
            return Ok(());
        }
        let store = self.store;
        let mut wrong: Option<TransferError> = None;
        let (mut chunks, mut bytes) = (0, 0);
        store.with_writer(PackOptions::LEVEL, |w| {
            for f in &frames {
                let f = match frame::open(f) {
                    Ok(f) => f,
                    Err(e) => {
                        wrong = Some(damaged(e));
                        return Ok(());
                    }
                };
                for c in &f.chunks {
                    if !c.good || c.len == 0 || c.len > CHUNK_MAX as usize {
                        wrong = Some(damaged("a chunk does not have its name"));
                        return Ok(());
                    }
                    if !w.has(&c.name)? {
                        w.put_new(c.name, &f.raw[c.off..c.off + c.len])?;
                    }
                }
            }
            (chunks, bytes) = (w.new_chunks, w.new_bytes);
            for i in &items {
                let Item::Base(ino, at, len, name) = i else {
                    continue;
                };
                // Read also if the index has it: the difference is no better than what it is to.
                match self.of_base((*ino, *at, *len), name) {
                    Ok(bytes) if !w.has(name)? => w.put_new(*name, &bytes)?,
                    Ok(_) => {}
                    Err(e) => {
                        wrong = Some(e);
                        return Ok(());
                    }
                }
            }
            self.take_twins(&items, w)?;
            // So that the chunks of this slice are found.
            w.finish()?;
            let mut placed: Vec<(u64, u64, Extent)> = Vec::new();
            for i in &items {
                let Item::Map(ino, at, list) = i else {
                    continue;
                };
                match self.place(w, list)? {
                    Some((segment, off, len)) => placed.push((
                        *ino,
                        *at,
                        Extent {
                            seg: segment,
                            off,
                            len,
                            flags: 0,
                            birth: 0,
                        },
                    )),
                    None => {
                        wrong = Some(damaged("it names a chunk that it does not bring"));
                        return Ok(());
                    }
                }
            }
            w.finish()?;
            let mut placed = placed.into_iter();
            // A few hundred changes a batch, so that nobody waits long for the lock.
            for (n, slice) in items.chunks(256).enumerate() {
                let last = (n + 1) * 256 >= items.len();
                let done = self.batch(slice, &mut placed, last.then_some(reached));
                if let Err(e) = done {
                    wrong = Some(e);
                    return Ok(());
                }
            }
            Ok(())
        })?;
        if let Some(e) = wrong {
            return Err(e);
        }
        self.new_chunks += chunks;
        self.new_bytes += bytes;
        self.reached = reached;
        // The place reached must not be ahead of what is durable.
        store.sync()?;
        Ok(())
    }

    /// Puts into packs what of a slice only segments have.
    fn take_twins(
        &self,
        items: &[Item],
        w: &mut crate::store::packs::Writer<'_>,
    ) -> Result<(), StoreError> {
        for i in items {
            let Item::Map(_, _, list) = i else { continue };
            for (_, name) in list {
                let Some((segment, offset, len)) = self.twins.get(name).copied() else {
                    continue;
                };
                if w.has(name)? {
                    continue;
                }
                let mut bytes = vec![0; len as usize];
                let place = Place { segment, offset };
                self.store.segments.read_unpacked(place, &mut bytes)?;
                if name_of(&bytes) == *name {
                    w.put_new(*name, &bytes)?;
                }
            }
        }
        Ok(())
    }

    /// A chunk that the stream says is in a file of the base.
    fn of_base(&self, at: (u64, u64, u32), name: &Name) -> Result<Vec<u8>, TransferError> {
        let Some((tree, called)) = &self.base else {
            return Err(damaged("it takes a chunk from a base, but has none"));
        };
        let found = base::chunk(self.store, tree.1, at, name);
        let why = match found {
            Ok(Some(bytes)) => return Ok(bytes),
            Ok(None) => String::new(),
            Err(StoreError::Corrupt { file, what }) => format!(" ({file}: {what})"),
            Err(e) => return Err(e.into()),
        };
        Err(StoreError::Refused(format!(
            "the stream takes {} bytes at {} of inode {} from checkpoint {called}, which does not have them here{why}; 'cowfs check \
             --data --repair' may help, or send without --from",
            at.2, at.1, at.0
        ))
        .into())
    }

    /// Gives chunks a place in a logical segment, where nothing is ever written; nothing if one is missing.
    fn place(
        &self,
        w: &mut crate::store::packs::Writer<'_>,
        list: &[(u32, Name)],
    ) -> Result<Option<(u32, u64, u32)>, StoreError> {
        let len: u64 = list.iter().map(|c| u64::from(c.0)).sum();
        let Some(len32) = u32::try_from(len)
            .ok()
            .filter(|l| *l > 0 && *l <= data::EXTENT_MAX)
        else {
            return Ok(None);
        };
        for (len, name) in list {
            let at = self.store.find_chunk(name)?;
            if at.is_none_or(|at| at.len != *len) {
                return Ok(None);
            }
        }
        let place = self.store.segments.allocate_void(len)?;
        let mut off = place.offset;
        for (len, name) in list {
            let entry = Entry {
                len: *len,
                packed: true,
                name: *name,
            };
            w.entry(place.segment, off, entry);
            off += u64::from(*len);
        }
        Ok(Some((place.segment, place.offset, len32)))
    }

    fn batch(
        &self,
        items: &[Item],
        placed: &mut impl Iterator<Item = (u64, u64, Extent)>,
        reached: Option<Reached>,
    ) -> Result<(), TransferError> {
        let err = |e: fs::FsError| TransferError::from(unwrap_fs(e));
        let mut t = self.store.begin(&self.hidden)?;
        let hash_key = self.store.hash_key();
        for i in items {
            match i {
                Item::Put(k, v) => {
                    check_record(k, Some(v))?;
                    t.put(k, v).map_err(err)?;
                }
                Item::Delete(k) => {
                    check_record(k, None)?;
                    t.del(k).map_err(err)?;
                }
                Item::PutName(dir, name, v) => {
                    check_name(*dir, name)?;
                    if v.len() != 9 {
                        return Err(damaged("a name makes no sense"));
                    }
                    let k = key::dirent(*dir, key::name_hash(&hash_key, name), name);
                    t.put(&k, v).map_err(err)?;
                }
                Item::DeleteName(dir, name) => {
                    check_name(*dir, name)?;
                    let k = key::dirent(*dir, key::name_hash(&hash_key, name), name);
                    t.del(&k).map_err(err)?;
                }
                Item::Unmap(ino, at, len) => {
                    let to = at.saturating_add(*len);
                    check_range(*ino, to)?;
                    while data::unmap(&mut t, *ino, *at, to, 1024).map_err(err)?.1 {}
                }
                // Its chunk is in a pack by now.
                Item::Base(..) => {}
                Item::Map(ino, at, _) => {
                    let Some((_, _, e)) = placed.next() else {
                        return Err(damaged("a range makes no sense"));
                    };
                    let to = at.saturating_add(u64::from(e.len));
                    check_range(*ino, to)?;
                    while data::unmap(&mut t, *ino, *at, to, 1024).map_err(err)?.1 {}
                    let e = Extent {
                        birth: t.generation(),
                        ..e
                    };
                    t.put(&key::extent(*ino, *at), &e.encode()).map_err(err)?;
                }
            }
        }
        if let Some(reached) = reached {
            let state = State {
                base: self.begin.base.clone(),
                reached,
            };
            let state = serde_json::to_vec(&state).unwrap_or_default();
            t.put(&key::kind(0, REACHED), &state).map_err(err)?;
        }
        t.commit();
        Ok(())
    }

    /// Checks the tree, and makes it a checkpoint.
    fn publish(self) -> Result<Received, TransferError> {
        let store = self.store;
        let mut t = store.begin(&self.hidden)?;
        t.del(&key::kind(0, REACHED)).map_err(unwrap_fs)?;
        t.commit();
        let root = store.pin_head(&self.hidden)?;
        let next_ino = self.begin.next_ino;
        let checked = fs::check::check(
            &mut QuietKv::new(store, root),
            next_ino,
            &mut |e: &Extent| store.has_bytes(e),
        );
        store.unpin_root(root);
        let checked = checked.map_err(unwrap_fs)?;
        if let Some(p) = checked.problems.first() {
            let what = format!("its tree makes no sense: {p}");
            self.forget()?;
            return Err(damaged(what));
        }
        let (begin, name, hidden) = (self.begin, self.name.clone(), self.hidden);
        let (id, seq) = store.change(
            |c| {
                let op = CatalogOp::Receive {
                    hidden,
                    id: c.next_checkpoint,
                    name: self.name.clone(),
                    head: begin.head,
                    tags: begin.tags,
                    created_us: begin.created_us,
                    source: begin.source,
                    next_ino,
                };
                Ok((op, c.next_checkpoint))
            },
            |_, _| (),
        )?;
        store.flush(seq)?;
        Ok(Received {
            name,
            id,
            new_chunks: self.new_chunks,
            new_bytes: self.new_bytes,
        })
    }
}

fn check_name(dir: u64, name: &[u8]) -> Result<(), TransferError> {
    let bad = dir == 0 || dir >= INO_END || fs::dir::check_name(name).is_err();
    if bad {
        return Err(damaged("a name that cannot be one"));
    }
    Ok(())
}

fn check_range(ino: u64, to: u64) -> Result<(), TransferError> {
    if ino == 0 || ino >= INO_END || to > fs::FILE_MAX {
        return Err(damaged("a range that cannot be one"));
    }
    Ok(())
}

/// Lets only records pass that a tree of files may have; what they say is checked with the whole tree.
fn check_record(k: &[u8], v: Option<&[u8]>) -> Result<(), TransferError> {
    let bad = || damaged("a record that cannot be one");
    let (ino, kind, _) = key::split(k).ok_or_else(bad)?;
    let fits = k.len() <= 280 && v.is_none_or(|v| v.len() <= 1000);
    let good = match kind {
        key::INODE => {
            ino > 0
                && ino < INO_END
                && key::inode_of_key(k).is_some()
                && v.is_none_or(|v| Inode::decode(v).is_some())
        }
        key::XATTR | key::SYMLINK => ino > 0 && ino < INO_END,
        key::ORPHAN => ino == 0 && key::orphan_ino(k).is_some(),
        _ => false,
    };
    if good && fits { Ok(()) } else { Err(bad()) }
}

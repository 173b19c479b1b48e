//! Reading and writing file contents.

use super::{MountFs, lock};
use crate::fs::{self, Ctx, Extent, FsError, attr, data, inode};
use crate::fuse::{Errno, Piece, Reply, WRITE_KILL_SUIDGID, step_aside};
use crate::store::StoreError;
use crate::store::segments::Place;

/// Block of the host, to which small overwrites are widened so that files do not fall into crumbs.
const BLOCK: u64 = 4096;
/// Appends shorter than this get room to grow.
const SMALL_APPEND: u64 = 128 << 10;
/// Room for growth at most.
const ROOM_MAX: u64 = 4 << 20;
/// Files with room kept at a time.
const TAILS_MAX: usize = 4096;
/// Reads and writes from this size on let another thread wait for requests meanwhile.
const SLOW_IO: usize = 128 << 10;
/// Reads from this size on, in pieces of this size in the mean, are answered from the segments' pages.
const SPLICE_MIN: u64 = 64 << 10;
/// Extents that one copy_file_range(2) shares at most; the caller goes on with the next.
const SHARE_MAX: usize = 1024;

/// Room behind the end of a file's last extent, in its segment: the next append goes there, in place. Nothing refers to
/// these bytes, so checkpoints and clones do not mind.
#[derive(Debug, Clone, Copy)]
pub(super) struct Tail {
    /// File offset that it continues.
    at: u64,
    /// Where that is.
    place: Place,
    /// Bytes left.
    room: u64,
    /// Of the segments; see [`crate::store::segments::Segments::epoch`].
    epoch: u64,
    /// View it belongs to.
    view: u32,
}

impl MountFs {
    pub(super) fn stripe(&self, ino: u64) -> std::sync::MutexGuard<'_, ()> {
        let n = self.stripes.len() as u64;
        let stripe = &self.stripes[usize::try_from(ino % n).unwrap_or(0)];
        match stripe.try_lock() {
            Ok(guard) => guard,
            // Somebody slow has it.
            Err(_) => {
                step_aside();
                lock(stripe)
            }
        }
    }

    pub(super) fn read_file(
        &self,
        nodeid: u64,
        offset: u64,
        size: u32,
        reply: &mut Reply,
    ) -> Result<(), Errno> {
        if size as usize >= SLOW_IO {
            step_aside();
        }
        let gate = self.gate_read();
        let (view, ino, inode, len, found) = self.read(nodeid, |t, view, ino| {
            let i = inode::load(t, ino)?;
            if !i.is_file() {
                return fs::fail(libc::EINVAL);
            }
            let len = u64::from(size).min(i.size.saturating_sub(offset));
            let found = data::list(t, ino, offset, offset.saturating_add(len), usize::MAX)?;
            Ok((std::sync::Arc::clone(view), ino, i, len, found))
        })?;
        if len < SPLICE_MIN || !self.splice(offset, len, &found, reply)? {
            let buf = reply.data_buf(usize::try_from(len).unwrap_or(0));
            self.fill(offset, buf, &found)?;
        }
        drop(gate);
        self.touch(&view, ino, &inode, fs::now());
        Ok(())
    }

    /// Answers a read of a range without holes from the segments themselves; false if it cannot. The gate is held until
    /// the kernel has the bytes.
    fn splice(
        &self,
        offset: u64,
        len: u64,
        found: &[data::Mapped],
        reply: &mut Reply,
    ) -> Result<bool, FsError> {
        if found.len() as u64 > len / SPLICE_MIN {
            return Ok(false);
        }
        let (mut files, mut places) = (Vec::new(), Vec::new());
        let mut done = offset;
        for m in found {
            let to = m.end().min(offset + len);
            if m.at > done || to <= done {
                return Ok(false);
            }
            let place = Place {
                segment: m.extent.seg,
                offset: m.extent.off + (done - m.at),
            };
            if self.store.is_packed(place, to - done) {
                return Ok(false);
            }
            files.push(self.store.segments.file(place.segment)?);
            places.push((place.offset, to - done));
            done = to;
        }
        if done != offset + len {
            return Ok(false);
        }
        let mut pieces = Vec::with_capacity(files.len());
        for (file, (offset, len)) in files.iter().zip(places) {
            let (Some(file), Ok(len)) = (file.host(), usize::try_from(len)) else {
                return Ok(false);
            };
            pieces.push(Piece { file, offset, len });
        }
        Ok(reply.send_from(&pieces))
    }

    fn gate_read(&self) -> std::sync::RwLockReadGuard<'_, ()> {
        let gate = &self.store.gate;
        match gate.try_read() {
            Ok(guard) => guard,
            Err(_) => {
                step_aside();
                gate.read()
                    .unwrap_or_else(std::sync::PoisonError::into_inner)
            }
        }
    }

    /// Fills a buffer that begins at file offset `offset`; holes become zeros. The gate is held.
    fn fill(&self, offset: u64, buf: &mut [u8], found: &[data::Mapped]) -> Result<(), FsError> {
        let at = |o: u64| usize::try_from(o - offset).unwrap_or(usize::MAX);
        let end = offset + buf.len() as u64;
        let mut done = offset;
        for m in found {
            let (from, to) = (m.at.max(offset), m.end().min(end));
            if from >= to {
                continue;
            }
            if from < done {
                // Only in a damaged tree.
                return fs::fail(libc::EIO);
            }
            buf[at(done)..at(from)].fill(0);
            let place = Place {
                segment: m.extent.seg,
                offset: m.extent.off + (from - m.at),
            };
            self.store.read_data(place, &mut buf[at(from)..at(to)])?;
            done = to;
        }
        buf[at(done)..].fill(0);
        Ok(())
    }

    pub(super) fn write_file(
        &self,
        nodeid: u64,
        offset: u64,
        bytes: &[u8],
        write_flags: u32,
        ctx: &Ctx,
    ) -> Result<u32, Errno> {
        let n = u32::try_from(bytes.len()).map_err(|_| Errno(libc::EINVAL))?;
        if self.read_only {
            return Err(Errno(libc::EROFS));
        }
        if n == 0 {
            return Ok(0);
        }
        if bytes.len() >= SLOW_IO {
            step_aside();
        }
        match self.try_write(nodeid, offset, bytes, write_flags, ctx) {
            Err(Errno(libc::ENOSPC)) => {
                // What was deleted comes free with a commit.
                step_aside();
                self.store.commit()?;
                self.try_write(nodeid, offset, bytes, write_flags, ctx)?;
            }
            other => other?,
        }
        Ok(n)
    }

    fn try_write(
        &self,
        nodeid: u64,
        offset: u64,
        bytes: &[u8],
        write_flags: u32,
        ctx: &Ctx,
    ) -> Result<(), Errno> {
        let (view, ino) = self.node(nodeid)?;
        if view.fixed().is_some() {
            return Err(Errno(libc::ESTALE));
        }
        // In this order: whoever holds the gate waits for no stripe, so a commit under a stripe can wait for the gate.
        let _stripe = self.stripe(ino);
        let _gate = self.gate_read();
        let len = bytes.len() as u64;
        if offset.checked_add(len).is_none_or(|e| e > fs::FILE_MAX) {
            return Err(Errno(libc::EFBIG));
        }
        let segments = &self.store.segments;
        let tail = lock(&self.tails).remove(&ino).filter(|t| {
            t.at == offset && t.room >= len && t.epoch == segments.epoch() && t.view == view.id
        });
        let widened;
        let (at, payload, place, tail) = if let Some(t) = tail {
            segments.write(t.place, bytes)?;
            (offset, bytes, t.place, advance(&t, len))
        } else {
            let w = self.widen(nodeid, offset, bytes)?;
            widened = w.bytes;
            let payload = widened.as_deref().unwrap_or(bytes);
            let (place, room) = self.place_for(payload.len() as u64, w.appends_to)?;
            segments.write(place, payload)?;
            let t = Tail {
                at: w.at,
                place,
                room: room.max(payload.len() as u64),
                epoch: segments.epoch(),
                view: view.id,
            };
            let rest = advance(&t, payload.len() as u64);
            (w.at, payload, place, rest)
        };
        let plen = u32::try_from(payload.len()).map_err(|_| Errno(libc::EINVAL))?;
        self.change_at_once(nodeid, |t, _, ino| {
            let mut i = inode::load(t, ino)?;
            if !i.is_file() {
                return fs::fail(libc::EINVAL);
            }
            let extent = Extent {
                seg: place.segment,
                off: place.offset,
                len: plen,
                flags: 0,
                birth: fs::Kv::generation(t),
            };
            data::map(t, ino, &mut i, at, extent)?;
            attr::drop_capability(t, ino, &mut i)?;
            if write_flags & WRITE_KILL_SUIDGID != 0 {
                attr::kill_suidgid(&mut i);
            }
            self.stamp(&mut i, ctx.now);
            inode::save(t, ino, &i)?;
            t.note_data(place.segment, place.offset, plen);
            Ok(())
        })?;
        if let Some(t) = tail {
            let mut tails = lock(&self.tails);
            if tails.len() >= TAILS_MAX {
                tails.clear();
            }
            tails.insert(ino, t);
        }
        Ok(())
    }

    /// Room in a segment: exact, or with space behind for a file that is being appended to.
    fn place_for(&self, len: u64, appends_to: Option<u64>) -> Result<(Place, u64), StoreError> {
        let room = match appends_to {
            Some(size) if size > 0 && len < SMALL_APPEND => len
                .max(size.clamp(64 << 10, ROOM_MAX))
                .next_multiple_of(BLOCK),
            _ => len,
        };
        let place = self.store.segments.allocate(room, room > len)?;
        Ok((place, room))
    }

    /// Widens a write to whole blocks where they hold other bytes of the file. The stripe is held.
    fn widen(&self, nodeid: u64, offset: u64, bytes: &[u8]) -> Result<Widened, Errno> {
        let end = offset + bytes.len() as u64;
        let found = self.read(nodeid, |t, _, ino| {
            let i = inode::load(t, ino)?;
            let appends_to =
                (offset >= i.size && offset.saturating_sub(i.size) < BLOCK).then_some(i.size);
            let start = if !offset.is_multiple_of(BLOCK) && offset / BLOCK * BLOCK < i.size {
                offset / BLOCK * BLOCK
            } else {
                offset
            };
            let stop = if !end.is_multiple_of(BLOCK) && end < i.size {
                end.next_multiple_of(BLOCK).min(i.size)
            } else {
                end
            };
            if start == offset && stop == end || i.mapped == 0 {
                return Ok((offset, end, Vec::new(), appends_to));
            }
            let found = data::list(t, ino, start, stop, usize::MAX)?;
            Ok((start, stop, found, appends_to))
        })?;
        let (start, stop, extents, appends_to) = found;
        if start == offset && stop == end {
            return Ok(Widened {
                at: offset,
                bytes: None,
                appends_to,
            });
        }
        let mut buf = vec![0; usize::try_from(stop - start).unwrap_or(0)];
        self.fill(start, &mut buf, &extents)?;
        let skip = usize::try_from(offset - start).unwrap_or(0);
        buf[skip..skip + bytes.len()].copy_from_slice(bytes);
        Ok(Widened {
            at: start,
            bytes: Some(buf),
            appends_to,
        })
    }

    /// Forgets the room behind a file whose contents change in another way than by a write. The stripe is held.
    pub(super) fn drop_tail(&self, ino: u64) {
        lock(&self.tails).remove(&ino);
    }

    pub(super) fn copy_range(
        &self,
        src: (u64, u64),
        dst: (u64, u64),
        len: u64,
        ctx: &Ctx,
    ) -> Result<u32, Errno> {
        // A reply can tell 32 bits; the caller goes on from there.
        let len = len.min(1 << 30);
        // From a state that was left by a rollback there is nothing to share: the kernel then copies.
        let (source, ino_in) = self.node(src.0)?;
        let (target, ino_out) = self.node(dst.0)?;
        if source.id != target.id {
            return Err(Errno(libc::EXDEV));
        }
        let _stripe = self.stripe(ino_out);
        self.drop_tail(ino_out);
        // The source's bytes become shared; its room must not be joined to them.
        self.drop_tail(ino_in);
        self.change(src.0, false, |t, view, ino| {
            let out = self.same_view(view, dst.0)?;
            let i = inode::load(t, ino)?;
            if !i.is_file() {
                return fs::fail(libc::EINVAL);
            }
            let mut n = len.min(i.size.saturating_sub(src.1));
            if n < len && self.has_writeback() {
                // The kernel knows more of the file than has come: it asks for no more than there is. Then it copies.
                return fs::fail(libc::EXDEV);
            }
            let found = data::list(t, ino, src.1, src.1.saturating_add(n), SHARE_MAX)?;
            if found.len() == SHARE_MAX
                && let Some(last) = found.last()
            {
                n = n.min(last.end() - src.1);
            }
            if n == 0 {
                return Ok(0);
            }
            let mut o = inode::load(t, out)?;
            if !o.is_file() {
                return fs::fail(libc::EINVAL);
            }
            if dst.1.checked_add(n).is_none() {
                return fs::fail(libc::EFBIG);
            }
            if ino == out && src.1 < dst.1 + n && dst.1 < src.1 + n {
                return fs::fail(libc::EINVAL);
            }
            data::share(t, (ino, src.1), (out, dst.1), n, &mut o)?;
            // The kernel has asked for set-id bits to be cleared before, if the caller may not keep them.
            attr::drop_capability(t, out, &mut o)?;
            self.stamp(&mut o, ctx.now);
            inode::save(t, out, &o)?;
            u32::try_from(n).map_err(|_| FsError::Errno(libc::EINVAL))
        })
    }

    pub(super) fn fallocate(
        &self,
        nodeid: u64,
        offset: u64,
        length: u64,
        mode: u32,
        ctx: &Ctx,
    ) -> Result<(), Errno> {
        const KEEP_SIZE: u32 = 1;
        const PUNCH: u32 = 2;
        const COLLAPSE: u32 = 8;
        const ZERO: u32 = 16;
        const INSERT: u32 = 32;
        let Some(end) = offset.checked_add(length).filter(|e| *e <= fs::FILE_MAX) else {
            return Err(Errno(libc::EFBIG));
        };
        if mode & !(KEEP_SIZE | PUNCH | COLLAPSE | ZERO | INSERT) != 0 {
            return Err(Errno(libc::EOPNOTSUPP));
        }
        if mode & (PUNCH | COLLAPSE | INSERT | ZERO) == 0
            && length > self.store.space()?.avail_bytes
        {
            return Err(Errno(libc::ENOSPC));
        }
        let (_, ino) = self.node(nodeid)?;
        let _stripe = self.stripe(ino);
        self.drop_tail(ino);
        self.change(nodeid, mode & PUNCH != 0, |t, _, ino| {
            let mut i = inode::load(t, ino)?;
            if !i.is_file() {
                return fs::fail(libc::ENODEV);
            }
            if mode & (COLLAPSE | INSERT) != 0 {
                data::shift(t, ino, &mut i, offset, length, mode & COLLAPSE != 0)?;
            } else if mode & (PUNCH | ZERO) != 0 {
                let upto = end.min(i.size.max(offset));
                data::punch(t, ino, &mut i, offset, upto)?;
            }
            if mode & (KEEP_SIZE | PUNCH | COLLAPSE | INSERT) == 0 {
                i.size = i.size.max(end);
            }
            attr::drop_capability(t, ino, &mut i)?;
            self.stamp(&mut i, ctx.now);
            inode::save(t, ino, &i)
        })
    }
}

/// A write, widened.
struct Widened {
    at: u64,
    /// The bytes, if there are more than the caller's.
    bytes: Option<Vec<u8>>,
    /// The size of the file that it continues, if it does.
    appends_to: Option<u64>,
}

/// The room that is left after `len` bytes.
fn advance(t: &Tail, len: u64) -> Option<Tail> {
    let room = t.room.checked_sub(len).filter(|r| *r > 0)?;
    Some(Tail {
        at: t.at + len,
        place: Place {
            segment: t.place.segment,
            offset: t.place.offset + len,
        },
        room,
        ..*t
    })
}

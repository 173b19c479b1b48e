//! Replies, built in a buffer that each worker keeps.

use std::time::Duration;

use super::abi::OUT_HEADER;
use super::splice::{Piece, Way};

/// Attributes of a node.
#[derive(Debug, Clone, Copy, Default)]
#[allow(missing_docs, reason = "as in stat(2)")]
pub struct Attr {
    pub ino: u64,
    pub size: u64,
    /// Units of 512 bytes.
    pub blocks: u64,
    pub atime: (i64, u32),
    pub mtime: (i64, u32),
    pub ctime: (i64, u32),
    pub btime: (i64, u32),
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    /// In the kernel's 32-bit form.
    pub rdev: u32,
}

/// Block size that stat(2) tells.
const BLKSIZE: u32 = 4096;

/// A node as a lookup gives it.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    /// Node.
    pub nodeid: u64,
    /// Attributes.
    pub attr: Attr,
    /// How long the name may be cached.
    pub entry_valid: Duration,
    /// How long the attributes may be cached.
    pub attr_valid: Duration,
}

/// The header of a message of `len` bytes in all.
fn header(len: usize, error: i32, unique: u64) -> [u8; OUT_HEADER] {
    let mut h = [0; OUT_HEADER];
    h[..4].copy_from_slice(&u32::try_from(len).unwrap_or(0).to_le_bytes());
    h[4..8].copy_from_slice(&(-error).to_le_bytes());
    h[8..].copy_from_slice(&unique.to_le_bytes());
    h
}

/// What statfs(2) tells.
#[derive(Debug, Clone, Copy, Default)]
#[allow(missing_docs, reason = "as in statvfs(3), in 4 KiB blocks")]
pub struct Statfs {
    pub blocks: u64,
    pub bfree: u64,
    pub bavail: u64,
    pub files: u64,
    pub ffree: u64,
}

/// A reply under construction.
#[derive(Debug)]
pub struct Reply {
    buf: Vec<u8>,
    /// Data with room for a header, as long as the longest so far.
    data: Vec<u8>,
    /// Bytes of data; if there are any, they are the reply.
    data_len: Option<usize>,
    way: Option<Way>,
    unique: u64,
    sent: bool,
}

impl Reply {
    /// An empty reply with room for `capacity` bytes.
    pub fn new(capacity: usize) -> Self {
        let mut buf = Vec::with_capacity(capacity + OUT_HEADER);
        buf.resize(OUT_HEADER, 0);
        Self {
            buf,
            data: Vec::new(),
            data_len: None,
            way: None,
            unique: 0,
            sent: false,
        }
    }

    /// Replies that can be sent from files, see [`Reply::send_from`].
    pub(super) fn set_way(&mut self, way: Way) {
        self.way = Some(way);
    }

    /// Begins the reply to a request.
    pub(super) fn begin(&mut self, unique: u64) {
        self.clear();
        self.unique = unique;
        self.sent = false;
    }

    /// True if the request has been answered.
    pub(super) fn was_sent(&self) -> bool {
        self.sent
    }

    /// Answers at once with these pieces of files. False if it cannot: then the reply is made and sent as usual.
    pub fn send_from(&mut self, pieces: &[Piece<'_>]) -> bool {
        let Some(way) = self.way.as_mut().filter(|w| w.is_of_use()) else {
            return false;
        };
        let len: usize = pieces.iter().map(|p| p.len).sum();
        let header = header(OUT_HEADER + len, 0, self.unique);
        self.sent = match way.send(&header, pieces) {
            Ok(()) => true,
            Err(e) => {
                tracing::debug!(error = %e, "a reply could not be spliced");
                false
            }
        };
        self.sent
    }

    /// What has been put in so far.
    pub fn payload(&self) -> &[u8] {
        match self.data_len {
            Some(len) => &self.data[OUT_HEADER..OUT_HEADER + len],
            None => &self.buf[OUT_HEADER..],
        }
    }

    /// Takes everything out.
    pub fn clear(&mut self) {
        self.buf.truncate(OUT_HEADER);
        self.data_len = None;
    }

    /// The whole message, with its header filled in.
    pub(super) fn finish(&mut self, unique: u64, error: i32) -> &[u8] {
        if error != 0 {
            self.clear();
        }
        let message = match self.data_len {
            Some(len) => &mut self.data[..OUT_HEADER + len],
            None => &mut self.buf[..],
        };
        let len = message.len();
        message[..OUT_HEADER].copy_from_slice(&header(len, error, unique));
        message
    }

    fn u32(&mut self, v: u32) {
        self.buf.extend_from_slice(&v.to_le_bytes());
    }

    fn u64(&mut self, v: u64) {
        self.buf.extend_from_slice(&v.to_le_bytes());
    }

    fn put_attr(&mut self, a: &Attr) {
        for v in [a.ino, a.size, a.blocks] {
            self.u64(v);
        }
        for t in [a.atime, a.mtime, a.ctime] {
            self.u64(t.0.cast_unsigned());
        }
        for v in [a.atime.1, a.mtime.1, a.ctime.1] {
            self.u32(v);
        }
        for v in [a.mode, a.nlink, a.uid, a.gid, a.rdev, BLKSIZE, 0] {
            self.u32(v);
        }
    }

    /// A node.
    pub fn entry(&mut self, e: &Entry) {
        self.u64(e.nodeid);
        self.u64(0);
        self.u64(e.entry_valid.as_secs());
        self.u64(e.attr_valid.as_secs());
        self.u32(e.entry_valid.subsec_nanos());
        self.u32(e.attr_valid.subsec_nanos());
        self.put_attr(&e.attr);
    }

    /// There is no such name, and that may be cached.
    pub fn negative(&mut self, valid: Duration) {
        self.entry(&Entry {
            nodeid: 0,
            attr: Attr::default(),
            entry_valid: valid,
            attr_valid: Duration::ZERO,
        });
    }

    /// Attributes.
    pub fn attr(&mut self, a: &Attr, valid: Duration) {
        self.u64(valid.as_secs());
        self.u32(valid.subsec_nanos());
        self.u32(0);
        self.put_attr(a);
    }

    /// Attributes with birth time.
    pub fn statx(&mut self, a: &Attr, valid: Duration) {
        self.u64(valid.as_secs());
        self.u32(valid.subsec_nanos());
        self.u32(0);
        self.u64(0);
        self.u64(0);
        // STATX_BASIC_STATS | STATX_BTIME
        self.u32(0xfff);
        self.u32(BLKSIZE);
        self.u64(0);
        for v in [a.nlink, a.uid, a.gid, a.mode & 0xffff] {
            self.u32(v);
        }
        for v in [a.ino, a.size, a.blocks, 0] {
            self.u64(v);
        }
        for t in [a.atime, a.btime, a.ctime, a.mtime] {
            self.u64(t.0.cast_unsigned());
            self.u32(t.1);
            self.u32(0);
        }
        // The kernel's 32-bit form: minor 8 bits, major 12, minor 12.
        self.u32(a.rdev >> 8 & 0xfff);
        self.u32(a.rdev & 0xff | a.rdev >> 12 & 0xfff00);
        self.u64(0);
        self.buf.resize(self.buf.len() + 14 * 8, 0);
    }

    /// Plain bytes.
    pub fn bytes(&mut self, b: &[u8]) {
        self.buf.extend_from_slice(b);
    }

    /// Room for `len` bytes of data, which are the whole reply; the caller fills all of it, as an earlier reply's are in it.
    pub fn data_buf(&mut self, len: usize) -> &mut [u8] {
        if self.data.len() < OUT_HEADER + len {
            self.data.resize(OUT_HEADER + len, 0);
        }
        self.data_len = Some(len);
        &mut self.data[OUT_HEADER..OUT_HEADER + len]
    }

    /// Cuts what was put in to its first `len` bytes.
    pub fn set_len(&mut self, len: usize) {
        self.buf.truncate(OUT_HEADER + len);
    }

    /// An open file.
    pub fn open(&mut self, fh: u64, flags: u32) {
        self.u64(fh);
        self.u32(flags);
        self.u32(0);
    }

    /// A file that was made and opened.
    pub fn created(&mut self, e: &Entry, fh: u64, flags: u32) {
        self.entry(e);
        self.open(fh, flags);
    }

    /// Bytes written or copied.
    pub fn written(&mut self, n: u32) {
        self.u32(n);
        self.u32(0);
    }

    /// The size of an attribute or of the list of their names.
    pub fn xattr_size(&mut self, n: u32) {
        self.u32(n);
        self.u32(0);
    }

    /// An offset.
    pub fn lseek(&mut self, at: u64) {
        self.u64(at);
    }

    /// Space.
    pub fn statfs(&mut self, s: &Statfs) {
        for v in [s.blocks, s.bfree, s.bavail, s.files, s.ffree] {
            self.u64(v);
        }
        for v in [4096, 255, 4096, 0, 0, 0, 0, 0, 0, 0] {
            self.u32(v);
        }
    }

    /// A directory listing of at most `size` bytes.
    pub fn dir(&mut self, size: u32) -> DirBuf<'_> {
        let end = self.buf.len() + size as usize;
        DirBuf { reply: self, end }
    }
}

/// A listing under construction.
#[derive(Debug)]
pub struct DirBuf<'a> {
    reply: &'a mut Reply,
    end: usize,
}

/// Bytes of a dirent before its name.
const DIRENT: usize = 24;
/// Bytes of an entry before its dirent.
const ENTRY: usize = 128;

impl DirBuf<'_> {
    fn fits(&self, extra: usize, name: &[u8]) -> bool {
        let need = extra + (DIRENT + name.len()).next_multiple_of(8);
        self.reply.buf.len() + need <= self.end
    }

    fn dirent(&mut self, ino: u64, next_offset: u64, dtype: u8, name: &[u8]) {
        let start = self.reply.buf.len();
        self.reply.u64(ino);
        self.reply.u64(next_offset);
        self.reply.u32(u32::try_from(name.len()).unwrap_or(0));
        self.reply.u32(u32::from(dtype));
        self.reply.bytes(name);
        let len = (self.reply.buf.len() - start).next_multiple_of(8);
        self.reply.buf.resize(start + len, 0);
    }

    /// Adds a name; false when it is full.
    pub fn add(&mut self, ino: u64, next_offset: u64, dtype: u8, name: &[u8]) -> bool {
        if !self.fits(0, name) {
            return false;
        }
        self.dirent(ino, next_offset, dtype, name);
        true
    }

    /// True if a name with attributes fits.
    pub fn has_room_plus(&self, name: &[u8]) -> bool {
        self.fits(ENTRY, name)
    }

    /// Adds a name with its attributes; false when it is full. A node id of 0 gives the name only.
    pub fn add_plus(&mut self, e: &Entry, next_offset: u64, dtype: u8, name: &[u8]) -> bool {
        if !self.has_room_plus(name) {
            return false;
        }
        self.reply.entry(e);
        self.dirent(e.attr.ino, next_offset, dtype, name);
        true
    }
}

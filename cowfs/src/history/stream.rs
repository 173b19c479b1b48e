//! The stream that carries a checkpoint from one store to another. Integers are little-endian.
//!
//! It begins with the magic `CWSTRM\0` and a version, 1 or 2. Only a difference is of version 2, which knows one item more.
//! Records follow:
//!
//! | size | field |
//! |---|---|
//! | 1 | kind |
//! | 3 | 0 |
//! | 4 | bytes of the body, at most 4 MiB |
//! | | body |
//! | 16 | first 16 bytes of BLAKE3 of the sum before (zeros at first), kind to length, and body |
//!
//! | kind | body |
//! |---|---|
//! | 1 begin | JSON of [`Begin`]; the first record |
//! | 2 chunks | a frame, as in packs |
//! | 3 items | [`Item`]s, then the place reached: inode u64, offset u64 |
//! | 4 end | items u64, chunks u64; the last record |
//!
//! The sums are a chain, so a record that was changed, lost, doubled or moved is noticed when it comes.

use std::io::{Read, Write};

use serde::{Deserialize, Serialize};

use crate::store::Source;
use crate::store::packs::records::{CHUNK_MAX, Name};

const MAGIC: &[u8; 7] = b"CWSTRM\0";
/// The newest version that this build reads and writes.
pub const VERSION: u8 = 2;
/// Version of what needs nothing newer.
pub const PLAIN: u8 = 1;
/// Bytes of a record's body at most.
pub const BODY_MAX: usize = 4 << 20;

/// What can be wrong with a stream.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The other end, the file or the network failed.
    #[error("the stream: {doing} failed")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It ended too early.
    #[error("the stream was cut off")]
    CutOff,
    /// It is none, or was damaged on the way.
    #[error("the stream is damaged: {0}")]
    Damaged(String),
    /// Made by a newer cowfs.
    #[error("the stream has version {0}, this cowfs reads up to {VERSION}; use a newer cowfs")]
    Newer(u8),
}

/// A place in a tree, up to which a stream was received: all of the inodes before, and of this one all but contents from
/// the offset on.
pub type Reached = (u64, u64);

/// What a stream is about.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Begin {
    /// Where the checkpoint was taken.
    pub source: Source,
    /// Its name.
    pub name: String,
    /// Its head.
    pub head: String,
    /// Its tags.
    pub tags: std::collections::BTreeMap<String, String>,
    /// When it was taken, microseconds since 1970.
    pub created_us: i64,
    /// Next inode number.
    pub next_ino: u64,
    /// Checkpoint that it is the difference to.
    pub base: Option<Source>,
    /// Name of that, for people.
    pub base_name: Option<String>,
    /// Where it goes on.
    pub resume: Option<Reached>,
}

/// A change of the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// Set a record that has the same key everywhere.
    Put(Vec<u8>, Vec<u8>),
    /// Remove one.
    Delete(Vec<u8>),
    /// Set a name: directory, name, value.
    PutName(u64, Vec<u8>, Vec<u8>),
    /// Remove a name.
    DeleteName(u64, Vec<u8>),
    /// A range of a file becomes a hole: inode, offset, bytes.
    Unmap(u64, u64, u64),
    /// A range of a file gets contents: inode, offset, chunks one behind the other.
    Map(u64, u64, Vec<(u32, Name)>),
    /// A chunk is in a file of the base: inode there, offset, bytes, name. Since version 2.
    Base(u64, u64, u32, Name),
}

/// A record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// What it is about.
    Begin(Box<Begin>),
    /// A frame of chunks.
    Chunks(Vec<u8>),
    /// Changes, and the place reached behind them.
    Items(Vec<Item>, Reached),
    /// Numbers of items and chunks.
    End(u64, u64),
}

fn put_bytes(out: &mut Vec<u8>, b: &[u8]) {
    let len = u16::try_from(b.len()).unwrap_or(u16::MAX);
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(b);
}

impl Item {
    /// The inode that it is of; of a chunk of the base the inode there.
    pub fn ino(&self) -> u64 {
        match self {
            Item::Put(k, _) | Item::Delete(k) => crate::fs::key::split(k).map_or(0, |k| k.0),
            Item::PutName(ino, ..)
            | Item::DeleteName(ino, _)
            | Item::Unmap(ino, ..)
            | Item::Map(ino, ..)
            | Item::Base(ino, ..) => *ino,
        }
    }

    /// Adds its bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let num = |out: &mut Vec<u8>, n: u64| out.extend_from_slice(&n.to_le_bytes());
        match self {
            Item::Put(k, v) => {
                out.push(1);
                put_bytes(out, k);
                put_bytes(out, v);
            }
            Item::Delete(k) => {
                out.push(2);
                put_bytes(out, k);
            }
            Item::PutName(dir, name, v) => {
                out.push(3);
                num(out, *dir);
                put_bytes(out, name);
                put_bytes(out, v);
            }
            Item::DeleteName(dir, name) => {
                out.push(4);
                num(out, *dir);
                put_bytes(out, name);
            }
            Item::Unmap(ino, at, len) => {
                out.push(5);
                for n in [ino, at, len] {
                    num(out, *n);
                }
            }
            Item::Map(ino, at, chunks) => {
                out.push(6);
                num(out, *ino);
                num(out, *at);
                num(out, chunks.len() as u64);
                for (len, name) in chunks {
                    out.extend_from_slice(&len.to_le_bytes());
                    out.extend_from_slice(name);
                }
            }
            Item::Base(ino, at, len, name) => {
                out.push(7);
                num(out, *ino);
                num(out, *at);
                out.extend_from_slice(&len.to_le_bytes());
                out.extend_from_slice(name);
            }
        }
    }
}

/// Takes pieces off the front of a body.
struct Body<'a>(&'a [u8]);

impl<'a> Body<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (a, b) = self.0.split_at_checked(n)?;
        self.0 = b;
        Some(a)
    }

    fn u16(&mut self) -> Option<u16> {
        Some(u16::from_le_bytes(self.take(2)?.try_into().ok()?))
    }

    fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }

    fn bytes(&mut self) -> Option<Vec<u8>> {
        let n = self.u16()?;
        Some(self.take(usize::from(n))?.to_vec())
    }

    fn item(&mut self, version: u8) -> Option<Item> {
        Some(match self.take(1)?[0] {
            1 => Item::Put(self.bytes()?, self.bytes()?),
            2 => Item::Delete(self.bytes()?),
            3 => Item::PutName(self.u64()?, self.bytes()?, self.bytes()?),
            4 => Item::DeleteName(self.u64()?, self.bytes()?),
            5 => Item::Unmap(self.u64()?, self.u64()?, self.u64()?),
            6 => {
                let (ino, at, n) = (self.u64()?, self.u64()?, self.u64()?);
                let mut chunks = Vec::new();
                for _ in 0..n {
                    let len = self.u32()?;
                    let name: Name = self.take(32)?.try_into().ok()?;
                    if len == 0 || len > CHUNK_MAX {
                        return None;
                    }
                    chunks.push((len, name));
                }
                Item::Map(ino, at, chunks)
            }
            7 if version >= 2 => {
                let (ino, at, len) = (self.u64()?, self.u64()?, self.u32()?);
                if len == 0 || len > CHUNK_MAX {
                    return None;
                }
                Item::Base(ino, at, len, self.take(32)?.try_into().ok()?)
            }
            _ => return None,
        })
    }
}

impl Record {
    fn encode(&self) -> (u8, Vec<u8>) {
        let mut body = Vec::new();
        let kind = match self {
            Record::Begin(b) => {
                body = serde_json::to_vec(b).unwrap_or_default();
                1
            }
            Record::Chunks(frame) => {
                body.extend_from_slice(frame);
                2
            }
            Record::Items(items, reached) => {
                for i in items {
                    i.encode(&mut body);
                }
                body.extend_from_slice(&reached.0.to_le_bytes());
                body.extend_from_slice(&reached.1.to_le_bytes());
                3
            }
            Record::End(items, chunks) => {
                body.extend_from_slice(&items.to_le_bytes());
                body.extend_from_slice(&chunks.to_le_bytes());
                4
            }
        };
        (kind, body)
    }

    fn decode(kind: u8, body: Vec<u8>, version: u8) -> Result<Self, StreamError> {
        let nonsense = || StreamError::Damaged(format!("a record of kind {kind} makes no sense"));
        match kind {
            1 => serde_json::from_slice(&body)
                .map(Record::Begin)
                .map_err(|e| StreamError::Damaged(format!("its beginning: {e}"))),
            2 => Ok(Record::Chunks(body)),
            3 => {
                let split = body.len().checked_sub(16).ok_or_else(nonsense)?;
                let mut rest = Body(&body[..split]);
                let mut items = Vec::new();
                while !rest.0.is_empty() {
                    items.push(rest.item(version).ok_or_else(nonsense)?);
                }
                let mut end = Body(&body[split..]);
                let reached = end.u64().zip(end.u64()).ok_or_else(nonsense)?;
                Ok(Record::Items(items, reached))
            }
            4 if body.len() == 16 => {
                let mut b = Body(&body);
                let (items, chunks) = b.u64().zip(b.u64()).ok_or_else(nonsense)?;
                Ok(Record::End(items, chunks))
            }
            _ => Err(nonsense()),
        }
    }
}

fn chain(before: &[u8; 16], head: &[u8; 8], body: &[u8]) -> [u8; 16] {
    let mut h = blake3::Hasher::new();
    h.update(before);
    h.update(head);
    h.update(body);
    let mut out = [0; 16];
    out.copy_from_slice(&h.finalize().as_bytes()[..16]);
    out
}

/// Writes a stream.
#[derive(Debug)]
pub struct Writer<W> {
    to: W,
    sum: [u8; 16],
    /// Bytes written.
    pub bytes: u64,
}

impl<W: Write> Writer<W> {
    /// A stream on `to` of the oldest version; the magic is written.
    ///
    /// # Errors
    /// Its own.
    pub fn new(to: W) -> Result<Self, StreamError> {
        Self::of_version(to, PLAIN)
    }

    /// As [`Writer::new`], of another version.
    ///
    /// # Errors
    /// Its own.
    pub fn of_version(to: W, version: u8) -> Result<Self, StreamError> {
        let mut w = Self {
            to,
            sum: [0; 16],
            bytes: 0,
        };
        w.raw(MAGIC)?;
        w.raw(&[version])?;
        Ok(w)
    }

    /// What it was written to.
    pub fn into_inner(self) -> W {
        self.to
    }

    fn raw(&mut self, b: &[u8]) -> Result<(), StreamError> {
        self.bytes += b.len() as u64;
        self.to.write_all(b).map_err(|source| StreamError::Io {
            doing: "writing",
            source,
        })
    }

    /// Writes a record.
    ///
    /// # Errors
    /// The other end's.
    pub fn write(&mut self, record: &Record) -> Result<(), StreamError> {
        let (kind, body) = record.encode();
        let len = u32::try_from(body.len()).ok();
        let len = len.filter(|_| body.len() <= BODY_MAX);
        let Some(len) = len else {
            return Err(StreamError::Damaged("a record grew too large".into()));
        };
        let mut head = [kind, 0, 0, 0, 0, 0, 0, 0];
        head[4..].copy_from_slice(&len.to_le_bytes());
        self.sum = chain(&self.sum, &head, &body);
        self.raw(&head)?;
        self.raw(&body)?;
        let sum = self.sum;
        self.raw(&sum)?;
        if matches!(record, Record::End(..)) {
            self.to.flush().map_err(|source| StreamError::Io {
                doing: "writing",
                source,
            })?;
        }
        Ok(())
    }
}

/// Reads a stream.
#[derive(Debug)]
pub struct Reader<R> {
    from: R,
    sum: [u8; 16],
    /// Its version.
    pub version: u8,
}

impl<R: Read> Reader<R> {
    /// A stream on `from`; the magic is read.
    ///
    /// # Errors
    /// No stream, a newer one.
    pub fn new(from: R) -> Result<Self, StreamError> {
        let mut r = Self {
            from,
            sum: [0; 16],
            version: PLAIN,
        };
        let mut magic = [0; 8];
        r.fill(&mut magic)?;
        if &magic[..7] != MAGIC {
            return Err(StreamError::Damaged(
                "it does not begin as one; 'cowfs send' makes them".into(),
            ));
        }
        match magic[7] {
            PLAIN..=VERSION => {
                r.version = magic[7];
                Ok(r)
            }
            0 => Err(StreamError::Damaged("it has version 0".into())),
            newer => Err(StreamError::Newer(newer)),
        }
    }

    fn fill(&mut self, buf: &mut [u8]) -> Result<(), StreamError> {
        self.from.read_exact(buf).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => StreamError::CutOff,
            _ => StreamError::Io {
                doing: "reading",
                source: e,
            },
        })
    }

    /// The next record. Behind [`Record::End`] there is none.
    ///
    /// # Errors
    /// Cut off, or damaged.
    pub fn read(&mut self) -> Result<Record, StreamError> {
        let mut head = [0; 8];
        self.fill(&mut head)?;
        let len = u32::from_le_bytes([head[4], head[5], head[6], head[7]]) as usize;
        if len > BODY_MAX || head[1..4] != [0; 3] {
            return Err(StreamError::Damaged("a record of impossible size".into()));
        }
        let mut body = vec![0; len];
        self.fill(&mut body)?;
        let mut sum = [0; 16];
        self.fill(&mut sum)?;
        if chain(&self.sum, &head, &body) != sum {
            return Err(StreamError::Damaged("a record has a wrong checksum".into()));
        }
        self.sum = sum;
        Record::decode(head[0], body, self.version)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records() -> Vec<Record> {
        let source = Source {
            store: "00".repeat(16),
            id: 3,
        };
        let begin = Begin {
            source: source.clone(),
            name: "n".into(),
            head: "main".into(),
            tags: [("a".to_owned(), "b".to_owned())].into(),
            created_us: 5,
            next_ino: 9,
            base: Some(source),
            base_name: None,
            resume: Some((4, 5)),
        };
        let items = vec![
            Item::Put(b"key".to_vec(), b"value".to_vec()),
            Item::Delete(b"other".to_vec()),
            Item::PutName(1, b"name".to_vec(), vec![0; 9]),
            Item::DeleteName(1, b"old".to_vec()),
            Item::Unmap(7, 0, 4096),
            Item::Base(3, 8192, 20, [2; 32]),
            Item::Map(7, 0, vec![(10, [1; 32]), (20, [2; 32])]),
        ];
        vec![
            Record::Begin(Box::new(begin)),
            Record::Chunks(vec![9; 100]),
            Record::Items(items, (7, u64::MAX)),
            Record::End(6, 2),
        ]
    }

    fn encoded() -> Vec<u8> {
        let mut out = Vec::new();
        let mut w = Writer::of_version(&mut out, VERSION).expect("memory");
        for r in records() {
            w.write(&r).expect("memory");
        }
        out
    }

    fn read_all(mut bytes: &[u8]) -> Result<Vec<Record>, StreamError> {
        let mut r = Reader::new(&mut bytes)?;
        let mut out = Vec::new();
        loop {
            out.push(r.read()?);
            if matches!(out.last(), Some(Record::End(..))) {
                return Ok(out);
            }
        }
    }

    #[test]
    fn comes_back() {
        assert_eq!(read_all(&encoded()).expect("whole"), records());
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        let good = encoded();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(read_all(&bad).is_err(), "bit {bit}");
        }
        for len in 0..good.len() {
            let got = read_all(&good[..len]);
            assert!(matches!(got, Err(StreamError::CutOff)), "{len}");
        }
        let mut older = good.clone();
        older[7] = PLAIN;
        let e = read_all(&older).expect_err("an item of a newer version");
        assert!(e.to_string().contains("makes no sense"), "{e}");
        let mut newer = good;
        newer[7] = VERSION + 1;
        let e = read_all(&newer).expect_err("newer").to_string();
        assert!(e.contains("use a newer cowfs"), "{e}");
    }
}

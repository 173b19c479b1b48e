//! What the fuzz targets share: a reader of inputs, a tree in memory, pages in memory, a store to damage, and snapshots.

pub mod json;
pub mod kv;
pub mod pages;
pub mod sample;
pub mod seeds;
pub mod snap;
pub mod store;

/// Takes an input apart. Numbers past its end are 0, byte strings are cut short.
#[derive(Debug, Clone, Copy)]
pub struct Bytes<'a>(pub &'a [u8]);

impl<'a> Bytes<'a> {
    /// The next byte, if there is one.
    pub fn next(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    /// The next byte.
    pub fn u8(&mut self) -> u8 {
        self.next().unwrap_or(0)
    }

    /// The next two bytes.
    pub fn u16(&mut self) -> u16 {
        u16::from(self.u8()) | u16::from(self.u8()) << 8
    }

    /// The next eight bytes.
    pub fn u64(&mut self) -> u64 {
        (0..8).fold(0, |v, i| v | u64::from(self.u8()) << (8 * i))
    }

    /// The next `n` bytes.
    pub fn take(&mut self, n: usize) -> &'a [u8] {
        let (head, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        head
    }

    /// A byte string behind its length in one byte.
    pub fn short(&mut self) -> &'a [u8] {
        let n = self.u8();
        self.take(usize::from(n))
    }

    /// A byte string behind its length in two bytes.
    pub fn long(&mut self) -> &'a [u8] {
        let n = self.u16();
        self.take(usize::from(n))
    }
}

/// A record of a filesystem's tree: inode number, kind, rest of the key, value. From kind 0x80 on the key is a directory
/// entry's with the right hash, which no mutation would hit.
pub fn record(b: &mut Bytes<'_>, hash_key: &[u8; 16]) -> (Vec<u8>, Vec<u8>) {
    let (ino, kind) = (u64::from(b.u8()), b.u8());
    let (rest, value) = (b.short(), b.short());
    let mut key = cowfs::fs::key::kind(ino, kind).to_vec();
    if kind >= 0x80 {
        let name = &rest[..rest.len().min(cowfs::fs::NAME_MAX)];
        let hash = cowfs::fs::key::name_hash(hash_key, name);
        key = cowfs::fs::key::dirent(ino, hash, name).to_vec();
    } else {
        key.extend_from_slice(rest);
    }
    (key, value.to_vec())
}

/// The bytes that [`record`] reads.
pub fn put_record(out: &mut Vec<u8>, ino: u8, kind: u8, rest: &[u8], value: &[u8]) {
    out.extend([ino, kind, rest.len() as u8]);
    out.extend_from_slice(rest);
    out.push(value.len() as u8);
    out.extend_from_slice(value);
}

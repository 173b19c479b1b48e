//! Checks one tree: that every record makes sense, names and inodes fit, links are counted right, and extents do not
//! overlap or lie outside of what the store has.

use std::ops::ControlFlow;

use rustc_hash::{FxHashMap, FxHashSet};

use super::data::{EXTENT_SHARED, Extent};
use super::inode::Inode;
use super::{FsError, Kv, ROOT_INO, key};

/// What a check found.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Report {
    /// Inodes seen.
    pub inodes: u64,
    /// Directory entries seen.
    pub entries: u64,
    /// Extents seen.
    pub extents: u64,
    /// Problems, each naming an inode and what is wrong with it (the first hundred).
    pub problems: Vec<String>,
    /// Problems in all.
    pub count: u64,
}

impl Report {
    /// Notes a problem.
    pub fn problem(&mut self, what: String) {
        self.count += 1;
        if self.problems.len() < 100 {
            self.problems.push(what);
        }
    }
}

#[derive(Default)]
struct Seen {
    nlink: u32,
    names: u32,
    subdirs: u32,
    is_dir: bool,
    dtype: u8,
    /// Parent that a directory's own record says.
    parent: u64,
    /// Directory that has a name for it, and the type that the name says (of the last one).
    named_in: u64,
    claimed: u8,
    /// A name says another type than one before.
    mixed: bool,
    known: bool,
}

/// The file that records are being read of.
#[derive(Default)]
struct File {
    ino: u64,
    is_dir: bool,
    size: u64,
    mapped: u64,
    /// Bytes mapped so far.
    sum: u64,
    /// End of the last extent.
    end: u64,
}

impl File {
    fn settle(&self, r: &mut Report) {
        if self.mapped != self.sum {
            r.problem(format!(
                "inode {}: {} bytes are mapped, its record says {}",
                self.ino, self.sum, self.mapped
            ));
        }
        if self.end > self.size {
            r.problem(format!(
                "inode {}: bytes are mapped beyond its end",
                self.ino
            ));
        }
    }
}

/// A range of a segment that an inode maps.
struct Used {
    seg: u32,
    len: u32,
    off: u64,
    ino: u64,
    shared: bool,
}

/// Checks a tree. `in_store` tells whether an extent lies within the store's segments.
///
/// # Errors
/// The store's, when the tree cannot be read on.
pub fn check<K: Kv + ?Sized>(
    kv: &mut K,
    next_ino: u64,
    in_store: &mut dyn FnMut(&Extent) -> bool,
) -> Result<Report, FsError> {
    let hash_key = kv.hash_key();
    let mut c = Checker {
        r: Report::default(),
        seen: FxHashMap::default(),
        orphans: FxHashSet::default(),
        used: Vec::new(),
        file: File::default(),
        next_ino,
        hash_key,
    };
    kv.scan(&[], &[0xff; 9], &mut |k, v| {
        c.record(k, v, in_store);
        ControlFlow::Continue(())
    })?;
    c.file.settle(&mut c.r);
    c.links();
    c.loops();
    c.overlaps();
    Ok(c.r)
}

struct Checker {
    r: Report,
    seen: FxHashMap<u64, Seen>,
    orphans: FxHashSet<u64>,
    used: Vec<Used>,
    file: File,
    next_ino: u64,
    hash_key: [u8; 16],
}

impl Checker {
    fn record(&mut self, k: &[u8], v: &[u8], in_store: &mut dyn FnMut(&Extent) -> bool) {
        let Some((ino, kind, rest)) = key::split(k) else {
            self.r.problem("a key that is too short".into());
            return;
        };
        match kind {
            key::INODE if rest.is_empty() => self.inode(ino, v),
            key::DIRENT => self.entry(ino, k, v),
            key::EXTENT => self.extent(ino, k, v, in_store),
            key::ORPHAN if ino == 0 => match key::orphan_ino(k) {
                Some(o) => {
                    self.orphans.insert(o);
                }
                None => self
                    .r
                    .problem("a record of an inode without links makes no sense".into()),
            },
            key::XATTR | key::SYMLINK => {
                if ino != self.file.ino || rest.is_empty() {
                    self.r
                        .problem(format!("inode {ino}: an attribute without an inode"));
                }
            }
            _ => self
                .r
                .problem(format!("inode {ino}: a record of unknown kind {kind}")),
        }
    }

    fn inode(&mut self, ino: u64, v: &[u8]) {
        self.file.settle(&mut self.r);
        self.file = File {
            ino,
            ..File::default()
        };
        self.r.inodes += 1;
        let Some(i) = Inode::decode(v) else {
            self.r
                .problem(format!("inode {ino}: its record makes no sense"));
            return;
        };
        if ino >= self.next_ino || ino == 0 {
            self.r
                .problem(format!("inode {ino}: its number was never given out"));
        }
        self.file.is_dir = i.is_dir();
        self.file.size = i.size;
        self.file.mapped = i.mapped;
        let s = self.seen.entry(ino).or_default();
        s.known = true;
        s.nlink = i.nlink;
        s.is_dir = i.is_dir();
        s.dtype = i.dtype();
        s.parent = i.parent;
    }

    fn entry(&mut self, ino: u64, k: &[u8], v: &[u8]) {
        self.r.entries += 1;
        if ino != self.file.ino || !self.file.is_dir {
            self.r
                .problem(format!("inode {ino}: an entry in what is no directory"));
        }
        let (parts, child) = (key::dirent_parts(k), v.first_chunk::<8>());
        let (Some((hash, name)), Some(child), 9) = (parts, child, v.len()) else {
            self.r
                .problem(format!("directory {ino}: an entry makes no sense"));
            return;
        };
        if super::dir::check_name(name).is_err() || hash != key::name_hash(&self.hash_key, name) {
            self.r
                .problem(format!("directory {ino}: an entry has an impossible name"));
        }
        let s = self.seen.entry(u64::from_le_bytes(*child)).or_default();
        s.mixed |= s.names > 0 && s.claimed != v[8];
        s.names += 1;
        s.claimed = v[8];
        s.named_in = ino;
        if v[8] == 4 {
            self.seen.entry(ino).or_default().subdirs += 1;
        }
    }

    fn extent(&mut self, ino: u64, k: &[u8], v: &[u8], in_store: &mut dyn FnMut(&Extent) -> bool) {
        self.r.extents += 1;
        let (Some(at), Some(e)) = (key::extent_offset(k), Extent::decode(v)) else {
            self.r
                .problem(format!("inode {ino}: an extent makes no sense"));
            return;
        };
        let file = &mut self.file;
        if ino != file.ino {
            self.r
                .problem(format!("inode {ino}: an extent without an inode"));
        }
        if at < file.end {
            self.r.problem(format!("inode {ino}: extents overlap"));
        }
        file.sum = file.sum.saturating_add(u64::from(e.len));
        file.end = at.saturating_add(u64::from(e.len));
        if !in_store(&e) {
            self.r.problem(format!(
                "inode {ino}: its bytes from {at} on should be in data/{:08}, which does not have them",
                e.seg
            ));
        }
        self.used.push(Used {
            seg: e.seg,
            len: e.len,
            off: e.off,
            ino,
            shared: e.flags & EXTENT_SHARED != 0,
        });
    }

    fn links(&mut self) {
        let r = &mut self.r;
        for (ino, s) in &self.seen {
            if !s.known {
                r.problem(format!(
                    "inode {ino}: a name leads to it, but it is not there"
                ));
                continue;
            }
            let wanted = match (s.is_dir, *ino == ROOT_INO) {
                (true, true) => 2 + s.subdirs,
                (true, false) if s.names == 0 => 0,
                (true, false) => 2 + s.subdirs,
                (false, _) => s.names,
            };
            if s.nlink != wanted {
                r.problem(format!(
                    "inode {ino}: it has {wanted} links, its record says {}",
                    s.nlink
                ));
            }
            if s.names > 0 && (s.mixed || s.claimed != s.dtype) {
                r.problem(format!(
                    "inode {ino}: an entry of directory {} has another type",
                    s.named_in
                ));
            }
            if s.is_dir && s.names > 1 {
                r.problem(format!("directory {ino}: it has {} names", s.names));
            }
            let up = if *ino == ROOT_INO {
                ROOT_INO
            } else {
                s.named_in
            };
            if s.is_dir && (s.names > 0 || *ino == ROOT_INO) && s.parent != up {
                r.problem(format!(
                    "directory {ino}: it is in directory {up}, its record says {}",
                    s.parent
                ));
            }
            if s.nlink == 0 && !self.orphans.contains(ino) {
                r.problem(format!(
                    "inode {ino}: it has no name and is not listed as such"
                ));
            }
            if s.nlink > 0 && self.orphans.contains(ino) {
                r.problem(format!(
                    "inode {ino}: it has a name, and is listed as having none"
                ));
            }
        }
        for ino in &self.orphans {
            if !self.seen.contains_key(ino) {
                r.problem(format!(
                    "inode {ino}: it is listed as having no name, but is not there"
                ));
            }
        }
        if !self
            .seen
            .get(&ROOT_INO)
            .is_some_and(|s| s.known && s.is_dir)
        {
            r.problem("there is no root directory".into());
        }
    }

    /// Directories that hold each other, so that no way leads to them.
    fn loops(&mut self) {
        let mut good: FxHashSet<u64> = FxHashSet::default();
        good.insert(ROOT_INO);
        let mut way = Vec::new();
        for start in self.seen.keys() {
            let mut at = *start;
            let mut on_way: FxHashSet<u64> = FxHashSet::default();
            while !good.contains(&at) {
                let Some(s) = self.seen.get(&at).filter(|s| s.is_dir && s.names > 0) else {
                    break;
                };
                if !on_way.insert(at) {
                    self.r
                        .problem(format!("directory {at}: no way leads to it from the root"));
                    break;
                }
                way.push(at);
                at = s.named_in;
            }
            good.extend(way.drain(..));
        }
    }

    /// Bytes that two extents have, though one of them says that it is the only one: dropping that one would free what
    /// the other still needs.
    fn overlaps(&mut self) {
        self.used.sort_unstable_by_key(|u| (u.seg, u.off));
        // Of what came before in the segment: the furthest end in all, and of those that are not shared.
        let mut last = (0, 0, 0, 0);
        let mut first = true;
        for u in &self.used {
            if first || last.0 != u.seg {
                last = (u.seg, 0, 0, 0);
                first = false;
            }
            if u.off < last.2 || (!u.shared && u.off < last.1) {
                self.r.problem(format!(
                    "inodes {} and {}: both have the bytes at {} of data/{:08}",
                    last.3, u.ino, u.off, u.seg
                ));
            }
            let end = u.off + u64::from(u.len);
            last.1 = last.1.max(end);
            if !u.shared {
                last.2 = last.2.max(end);
            }
            last.3 = u.ino;
        }
    }
}

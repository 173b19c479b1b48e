//! Checks one tree: that every record makes sense, names and inodes fit, links are counted right, and extents do not
//! overlap or lie outside of what the store has.

use std::ops::ControlFlow;

use rustc_hash::{FxHashMap, FxHashSet};

use super::data::Extent;
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
    parent: u64,
    known: bool,
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
    let mut r = Report::default();
    let mut seen: FxHashMap<u64, Seen> = FxHashMap::default();
    let mut orphans: FxHashSet<u64> = FxHashSet::default();
    // The file that extents are being counted for: inode, size, mapped, sum so far, end of the last one.
    let mut file = (0u64, 0u64, 0u64, 0u64, 0u64);
    let hash_key = kv.hash_key();
    let settle = |file: &(u64, u64, u64, u64, u64), r: &mut Report| {
        if file.2 != file.3 {
            r.problem(format!(
                "inode {}: {} bytes are mapped, its record says {}",
                file.0, file.3, file.2
            ));
        }
        if file.4 > file.1 {
            r.problem(format!("inode {}: bytes are mapped beyond its end", file.0));
        }
    };
    kv.scan(&[], &[0xff; 9], &mut |k, v| {
        let Some((ino, kind, rest)) = key::split(k) else {
            r.problem("a key that is too short".into());
            return ControlFlow::Continue(());
        };
        match kind {
            key::INODE => {
                settle(&file, &mut r);
                file = (ino, 0, 0, 0, 0);
                r.inodes += 1;
                let Some(i) = Inode::decode(v) else {
                    r.problem(format!("inode {ino}: its record makes no sense"));
                    return ControlFlow::Continue(());
                };
                if ino >= next_ino || ino == 0 {
                    r.problem(format!("inode {ino}: its number was never given out"));
                }
                file = (ino, i.size, i.mapped, 0, 0);
                let s = seen.entry(ino).or_default();
                s.known = true;
                s.nlink = i.nlink;
                s.is_dir = i.is_dir();
                s.dtype = i.dtype();
                s.parent = i.parent;
            }
            key::DIRENT => {
                r.entries += 1;
                let (parts, child) = (key::dirent_parts(k), v.first_chunk::<8>());
                let (Some((hash, name)), Some(child), 9) = (parts, child, v.len()) else {
                    r.problem(format!("directory {ino}: an entry makes no sense"));
                    return ControlFlow::Continue(());
                };
                if super::dir::check_name(name).is_err() || hash != key::name_hash(&hash_key, name) {
                    r.problem(format!("directory {ino}: an entry has an impossible name"));
                }
                let child = u64::from_le_bytes(*child);
                let s = seen.entry(child).or_default();
                s.names += 1;
                // Filled in before or checked after: the type that the entry claims.
                if s.known && s.dtype != v[8] {
                    r.problem(format!("inode {child}: an entry of directory {ino} has another type"));
                }
                if v[8] == 4 {
                    seen.entry(ino).or_default().subdirs += 1;
                }
            }
            key::EXTENT => {
                r.extents += 1;
                let (Some(at), Some(e)) = (key::extent_offset(k), Extent::decode(v)) else {
                    r.problem(format!("inode {ino}: an extent makes no sense"));
                    return ControlFlow::Continue(());
                };
                if ino != file.0 {
                    r.problem(format!("inode {ino}: an extent without an inode"));
                }
                if at < file.4 {
                    r.problem(format!("inode {ino}: extents overlap"));
                }
                file.3 += u64::from(e.len);
                file.4 = at.saturating_add(u64::from(e.len));
                if !in_store(&e) {
                    r.problem(format!(
                        "inode {ino}: its bytes from {at} on should be in data/{:08}, which does not have them",
                        e.seg
                    ));
                }
            }
            key::ORPHAN if ino == 0 => match key::orphan_ino(k) {
                Some(o) => {
                    orphans.insert(o);
                }
                None => r.problem("a record of an inode without links makes no sense".into()),
            },
            key::XATTR | key::SYMLINK => {
                if ino != file.0 || rest.is_empty() {
                    r.problem(format!("inode {ino}: an attribute without an inode"));
                }
            }
            _ => r.problem(format!("inode {ino}: a record of unknown kind {kind}")),
        }
        ControlFlow::Continue(())
    })?;
    settle(&file, &mut r);
    for (ino, s) in &seen {
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
        if s.is_dir && s.names > 1 {
            r.problem(format!("directory {ino}: it has {} names", s.names));
        }
        if s.nlink == 0 && !orphans.contains(ino) {
            r.problem(format!(
                "inode {ino}: it has no name and is not listed as such"
            ));
        }
    }
    if !seen.get(&ROOT_INO).is_some_and(|s| s.known && s.is_dir) {
        r.problem("there is no root directory".into());
    }
    Ok(r)
}

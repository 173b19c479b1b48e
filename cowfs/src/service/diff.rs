//! What differs between two trees, by path. Costs what changed: shared pages are skipped.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

use super::{Pinned, Service};
use crate::control::{Answer, DiffEntry, DiffKind, Failure};
use crate::fs::{Inode, Kv, ROOT_INO, key};
use crate::names;
use crate::store::Store;
use crate::tree::PageId;

/// What changed of one inode.
#[derive(Default, Clone, Copy)]
struct Touched {
    contents: bool,
    attributes: bool,
}

/// The tree of a checkpoint or, by its name or as `HEAD`, of a head, pinned.
fn tree_of<'a>(
    service: &'a Service,
    head: Option<&str>,
    name: &str,
) -> Result<Pinned<'a>, Failure> {
    let head_name = if name == "HEAD" {
        head.unwrap_or("main")
    } else {
        name
    };
    let store = &service.store;
    if store.catalog()?.heads.contains_key(head_name) {
        return fixed(service, head_name);
    }
    let (root, ()) = store.pin_found(|c| Ok((names::resolve(c, head, name)?.root, ())))?;
    Ok(Pinned { store, root })
}

/// The present state of a head.
fn fixed<'a>(service: &'a Service, head: &str) -> Result<Pinned<'a>, Failure> {
    if let Some(m) = service.mounted(head) {
        m.sync_kernel()
            .map_err(|e| Failure::new(format!("bringing mapped pages back failed: {e}")))?;
    }
    let store = &service.store;
    let root = store.pin_head(head)?;
    Ok(Pinned { store, root })
}

type Entries = BTreeMap<(u64, Vec<u8>), (Option<u64>, Option<u64>)>;

pub(super) fn diff(
    service: &Service,
    head: Option<&str>,
    a: &str,
    b: &str,
) -> Result<Answer, Failure> {
    let (a, b) = (tree_of(service, head, a)?, tree_of(service, head, b)?);
    let entries = compare(&service.store, [a.root, b.root])?;
    Ok(Answer::Diff { entries })
}

fn compare(store: &Store, [a, b]: [PageId; 2]) -> Result<Vec<DiffEntry>, Failure> {
    // Directory entries that differ, with the inode on each side; and inodes whose own records differ.
    let mut entries: Entries = BTreeMap::new();
    let mut touched: BTreeMap<u64, Touched> = BTreeMap::new();
    store.diff(a, b, &mut |k, va, vb| {
        let Some((ino, kind, _)) = key::split(k) else {
            return ControlFlow::Continue(());
        };
        let child = |v: Option<&[u8]>| {
            v.and_then(|v| v.first_chunk::<8>())
                .map(|c| u64::from_le_bytes(*c))
        };
        match kind {
            key::DIRENT => {
                if let Some((_, name)) = key::dirent_parts(k) {
                    entries.insert((ino, name.to_vec()), (child(va), child(vb)));
                }
            }
            key::EXTENT | key::SYMLINK => touched.entry(ino).or_default().contents = true,
            key::INODE => {
                let t = touched.entry(ino).or_default();
                let (ia, ib) = (va.and_then(Inode::decode), vb.and_then(Inode::decode));
                if let (Some(x), Some(y)) = (ia, ib) {
                    t.contents |= x.size != y.size && !x.is_dir();
                    let strip = |i: Inode| Inode {
                        atime: (0, 0),
                        // A directory's times follow its entries, which are listed themselves.
                        mtime: if i.is_dir() { (0, 0) } else { i.mtime },
                        ctime: (0, 0),
                        nlink: 0,
                        size: 0,
                        mapped: 0,
                        // A new name is an entry that differs.
                        name: 0,
                        parent: if i.is_dir() { i.parent } else { 0 },
                        ..i
                    };
                    t.attributes |= strip(x) != strip(y);
                }
            }
            key::XATTR => touched.entry(ino).or_default().attributes = true,
            _ => {}
        }
        ControlFlow::Continue(())
    })?;
    let mut out: BTreeMap<String, DiffKind> = BTreeMap::new();
    let mut note = |path: String, kind: DiffKind| {
        out.entry(path)
            .and_modify(|k| *k = (*k).min(kind))
            .or_insert(kind);
    };
    let mut paths = [Paths::new(store, a)?, Paths::new(store, b)?];
    for ((dir, name), (old, new)) in &entries {
        match (old, new) {
            (None, Some(_)) => {
                if let Some(p) = paths[1].of(*dir, name)? {
                    note(p, DiffKind::Added);
                }
            }
            (Some(_), None) => {
                if let Some(p) = paths[0].of(*dir, name)? {
                    note(p, DiffKind::Removed);
                }
            }
            _ => {
                if let Some(p) = paths[1].of(*dir, name)? {
                    note(p, DiffKind::Modified);
                }
            }
        }
    }
    let changed: BTreeSet<u64> = touched
        .iter()
        .filter(|(_, t)| t.contents || t.attributes)
        .map(|(i, _)| *i)
        .collect();
    for (ino, path) in paths[1].names_of(&changed)? {
        let kind = if touched.get(&ino).is_some_and(|t| t.contents) {
            DiffKind::Modified
        } else {
            DiffKind::Attributes
        };
        note(path, kind);
    }
    Ok(out
        .into_iter()
        .map(|(path, change)| DiffEntry { path, change })
        .collect())
}

/// The name of an inode in a directory, if its hash is in a range: from the first to before the last.
fn name_among<K: Kv + ?Sized>(
    kv: &mut K,
    dir: u64,
    (first, end): (u64, u64),
    ino: u64,
) -> Result<Option<Vec<u8>>, Failure> {
    let mut name = None;
    let range = [first, end].map(|hash| key::dirent_from(dir, hash));
    kv.scan(&range[0], &range[1], &mut |k, v| {
        if v.first_chunk::<8>()
            .is_some_and(|c| u64::from_le_bytes(*c) == ino)
        {
            name = key::dirent_parts(k).map(|(_, n)| n.to_vec());
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    })?;
    Ok(name)
}

/// Finds paths in one tree. Directories know their parents; the names in between are looked up once.
struct Paths<'a> {
    store: &'a Store,
    root: PageId,
    dirs: BTreeMap<u64, Option<String>>,
}

impl<'a> Paths<'a> {
    fn new(store: &'a Store, root: PageId) -> Result<Self, Failure> {
        Ok(Self {
            store,
            root,
            dirs: BTreeMap::from([(ROOT_INO, Some(String::new()))]),
        })
    }

    /// Path of a directory.
    fn dir(&mut self, ino: u64, depth: u32) -> Result<Option<String>, Failure> {
        if let Some(p) = self.dirs.get(&ino) {
            return Ok(p.clone());
        }
        if depth > 4096 {
            return Ok(None);
        }
        let mut txn = self.store.read(self.root)?;
        let inode = crate::fs::inode::find(&mut txn, ino)?;
        let (mut parent, mut name) = (None, None);
        if let Some(i) = inode {
            parent = Some(i.parent);
            name = name_among(&mut txn, i.parent, i.hint(), ino)?;
            if name.is_none() {
                name = name_among(&mut txn, i.parent, key::HASHES, ino)?;
            }
        }
        drop(txn);
        let name = name.map(|n| String::from_utf8_lossy(&n).into_owned());
        let path = match (parent, name) {
            (Some(p), Some(n)) => self.dir(p, depth + 1)?.map(|up| format!("{up}/{n}")),
            _ => None,
        };
        self.dirs.insert(ino, path.clone());
        Ok(path)
    }

    fn of(&mut self, dir: u64, name: &[u8]) -> Result<Option<String>, Failure> {
        let up = self.dir(dir, 0)?;
        Ok(up.map(|up| format!("{up}/{}", String::from_utf8_lossy(name))))
    }

    /// All names of some inodes. A file with one name is mostly where its inode says; for others all entries are looked
    /// through.
    fn names_of(&mut self, inos: &BTreeSet<u64>) -> Result<Vec<(u64, String)>, Failure> {
        let mut found: Vec<(u64, u64, Vec<u8>)> = Vec::new();
        let mut left = BTreeSet::new();
        let mut out = Vec::new();
        for &ino in inos {
            let mut txn = self.store.read(self.root)?;
            let inode = crate::fs::inode::find(&mut txn, ino)?;
            let hinted = match &inode {
                Some(i) if !i.is_dir() && i.nlink == 1 && i.parent != 0 => {
                    name_among(&mut txn, i.parent, i.hint(), ino)?.map(|name| (i.parent, name))
                }
                _ => None,
            };
            drop(txn);
            match (inode, hinted) {
                (_, Some((dir, name))) => found.push((ino, dir, name)),
                (Some(i), _) if i.is_dir() => {
                    if let Some(p) = self.dir(ino, 0)? {
                        out.push((ino, if p.is_empty() { "/".into() } else { p }));
                    }
                }
                (Some(i), _) if i.nlink > 0 => drop(left.insert(ino)),
                _ => {}
            }
        }
        if !left.is_empty() {
            // In pieces, so that the filesystem goes on meanwhile.
            let mut from: Vec<u8> = Vec::new();
            loop {
                let mut n = 0;
                let mut last = Vec::new();
                let mut txn = self.store.read(self.root)?;
                txn.scan(&from, &[0xff; 9], &mut |k, v| {
                    n += 1;
                    if let Some((dir, key::DIRENT, _)) = key::split(k)
                        && let Some(c) = v.first_chunk::<8>()
                        && left.contains(&u64::from_le_bytes(*c))
                        && v.get(8) != Some(&4)
                        && let Some((_, name)) = key::dirent_parts(k)
                    {
                        found.push((u64::from_le_bytes(*c), dir, name.to_vec()));
                    }
                    if n >= 10_000 {
                        last = k.to_vec();
                        return ControlFlow::Break(());
                    }
                    ControlFlow::Continue(())
                })?;
                drop(txn);
                if last.is_empty() {
                    break;
                }
                last.push(0);
                from = last;
            }
        }
        for (ino, dir, name) in found {
            if let Some(p) = self.of(dir, &name)? {
                out.push((ino, p));
            }
        }
        Ok(out)
    }
}

//! Directory entries.

use std::ops::ControlFlow;

use super::inode::{self, Inode};
use super::{FsError, INO_END, Kv, NAME_MAX, fail, key};

/// What a directory entry points to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// Inode.
    pub ino: u64,
    /// Type as in `d_type`.
    pub dtype: u8,
}

/// An entry as listed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Place in the directory's order; listing goes on from the one after.
    pub place: u64,
    /// What it points to.
    pub target: Target,
    /// Name.
    pub name: Vec<u8>,
}

/// Reads the value of an entry; nothing if it makes no sense.
pub(crate) fn decode(v: &[u8]) -> Option<Target> {
    let (ino, rest) = v.split_first_chunk::<8>()?;
    let ino = u64::from_le_bytes(*ino);
    match rest {
        // Node ids have no room for a longer number: it would name a node of another view.
        [dtype] if (1..INO_END).contains(&ino) => Some(Target { ino, dtype: *dtype }),
        _ => None,
    }
}

/// Checks a name that a caller gave.
///
/// # Errors
/// ENAMETOOLONG, EINVAL.
pub fn check_name(name: &[u8]) -> Result<(), FsError> {
    if name.len() > NAME_MAX {
        return fail(libc::ENAMETOOLONG);
    }
    if name.is_empty() || name.contains(&b'/') || name.contains(&0) {
        return fail(libc::EINVAL);
    }
    if name == b"." || name == b".." {
        return fail(libc::EEXIST);
    }
    Ok(())
}

/// Looks a name up.
///
/// # Errors
/// Corrupt, or the store's.
pub fn lookup<K: Kv + ?Sized>(
    kv: &mut K,
    dir: u64,
    name: &[u8],
) -> Result<Option<Target>, FsError> {
    if name.len() > NAME_MAX {
        return fail(libc::ENAMETOOLONG);
    }
    let hash = hash(kv, name);
    let mut got = None;
    if !kv.get(&key::dirent(dir, hash, name), &mut |v| got = decode(v))? {
        return Ok(None);
    }
    got.map(Some).ok_or(FsError::Corrupt {
        ino: dir,
        what: "a directory entry makes no sense",
    })
}

/// Adds (or replaces) an entry. The caller keeps the directory's inode in step.
///
/// # Errors
/// The store's.
pub fn set<K: Kv + ?Sized>(
    kv: &mut K,
    dir: u64,
    name: &[u8],
    target: Target,
) -> Result<(), FsError> {
    let hash = hash(kv, name);
    let mut v = [0; 9];
    v[..8].copy_from_slice(&target.ino.to_le_bytes());
    v[8] = target.dtype;
    kv.put(&key::dirent(dir, hash, name), &v)
}

/// The hash of a name.
pub fn hash<K: Kv + ?Sized>(kv: &K, name: &[u8]) -> u64 {
    key::name_hash(&kv.hash_key(), name)
}

/// Removes an entry.
///
/// # Errors
/// The store's.
pub fn unset<K: Kv + ?Sized>(kv: &mut K, dir: u64, name: &[u8]) -> Result<(), FsError> {
    let hash = hash(kv, name);
    kv.del(&key::dirent(dir, hash, name))?;
    Ok(())
}

/// True if the directory has no entries.
///
/// # Errors
/// The store's.
pub fn is_empty<K: Kv + ?Sized>(kv: &mut K, dir: u64) -> Result<bool, FsError> {
    let mut empty = true;
    kv.scan(
        &key::kind(dir, key::DIRENT),
        &key::kind(dir, key::DIRENT + 1),
        &mut |_, _| {
            empty = false;
            ControlFlow::Break(())
        },
    )?;
    Ok(empty)
}

/// The entries from place `from` on, at most `max`, and never only a part of those that share a place (so that going
/// on from the place after the last one misses none).
///
/// # Errors
/// Corrupt, or the store's.
pub fn list<K: Kv + ?Sized>(
    kv: &mut K,
    dir: u64,
    from: u64,
    max: usize,
) -> Result<Vec<Entry>, FsError> {
    let mut out: Vec<Entry> = Vec::with_capacity(max.min(512));
    let mut bad = false;
    kv.scan(
        &key::dirent_from(dir, from),
        &key::kind(dir, key::DIRENT + 1),
        &mut |k, v| {
            let (Some((place, name)), Some(target)) = (key::dirent_parts(k), decode(v)) else {
                bad = true;
                return ControlFlow::Break(());
            };
            if out.len() >= max && out.last().is_some_and(|e| e.place != place) {
                return ControlFlow::Break(());
            }
            out.push(Entry {
                place,
                target,
                name: name.to_vec(),
            });
            ControlFlow::Continue(())
        },
    )?;
    if bad {
        return Err(FsError::Corrupt {
            ino: dir,
            what: "a directory entry makes no sense",
        });
    }
    Ok(out)
}

/// Loads a directory's inode.
///
/// # Errors
/// ENOTDIR, ESTALE.
pub fn load<K: Kv + ?Sized>(kv: &mut K, dir: u64) -> Result<Inode, FsError> {
    let inode = inode::load(kv, dir)?;
    if !inode.is_dir() {
        return fail(libc::ENOTDIR);
    }
    Ok(inode)
}

/// Walks a path of names from the root without following symlinks.
///
/// # Errors
/// ENOENT, ENOTDIR.
pub fn resolve<K: Kv + ?Sized>(kv: &mut K, path: &[u8]) -> Result<u64, FsError> {
    let mut at = super::ROOT_INO;
    for name in path
        .split(|b| *b == b'/')
        .filter(|n| !n.is_empty() && *n != b".")
    {
        load(kv, at)?;
        at = match lookup(kv, at, name)? {
            Some(t) => t.ino,
            None => return fail(libc::ENOENT),
        };
    }
    Ok(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_numbers_that_no_inode_has() {
        let entry = |ino: u64| [&ino.to_le_bytes()[..], &[8]].concat();
        assert_eq!(decode(&entry(7)).map(|t| t.ino), Some(7));
        for ino in [0, INO_END, u64::MAX] {
            assert_eq!(decode(&entry(ino)), None, "{ino}");
        }
    }
}

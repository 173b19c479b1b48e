//! Everything that a tree shows, as a map that can be compared.

use std::collections::BTreeMap;
use std::sync::Arc;

use cowfs::fs::{ROOT_INO, data, dir, inode, node, xattr};
use cowfs::store::Store;
use cowfs::store::segments::Place;

/// What a path shows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Shown {
    /// A directory with its number of links.
    Dir(u32),
    /// A file: contents, links, and an attribute.
    File(Vec<u8>, u32, Option<Vec<u8>>),
    /// A symlink's target.
    Link(Vec<u8>),
}

/// Paths and what they show.
pub type Dump = BTreeMap<String, Shown>;

/// Dumps a tree by its root page.
pub fn dump(store: &Arc<Store>, root: u64) -> Dump {
    let mut out = Dump::new();
    let mut dirs = vec![(ROOT_INO, String::new())];
    while let Some((ino, path)) = dirs.pop() {
        let mut t = store.read(root).expect("the store works");
        let d = inode::load(&mut t, ino).expect("the directory is there");
        let entries = dir::list(&mut t, ino, 0, usize::MAX).expect("it can be listed");
        out.insert(path.clone(), Shown::Dir(d.nlink));
        for e in entries {
            let p = format!("{path}/{}", String::from_utf8_lossy(&e.name));
            let i = inode::load(&mut t, e.target.ino).expect("the name leads to an inode");
            if i.is_dir() {
                dirs.push((e.target.ino, p));
            } else if i.is_symlink() {
                out.insert(
                    p,
                    Shown::Link(node::readlink(&mut t, e.target.ino).expect("target")),
                );
            } else {
                let mut bytes = vec![0; usize::try_from(i.size).expect("small files")];
                let x = xattr::find(&mut t, e.target.ino, b"user.x").expect("attributes");
                let list =
                    data::list(&mut t, e.target.ino, 0, u64::MAX, usize::MAX).expect("extents");
                drop(t);
                for m in list {
                    let at = usize::try_from(m.at).expect("small files");
                    let place = Place {
                        segment: m.extent.seg,
                        offset: m.extent.off,
                    };
                    let end = at + m.extent.len as usize;
                    store.read_data(place, &mut bytes[at..end]).expect("data");
                }
                out.insert(p, Shown::File(bytes, i.nlink, x));
                t = store.read(root).expect("the store works");
            }
        }
    }
    out
}

/// Root page of a head.
pub fn head_root(store: &Arc<Store>, head: &str) -> u64 {
    store.catalog().expect("the store works").heads[head].root
}

/// Checks all trees; panics with what is wrong.
pub fn check(store: &Arc<Store>) {
    let report = store.check(&mut |_, _| ()).expect("the store works");
    assert!(report.problems.is_empty(), "{:#?}", report.problems);
}

/// Checks all contents that have sums; panics with what is wrong.
pub fn check_data(store: &Arc<Store>) {
    let report = store.check_data(&mut |_, _| ()).expect("the store works");
    assert!(report.damage.is_empty(), "{:#?}", report.damage);
    assert!(report.other.is_empty(), "{:#?}", report.other);
}

//! Pages of a store's trees, for tests that damage them.

use std::collections::BTreeMap;
use std::sync::Arc;

use cowfs::store::disk::{Disk, DiskFile, HostDisk};
use cowfs::store::{Store, StoreError};
use cowfs::tree::{self, PAGE_SIZE, Page, PageId, Visit};

use crate::simdisk::SimDisk;

/// Reads pages from the file, as they are there.
struct OfFile(Arc<dyn DiskFile>);

impl tree::Pages for OfFile {
    type Error = StoreError;

    fn read(&mut self, id: PageId) -> Result<Arc<Page>, StoreError> {
        let mut buf = Box::new([0; PAGE_SIZE]);
        let io = |e| StoreError::io("meta", "reading")(e);
        self.0
            .read_at(&mut buf[..], id * PAGE_SIZE as u64)
            .map_err(io)?;
        Ok(Arc::new(Page::from_bytes(buf)?))
    }

    fn modify(&mut self, _: PageId) -> Result<(PageId, &mut Page), StoreError> {
        Err(StoreError::NoSpace)
    }

    fn alloc(&mut self) -> Result<(PageId, &mut Page), StoreError> {
        Err(StoreError::NoSpace)
    }

    fn release(&mut self, _: PageId) {}
}

/// Pages of every tree (`head NAME`, `checkpoint NAME`, `hidden NAME`), parents first, and whether each is a leaf. All must
/// be in a commit.
pub type PagesOf = BTreeMap<String, Vec<(PageId, bool)>>;

/// Heads and checkpoints of a store, called so, and their roots.
pub fn trees(store: &Store) -> Vec<(String, PageId)> {
    let catalog = store.catalog().expect("it works");
    let heads = catalog.heads.iter();
    let mut out: Vec<_> = heads.map(|(n, h)| (format!("head {n}"), h.root)).collect();
    let checkpoints = catalog.checkpoints.values();
    out.extend(checkpoints.map(|c| (format!("checkpoint {}", c.name), c.root)));
    out
}

fn pages(store: &Store, disk: &dyn Disk) -> PagesOf {
    let mut roots = trees(store);
    let catalog = store.catalog().expect("it works");
    let hidden = catalog.hidden.iter();
    roots.extend(hidden.map(|(n, h)| (format!("hidden {n}"), h.root)));
    let mut file = OfFile(disk.open("meta", false).expect("there"));
    let mut out = PagesOf::new();
    for (name, root) in roots {
        let mut list = Vec::new();
        let mut each = |id, leaf| {
            list.push((id, leaf));
            Visit::Descend
        };
        tree::mark(&mut file, root, &mut each, None).expect("whole");
        out.insert(name, list);
    }
    out
}

/// Pages of a store on a simulated disk.
pub fn of_sim(store: &Store, disk: &SimDisk) -> PagesOf {
    pages(store, disk)
}

/// Pages of a store in a directory, which nobody has open.
pub fn of_dir(dir: &std::path::Path) -> PagesOf {
    let store = Store::open(dir).expect("it opens");
    store.commit().expect("room");
    pages(&store, &HostDisk::new(dir))
}

/// Pages of a tree that no other of these has.
pub fn own(all: &PagesOf, tree: &str) -> Vec<(PageId, bool)> {
    let others: Vec<PageId> = all
        .iter()
        .filter(|(n, _)| *n != tree)
        .flat_map(|(_, l)| l.iter().map(|p| p.0))
        .collect();
    let mut list = all[tree].clone();
    list.retain(|p| !others.contains(&p.0));
    list
}

/// Pages that all of some trees have.
pub fn shared(all: &PagesOf, trees: &[&str]) -> Vec<(PageId, bool)> {
    let mut list = all[trees[0]].clone();
    list.retain(|p| trees.iter().all(|t| all[*t].contains(p)));
    list
}

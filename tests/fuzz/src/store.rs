//! A small store on a disk in memory, ways to damage it, and a look at all of it.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use cowfs::fuse::{Op, Setattr};
use cowfs::store::disk::{Disk, DiskFile};
use cowfs::store::superblock::{self, Superblock};
use cowfs::store::{CatalogOp, Store, log, pages};
use cowfs::tree::{PAGE_SIZE, Page};
use cowfs_tests::driver::Driver;
use cowfs_tests::simdisk::SimDisk;

use crate::Bytes;
use crate::kv::HASH_KEY;

/// Node id of an inode in a mount that was never rolled back.
pub fn node(ino: u64) -> u64 {
    if ino == 1 { 1 } else { 1 << 40 | ino }
}

/// A copy of a store with two checkpoints, a second head, files of all kinds, and changes that only the log holds.
pub fn disk() -> SimDisk {
    static ONCE: OnceLock<SimDisk> = OnceLock::new();
    ONCE.get_or_init(|| make().expect("a new store")).copy()
}

/// Opens a store of a disk.
pub fn open(disk: &SimDisk) -> Result<Arc<Store>, cowfs::store::StoreError> {
    Store::open_on(Arc::new(disk.clone()), None)
}

fn file(disk: &SimDisk, name: &str) -> Arc<dyn DiskFile> {
    disk.open(name, false).expect("a file of the store")
}

fn make() -> Result<SimDisk, cowfs::store::StoreError> {
    let disk = SimDisk::default();
    Store::init_on(Arc::new(disk.clone()))?;
    // Not by chance, so that an input means the same pages in every run.
    let sb_file = file(&disk, superblock::FILE);
    let mut sb = Superblock::load(sb_file.as_ref())?;
    (sb.uuid, sb.hash_key) = ([1; 16], HASH_KEY);
    sb.store(sb_file.as_ref())?;
    let store = open(&disk)?;
    let mut d = Driver::new(&store, "main");
    let checkpoint = |id: u64| {
        let op = CatalogOp::Checkpoint {
            head: "main".into(),
            id,
            name: format!("c{id}"),
            tags: BTreeMap::new(),
            created_us: 1,
        };
        store.change(|_| Ok((op, ())), |(), _| ()).map(drop)
    };
    for i in 0..30 {
        let f = d.create(1, &format!("file {i}")).expect("room");
        d.write(f, 0, &vec![i; 100 * usize::from(i)]).expect("room");
    }
    checkpoint(1)?;
    let dir = Op::Mkdir {
        name: b"dir",
        mode: 0o755,
        umask: 0,
    };
    let dir = d.make(1, dir).expect("room");
    let f = d.create(dir, "sparse").expect("room");
    d.write(f, 1 << 20, b"far out").expect("room");
    let value = Op::Setxattr {
        name: b"user.x",
        value: &[7; 1500],
        flags: 0,
        extra_flags: 0,
    };
    d.ask(f, value).expect("room");
    let link = Op::Symlink {
        name: b"link",
        target: b"dir/sparse",
    };
    d.make(1, link).expect("room");
    checkpoint(2)?;
    let op = CatalogOp::Clone {
        from: 1,
        id: 2,
        name: "second".into(),
        created_us: 1,
    };
    store.change(|_| Ok((op, ())), |(), _| ())?;
    store.commit()?;
    d.create(1, "in the log").expect("room");
    checkpoint(3)?;
    d.write(f, 0, b"in the log as well").expect("room");
    store.flush_all()?;
    Ok(disk.copy())
}

/// Changes bytes of the store's files: flags, then file, offset and bytes of each change. The flags say which checksums
/// are made right again: 1 those of pages, 2 those of the log, 4 those of the commit.
pub fn damage(disk: &SimDisk, b: &mut Bytes<'_>) {
    let flags = b.u8();
    let names: Vec<(String, u64)> = disk.files().into_iter().filter(|f| f.1 > 0).collect();
    let mut touched = Vec::new();
    while let Some(n) = b.next() {
        let (name, len) = &names[usize::from(n) % names.len()];
        let at = (u64::from(b.u16()) | u64::from(b.u8()) << 16) % len;
        let bytes = b.short();
        let _ = file(disk, name).write_at(bytes, at);
        if name == pages::FILE && !bytes.is_empty() {
            touched.push(at / PAGE_SIZE as u64);
            touched.push((at + bytes.len() as u64 - 1) / PAGE_SIZE as u64);
        }
    }
    if flags & 1 != 0 {
        seal_pages(disk, &touched);
    }
    if flags & 4 != 0 {
        seal_commit(disk);
    }
    if flags & 2 != 0 {
        seal_log(disk);
    }
}

fn seal_pages(disk: &SimDisk, touched: &[u64]) {
    let meta = file(disk, pages::FILE);
    for id in touched {
        let mut bytes = Box::new([0; PAGE_SIZE]);
        let _ = meta.read_at(&mut bytes[..], id * PAGE_SIZE as u64);
        if let Ok(mut page) = Page::from_bytes(bytes) {
            page.seal(*id);
            let _ = meta.write_at(page.as_bytes(), id * PAGE_SIZE as u64);
        }
    }
}

fn seal_commit(disk: &SimDisk) {
    let (sb_file, meta) = (file(disk, superblock::FILE), file(disk, pages::FILE));
    for slot in 0..2 {
        let mut b = vec![0; superblock::SLOT_BYTES];
        let at = slot * b.len() as u64;
        let _ = sb_file.read_at(&mut b, at);
        if b[..8] != *b"COWFS\0SB" {
            continue;
        }
        let mut blob = Vec::new();
        for run in b[192..].chunks_exact(16).take(usize::from(b[88])) {
            let (first, pages) = (Bytes(run).u64(), Bytes(&run[8..]).u64());
            if first < 1 << 12 && pages < 1 << 8 {
                let at = blob.len();
                blob.resize(at + pages as usize * PAGE_SIZE, 0);
                let _ = meta.read_at(&mut blob[at..], first * PAGE_SIZE as u64);
            }
        }
        blob.truncate(Bytes(&b[96..]).u64().min(1 << 20) as usize);
        b[128..160].copy_from_slice(blake3::hash(&blob).as_bytes());
        seal_slot(&mut b);
        let _ = sb_file.write_at(&b, at);
    }
}

/// Makes the checksum of a superblock's slot right.
pub fn seal_slot(slot: &mut [u8]) {
    let mut sum = blake3::Hasher::new();
    sum.update(&slot[..160]).update(&slot[192..]);
    slot[160..192].copy_from_slice(sum.finalize().as_bytes());
}

fn seal_log(disk: &SimDisk) {
    let Ok(sb) = Superblock::load(file(disk, superblock::FILE).as_ref()) else {
        return;
    };
    let mut chain = sb.chain;
    for index in [sb.log as usize, sb.log as usize ^ 1] {
        chain = seal_chunks(file(disk, log::FILES[index]).as_ref(), chain);
    }
}

/// Makes the checksums of a log file's chunks right, and their order; gives back the last one.
pub fn seal_chunks(log: &dyn DiskFile, mut chain: [u8; 16]) -> [u8; 16] {
    let len = log.len().unwrap_or(0);
    let mut at = 0;
    loop {
        let mut h = [0; 64];
        let _ = log.read_at(&mut h, at);
        let payload = u64::from(Bytes(&h[4..]).u16()) | u64::from(Bytes(&h[6..]).u16()) << 16;
        if h[..4] != *b"CLG1" || at + 64 + payload > len {
            return chain;
        }
        h[24..40].copy_from_slice(&chain);
        let mut sum = blake3::Hasher::new();
        let mut bytes = vec![0; payload as usize];
        let _ = log.read_at(&mut bytes, at + 64);
        sum.update(&h[..40]).update(&bytes);
        chain.copy_from_slice(&sum.finalize().as_bytes()[..16]);
        h[40..56].copy_from_slice(&chain);
        let _ = log.write_at(&h, at);
        at += (64 + payload).next_multiple_of(4096);
    }
}

/// Does everything with a store that may be damaged. Errors are fine; panics, endless loops and huge buffers are not.
pub fn exercise(store: &Arc<Store>) {
    let Ok(catalog) = store.catalog() else { return };
    let _ = store.check(&mut |_, _| ());
    for head in catalog.heads.keys().take(2) {
        if let Some(mut d) = Driver::try_new(store, head) {
            // Not all of them, as a run should be short.
            for (node, size) in walk(&mut d).into_iter().step_by(4) {
                change(&mut d, node, size);
            }
            d.forget_all(&[]);
        }
    }
    let roots: Vec<u64> = catalog.checkpoints.values().map(|c| c.root).collect();
    for pair in roots.windows(2).take(3) {
        let _ = store.diff(pair[0], pair[1], &mut |_, _, _| {
            std::ops::ControlFlow::Continue(())
        });
    }
    let _ = store.commit();
    let _ = store.gc();
    let _ = store.check(&mut |_, _| ());
}

/// Looks at up to 40 nodes, from the root on. Gives each node and the size of its file.
fn walk(d: &mut Driver) -> Vec<(u64, u64)> {
    let (mut todo, mut seen) = (vec![1], Vec::new());
    while let Some(at) = todo.pop() {
        let size = d.ask(at, Op::Getattr).map_or(0, |r| Bytes(&r[24..]).u64());
        seen.push((at, size));
        let mut offset = 0;
        for _ in 0..4 {
            let mut names: Vec<Vec<u8>> = Vec::new();
            let list = Op::Readdir { offset, size: 2048 };
            let mut list = Bytes(d.ask(at, list).unwrap_or_default());
            while list.0.len() >= 24 {
                list.take(8);
                let next = list.u64();
                assert!(next >= offset.min(2), "a listing that begins again");
                offset = next;
                let len = usize::from(list.u16());
                list.take(6);
                names.push(list.take(len).to_vec());
                list.take(len.next_multiple_of(8) - len);
            }
            for name in names.iter().filter(|n| *n != b"." && *n != b"..") {
                let got = d.ask(at, Op::Lookup { name });
                let id = got.map_or(0, |r| Bytes(r).u64());
                if id != 0 && seen.len() + todo.len() < 40 {
                    todo.push(id);
                }
            }
            if names.is_empty() {
                break;
            }
        }
        let end = size.saturating_sub(100);
        for op in [
            Op::Statx,
            Op::Readlink,
            Op::Listxattr { size: 65_536 },
            Op::Read {
                offset: 0,
                size: 65_536,
            },
            Op::Read {
                offset: end,
                size: 65_536,
            },
            Op::Lseek {
                offset: 0,
                whence: 3,
            },
            Op::Lseek {
                offset: 1,
                whence: 4,
            },
            Op::Readdirplus {
                offset: 0,
                size: 4096,
            },
        ] {
            let _ = d.ask(at, op);
        }
    }
    seen
}

/// Changes a node in several ways.
fn change(d: &mut Driver, at: u64, size: u64) {
    let (name, other) = (b"x", b"file 3");
    for op in [
        Op::Write {
            offset: 10,
            data: b"hello",
            write_flags: 4,
            open_flags: 0,
        },
        Op::Write {
            offset: size,
            data: b"hello",
            write_flags: 0,
            open_flags: 0,
        },
        Op::Fallocate {
            offset: 100,
            length: 50,
            mode: 3,
        },
        Op::Fallocate {
            offset: 0,
            length: 4096,
            mode: 32,
        },
        Op::CopyFileRange {
            offset_in: 0,
            node_out: at,
            offset_out: 1 << 20,
            len: 5000,
        },
        Op::Setxattr {
            name: b"user.x",
            value: b"y",
            flags: 0,
            extra_flags: 0,
        },
        Op::Setattr(Setattr {
            size: Some(size / 2),
            mode: Some(0o750),
            ..Setattr::default()
        }),
        Op::Mkdir {
            name,
            mode: 0o777,
            umask: 0,
        },
        Op::Rename {
            name: other,
            new_parent: 1,
            new_name: name,
            flags: 2,
        },
        Op::Unlink { name: other },
        Op::Rmdir { name },
        Op::Unlink { name },
    ] {
        let _ = d.ask(at, op);
    }
}

//! Records of a filesystem's tree: inodes, entries, extents, attributes, targets, orphans, with any key and value.
//! Asserted: never a panic or an endless loop, whatever is read, changed or removed, and an inode's record comes back the
//! same.
#![no_main]

use cowfs::fs::attr::{self, Change, SetTime};
use cowfs::fs::rename::{self, Ends};
use cowfs::fs::{Ctx, Extent, Inode, Kv, check, data, dir, inode, key, node, xattr};
use cowfs_fuzz::kv::{HASH_KEY, MemKv};
use cowfs_fuzz::{Bytes, record};
use libfuzzer_sys::fuzz_target;

const CTX: Ctx = Ctx {
    uid: 1,
    gid: 1,
    now: (5, 5),
};

fuzz_target!(|input: &[u8]| {
    let mut b = Bytes(input);
    let mut kv = MemKv::default();
    for _ in 0..b.u8() {
        let (k, v) = record(&mut b, &HASH_KEY);
        if let Some(i) = Inode::decode(&v) {
            assert_eq!(i.encode()[..], v[..]);
        }
        let _ = (key::split(&k), key::inode_of_key(&k), key::dirent_parts(&k));
        let _ = (
            key::extent_offset(&k),
            key::orphan_ino(&k),
            Extent::decode(&v),
        );
        let _ = kv.put(&k, &v);
    }
    let _ = check::check(&mut kv, 10, &mut |_| true);
    let _ = dir::resolve(&mut kv, b.short());
    for ino in 0..4 {
        let (at, len) = (b.u64() >> (b.u8() & 63), u64::from(b.u16()) * 512);
        let _ = dir::list(&mut kv, ino, at, 100);
        let _ = node::readlink(&mut kv, ino);
        let _ = xattr::list(&mut kv, ino, true);
        let _ = xattr::set(&mut kv, ino, b"user.x", b"y", 0, true, &CTX);
        let Ok(mut i) = inode::load(&mut kv, ino) else {
            continue;
        };
        let extent = Extent {
            seg: 1,
            off: 0,
            len: 4096,
            flags: 0,
            birth: 1,
        };
        let _ = data::seek(&mut kv, ino, i.size, at, b.u8() & 1 == 0);
        let _ = data::map(&mut kv, ino, &mut i, at, extent);
        let _ = data::punch(&mut kv, ino, &mut i, at, at.saturating_add(len));
        let _ = data::share(&mut kv, (ino, 0), (1, at), len, &mut i);
        let _ = data::shift(&mut kv, ino, &mut i, 4096, 8192, b.u8() & 1 == 0);
        let _ = inode::save(&mut kv, ino, &i);
        let change = Change {
            mode: Some(0o640),
            size: Some(at),
            uid: Some(3),
            atime: Some(SetTime::Now),
            ..Change::default()
        };
        let _ = attr::set(&mut kv, ino, &change, &CTX);
        let _ = node::link(&mut kv, ino, 1, b"link", &CTX);
        let ends = Ends {
            from: 1,
            name: b"a",
            to: ino,
            new_name: b"b",
        };
        let _ = rename::rename(&mut kv, &ends, u32::from(b.u8() & 3), &CTX);
        let _ = node::unlink(&mut kv, 1, b"link", &CTX);
        let _ = node::rmdir(&mut kv, ino, b"b", &CTX);
    }
    // As a mount does it: what is listed must go, unless there is an error.
    while let Some(ino) = data::orphans(&mut kv, 8).unwrap_or_default().first() {
        loop {
            match data::reap(&mut kv, *ino, 4) {
                Ok(true) => break,
                Ok(false) => {}
                Err(_) => return,
            }
        }
    }
});

//! Findings of the fuzz targets (tests/fuzz), kept as tests: requests that the kernel does not send, and trees that nobody
//! but an attacker writes.

use cowfs::fs::{FsError, Inode, Kv, inode, key, node, xattr};
use cowfs::fuse::Op;
use cowfs_tests::driver::Driver;
use cowfs_tests::dump::check;
use cowfs_tests::simdisk::store;

/// A file of a type that there is not had a record that could not be read again.
#[test]
fn mknod_of_no_type_is_refused() {
    let store = store();
    let mut d = Driver::new(&store, "main");
    let mut mknod = |name: &'static [u8], mode: u32| {
        let op = Op::Mknod {
            name,
            mode,
            rdev: 0,
            umask: 0,
        };
        d.ask(1, op).map(drop)
    };
    assert_eq!(mknod(b"none", 0o644), Err(libc::EINVAL));
    assert_eq!(mknod(b"odd", 0o30_644), Err(libc::EINVAL));
    assert_eq!(mknod(b"more", 1 << 20 | libc::S_IFREG | 0o644), Ok(()));
    check(&store);
    let mut t = store.read_head("main").expect("the head is there");
    let made = inode::load(&mut t, 2).expect("it was made");
    assert_eq!(made.mode, libc::S_IFREG | 0o644);
}

/// However many pieces a tree has of them, attributes and targets are not read beyond what they may have.
#[test]
fn values_that_never_end_are_refused() {
    let store = store();
    let mut t = store.begin("main").expect("the head is there");
    let link = Inode {
        mode: libc::S_IFLNK | 0o777,
        size: 100_000,
        flags: inode::HAS_XATTR,
        ..Inode::default()
    };
    inode::save(&mut t, 2, &link).expect("room");
    for i in 0..100u8 {
        t.put(&key::symlink(2, i), &[b'x'; 1000]).expect("room");
        let piece = key::xattr(2, b"user.x", u16::from(i));
        t.put(&piece, &[b'x'; 1000]).expect("room");
    }
    let corrupt = |e: Option<FsError>| matches!(e, Some(FsError::Corrupt { ino: 2, .. }));
    assert!(corrupt(node::readlink(&mut t, 2).err()));
    assert!(corrupt(xattr::find(&mut t, 2, b"user.x").err()));
}

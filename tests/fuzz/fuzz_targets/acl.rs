//! POSIX ACLs. Asserted: what was taken can be read and set again, before and after chmod and when a child inherits it,
//! and the mode mirrors it.
#![no_main]

use cowfs::fs::acl::{ACCESS, DEFAULT};
use cowfs::fs::attr::{self, Change};
use cowfs::fs::node::{self, New};
use cowfs::fs::{Ctx, inode, xattr};
use cowfs_fuzz::Bytes;
use cowfs_fuzz::kv::MemKv;
use libfuzzer_sys::fuzz_target;

fn holds(kv: &mut MemKv, ino: u64, name: &[u8], ctx: &Ctx) {
    let before = inode::load(kv, ino).expect("it is there");
    if let Some(value) = xattr::find(kv, ino, name).expect("a name that is allowed") {
        xattr::set(kv, ino, name, &value, 0, false, ctx).expect("it was taken before");
        let after = inode::load(kv, ino).expect("it is there");
        assert_eq!(before.mode, after.mode);
    }
}

fuzz_target!(|data: &[u8]| {
    let ctx = Ctx::root_now();
    let mut b = Bytes(data);
    let (mode, umask) = (u32::from(b.u16()) & 0o7777, u32::from(b.u16()) & 0o777);
    let mut kv = MemKv::default();
    node::mkfs(&mut kv, &ctx).expect("a root");
    let list = b.long();
    if xattr::set(&mut kv, 1, ACCESS, list, 0, mode & 1 == 0, &ctx).is_ok() {
        holds(&mut kv, 1, ACCESS, &ctx);
        let change = Change {
            mode: Some(mode),
            ..Change::default()
        };
        let set = attr::set(&mut kv, 1, &change, &ctx).expect("chmod works");
        assert_eq!(set.mode & 0o7777, mode);
        holds(&mut kv, 1, ACCESS, &ctx);
    }
    if xattr::set(&mut kv, 1, DEFAULT, b.0, 0, false, &ctx).is_ok() {
        for (name, kind) in [(b"f", libc::S_IFREG), (b"d", libc::S_IFDIR)] {
            let new = New {
                mode: kind | mode,
                umask,
                rdev: 0,
                target: &[],
            };
            let made = node::create(&mut kv, 1, name, &new, &ctx);
            let (ino, made) = made.expect("what was taken can be handed down");
            assert_eq!(made.mode & 0o777 & !mode, 0, "more than was asked for");
            holds(&mut kv, ino, ACCESS, &ctx);
            holds(&mut kv, ino, DEFAULT, &ctx);
        }
    }
});

//! A mount that is sent requests of any kind: opcode, inode and body of each. Asserted: never a panic or an endless loop,
//! and the store is sound afterwards.
#![no_main]

use cowfs::fuse::{Filesystem, Op, Reply, Request};
use cowfs_fuzz::{Bytes, store};
use cowfs_tests::driver::Driver;
use libfuzzer_sys::fuzz_target;

/// What the kernel never asks for in one request.
const MAX_IO: u32 = 1 << 20;

fuzz_target!(|data: &[u8]| {
    let mut b = Bytes(data);
    let opened = store::open(&store::disk()).expect("a sound store");
    let d = Driver::new(&opened, "main");
    let mut reply = Reply::new(1 << 12);
    for _ in 0..64 {
        let Some(opcode) = b.next() else { break };
        let (ino, uid, body) = (b.u8(), b.u8(), b.long());
        let mut message = Vec::with_capacity(40 + body.len());
        message.extend_from_slice(&(40 + body.len() as u32).to_le_bytes());
        message.extend_from_slice(&u32::from(opcode).to_le_bytes());
        message.extend_from_slice(&7u64.to_le_bytes());
        message.extend_from_slice(&store::node(u64::from(ino)).to_le_bytes());
        message.extend_from_slice(&[uid, 0, 0, 0, uid, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]);
        message.extend_from_slice(body);
        let Some(request) = Request::parse(&message) else {
            continue;
        };
        reply.clear();
        match request.op {
            Op::Read { size, .. } if size > MAX_IO => continue,
            Op::Forget { nlookup } => d.fs.forget(request.nodeid, nlookup),
            _ => {
                let mark = d.fs.arrived(&request);
                let _ = d.fs.handle(&request, &mut reply);
                d.fs.finished(mark);
            }
        }
    }
    cowfs_tests::dump::check(&opened);
});

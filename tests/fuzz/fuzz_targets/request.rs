//! FUSE requests, parsed only. Asserted: never a panic, names hold no zero, no part is longer than the message, and
//! nothing behind the length that the header tells is read.
#![no_main]

use cowfs::fuse::{Op, Request};
use libfuzzer_sys::fuzz_target;

fn names(op: &Op<'_>) -> Vec<Vec<u8>> {
    match *op {
        Op::Lookup { name }
        | Op::Unlink { name }
        | Op::Rmdir { name }
        | Op::Mkdir { name, .. }
        | Op::Mknod { name, .. }
        | Op::Setxattr { name, .. }
        | Op::Getxattr { name, .. }
        | Op::Removexattr { name } => vec![name.to_vec()],
        Op::Rename { name, new_name, .. } => vec![name.to_vec(), new_name.to_vec()],
        Op::Symlink { name, target } => vec![name.to_vec(), target.to_vec()],
        Op::Link { new_name, .. } => vec![new_name.to_vec()],
        Op::Create(ref c) | Op::Tmpfile(ref c) => vec![c.name.to_vec()],
        _ => vec![],
    }
}

fuzz_target!(|data: &[u8]| {
    let _ = Request::parse(data);
    let mut message = data.to_vec();
    let Some(len) = message.first_chunk_mut::<4>() else {
        return;
    };
    *len = (data.len() as u32).to_le_bytes();
    let Some(request) = Request::parse(&message) else {
        return;
    };
    for name in names(&request.op) {
        assert!(!name.contains(&0) && name.len() < data.len());
    }
    match request.op {
        Op::Write { data: d, .. } | Op::Setxattr { value: d, .. } => assert!(d.len() < data.len()),
        Op::BatchForget { pairs } => assert!(pairs.len() * 16 < data.len()),
        _ => {}
    }
    let padded = [&message[..], &[0; 64]].concat();
    let same = Request::parse(&padded).map(|r| r.op);
    assert_eq!(
        same.as_ref(),
        Some(&request.op),
        "bytes behind the message count"
    );
});

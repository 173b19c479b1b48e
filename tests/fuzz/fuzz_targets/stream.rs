//! Streams that carry checkpoints, as they are and with right sums, received into a small store; and frames. Asserted:
//! never a panic, and no checkpoint of a stream that has no whole tree.
#![no_main]


use cowfs::history::receive;
use cowfs::history::stream::Reader;
use cowfs::store::packs::frame;
use cowfs_tests::dump::check;
use cowfs_tests::simdisk::SimDisk;
use libfuzzer_sys::fuzz_target;

const BEGIN: &[u8] = br#"{"source":{"store":"00000000000000000000000000000000","id":1},"name":"n","head":"main","tags":{},"created_us":1,"next_ino":100,"base":null,"base_name":null,"resume":null}"#;

/// Records of kinds and bodies, with right sums: a kind, a length of two bytes, a body.
fn sealed(mut data: &[u8]) -> Vec<u8> {
    let mut out = b"CWSTRM\0\x01".to_vec();
    let mut sum = [0; 16];
    let mut record = |kind: u8, body: &[u8]| {
        let mut head = [kind, 0, 0, 0, 0, 0, 0, 0];
        head[4..].copy_from_slice(&u32::try_from(body.len()).unwrap_or(0).to_le_bytes());
        let mut h = blake3::Hasher::new();
        h.update(&sum).update(&head).update(body);
        sum.copy_from_slice(&h.finalize().as_bytes()[..16]);
        out.extend_from_slice(&head);
        out.extend_from_slice(body);
        out.extend_from_slice(&sum);
    };
    record(1, BEGIN);
    while let Some(([kind, a, b], rest)) = data.split_first_chunk::<3>() {
        let len = usize::from(u16::from_le_bytes([*a, *b])).min(rest.len());
        let (body, after) = rest.split_at(len);
        record(kind % 5, body);
        data = after;
    }
    out
}

fuzz_target!(|data: &[u8]| {
    if let Ok(f) = frame::open(data) {
        for c in &f.chunks {
            assert_eq!(f.chunk(&c.name).is_some(), f.chunks.iter().any(|d| d.name == c.name && d.good));
        }
    }
    if let Ok(mut r) = Reader::new(data) {
        while r.read().is_ok() {}
    }
    let disk = SimDisk::default();
    let store = disk.store();
    let _ = receive(&store, &sealed(data)[..], None);
    check(&store);
});

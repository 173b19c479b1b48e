//! Journals: two records, as they are and with right sums, at both places of the file. Asserted: never a panic or much
//! memory, the valid one with the higher number counts, and a record comes back the same.
#![no_main]

use std::os::unix::fs::FileExt;

use cowfs_fuzz::Bytes;
use cowfs_fuzz::snap::Dir;
use libfuzzer_sys::fuzz_target;
use snapshot::target::journal::{Journal, Record};

const SECOND: u64 = 256 << 20;
const HEAD: usize = 13 * 8;
const THREAD: usize = 29 * 8;

/// With magic, number of threads and sum as they should be.
fn sealed(data: &[u8]) -> Vec<u8> {
    let mut out = b"UMLJRNL2".to_vec();
    out.extend(data);
    out.resize(out.len().max(HEAD), 0);
    let threads = (out.len() - HEAD) / THREAD;
    out[HEAD - 8..HEAD].copy_from_slice(&(threads as u64).to_le_bytes());
    out.truncate(HEAD + threads * THREAD);
    let sum = blake3::hash(&out);
    out.extend(&sum.as_bytes()[..8]);
    out
}

fuzz_target!(|data: &[u8]| {
    let mut b = Bytes(data);
    let flags = b.u8();
    let places = [0, 1].map(|i| {
        let raw = b.long();
        match flags >> i & 1 {
            0 => raw.to_vec(),
            _ => sealed(raw),
        }
    });
    let dir = Dir::new("journal");
    let path = dir.path().join("1");
    let file = std::fs::File::create(&path).expect("room");
    file.write_all_at(&places[0], 0).expect("room");
    if flags & 4 != 0 {
        file.write_all_at(&places[1], SECOND).expect("room");
    }
    drop(file);
    let found = Journal::look(&path);
    let mut best: Option<(u64, Record)> = None;
    for bytes in &places[..if flags & 4 != 0 { 2 } else { 1 }] {
        if let Ok((number, record)) = Record::decode(bytes) {
            assert!(number < u64::MAX, "there must be a next one");
            let again = Record::decode(&record.encode(number));
            assert_eq!(again, Ok((number, record.clone())));
            if best.as_ref().is_none_or(|best| best.0 < number) {
                best = Some((number, record));
            }
        }
    }
    // What follows the first place in the file may make its record whole, so only what was whole before is known.
    if let Some((_, best)) = &best {
        assert_eq!(found.as_ref().ok(), Some(best));
    }
    if let Ok(Some(mut taken)) = Journal::take_over(&path) {
        assert_eq!(found.ok().as_ref(), Some(&taken.record));
        taken.record.away.truncate(1);
        taken.write().expect("room");
        assert_eq!(Journal::look(&path).ok().as_ref(), Some(&taken.record));
    }
    let _ = Journal::create(dir.path(), 1, 2);
});

//! A sound store with records of any kind in its tree. Asserted: mounting, checking, reading, changing and collecting
//! garbage give errors at most, never a panic, an endless loop or a huge buffer.
#![no_main]

use cowfs::fs::Kv;
use cowfs_fuzz::kv::HASH_KEY;
use cowfs_fuzz::{Bytes, record, store};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut b = Bytes(data);
    let opened = store::open(&store::disk()).expect("a sound store");
    let mut txn = opened.begin("main").expect("a head that is there");
    for _ in 0..b.u8() {
        let (key, value) = record(&mut b, &HASH_KEY);
        let _ = txn.put(&key, &value);
    }
    txn.commit();
    store::exercise(&opened);
});

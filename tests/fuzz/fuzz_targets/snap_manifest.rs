//! Manifests of processes: bytes as they are, a body with a right sum, and a sample with changes. Asserted: never a panic or
//! much memory; what is accepted comes back the same; and the tables of a resume can be made of it, or it is refused.
#![no_main]

use cowfs_fuzz::snap::{Few, sealed};
use cowfs_fuzz::{Bytes, json, sample};
use libfuzzer_sys::fuzz_target;
use snapshot::image::store;

fn one(bytes: &[u8]) {
    let Ok(m) = store::decode(bytes) else { return };
    let again = store::encode(&m).expect("what was read can be written");
    assert_eq!(store::decode(&again).as_ref(), Ok(&m));
    if let Ok(len) = snapshot::fuzz::tables(&m, &Few) {
        assert!(len.is_multiple_of(4096));
    }
}

fuzz_target!(|data: &[u8]| {
    one(data);
    if data.first() == Some(&b'{') {
        one(&sealed(b"UMLSNAP\n", data));
        return;
    }
    let mut value = serde_json::to_value(sample::manifest()).expect("JSON");
    json::edit(&mut value, &mut Bytes(data));
    one(&sealed(b"UMLSNAP\n", value.to_string().as_bytes()));
});

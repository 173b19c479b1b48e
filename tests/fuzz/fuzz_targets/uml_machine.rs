//! Manifests of machines: bytes as they are, a body with a right sum, and a sample with changes. Asserted: never a panic or
//! much memory, what is accepted comes back the same, and what a rebuilding takes lies inside the guest's memory.
#![no_main]

use std::path::Path;

use cowfs_fuzz::snap::sealed;
use cowfs_fuzz::{Bytes, json, sample};
use libfuzzer_sys::fuzz_target;
use snapshot::uml::manifest::{decode, encode};

fn one(bytes: &[u8]) {
    let path = Path::new("machine");
    let Ok(m) = decode(bytes, path) else { return };
    let again = encode(&m).expect("what was read can be written");
    assert_eq!(decode(&again, path).ok().as_ref(), Some(&m));
    if snapshot::fuzz::check_machine(&m).is_err() {
        return;
    }
    assert!(m.space.ranges.iter().all(|r| r.start < r.end));
    for piece in m.users.iter().flat_map(|u| &u.pieces) {
        let end = piece.offset.checked_add(piece.len);
        assert!(end.is_some_and(|end| end <= m.memory_len));
    }
}

fuzz_target!(|data: &[u8]| {
    one(data);
    if data.first() == Some(&b'{') {
        one(&sealed(b"UMLMACH\n", data));
        return;
    }
    let mut value = serde_json::to_value(sample::machine(1 << 20)).expect("JSON");
    json::edit(&mut value, &mut Bytes(data));
    one(&sealed(b"UMLMACH\n", value.to_string().as_bytes()));
});

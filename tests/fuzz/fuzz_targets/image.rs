//! COW files of virtual machines: the header, and all that info and verify read. Asserted: never a panic or much memory, and
//! a header that is accepted encodes to bytes that decode to the same.
#![no_main]

use std::path::Path;

use cowfs::image::{self, Header};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(h) = Header::parse(Path::new("/fuzzed"), data) {
        let again = Header::parse(Path::new("/fuzzed"), &h.encode());
        assert_eq!(again.ok(), Some(h));
    }
    let path = std::env::temp_dir().join(format!("cowfs-fuzz-image.{}", std::process::id()));
    std::fs::write(&path, data).expect("room");
    let _ = image::info(&path);
    let _ = image::verify(&path);
    let _ = std::fs::remove_file(&path);
});

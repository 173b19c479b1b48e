//! Indexes of pages: bytes as they are, and entries behind a right header. Asserted: never a panic or much memory, what is
//! accepted is what the format promises, and it is written as it was read.
#![no_main]

use std::path::Path;

use cowfs_fuzz::snap;
use libfuzzer_sys::fuzz_target;
use snapshot::image::index::Index;

fuzz_target!(|data: &[u8]| {
    for bytes in [data, &snap::index(data)] {
        if let Ok(index) = Index::parse(bytes, Path::new("index")) {
            snap::sound(&index);
            assert_eq!(index.to_bytes(), bytes);
            for space in 0..3 {
                assert!(index.blocks(space).is_sorted_by(|a, b| a < b));
            }
        }
    }
});

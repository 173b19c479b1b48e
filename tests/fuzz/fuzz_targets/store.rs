//! A whole store whose files were changed, with checksums made right again or not. Asserted: opening, checking, reading,
//! changing, diffing and collecting garbage give errors at most, never a panic, an endless loop or a huge buffer.
#![no_main]

use cowfs_fuzz::{Bytes, store};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let disk = store::disk();
    store::damage(&disk, &mut Bytes(data));
    match store::open(&disk) {
        Ok(opened) => store::exercise(&opened),
        Err(e) => assert!(e.to_string().len() > 10, "an error that says nothing: {e}"),
    }
});

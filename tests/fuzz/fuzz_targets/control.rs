//! Requests of the control socket. Asserted: never a panic, and what is accepted reads the same when it is written again.
#![no_main]

use cowfs::control::{Answer, Request};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(request) = serde_json::from_slice::<Request>(data) {
        let json = serde_json::to_vec(&request).expect("what was read can be written");
        let again: Request = serde_json::from_slice(&json).expect("and read again");
        assert_eq!(format!("{request:?}"), format!("{again:?}"));
    }
    let _ = serde_json::from_slice::<Answer>(data);
});

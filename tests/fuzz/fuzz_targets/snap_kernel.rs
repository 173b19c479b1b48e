//! The kernel's binary messages: records of mappings, faults, events of memory, sockets, addresses. Asserted: never a panic
//! or an endless loop.
#![no_main]

use libfuzzer_sys::fuzz_target;
use snapshot::sys::{fill, perf, uffd};

fuzz_target!(|data: &[u8]| {
    let len = data.len() as u64;
    let copy = |at: u64, out: &mut [u8]| {
        for (i, byte) in out.iter_mut().enumerate() {
            *byte = data[(at as usize + i) % data.len()];
        }
    };
    let mut count = 0;
    perf::walk(7..7 + len, copy, &mut |_| count += 1);
    assert!(count <= len / 8 + 1);
    for message in data.chunks(fill::MESSAGE) {
        if let Some(fault) = uffd::message(message) {
            assert_eq!(fault.address % 4096, 0);
        }
        if let Ok(message) = message.try_into() {
            let _ = fill::decode(message);
        }
    }
    let _ = snapshot::files::fuzz::sockets(data);
});

//! Messages of a VM's control socket: a stream as it comes, and messages behind right lengths. Asserted: never a panic or
//! much memory, what is accepted comes back the same, and it does not matter in which pieces it came.
#![no_main]

use cowfs_fuzz::Bytes;
use libfuzzer_sys::fuzz_target;
use umlctl::control::{Answer, LONGEST, Request, decode, encode};

/// All messages of a stream that comes in pieces of `step` bytes, until one is none.
macro_rules! all {
    ($kind:ty, $bytes:expr, $step:expr) => {{
        let (mut waiting, mut found) = (Vec::new(), Vec::<$kind>::new());
        'stream: for piece in $bytes.chunks($step) {
            waiting.extend(piece);
            loop {
                match decode(&mut waiting) {
                    Ok(Some(message)) => found.push(message),
                    Ok(None) => break,
                    Err(_) => break 'stream,
                }
            }
            assert!(waiting.len() <= 4 + LONGEST + $step);
        }
        for message in &found {
            let mut again = encode(message);
            assert_eq!(decode(&mut again).ok().flatten().as_ref(), Some(message));
            assert!(again.is_empty());
        }
        found
    }};
}

fn stream(bytes: &[u8]) {
    let requests = all!(Request, bytes, bytes.len().max(1));
    assert_eq!(all!(Request, bytes, 13), requests);
    let answers = all!(Answer, bytes, bytes.len().max(1));
    assert_eq!(all!(Answer, bytes, 13), answers);
}

fuzz_target!(|data: &[u8]| {
    stream(data);
    let mut b = Bytes(data);
    let mut sealed = Vec::new();
    while !b.0.is_empty() {
        let text = b.long();
        sealed.extend((text.len() as u32).to_le_bytes());
        sealed.extend(text);
    }
    stream(&sealed);
});

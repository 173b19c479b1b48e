//! Frames of the agent channel: a stream as it comes, and frames with right sums in it; commands; and what the supervisor
//! makes of them. Asserted: never a panic or much memory, what is found can be sent, and it does not matter in which pieces
//! it came.
#![no_main]

use std::io::Write;

use cowfs_fuzz::Bytes;
use libfuzzer_sys::fuzz_target;
use umlctl::supervisor::agent::{Channel, Owner, Said};
use umlctl_agent::exec::Exec;
use umlctl_agent::wire::{Decoder, Frame, Kind, reset};

fn frames(bytes: &[u8], step: usize) -> Vec<Frame> {
    let (mut decoder, mut found) = (Decoder::default(), Vec::new());
    for piece in bytes.chunks(step) {
        decoder.push(piece);
        found.extend(std::iter::from_fn(|| decoder.next_frame()));
    }
    assert!(decoder.skipped <= bytes.len() as u64);
    found
}

/// A stream with whole frames and resets between the noise.
fn stream(b: &mut Bytes<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    while let Some(what) = b.next() {
        match (what, Kind::from_number(what)) {
            (0, _) => out.extend(b.short()),
            (255, _) => out.extend(reset()),
            (_, Some(kind)) => Frame::new(kind, u32::from(b.u8() & 3), b.short()).encode(&mut out),
            _ => {}
        }
    }
    out
}

fn one(bytes: &[u8]) {
    let found = frames(bytes, bytes.len().max(1));
    assert_eq!(frames(bytes, 7), found);
    for frame in &found {
        let mut sent = Vec::new();
        frame.encode(&mut sent);
        assert_eq!(frames(&sent, sent.len()), [frame.clone()]);
        let _ = (frame.as_credit(), frame.as_exit(), frame.as_i32());
        if let Some(exec) = Exec::decode(&frame.payload) {
            assert_eq!(exec.encode().as_deref(), Some(&frame.payload[..]));
        }
    }
    let mut decoder = Decoder::default();
    for piece in bytes.chunks(11) {
        decoder.push_or_reset(piece);
        while decoder.next_frame().is_some() {}
    }
}

fn supervised(bytes: &[u8]) {
    let (mut channel, end) = Channel::new().expect("a pair");
    for owner in [Owner::Client(5), Owner::Own, Owner::Client(6)] {
        channel.begin(owner);
    }
    if bytes.len() % 2 == 1 {
        channel.reset();
    }
    let mut end = std::fs::File::from(end);
    for piece in bytes.chunks(4096) {
        // What does not go is lost, as on a line.
        let _ = end.write(piece);
        for said in channel.take() {
            if let Said::To(client, frame) = said {
                assert!(client == 5 || client == 6);
                assert!((1..=3).contains(&frame.stream));
            }
        }
        channel.flush();
    }
}

fuzz_target!(|data: &[u8]| {
    one(data);
    if let Some(exec) = Exec::decode(data) {
        assert_eq!(
            Exec::decode(&exec.encode().expect("it is no longer")),
            Some(exec)
        );
    }
    let made = stream(&mut Bytes(data));
    one(&made);
    supervised(&made);
});

//! Frames on the agent channel: a serial line, so a reader finds its way back after noise.
//!
//! ```text
//!  offset size
//!       0    2  magic c5 5a
//!       2    1  kind
//!       3    1  check: the sum of the other 15 bytes of the header, inverted
//!       4    4  stream
//!       8    4  length of the payload, at most 65536
//!      12    4  FNV-1a of the payload
//!      16       payload
//! ```
//! All numbers are little-endian.

/// Version of the protocol.
pub const VERSION: u32 = 1;
/// First bytes of a frame.
pub const MAGIC: [u8; 2] = [0xc5, 0x5a];
/// Bytes before the payload.
pub const HEADER: usize = 16;
/// Longest payload.
pub const MAX_PAYLOAD: usize = 65536;
/// Longest payload of a data frame that we send: others must get their turn.
pub const MAX_DATA: usize = 4096;
/// How many bytes of the host may be unread in the guest. UML's serial line never wakes up again once the terminal's buffer
/// of 4096 bytes was full (its `throttle` forgets the descriptor), so it must not get full.
pub const LINE_WINDOW: usize = 3072;
/// The agent says how much it has read when it is at least this.
pub const LINE_ACK: usize = 1024;
/// How many bytes of a channel may be on their way when a stream begins; a `Credit` allows more.
pub const WINDOW: usize = 65536;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $number:literal,)*) => {
        /// What a frame says.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Kind { $($(#[$doc])* $name = $number,)* }

        impl Kind {
            /// The kind with this number.
            #[must_use]
            pub fn from_number(n: u8) -> Option<Self> {
                match n { $($number => Some(Self::$name),)* _ => None }
            }
        }
    };
}

kinds! {
    /// Agent: it is there. Payload: version u32. Sent when it starts, and as the answer to a [`reset`].
    Hello = 1,
    /// Host: are you there? Any payload.
    Ping = 2,
    /// Agent: the payload of the `Ping`.
    Pong = 3,
    /// Host: set the clock. Payload: seconds since 1970 i64, nanoseconds u32.
    TimeSet = 4,
    /// Host: mix the payload into the random-number generator, count it as entropy, and seed anew.
    Reseed = 5,
    /// Agent: the answer to `TimeSet` and `Reseed`. Payload: errno i32, 0 if it was done.
    Done = 6,
    /// Either: this stream is over. From the host it is a hang-up; from the agent the payload says why.
    Reset = 7,
    /// Agent: so many bytes of the line were read since it last said so. Payload: u32.
    Taken = 9,
    /// Host: begin a stream. Payload: see [`crate::exec`].
    Exec = 16,
    /// Host: input.
    Stdin = 17,
    /// Agent: output.
    Stdout = 18,
    /// Agent: error output.
    Stderr = 19,
    /// Either: so many more bytes may be sent. Payload: channel u8, bytes u32.
    Credit = 20,
    /// Either: nothing more comes on a channel. Payload: channel u8.
    Eof = 21,
    /// Agent: the program has ended, and the stream with it. Payload: 0 and a code, or 1 and a signal: u8, i32.
    Exit = 22,
    /// Host: send a signal. Payload: its number i32.
    Signal = 23,
    /// Host: the terminal's size. Payload: rows u16, columns u16.
    WinSize = 24,
}

/// Channels, as in `Credit` and `Eof`.
pub mod channel {
    /// Standard input.
    pub const STDIN: u8 = 0;
    /// Standard output.
    pub const STDOUT: u8 = 1;
    /// Standard error.
    pub const STDERR: u8 = 2;
}

/// Length of a [`reset`].
pub const RESET: usize = 32;

/// What the host sends when it is another than before, as after a resume: all streams are over, and whatever was begun is
/// not going to be completed. No frame, as the agent may be in the middle of one, and then takes everything for its payload.
/// Calculated, so that no file has it by chance, not even this program's.
#[must_use]
pub fn reset() -> [u8; RESET] {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    std::array::from_fn(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 24) as u8
    })
}

/// A frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// What it says.
    pub kind: Kind,
    /// Of which stream; 0 if of none.
    pub stream: u32,
    /// More of it.
    pub payload: Vec<u8>,
}

impl Frame {
    /// A frame.
    #[must_use]
    pub fn new(kind: Kind, stream: u32, payload: impl Into<Vec<u8>>) -> Self {
        Self {
            kind,
            stream,
            payload: payload.into(),
        }
    }

    /// A `Credit`.
    #[must_use]
    pub fn credit(stream: u32, channel: u8, bytes: usize) -> Self {
        let mut payload = vec![channel];
        payload.extend(u32::try_from(bytes).unwrap_or(u32::MAX).to_le_bytes());
        Self::new(Kind::Credit, stream, payload)
    }

    /// The channel and the number of a `Credit`.
    #[must_use]
    pub fn as_credit(&self) -> Option<(u8, usize)> {
        let (channel, bytes) = self.payload.split_first()?;
        let bytes = u32::from_le_bytes(bytes.try_into().ok()?);
        Some((*channel, bytes as usize))
    }

    /// An `Exit`.
    #[must_use]
    pub fn exit(stream: u32, by_signal: bool, value: i32) -> Self {
        let mut payload = vec![u8::from(by_signal)];
        payload.extend(value.to_le_bytes());
        Self::new(Kind::Exit, stream, payload)
    }

    /// Whether it was by a signal, and the code or signal of an `Exit`.
    #[must_use]
    pub fn as_exit(&self) -> Option<(bool, i32)> {
        let (by_signal, value) = self.payload.split_first()?;
        Some((*by_signal == 1, i32::from_le_bytes(value.try_into().ok()?)))
    }

    /// The first number of the payload.
    #[must_use]
    pub fn as_i32(&self) -> Option<i32> {
        Some(i32::from_le_bytes(self.payload.as_slice().try_into().ok()?))
    }

    /// Appends its bytes. The payload must not be longer than [`MAX_PAYLOAD`]; what is beyond is cut off.
    pub fn encode(&self, to: &mut Vec<u8>) {
        let payload = &self.payload[..self.payload.len().min(MAX_PAYLOAD)];
        let mut header = [0; HEADER];
        header[..2].copy_from_slice(&MAGIC);
        header[2] = self.kind as u8;
        header[4..8].copy_from_slice(&self.stream.to_le_bytes());
        header[8..12].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        header[12..16].copy_from_slice(&fnv(payload).to_le_bytes());
        header[3] = check(&header);
        to.extend(header);
        to.extend(payload);
    }
}

fn fnv(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |h, b| {
        (h ^ u32::from(*b)).wrapping_mul(0x0100_0193)
    })
}

fn check(header: &[u8; HEADER]) -> u8 {
    let sum = header
        .iter()
        .enumerate()
        .filter(|(i, _)| *i != 3)
        .fold(0u8, |s, (_, b)| s.wrapping_add(*b));
    !sum
}

/// Makes frames of bytes, and skips what is none.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    start: usize,
    /// The last bytes, in which a reset may have begun.
    recent: Vec<u8>,
    /// Bytes that were no part of a frame.
    pub skipped: u64,
}

impl Decoder {
    /// Adds bytes.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.start > 0 {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        self.bytes.extend(bytes);
    }

    /// Adds bytes, and looks for a [`reset`]. If there is one, what was before it is forgotten. It may come in
    /// pieces: the last bytes are remembered.
    pub fn push_or_reset(&mut self, bytes: &[u8]) -> bool {
        let wanted = reset();
        self.recent.extend(bytes);
        let found = self.recent.windows(RESET).rposition(|w| w == wanted);
        if let Some(at) = found {
            let rest = self.recent.split_off(at + RESET);
            self.bytes.clear();
            self.start = 0;
            self.push(&rest);
        } else {
            self.push(bytes);
        }
        let old = self.recent.len().saturating_sub(RESET - 1);
        self.recent.drain(..old);
        if found.is_some() {
            self.recent.clear();
        }
        found.is_some()
    }

    /// The next whole frame.
    pub fn next_frame(&mut self) -> Option<Frame> {
        loop {
            let rest = &self.bytes[self.start..];
            // To the next place where a frame may begin.
            let skip = rest
                .iter()
                .enumerate()
                .position(|(i, b)| *b == MAGIC[0] && rest.get(i + 1).is_none_or(|n| *n == MAGIC[1]))
                .unwrap_or(rest.len());
            self.start += skip;
            self.skipped += skip as u64;
            let rest = &self.bytes[self.start..];
            let header: &[u8; HEADER] = rest.first_chunk()?;
            let number = |at: usize| {
                u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
            };
            let length = number(8) as usize;
            let kind = Kind::from_number(header[2])
                .filter(|_| header[3] == check(header) && length <= MAX_PAYLOAD);
            if let Some(kind) = kind {
                let payload = rest.get(HEADER..HEADER + length)?;
                if fnv(payload) == number(12) {
                    let frame = Frame::new(kind, number(4), payload);
                    self.start += HEADER + length;
                    return Some(frame);
                }
            }
            self.start += 1;
            self.skipped += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames() -> Vec<Frame> {
        vec![
            Frame::new(Kind::Hello, 0, VERSION.to_le_bytes()),
            Frame::new(Kind::Stdout, 7, vec![0xc5; 100]),
            Frame::new(Kind::Stdin, u32::MAX, [0xc5, 0x5a].repeat(2048)),
            Frame::new(Kind::Exec, 1, vec![9; MAX_PAYLOAD]),
            Frame::exit(3, true, 9),
            Frame::new(Kind::Eof, 2, vec![]),
        ]
    }

    #[test]
    fn whole_and_byte_by_byte() {
        let mut bytes = Vec::new();
        frames().iter().for_each(|f| f.encode(&mut bytes));
        for step in [1, 7, 4096, bytes.len()] {
            let mut decoder = Decoder::default();
            let mut found = Vec::new();
            for part in bytes.chunks(step) {
                decoder.push(part);
                found.extend(std::iter::from_fn(|| decoder.next_frame()));
            }
            assert_eq!(found, frames(), "in steps of {step}");
            assert_eq!(decoder.skipped, 0);
        }
    }

    #[test]
    fn noise() {
        let mut bytes = b"login: \xc5".to_vec();
        let mut half = Vec::new();
        frames()[1].encode(&mut half);
        for f in frames() {
            f.encode(&mut bytes);
            bytes.extend(b"\xc5\x5a\x01noise \xc5\xc5\x5a");
            bytes.extend(&half[..half.len() / 2]);
        }
        // Half a frame may hide what follows until as many bytes as it lacks are there.
        bytes.extend(vec![0; 2 * MAX_PAYLOAD]);
        let mut decoder = Decoder::default();
        decoder.push(&bytes);
        let found: Vec<_> = std::iter::from_fn(|| decoder.next_frame()).collect();
        assert_eq!(found, frames());
    }

    #[test]
    fn resets() {
        let [first, large, ..] = &frames()[..] else {
            unreachable!()
        };
        let (mut begun, mut whole) = (Vec::new(), Vec::new());
        large.encode(&mut begun);
        begun.truncate(60);
        let mut stream = begun.clone();
        stream.extend(reset());
        first.encode(&mut whole);
        stream.extend(&whole);
        for step in [1, 5, 31, 33, stream.len()] {
            let mut decoder = Decoder::default();
            let (mut found, mut count) = (Vec::new(), 0);
            for part in stream.chunks(step) {
                count += usize::from(decoder.push_or_reset(part));
                found.extend(std::iter::from_fn(|| decoder.next_frame()));
            }
            assert_eq!(
                (count, &found[..]),
                (1, &[first.clone()][..]),
                "in steps of {step}"
            );
        }
    }

    #[test]
    fn numbers() {
        for n in 0..=255 {
            if let Some(k) = Kind::from_number(n) {
                assert_eq!(k as u8, n);
            }
        }
        assert_eq!(Frame::credit(1, 2, 300).as_credit(), Some((2, 300)));
        assert_eq!(Frame::exit(1, false, -1).as_exit(), Some((false, -1)));
        assert_eq!(Frame::new(Kind::Credit, 0, vec![1]).as_credit(), None);
    }
}

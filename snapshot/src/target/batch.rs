//! A list of system calls to be made by a driven thread, and the bytes they read and write.

use nix::errno::Errno;

/// Bytes of one entry: number, six arguments, result.
pub(super) const ENTRY: usize = 64;

/// Calls that are made one after the other. A call that fails does not end the batch.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    calls: Vec<(i64, [Arg; 6])>,
    data: Vec<u8>,
    pointers: Vec<(usize, usize)>,
    results: Vec<i64>,
}

/// An argument of a call.
#[derive(Debug, Clone, Copy)]
pub enum Arg {
    /// A number or an address of the target.
    Word(u64),
    /// The address of the batch's own data at this offset.
    Data(usize),
}

impl From<u64> for Arg {
    fn from(v: u64) -> Self {
        Self::Word(v)
    }
}

impl From<i32> for Arg {
    fn from(v: i32) -> Self {
        Self::Word(v as u64)
    }
}

impl Batch {
    /// An empty batch.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a call; missing arguments are 0. Returns its number.
    pub fn call(&mut self, nr: i64, args: &[Arg]) -> usize {
        let mut six = [Arg::Word(0); 6];
        six[..args.len()].copy_from_slice(args);
        self.calls.push((nr, six));
        self.calls.len() - 1
    }

    /// Adds bytes for calls to read or write, aligned to 8; returns the argument that points there.
    pub fn data(&mut self, bytes: &[u8]) -> Arg {
        self.data.resize(self.data.len().next_multiple_of(8), 0);
        let at = self.data.len();
        self.data.extend_from_slice(bytes);
        Arg::Data(at)
    }

    /// Adds room of `len` zero bytes.
    pub fn room(&mut self, len: usize) -> Arg {
        self.data(&vec![0; len])
    }

    /// Adds words, of which those that are `Arg::Data` become addresses.
    pub fn pointers(&mut self, words: &[Arg]) -> Arg {
        let bytes: Vec<u8> = words
            .iter()
            .flat_map(|w| match *w {
                Arg::Word(w) => w.to_le_bytes(),
                Arg::Data(_) => [0; 8],
            })
            .collect();
        let place = self.data(&bytes);
        if let Arg::Data(at) = place {
            for (i, w) in words.iter().enumerate() {
                if let Arg::Data(to) = *w {
                    self.pointers.push((at + 8 * i, to));
                }
            }
        }
        place
    }

    /// Number of calls.
    #[must_use]
    pub fn len(&self) -> usize {
        self.calls.len()
    }

    /// Whether there is no call.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.calls.is_empty()
    }

    /// Bytes that the table and the data take in the scratch, with the done word in front.
    pub(super) fn size(&self) -> usize {
        8 + self.calls.len() * ENTRY + self.data.len().next_multiple_of(8)
    }

    /// The bytes for the scratch, to stand at `addr`: done word, table, data.
    pub(super) fn encode(&self, addr: u64) -> Vec<u8> {
        let data = addr + 8 + (self.calls.len() * ENTRY) as u64;
        let mut out = vec![0u8; 8];
        for (nr, args) in &self.calls {
            out.extend_from_slice(&nr.to_le_bytes());
            for arg in args {
                let word = match *arg {
                    Arg::Word(w) => w,
                    Arg::Data(at) => data + at as u64,
                };
                out.extend_from_slice(&word.to_le_bytes());
            }
            out.extend_from_slice(&[0; 8]);
        }
        let begin = out.len();
        out.extend_from_slice(&self.data);
        for &(at, to) in &self.pointers {
            out[begin + at..begin + at + 8].copy_from_slice(&(data + to as u64).to_le_bytes());
        }
        out.resize(self.size(), 0);
        out
    }

    /// Takes results and data from the bytes that are in the scratch afterwards.
    pub(super) fn decode(&mut self, bytes: &[u8]) {
        self.results = (0..self.calls.len())
            .map(|i| {
                let at = 8 + i * ENTRY + 56;
                i64::from_le_bytes(bytes[at..at + 8].try_into().unwrap_or_default())
            })
            .collect();
        let at = 8 + self.calls.len() * ENTRY;
        let len = self.data.len();
        self.data.copy_from_slice(&bytes[at..at + len]);
    }

    /// The result of call `i`, after the batch was run.
    pub fn result(&self, i: usize) -> Result<i64, Errno> {
        match self.results.get(i) {
            Some(&r) if (-4095..0).contains(&r) => Err(Errno::from_raw(-(r as i32))),
            Some(&r) => Ok(r),
            None => Err(Errno::ENOSYS),
        }
    }

    /// The bytes that `arg` points to, after the batch was run.
    #[must_use]
    pub fn bytes(&self, arg: Arg, len: usize) -> &[u8] {
        match arg {
            Arg::Data(at) => self.data.get(at..at + len).unwrap_or_default(),
            Arg::Word(_) => &[],
        }
    }

    /// The little-endian word of 8 bytes at `offset` behind `arg`.
    #[must_use]
    pub fn word(&self, arg: Arg, offset: usize) -> u64 {
        let bytes = self.bytes(arg, offset + 8);
        bytes
            .get(offset..)
            .and_then(|b| b.try_into().ok())
            .map_or(0, u64::from_le_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_there_and_back() {
        let mut b = Batch::new();
        let d = b.data(b"abc");
        let e = b.room(8);
        b.call(39, &[]);
        b.call(1, &[1.into(), d, 3u64.into(), e]);
        let bytes = b.encode(0x1000);
        assert_eq!(bytes.len(), 8 + 2 * ENTRY + 16);
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!(
            (word(8), word(72), word(72 + 16)),
            (39, 1, 0x1000 + 8 + 128)
        );
        assert_eq!(word(72 + 32), 0x1000 + 8 + 128 + 8);
        let mut after = bytes.clone();
        after[8 + 56..8 + 64].copy_from_slice(&(-2i64).to_le_bytes());
        after[8 + 128 + 8] = 7;
        b.decode(&after);
        assert_eq!(b.result(0), Err(Errno::ENOENT));
        assert_eq!(b.result(1), Ok(0));
        assert_eq!(b.word(e, 0), 7);
        assert_eq!(b.result(2), Err(Errno::ENOSYS));
    }
}

//! Bytes that wait until a descriptor takes them.

use nix::errno::Errno;
use std::collections::VecDeque;
use std::io;
use std::os::fd::AsFd;

/// The bytes.
#[derive(Debug, Default)]
pub struct Queue(VecDeque<u8>);

impl Queue {
    /// How many.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Adds some.
    pub fn push(&mut self, bytes: &[u8]) {
        self.0.extend(bytes);
    }

    /// Drops all.
    pub fn clear(&mut self) {
        self.0.clear();
    }

    /// Writes what goes without waiting.
    ///
    /// # Errors
    /// Nobody reads any more.
    pub fn flush(&mut self, to: impl AsFd) -> io::Result<()> {
        self.flush_most(to, usize::MAX).map(drop)
    }

    /// Writes what goes without waiting, but no more than `most`. Returns how much it was.
    ///
    /// # Errors
    /// Nobody reads any more.
    pub fn flush_most(&mut self, to: impl AsFd, most: usize) -> io::Result<usize> {
        let mut done = 0;
        while !self.0.is_empty() && done < most {
            let piece = self.0.as_slices().0;
            match nix::unistd::write(&to, &piece[..piece.len().min(most - done)]) {
                Ok(n) => {
                    self.0.drain(..n);
                    done += n;
                }
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(done)
    }
}

/// What there is to read.
#[derive(Debug, PartialEq, Eq)]
pub enum Got {
    /// Bytes.
    Bytes(Vec<u8>),
    /// Nothing at present.
    Nothing,
    /// The other end is closed.
    End,
}

/// Reads what is there.
pub fn read(from: impl AsFd) -> Got {
    let mut buffer = vec![0; 65536];
    loop {
        match nix::unistd::read(&from, &mut buffer) {
            Ok(0) => return Got::End,
            Ok(n) => {
                buffer.truncate(n);
                return Got::Bytes(buffer);
            }
            Err(Errno::EAGAIN) => return Got::Nothing,
            Err(Errno::EINTR) => {}
            Err(_) => return Got::End,
        }
    }
}

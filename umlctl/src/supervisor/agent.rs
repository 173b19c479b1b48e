//! Our end of the agent channel: frames go to and fro between streams and those they belong to.

use super::Error;
use super::console::pair;
use super::queue::{Got, Queue, read};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use umlctl_agent::wire::{Decoder, Frame, Kind, LINE_WINDOW, reset};

/// Nothing is taken from clients while so much waits to be sent.
const FULL: usize = 256 << 10;

/// How much may be sent between a reset and the answer to it. With a full window before it the terminal's buffer is not full.
const AFTER_RESET: usize = 512;

/// Whose a stream is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// A client's, by its number.
    Client(u32),
    /// The supervisor's own; answers do not matter.
    Own,
}

/// The channel.
#[derive(Debug)]
pub struct Channel {
    end: OwnedFd,
    open: bool,
    output: Queue,
    /// Bytes that were sent and that the agent has not read, as far as we know.
    unread: usize,
    /// What comes before the agent has heard of a reset is of an earlier life.
    resetting: bool,
    decoder: Decoder,
    streams: BTreeMap<u32, Owner>,
    last: u32,
}

/// What the agent has said.
#[derive(Debug)]
pub enum Said {
    /// It is there, with this version of the protocol.
    Hello(u32),
    /// Something for a client.
    To(u32, Frame),
}

impl Channel {
    /// Our end, and main's.
    ///
    /// # Errors
    /// The kernel's.
    pub fn new() -> Result<(Self, OwnedFd), Error> {
        let (end, mains) = pair()?;
        let channel = Self {
            end,
            open: true,
            output: Queue::default(),
            unread: 0,
            resetting: false,
            decoder: Decoder::default(),
            streams: BTreeMap::new(),
            last: 0,
        };
        Ok((channel, mains))
    }

    /// The descriptor, until main has closed its end.
    #[must_use]
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.open.then(|| self.end.as_fd())
    }

    /// Whether to wait until something can be written.
    #[must_use]
    pub fn wants_to_write(&self) -> bool {
        !self.output.is_empty() && self.unread < LINE_WINDOW
    }

    /// Whether clients have to wait.
    #[must_use]
    pub fn full(&self) -> bool {
        self.output.len() > FULL
    }

    /// A new stream.
    pub fn begin(&mut self, owner: Owner) -> u32 {
        // Never 0, and none that is in use: a stream may live as long as the VM.
        loop {
            self.last = self.last.checked_add(1).unwrap_or(1);
            if !self.streams.contains_key(&self.last) {
                break;
            }
        }
        self.streams.insert(self.last, owner);
        self.last
    }

    /// The owner is gone.
    pub fn abandon(&mut self, stream: u32) {
        if self.streams.remove(&stream).is_some() {
            self.send(&Frame::new(Kind::Reset, stream, vec![]));
        }
    }

    /// Whether the stream still is one.
    #[must_use]
    pub fn has(&self, stream: u32) -> bool {
        self.streams.contains_key(&stream)
    }

    /// The agent has lived before, with another supervisor: all that was is over.
    pub fn reset(&mut self) {
        self.output.push(&reset());
        self.resetting = true;
        // How much it has not read of what it was sent then nobody knows. Little more may come until it has.
        self.unread = LINE_WINDOW - AFTER_RESET;
    }

    /// Queues a frame.
    pub fn send(&mut self, frame: &Frame) {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        self.output.push(&bytes);
    }

    /// Sends what goes.
    pub fn flush(&mut self) {
        let room = LINE_WINDOW.saturating_sub(self.unread);
        match self.output.flush_most(&self.end, room) {
            Ok(n) => self.unread += n,
            Err(_) => self.output.clear(),
        }
    }

    /// Reads what is there.
    pub fn take(&mut self) -> Vec<Said> {
        match read(&self.end) {
            Got::Bytes(bytes) => self.decoder.push(&bytes),
            Got::Nothing => {}
            Got::End => self.open = false,
        }
        let mut said = Vec::new();
        while let Some(frame) = self.decoder.next_frame() {
            match (frame.kind, frame.as_i32()) {
                (Kind::Hello, version) => {
                    // It counts from the end of the reset; what was sent after that is not read yet, but is little.
                    self.unread = 0;
                    self.resetting = false;
                    said.extend(version.map(|v| Said::Hello(v.cast_unsigned())));
                    continue;
                }
                (Kind::Taken, taken) if !self.resetting => {
                    let taken = taken.and_then(|n| usize::try_from(n).ok()).unwrap_or(0);
                    self.unread = self.unread.saturating_sub(taken);
                    continue;
                }
                _ if self.resetting => continue,
                _ => {}
            }
            let owner = self.streams.get(&frame.stream).copied();
            let last = match frame.kind {
                Kind::Exit | Kind::Reset => true,
                // We ask but once.
                Kind::Done => owner == Some(Owner::Own),
                _ => false,
            };
            if last {
                self.streams.remove(&frame.stream);
            }
            if let Some(Owner::Client(client)) = owner {
                said.push(Said::To(client, frame));
            }
        }
        said
    }
}

/// Whether a client may send such a frame. The rest is the agent's to send, or concerns the streams of others.
#[must_use]
pub fn allowed(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::Ping
            | Kind::TimeSet
            | Kind::Reseed
            | Kind::Reset
            | Kind::Exec
            | Kind::Stdin
            | Kind::Credit
            | Kind::Eof
            | Kind::Signal
            | Kind::WinSize
    )
}

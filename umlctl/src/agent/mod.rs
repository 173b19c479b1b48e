//! The asking end of the agent channel: a stream over a VM's control socket.

pub mod copy;
pub mod exec;

use crate::control::client::Client;
use crate::control::{self, Request};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use umlctl_agent::exec::Exec;
use umlctl_agent::wire::{Decoder, Frame, Kind, WINDOW};

/// What can go wrong between us and the agent.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// the control socket
    #[error(transparent)]
    Control(#[from] control::Error),
    /// the connection failed
    #[error("the connection to the VM is broken")]
    Io(#[source] std::io::Error),
    /// the stream was ended
    #[error("the VM has ended")]
    Gone,
    /// the agent refuses
    #[error("the agent in the guest says: {0}")]
    Refused(String),
    /// too much for one message
    #[error("the command and its environment are too long: at most 64 kB can be given")]
    TooLong,
    /// our own side
    #[error("{0}")]
    Here(#[source] std::io::Error),
    /// the guest's side of a copy
    #[error("in the guest: {0}")]
    There(String),
}

/// The only stream of a connection; the supervisor gives it its number on the channel.
const STREAM: u32 = 1;

/// How a program in the guest has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// By a signal.
    pub by_signal: bool,
    /// The code or the signal.
    pub value: i32,
}

impl Ended {
    /// As a shell has it.
    #[must_use]
    pub fn code(self) -> u8 {
        let base = if self.by_signal { 128 } else { 0 };
        u8::try_from(base + (self.value & 0xff)).unwrap_or(u8::MAX)
    }
}

/// A stream.
#[derive(Debug)]
pub struct Session {
    socket: UnixStream,
    decoder: Decoder,
    /// How much input the agent will take.
    credit: usize,
}

impl Session {
    /// Begins a stream.
    ///
    /// # Errors
    /// The agent does not answer.
    pub fn begin(client: Client, exec: &Exec) -> Result<Self, Error> {
        let payload = exec.encode().ok_or(Error::TooLong)?;
        let (socket, rest) = client.switch(&Request::Agent)?;
        let mut decoder = Decoder::default();
        decoder.push(&rest);
        let mut session = Self {
            socket,
            decoder,
            credit: WINDOW,
        };
        session.send(Kind::Exec, payload)?;
        Ok(session)
    }

    /// Sends a frame. If nobody is there any more that is no error: what was said before is still to be heard, and may say
    /// how it ended.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn send(&mut self, kind: Kind, payload: impl Into<Vec<u8>>) -> Result<(), Error> {
        self.send_frame(&Frame::new(kind, STREAM, payload))
    }

    fn send_frame(&mut self, frame: &Frame) -> Result<(), Error> {
        let mut bytes = Vec::new();
        frame.encode(&mut bytes);
        match self.socket.write_all(&bytes) {
            Err(e) if !matches!(e.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {
                Err(Error::Io(e))
            }
            _ => Ok(()),
        }
    }

    /// Allows the agent to send more.
    ///
    /// # Errors
    /// The connection is broken.
    pub fn grant(&mut self, channel: u8, bytes: usize) -> Result<(), Error> {
        self.send_frame(&Frame::credit(STREAM, channel, bytes))
    }

    /// A frame that has come already. Credit is kept account of here.
    pub fn heard(&mut self) -> Option<Frame> {
        loop {
            let frame = self.decoder.next_frame()?;
            match (frame.kind, frame.as_credit()) {
                (Kind::Credit, Some((_, n))) => self.credit = self.credit.saturating_add(n),
                _ => return Some(frame),
            }
        }
    }

    /// Waits for bytes.
    ///
    /// # Errors
    /// [`Error::Gone`] at the end.
    pub fn listen(&mut self) -> Result<(), Error> {
        let mut bytes = [0; 65536];
        match self.socket.read(&mut bytes) {
            Ok(0) => Err(Error::Gone),
            Ok(n) => {
                self.decoder.push(&bytes[..n]);
                Ok(())
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => Ok(()),
            Err(e) if e.kind() == ErrorKind::ConnectionReset => Err(Error::Gone),
            Err(e) => Err(Error::Io(e)),
        }
    }

    /// How much input may be sent now.
    #[must_use]
    pub fn credit(&self) -> usize {
        self.credit
    }

    /// Sends input, no more than [`Session::credit`].
    ///
    /// # Errors
    /// The connection is broken.
    pub fn input(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.credit = self.credit.saturating_sub(bytes.len());
        self.send(Kind::Stdin, bytes)
    }

    /// The connection.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// What an `Exit` or `Reset` says.
///
/// # Errors
/// It is a `Reset`.
pub fn ended(frame: &Frame) -> Result<Option<Ended>, Error> {
    match (frame.kind, frame.as_exit()) {
        (Kind::Exit, Some((by_signal, value))) => Ok(Some(Ended { by_signal, value })),
        (Kind::Reset, _) => Err(Error::Refused(
            String::from_utf8_lossy(&frame.payload).into_owned(),
        )),
        _ => Ok(None),
    }
}

//! Connections to the control socket.

use super::queue::{Got, Queue, read};
use crate::control::{Answer, Request, WaitFor, decode, encode, may};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use umlctl_agent::wire::Decoder;

/// So many at a time; further ones are turned away.
pub const MOST: usize = 256;
/// What a viewer of the console is behind at most; then it misses some.
const BEHIND: usize = 1 << 20;
/// What a stream's client is behind at most. The windows of its channels allow less.
const STREAM_BEHIND: usize = 4 << 20;

/// What a connection is used for.
#[derive(Debug)]
pub enum Role {
    /// Nothing was asked yet.
    New,
    /// It is told when something is so.
    Waits(WaitFor),
    /// It is told how a snapshot goes.
    Captures,
    /// It carries the console.
    Console,
    /// It carries a stream to the agent.
    Stream {
        /// The stream's number on the agent channel.
        stream: u32,
        /// What has come from the client.
        decoder: Decoder,
    },
}

/// A connection.
#[derive(Debug)]
pub struct Client {
    socket: UnixStream,
    input: Vec<u8>,
    output: Queue,
    /// What it is used for.
    pub role: Role,
    /// Closed once all was sent.
    pub closing: bool,
}

impl Client {
    /// The next connection, if there is one from somebody who may.
    pub fn accept(listener: &UnixListener) -> Option<Self> {
        let (socket, _) = listener.accept().ok()?;
        if !may(&socket) {
            return None;
        }
        socket.set_nonblocking(true).ok()?;
        Some(Self {
            socket,
            input: Vec::new(),
            output: Queue::default(),
            role: Role::New,
            closing: false,
        })
    }

    /// The connection.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whether something waits to be sent.
    #[must_use]
    pub fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// What has come.
    pub fn read(&self) -> Got {
        read(&self.socket)
    }

    /// Adds what has come, and takes a request off it.
    ///
    /// # Errors
    /// It is none.
    pub fn request(&mut self, bytes: &[u8]) -> Result<Option<Request>, crate::control::Error> {
        self.input.extend(bytes);
        decode(&mut self.input)
    }

    /// What has come after the request.
    pub fn rest(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.input)
    }

    /// Answers.
    pub fn answer(&mut self, answer: &Answer) {
        self.output.push(&encode(answer));
    }

    /// Answers that it cannot be, and closes.
    pub fn refuse(&mut self, message: impl Into<String>) {
        self.answer(&Answer::Error {
            message: message.into(),
        });
        self.closing = true;
    }

    /// Bytes of what it carries.
    pub fn send(&mut self, bytes: &[u8]) {
        match self.role {
            Role::Console if self.output.len() > BEHIND => {}
            Role::Stream { .. } if self.output.len() > STREAM_BEHIND => {
                self.output.clear();
                self.closing = true;
            }
            _ => self.output.push(bytes),
        }
    }

    /// Sends what goes.
    ///
    /// # Errors
    /// The other end is closed.
    pub fn flush(&mut self) -> io::Result<()> {
        self.output.flush(&self.socket)
    }
}

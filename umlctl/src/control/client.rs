//! The asking end.

use super::{Answer, Error, Request, decode, encode};
use crate::vm::home::Vm;
use crate::vm::state::State;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;

/// A connection to a VM's supervisor.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    bytes: Vec<u8>,
}

impl Client {
    /// Connects. The socket's path may be longer than an address has room for, so it is reached through its directory.
    ///
    /// # Errors
    /// [`Error::Gone`] if nobody listens.
    pub fn connect(vm: &Vm) -> Result<Self, Error> {
        let gone = |e: std::io::Error| match e.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => Error::Gone,
            _ => Error::Socket(e),
        };
        let stream = super::short(&vm.socket(), UnixStream::connect).map_err(gone)?;
        Ok(Self {
            stream,
            bytes: Vec::new(),
        })
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// The supervisor refuses, or has gone.
    pub fn ask(&mut self, request: &Request) -> Result<Answer, Error> {
        self.stream.write_all(&encode(request)).map_err(gone)?;
        self.answer()
    }

    /// Waits for a further answer.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub fn answer(&mut self) -> Result<Answer, Error> {
        loop {
            match decode(&mut self.bytes)? {
                Some(Answer::Error { message }) => return Err(Error::Refused(message)),
                Some(answer) => return Ok(answer),
                None => {}
            }
            let mut part = [0; 4096];
            match self.stream.read(&mut part) {
                Ok(0) => return Err(Error::Gone),
                Ok(n) => self.bytes.extend(&part[..n]),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(gone(e)),
            }
        }
    }

    /// Asks for something that is answered by a state.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub fn ask_state(&mut self, request: &Request) -> Result<State, Error> {
        match self.ask(request)? {
            Answer::State { state } => Ok(state),
            other => Err(Error::Malformed(format!("{other:?} answers {request:?}"))),
        }
    }

    /// Asks for the connection to carry something else. Returns the connection, and what has come over it by now.
    ///
    /// # Errors
    /// As [`Client::ask`].
    pub fn switch(mut self, request: &Request) -> Result<(UnixStream, Vec<u8>), Error> {
        match self.ask(request)? {
            Answer::Go => Ok((self.stream, self.bytes)),
            other => Err(Error::Malformed(format!("{other:?} answers {request:?}"))),
        }
    }
}

fn gone(e: std::io::Error) -> Error {
    match e.kind() {
        ErrorKind::BrokenPipe | ErrorKind::ConnectionReset | ErrorKind::UnexpectedEof => {
            Error::Gone
        }
        _ => Error::Socket(e),
    }
}

//! Files and directories to and from the guest.

use super::{Ended, Error, Session, ended};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use umlctl_agent::archive;
use umlctl_agent::wire::{Frame, Kind, MAX_DATA, channel};

/// What the guest has said and how it ended, as far as we know.
#[derive(Debug, Default)]
struct Guest {
    message: Vec<u8>,
    ended: Option<Ended>,
}

/// Messages of the guest are cut to this.
const LONGEST_MESSAGE: usize = 4096;

impl Guest {
    fn hear(&mut self, session: &mut Session, frame: &Frame) -> Result<(), Error> {
        if frame.kind == Kind::Stderr {
            session.grant(channel::STDERR, frame.payload.len())?;
            self.message.extend(&frame.payload);
            self.message.truncate(LONGEST_MESSAGE);
        }
        if let Some(e) = ended(frame)? {
            self.ended = Some(e);
        }
        Ok(())
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.message).trim_end().to_owned()
    }

    /// Whether all was copied.
    fn result(&self) -> Result<bool, Error> {
        match self.ended {
            Some(Ended {
                by_signal: false,
                value: 0,
            }) => Ok(true),
            Some(Ended {
                by_signal: false,
                value: 3,
            }) => {
                eprintln!("{}", self.text());
                Ok(false)
            }
            _ if self.message.is_empty() => {
                Err(Error::There("the copying process was killed".into()))
            }
            _ => Err(Error::There(self.text())),
        }
    }
}

/// A reader or writer over a session. An error of the session is kept, as those of `io` say less.
struct Pipe<'a> {
    session: &'a mut Session,
    guest: Guest,
    bytes: Vec<u8>,
    at: usize,
    owed: usize,
    failed: Option<Error>,
}

impl<'a> Pipe<'a> {
    fn new(session: &'a mut Session) -> Self {
        Self {
            session,
            guest: Guest::default(),
            bytes: Vec::new(),
            at: 0,
            owed: 0,
            failed: None,
        }
    }

    /// Waits for the next frame.
    fn frame(&mut self) -> Result<Frame, Error> {
        loop {
            if let Some(frame) = self.session.heard() {
                self.guest.hear(self.session, &frame)?;
                return Ok(frame);
            }
            self.session.listen()?;
        }
    }

    fn keep<T>(&mut self, result: Result<T, Error>) -> io::Result<T> {
        result.map_err(|e| {
            self.failed = Some(e);
            io::Error::other("the connection to the guest")
        })
    }

    /// The next piece of output; false at its end.
    fn piece(&mut self) -> Result<bool, Error> {
        if self.owed > 0 {
            self.session.grant(channel::STDOUT, self.owed)?;
            self.owed = 0;
        }
        while self.guest.ended.is_none() {
            let frame = self.frame()?;
            match frame.kind {
                Kind::Stdout => {
                    self.owed = frame.payload.len();
                    (self.bytes, self.at) = (frame.payload, 0);
                    return Ok(true);
                }
                Kind::Eof if frame.payload == [channel::STDOUT] => return Ok(false),
                _ => {}
            }
        }
        Ok(false)
    }

    /// Waits for the end, and makes of all that is known what is told.
    fn finish<T>(mut self, result: io::Result<T>) -> Result<(T, bool), Error> {
        if let Some(e) = self.failed.take() {
            return Err(e);
        }
        if let Err(e) = &result
            && self.guest.ended.is_none()
            && e.kind() != io::ErrorKind::UnexpectedEof
        {
            // Our side does not go on. The guest's is hung up with the connection.
            return Err(Error::Here(io::Error::new(e.kind(), e.to_string())));
        }
        while self.guest.ended.is_none() {
            if self.at >= self.bytes.len() {
                self.piece()?;
            }
            self.bytes.clear();
        }
        let complete = self.guest.result()?;
        Ok((result.map_err(Error::Here)?, complete))
    }
}

impl Read for Pipe<'_> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        if self.at >= self.bytes.len() {
            let more = self.piece();
            if !self.keep(more)? {
                return Ok(0);
            }
        }
        let n = to.len().min(self.bytes.len() - self.at);
        to[..n].copy_from_slice(&self.bytes[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}

impl Write for Pipe<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        while self.session.credit() == 0 && self.guest.ended.is_none() {
            // Credit is taken account of in passing, so what was heard has to be looked at without waiting.
            let heard = match self.session.heard() {
                Some(frame) => self.guest.hear(self.session, &frame),
                None if self.session.credit() > 0 => break,
                None => self.session.listen(),
            };
            self.keep(heard)?;
        }
        if self.guest.ended.is_some() {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the guest takes no more",
            ));
        }
        let n = bytes.len().min(MAX_DATA).min(self.session.credit());
        let sent = self.session.input(&bytes[..n]);
        self.keep(sent)?;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// From a session that sends, to `to`. Returns where it is now, and whether it is complete.
///
/// # Errors
/// Either side's.
pub fn fetch(session: &mut Session, to: &Path) -> Result<(PathBuf, bool), Error> {
    let mut reader = BufReader::with_capacity(64 << 10, Pipe::new(session));
    // Nothing of the guest's gets a set-user-id bit here.
    let result = archive::receive(to, &mut reader, 0o777);
    reader.into_inner().finish(result)
}

/// From `from`, to a session that receives. Says whether it is complete.
///
/// # Errors
/// Either side's.
pub fn push(session: &mut Session, from: &Path) -> Result<bool, Error> {
    let mut complete = true;
    let mut writer = BufWriter::with_capacity(MAX_DATA, Pipe::new(session));
    let result = archive::send(from, &mut writer, &mut |p| {
        complete = false;
        eprintln!(
            "{}: left out, it is neither a file nor a directory nor a link",
            p.display()
        );
    })
    .and_then(|()| writer.flush());
    let (pipe, _) = writer.into_parts();
    if result.is_ok() {
        pipe.session.send(Kind::Eof, [channel::STDIN])?;
    }
    let ((), all) = pipe.finish(result)?;
    Ok(all && complete)
}

//! The asking end.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::{Answer, Failure, Request, SOCKET};

/// What the answer to `list` begins with.
const LIST: &str = "{\"answer\":\"list\",";

/// A connection to a daemon.
#[derive(Debug)]
pub struct Client {
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects to the daemon that serves a store, if there is one.
    ///
    /// # Errors
    /// When there is a socket that cannot be used for another reason than that nobody serves it.
    pub fn connect(store: &Path) -> Result<Option<Self>, Failure> {
        match UnixStream::connect(store.join(SOCKET)) {
            Ok(stream) => Ok(Some(Self {
                stream: BufReader::new(stream),
            })),
            Err(e)
                if matches!(
                    e.kind(),
                    std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused
                ) =>
            {
                Ok(None)
            }
            Err(e) => Err(Failure::new(format!(
                "the daemon's socket in {} cannot be used: {e}",
                store.display()
            ))),
        }
    }

    /// Asks and waits for the answer.
    ///
    /// # Errors
    /// The daemon's, or that it went away.
    pub fn ask(&mut self, request: &Request) -> Result<Answer, Failure> {
        let gone = |e: std::io::Error| Failure::new(format!("the daemon went away: {e}"));
        let mut line =
            serde_json::to_vec(request).map_err(|e| Failure::new(format!("the request: {e}")))?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line).map_err(gone)?;
        let mut answer = String::new();
        self.stream.read_line(&mut answer).map_err(gone)?;
        if answer.is_empty() {
            return Err(Failure::new(
                "the daemon went away without an answer; see logs/daemon.log in the store",
            ));
        }
        // A list may be long; read as one kind of answer among others it would be copied piece by piece first.
        let read = if answer.starts_with(LIST) {
            serde_json::from_str(&answer).map(Answer::List)
        } else {
            serde_json::from_str(&answer)
        };
        match read {
            Ok(Answer::Error(f)) => Err(f),
            Ok(a) => Ok(a),
            Err(e) => Err(Failure::new(format!(
                "the daemon's answer cannot be read ({e}); is it another version of cowfs?"
            ))),
        }
    }
}

//! What goes over a VM's control socket: a request and its answers, each as a length (u32, little-endian) and JSON.
//!
//! After the answer to `console` the connection carries the console's bytes, after that to `agent` frames of
//! [`umlctl_agent::wire`], whose stream number does not matter.

pub mod client;

use crate::snapshots::store::Figures;
use crate::vm::name::Name;
use crate::vm::state::State;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

/// Version of the protocol.
pub const VERSION: u32 = 1;
/// Longest message.
pub const LONGEST: usize = 64 << 10;

/// What can be waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WaitFor {
    /// The agent answers.
    Agent,
    /// The VM has ended.
    End,
}

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// The state.
    Info,
    /// To be told when something is so.
    Wait {
        /// What.
        until: WaitFor,
    },
    /// The console.
    Console,
    /// A stream to the agent.
    Agent,
    /// Power off; kill after some time. Answered when it has ended.
    Stop {
        /// After how long.
        timeout_s: u32,
    },
    /// Kill. Answered when it has ended.
    Kill,
    /// Take a snapshot. Answered twice: when the point in time is fixed, and when all is saved.
    Snapshot {
        /// Its name.
        name: Name,
        /// End the VM at the point in time.
        kill: bool,
        /// Copy everything while it stands still.
        stop_and_copy: bool,
        /// It is to outlast a power cut.
        durable: bool,
    },
}

/// What is answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum Answer {
    /// What was asked is so.
    State {
        /// The state.
        state: State,
    },
    /// How a snapshot goes.
    Snapshot {
        /// What it has cost so far.
        figures: Figures,
        /// Whether all is saved.
        saved: bool,
    },
    /// What the connection carries from here on is what was asked for.
    Go,
    /// It cannot be done.
    Error {
        /// Why.
        message: String,
    },
}

/// A message with its version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Message<T> {
    version: u32,
    #[serde(flatten)]
    body: T,
}

/// What can be wrong with a message, or the socket.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// the message is too long
    #[error("a message of {0} bytes is longer than the {LONGEST} allowed")]
    Length(usize),
    /// the message cannot be read
    #[error("the message cannot be understood: {0}")]
    Malformed(String),
    /// the other end speaks another version
    #[error(
        "the message has version {0}, and this umlctl knows {VERSION}: use the umlctl that started the VM"
    )]
    Newer(u32),
    /// the supervisor does not answer
    #[error("the VM's supervisor went away")]
    Gone,
    /// the socket cannot be used
    #[error("the control socket cannot be used")]
    Socket(#[source] std::io::Error),
    /// the supervisor says no
    #[error("{0}")]
    Refused(String),
}

/// A message as it is sent.
#[must_use]
pub fn encode<T: Serialize>(body: &T) -> Vec<u8> {
    let message = Message {
        version: VERSION,
        body,
    };
    let text = serde_json::to_vec(&message).unwrap_or_default();
    let mut bytes = u32::try_from(text.len())
        .unwrap_or(0)
        .to_le_bytes()
        .to_vec();
    bytes.extend(text);
    bytes
}

/// Takes a message off the front of what has come, if it is there in full.
///
/// # Errors
/// What is there is no message.
pub fn decode<T: DeserializeOwned>(bytes: &mut Vec<u8>) -> Result<Option<T>, Error> {
    let Some(head) = bytes.first_chunk() else {
        return Ok(None);
    };
    let length = u32::from_le_bytes(*head) as usize;
    if length > LONGEST {
        return Err(Error::Length(length));
    }
    let Some(text) = bytes.get(4..4 + length) else {
        return Ok(None);
    };
    let message = understand(text);
    bytes.drain(..4 + length);
    message.map(Some)
}

fn understand<T: DeserializeOwned>(text: &[u8]) -> Result<T, Error> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let malformed = |e: serde_json::Error| Error::Malformed(e.to_string());
    let Version { version } = serde_json::from_slice(text).map_err(malformed)?;
    if version != VERSION {
        return Err(Error::Newer(version));
    }
    let message: Message<T> = serde_json::from_slice(text).map_err(malformed)?;
    Ok(message.body)
}

/// Whether whoever is at the other end of a socket may ask for something: root, and our own user.
pub fn may(socket: &UnixStream) -> bool {
    let own = nix::unistd::geteuid().as_raw();
    getsockopt(socket, PeerCredentials).is_ok_and(|peer| [0, own].contains(&peer.uid()))
}

/// Does something with the path of a socket that may be longer than an address has room for (107 bytes), by a descriptor of
/// its directory.
///
/// # Errors
/// Those of `act`, or the directory cannot be opened.
pub fn short<T>(
    path: &Path,
    act: impl FnOnce(PathBuf) -> std::io::Result<T>,
) -> std::io::Result<T> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return act(path.to_owned());
    };
    let dir = File::open(dir)?;
    act(Path::new("/proc/self/fd")
        .join(dir.as_raw_fd().to_string())
        .join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        for request in [
            Request::Info,
            Request::Wait {
                until: WaitFor::Agent,
            },
            Request::Stop { timeout_s: 7 },
        ] {
            let all = encode(&request);
            let mut bytes = Vec::new();
            for b in &all {
                assert_eq!(decode::<Request>(&mut bytes).unwrap(), None);
                bytes.push(*b);
            }
            assert_eq!(decode(&mut bytes).unwrap(), Some(request));
            assert!(bytes.is_empty());
        }
    }

    #[test]
    fn refused() {
        for text in [
            "",
            "null",
            "{}",
            "[1]",
            r#"{"version":1}"#,
            r#"{"version":1,"request":"fly"}"#,
            r#"{"version":2,"request":"info"}"#,
        ] {
            let mut bytes = u32::try_from(text.len()).unwrap().to_le_bytes().to_vec();
            bytes.extend(text.bytes());
            assert!(decode::<Request>(&mut bytes).is_err(), "{text}");
        }
        assert!(decode::<Request>(&mut vec![0xff; 8]).is_err());
    }
}

//! `state.json`: how far a VM is in its life. Written by its supervisor; whether the supervisor lives is told by its lock.

use super::{Error, home};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The version that is written.
pub const VERSION: u32 = 1;

/// Where a VM is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Its files are there; nothing of it has run yet.
    Created,
    /// The supervisor is at work; the guest's kernel has not started.
    Starting,
    /// The guest's kernel runs; the agent has not spoken yet.
    Booting,
    /// The agent answers.
    Running,
    /// It was asked to go down.
    Stopping,
    /// It has ended.
    Ended,
    /// Its supervisor was killed, and all of it with the supervisor. Never in the file: it is what a file that says
    /// anything else means when nobody holds the lock.
    Lost,
}

impl Phase {
    /// As it is shown.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Starting => "starting",
            Self::Booting => "booting",
            Self::Running => "running",
            Self::Stopping => "stopping",
            Self::Ended => "ended",
            Self::Lost => "lost",
        }
    }

    /// Whether there are processes of it.
    #[must_use]
    pub fn alive(self) -> bool {
        matches!(
            self,
            Self::Starting | Self::Booting | Self::Running | Self::Stopping
        )
    }
}

/// How a VM has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// The guest's kernel has exited with this status; 0 is a power-off.
    Code(i32),
    /// It was killed by this signal.
    Signal(i32),
}

impl Exit {
    /// As a shell has it.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::Code(c) => u8::try_from(c & 0xff).unwrap_or(1),
            Self::Signal(s) => u8::try_from(128 + (s & 0x7f)).unwrap_or(1),
        }
    }
}

/// The state. Process numbers are those of the supervisor's pid namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Of this file.
    pub version: u32,
    /// How far it is.
    pub phase: Phase,
    /// The supervisor.
    pub supervisor: Option<i32>,
    /// Process 1 of the VM's pid namespace.
    pub keeper: Option<i32>,
    /// The guest's kernel.
    pub main: Option<i32>,
    /// When the guest's kernel was started: microseconds since 1970.
    pub started_us: Option<u64>,
    /// From then until the agent spoke.
    pub boot_us: Option<u64>,
    /// How it has ended.
    pub exit: Option<Exit>,
    /// Why, where umlctl itself has ended it.
    #[serde(default)]
    pub reason: Option<String>,
}

impl State {
    /// Of a VM of which nothing runs.
    #[must_use]
    pub fn new(phase: Phase) -> Self {
        Self {
            version: VERSION,
            phase,
            supervisor: None,
            keeper: None,
            main: None,
            started_us: None,
            boot_us: None,
            exit: None,
            reason: None,
        }
    }

    /// Reads it; a VM that has none was only just created.
    ///
    /// # Errors
    /// It is damaged, or of a newer umlctl.
    pub fn load(path: &Path) -> Result<Self, Error> {
        match home::read_json(path, VERSION) {
            Err(Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                Ok(Self::new(Phase::Created))
            }
            other => other,
        }
    }

    /// Writes it, whole or not at all.
    ///
    /// # Errors
    /// The file system's.
    pub fn save(&self, path: &Path) -> Result<(), Error> {
        home::write_json(path, self)
    }
}

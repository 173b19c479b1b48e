//! What is asked and answered. The JSON of the answers is what `--json` prints, but for lists, whose rows are short on
//! their way.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Listing;
use crate::history::prune::{Rules, Verdict};
use crate::store::packs::PackReport;
use crate::store::{GcReport, Stats, StoreError};

/// Version of the protocol and of the JSON that commands print.
pub const SCHEMA: u32 = 1;

/// What to mount where.
#[derive(Debug, Clone, Serialize, Deserialize, Default)]
pub struct MountSpec {
    /// Where.
    pub mountpoint: PathBuf,
    /// Head (`main` if there is neither).
    pub head: Option<String>,
    /// Checkpoint, read-only.
    pub at: Option<String>,
    /// Mount options, as behind `-o`.
    pub options: Vec<String>,
}

/// A request.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
#[allow(missing_docs, reason = "as the commands of the same names")]
pub enum Request {
    Checkpoint {
        head: String,
        name: Option<String>,
        tags: BTreeMap<String, String>,
        wait: bool,
    },
    Rollback {
        head: String,
        checkpoint: String,
        discard: bool,
        dry_run: bool,
        /// What is left behind gets this name.
        keep_as: Option<String>,
    },
    Clone {
        head: Option<String>,
        checkpoint: String,
        new_head: String,
    },
    List,
    Diff {
        head: Option<String>,
        a: String,
        b: String,
    },
    Restore {
        head: String,
        checkpoint: String,
        paths: Vec<String>,
    },
    Tag {
        head: Option<String>,
        checkpoint: String,
        set: BTreeMap<String, String>,
        remove: Vec<String>,
    },
    Pin {
        head: Option<String>,
        checkpoint: String,
        on: bool,
    },
    Rename {
        from: String,
        to: String,
    },
    Delete {
        name: String,
    },
    Gc,
    /// Waits for the collections that were asked for.
    GcWait,
    Pack {
        /// Head that names like `latest` are of.
        head: Option<String>,
        checkpoints: Vec<String>,
        level: i32,
    },
    Prune {
        rules: Rules,
        dry_run: bool,
    },
    Send {
        head: Option<String>,
        checkpoint: String,
        base: Option<String>,
        resume: Option<String>,
        level: i32,
        /// A pipe to write the stream to.
        pipe: PathBuf,
        /// A file with names of chunks (32 bytes each) that need not be sent.
        have: Option<PathBuf>,
    },
    Receive {
        name: Option<String>,
        /// A pipe to read the stream from.
        pipe: PathBuf,
    },
    /// Writes the names of all chunks (32 bytes each) to a pipe.
    Chunks {
        pipe: PathBuf,
    },
    Stats,
    Mount(MountSpec),
    Unmount {
        mountpoint: PathBuf,
        lazy: bool,
    },
}

/// One difference between two trees.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct DiffEntry {
    /// Path from the root.
    pub path: String,
    /// What happened.
    pub change: DiffKind,
}

/// Kinds of difference.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(rename_all = "snake_case")]
pub enum DiffKind {
    /// Only in the second.
    Added,
    /// Only in the first.
    Removed,
    /// Contents differ.
    Modified,
    /// Only mode, owner, times or attributes differ.
    Attributes,
}

/// A path that was not restored.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NotRestored {
    /// As it was given.
    pub path: String,
    /// Why.
    pub error: String,
}

/// An answer.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
#[allow(missing_docs, reason = "the names say it")]
pub enum Answer {
    Checkpoint {
        id: u64,
        name: String,
        head: String,
        elapsed_us: u64,
        durable: bool,
    },
    Rollback {
        name: String,
        head: String,
        left_behind: Option<String>,
        elapsed_us: u64,
    },
    /// What would be done.
    Plan {
        steps: Vec<String>,
    },
    List(Listing),
    Diff {
        entries: Vec<DiffEntry>,
    },
    Restored {
        paths: u64,
        failed: Vec<NotRestored>,
        elapsed_us: u64,
    },
    Gc {
        freed_pages: u64,
        freed_bytes: u64,
        live_pages: u64,
        elapsed_us: u64,
    },
    Stats {
        store: Stats,
        pid: u32,
        rss_bytes: u64,
        requests: u64,
        mounts: Vec<PathBuf>,
    },
    Packed(PackReport),
    Pruned {
        plan: Vec<Verdict>,
        dry_run: bool,
    },
    Sent {
        name: String,
        /// Chunks sent, and their bytes.
        chunks: u64,
        chunk_bytes: u64,
        /// Bytes of the stream.
        stream_bytes: u64,
        elapsed_us: u64,
    },
    Received {
        name: String,
        id: u64,
        /// Chunks that the store did not have, and their bytes.
        new_chunks: u64,
        new_bytes: u64,
        elapsed_us: u64,
    },
    Mounted {
        mountpoint: PathBuf,
    },
    Done,
    Error(Failure),
}

/// An answer as it goes out.
#[derive(Debug)]
pub enum Reply {
    /// To be written as JSON.
    Answer(Box<Answer>),
    /// JSON already, one line without its end.
    Line(Vec<u8>),
}

impl From<Answer> for Reply {
    fn from(a: Answer) -> Self {
        Reply::Answer(Box::new(a))
    }
}

impl Answer {
    /// The exit code that it means.
    pub fn code(&self) -> u8 {
        match self {
            Answer::Restored { failed, .. } if !failed.is_empty() => 3,
            Answer::Error(f) => f.code,
            _ => 0,
        }
    }
}

impl From<GcReport> for Answer {
    fn from(r: GcReport) -> Self {
        Answer::Gc {
            freed_pages: r.freed_pages,
            freed_bytes: r.freed_bytes,
            live_pages: r.live_pages,
            elapsed_us: r.elapsed_us,
        }
    }
}

/// An error with the exit code that it means.
#[derive(Debug, Clone, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// Exit code: 1 error, 2 usage, 3 partial, 10 no store, 11 locked.
    pub code: u8,
    /// What went wrong and what to do.
    pub message: String,
}

impl Failure {
    /// A plain error.
    pub fn new(message: impl Into<String>) -> Self {
        Self {
            code: 1,
            message: message.into(),
        }
    }
}

impl From<StoreError> for Failure {
    fn from(e: StoreError) -> Self {
        let code = match e {
            StoreError::NoStore(_) => 10,
            StoreError::Locked => 11,
            _ => 1,
        };
        let message = crate::errors::in_full(&e);
        Self { code, message }
    }
}

impl From<crate::fs::FsError> for Failure {
    fn from(e: crate::fs::FsError) -> Self {
        Self::new(e.to_string())
    }
}

impl From<crate::fuse::FuseError> for Failure {
    fn from(e: crate::fuse::FuseError) -> Self {
        use std::error::Error;
        match e.source() {
            Some(s) => Self::new(format!("{e}: {s}")),
            None => Self::new(e.to_string()),
        }
    }
}

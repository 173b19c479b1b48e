//! Open files: what is captured of each kind, and how it is made again.

use serde::{Deserialize, Serialize};

/// An open file description: what descriptors that were duplicated or inherited share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpenFile {
    /// Access mode and status flags, as of F_GETFL.
    pub flags: i32,
    /// Offset, bytes.
    pub offset: u64,
    /// What it is.
    pub kind: Kind,
}

/// Kinds of open files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Kind {
    /// A path that is opened again: a device that holds no state (`/dev/null`), a directory.
    Path(std::path::PathBuf),
}

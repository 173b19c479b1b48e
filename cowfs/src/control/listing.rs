//! What `list` is answered: rows on the way, in full where they are shown.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::store::{Origin, Row};

/// A head as listed.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[allow(missing_docs, reason = "as in the catalog")]
pub struct HeadInfo {
    pub name: String,
    pub parent: Option<String>,
    pub created_us: i64,
    pub mounted_at: Option<PathBuf>,
}

/// A checkpoint as listed.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[allow(missing_docs, reason = "as in the catalog")]
pub struct CheckpointInfo {
    pub id: u64,
    pub name: String,
    pub head: String,
    pub parent: Option<String>,
    pub created_us: i64,
    pub tags: BTreeMap<String, String>,
    pub pinned: bool,
    pub origin: Origin,
    pub mounted_at: Vec<PathBuf>,
}

/// A mount that shows a checkpoint.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Shown {
    /// Number of the checkpoint.
    pub id: u64,
    /// Where.
    pub at: PathBuf,
}

/// Heads and checkpoints as a daemon sends them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Listing {
    /// Heads.
    pub heads: Vec<HeadInfo>,
    /// Mounts of checkpoints.
    pub shown: Vec<Shown>,
    /// Checkpoints, by number.
    pub rows: Vec<Row>,
}

impl Listing {
    /// Heads and checkpoints in full.
    pub fn whole(&self) -> (Vec<HeadInfo>, Vec<CheckpointInfo>) {
        let names: HashMap<u64, &str> = self.rows.iter().map(|r| (r.id, r.name.as_str())).collect();
        let whole = |r: &Row| CheckpointInfo {
            id: r.id,
            name: r.name.clone(),
            head: r.head.clone(),
            parent: r
                .parent
                .and_then(|p| names.get(&p))
                .map(|n| (*n).to_owned()),
            created_us: r.created_us,
            tags: r.tags.clone(),
            pinned: r.pinned,
            origin: r.origin,
            mounted_at: self
                .shown
                .iter()
                .filter(|s| s.id == r.id)
                .map(|s| s.at.clone())
                .collect(),
        };
        (self.heads.clone(), self.rows.iter().map(whole).collect())
    }
}

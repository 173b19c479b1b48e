//! A checkpoint as a list has it on its way over the control socket.
//!
//! A thousand of them are asked for at once, so a row is an array with what differs from the usual at its end, and only if
//! something does. What depends on more than the checkpoint itself is not in it: where it is mounted, its parent's name.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize, Serializer};

use super::catalog::{Checkpoint, Origin};

/// One checkpoint of a list.
#[derive(Debug, Clone, Deserialize, PartialEq, Eq)]
#[allow(missing_docs, reason = "as in the catalog")]
pub struct Row {
    pub id: u64,
    pub name: String,
    pub head: String,
    pub parent: Option<u64>,
    pub created_us: i64,
    #[serde(default = "asked")]
    pub origin: Origin,
    #[serde(default)]
    pub pinned: bool,
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
}

fn asked() -> Origin {
    Origin::Asked
}

impl From<&Checkpoint> for Row {
    fn from(c: &Checkpoint) -> Self {
        Self {
            id: c.id,
            name: c.name.clone(),
            head: c.head.clone(),
            parent: c.parent,
            created_us: c.created_us,
            origin: c.origin,
            pinned: c.pinned,
            tags: c.tags.clone(),
        }
    }
}

impl Serialize for Row {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let first = (
            self.id,
            &self.name,
            &self.head,
            self.parent,
            self.created_us,
        );
        if self.origin == Origin::Asked && !self.pinned && self.tags.is_empty() {
            return first.serialize(s);
        }
        let (id, name, head, parent, created_us) = first;
        let (origin, pinned, tags) = (self.origin, self.pinned, &self.tags);
        (id, name, head, parent, created_us, origin, pinned, tags).serialize(s)
    }
}

/// The JSON of rows, with commas between them.
pub(super) fn text<'a>(all: impl Iterator<Item = &'a Checkpoint>) -> String {
    let rows: Vec<String> = all
        .filter_map(|c| serde_json::to_string(&Row::from(c)).ok())
        .collect();
    rows.join(",")
}

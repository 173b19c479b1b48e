//! The catalog: heads and checkpoints by name, and the operations that change it.
//!
//! It is kept in memory, written as JSON with every commit, and each change is a log record, so that replay comes to
//! the same catalog. An operation carries everything that decides its result (ids, names, times).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

pub use super::checkpoints::Checkpoints;
use super::error::StoreError;
use crate::tree::PageId;

/// Newest version of the catalog's JSON that this build reads.
pub const VERSION: u32 = 2;
/// What is written as long as nothing needs the newer one, so that an older build can still read the store.
const PLAIN: u32 = 1;
/// First character of the names of hidden heads, which no user's name may have.
pub const HIDDEN: char = '@';

/// A writable branch.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct Head {
    /// Number, never reused.
    pub id: u32,
    /// Root page of its tree.
    pub root: PageId,
    /// Pages and extents born after this generation belong to this head alone.
    pub base: u64,
    /// Next inode number.
    pub next_ino: u64,
    /// Checkpoint that it continues.
    pub parent: Option<u64>,
    /// Microseconds since 1970.
    pub created_us: i64,
}

/// Why a checkpoint exists.
#[derive(Debug, Clone, Copy, Serialize, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// Somebody asked for it.
    Asked,
    /// What a rollback left behind.
    LeftBehind,
}

/// A fixed point in time of one head.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct Checkpoint {
    /// Number, never reused; later ones are higher.
    pub id: u64,
    /// Name.
    pub name: String,
    /// Root page.
    pub root: PageId,
    /// Generation it fixed.
    pub generation: u64,
    /// Next inode number at that point.
    pub next_ino: u64,
    /// Head it was taken of.
    pub head: String,
    /// Checkpoint before it in its head's line.
    pub parent: Option<u64>,
    /// Microseconds since 1970.
    pub created_us: i64,
    /// Free-form tags.
    #[serde(default)]
    pub tags: BTreeMap<String, String>,
    /// A pinned one is never deleted.
    #[serde(default)]
    pub pinned: bool,
    /// Why it exists.
    pub origin: Origin,
    /// Where it came from, if another store sent it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
}

/// What makes a checkpoint the same one in several stores: where it was taken.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct Source {
    /// Uuid of the store where it was taken, 32 hexadecimal digits.
    pub store: String,
    /// Its number there.
    pub id: u64,
}

/// Heads and checkpoints.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
pub struct Catalog {
    /// Version of this layout.
    pub version: u32,
    /// Heads by name.
    pub heads: BTreeMap<String, Head>,
    /// Checkpoints by number.
    pub checkpoints: Checkpoints,
    /// Trees that no command shows, by names that begin with [`HIDDEN`]: the index of packed contents, and checkpoints
    /// that are being received.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub hidden: BTreeMap<String, Head>,
    /// Next head number.
    pub next_head: u32,
    /// Next checkpoint number.
    pub next_checkpoint: u64,
    /// Pages and bytes of file data left for garbage collection at the last commit (estimates; filled in when a commit
    /// is written).
    #[serde(default)]
    pub garbage_pages: u64,
    #[allow(missing_docs, reason = "as above")]
    #[serde(default)]
    pub garbage_bytes: u64,
}

/// A change of the catalog, as it stands in the log.
#[derive(Debug, Clone, Serialize, Deserialize, PartialEq, Eq)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum CatalogOp {
    /// Fix the present state of a head under a name.
    Checkpoint {
        /// Head.
        head: String,
        /// Number of the new checkpoint.
        id: u64,
        /// Its name.
        name: String,
        /// Its tags.
        tags: BTreeMap<String, String>,
        /// When, microseconds since 1970.
        created_us: i64,
    },
    /// Move a head to a checkpoint; what it leaves becomes a checkpoint, if it has a name.
    Rollback {
        /// Head.
        head: String,
        /// Checkpoint to go to.
        to: u64,
        /// Number and name for what is left.
        left: Option<(u64, String)>,
        /// When.
        created_us: i64,
    },
    /// A second head from a checkpoint.
    Clone {
        /// Checkpoint.
        from: u64,
        /// Number of the new head.
        id: u32,
        /// Its name.
        name: String,
        /// When.
        created_us: i64,
    },
    /// Set and remove tags.
    Tag {
        /// Checkpoint.
        id: u64,
        /// Tags to set.
        set: BTreeMap<String, String>,
        /// Keys to remove.
        remove: Vec<String>,
    },
    /// Pin or unpin.
    Pin {
        /// Checkpoint.
        id: u64,
        /// New state.
        on: bool,
    },
    /// Rename a checkpoint.
    Rename {
        /// Checkpoint.
        id: u64,
        /// New name.
        name: String,
    },
    /// Rename a head.
    RenameHead {
        /// Head.
        head: String,
        /// New name.
        name: String,
    },
    /// Delete a checkpoint.
    Delete {
        /// Checkpoint.
        id: u64,
    },
    /// Delete a head.
    DeleteHead {
        /// Head.
        head: String,
    },
    /// A hidden head, empty or from a checkpoint.
    Hide {
        /// Number of the new head.
        id: u32,
        /// Its name.
        name: String,
        /// Checkpoint that it begins at.
        from: Option<u64>,
        /// When.
        created_us: i64,
    },
    /// Remove a hidden head.
    Unhide {
        /// Its name.
        name: String,
    },
    /// A hidden head takes the place, and the name, of another.
    Rehide {
        /// Its name.
        from: String,
        /// Name of the other, which goes.
        to: String,
    },
    /// A hidden head becomes a checkpoint.
    Receive {
        /// Hidden head.
        hidden: String,
        /// Number of the new checkpoint.
        id: u64,
        /// Its name.
        name: String,
        /// Head that it counts to.
        head: String,
        /// Its tags.
        tags: BTreeMap<String, String>,
        /// When it was taken.
        created_us: i64,
        /// Where it was taken.
        source: Source,
        /// Next inode number.
        next_ino: u64,
    },
}

impl Catalog {
    /// A catalog with one empty head `main`.
    pub fn new(root: PageId, next_ino: u64, created_us: i64) -> Self {
        let head = Head {
            id: 1,
            root,
            base: 0,
            next_ino,
            parent: None,
            created_us,
        };
        let mut checkpoints = Checkpoints::default();
        checkpoints.index();
        Self {
            version: PLAIN,
            heads: BTreeMap::from([("main".to_owned(), head)]),
            checkpoints,
            hidden: BTreeMap::new(),
            next_head: 2,
            next_checkpoint: 1,
            garbage_pages: 0,
            garbage_bytes: 0,
        }
    }

    /// Decodes and checks a catalog.
    ///
    /// # Errors
    /// Corrupt, or newer than this build.
    pub fn decode(json: &[u8]) -> Result<Self, StoreError> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let bad = |e: serde_json::Error| StoreError::corrupt("meta", format!("the catalog: {e}"));
        let v: Version = serde_json::from_slice(json).map_err(bad)?;
        if v.version > VERSION {
            return Err(StoreError::Newer {
                found: v.version,
                known: VERSION,
            });
        }
        let mut c: Catalog = serde_json::from_slice(json).map_err(bad)?;
        let sane = c
            .heads
            .values()
            .chain(c.hidden.values())
            .all(|h| h.id < c.next_head && h.next_ino < 1 << 40)
            && c.checkpoints
                .values()
                .all(|k| k.id < c.next_checkpoint && k.next_ino < 1 << 40);
        if !sane {
            return Err(StoreError::corrupt(
                "meta",
                "the catalog contradicts itself",
            ));
        }
        c.checkpoints.index();
        Ok(c)
    }

    /// The JSON.
    pub fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).unwrap_or_default()
    }

    /// The head of a number, also a hidden one.
    pub fn head_by_id(&mut self, id: u32) -> Option<&mut Head> {
        let mut all = self.heads.values_mut().chain(self.hidden.values_mut());
        all.find(|h| h.id == id)
    }

    /// The head of a name, also a hidden one.
    pub fn any_head(&self, name: &str) -> Option<&Head> {
        if name.starts_with(HIDDEN) {
            self.hidden.get(name)
        } else {
            self.heads.get(name)
        }
    }

    /// As [`Catalog::any_head`], to be changed.
    pub fn any_head_mut(&mut self, name: &str) -> Option<&mut Head> {
        if name.starts_with(HIDDEN) {
            self.hidden.get_mut(name)
        } else {
            self.heads.get_mut(name)
        }
    }

    /// The checkpoint of a name.
    pub fn checkpoint_named(&self, name: &str) -> Option<&Checkpoint> {
        self.checkpoints.named(name)
    }

    /// True if a head or checkpoint has this name.
    pub fn is_taken(&self, name: &str) -> bool {
        self.heads.contains_key(name) || self.checkpoint_named(name).is_some()
    }

    /// Applies an operation at a generation (which the caller then moves on).
    ///
    /// # Errors
    /// Not found, or a name that is taken, when it does not fit the catalog; nothing has changed then.
    pub fn apply(&mut self, op: &CatalogOp, generation: u64) -> Result<(), StoreError> {
        let gone = |what: &str| StoreError::NotFound(format!("there is no {what}"));
        // Numbers are given one after the other: such ones come from a damaged log, and there would be none after them.
        let (last, last_head) = match op {
            CatalogOp::Checkpoint { id, .. }
            | CatalogOp::Rollback {
                left: Some((id, _)),
                ..
            } => (*id, 0),
            CatalogOp::Receive { id, .. } => (*id, 0),
            CatalogOp::Clone { id, .. } | CatalogOp::Hide { id, .. } => (0, *id),
            _ => (0, 0),
        };
        if last > u64::MAX / 2 || last_head > u32::MAX / 2 {
            return Err(StoreError::corrupt("log", "a number of impossible size"));
        }
        let new_name = match op {
            CatalogOp::Checkpoint { name, .. }
            | CatalogOp::Clone { name, .. }
            | CatalogOp::Receive { name, .. }
            | CatalogOp::Rename { name, .. }
            | CatalogOp::RenameHead { name, .. }
            | CatalogOp::Rollback {
                left: Some((_, name)),
                ..
            } => Some(name),
            _ => None,
        };
        if let Some(name) = new_name.filter(|n| self.is_taken(n)) {
            return Err(StoreError::Exists(format!("the name {name} is taken")));
        }
        match op {
            CatalogOp::Checkpoint {
                head,
                id,
                name,
                tags,
                created_us,
            } => {
                let h = self.heads.get_mut(head).ok_or_else(|| gone(head))?;
                let c = Checkpoint {
                    id: *id,
                    name: name.clone(),
                    root: h.root,
                    generation,
                    next_ino: h.next_ino,
                    head: head.clone(),
                    parent: h.parent,
                    created_us: *created_us,
                    tags: tags.clone(),
                    pinned: false,
                    origin: Origin::Asked,
                    source: None,
                };
                h.base = generation;
                h.parent = Some(*id);
                self.next_checkpoint = self.next_checkpoint.max(id + 1);
                self.checkpoints.insert(c);
            }
            CatalogOp::Rollback {
                head,
                to,
                left,
                created_us,
            } => {
                let target = self
                    .checkpoints
                    .get(to)
                    .cloned()
                    .ok_or_else(|| gone("checkpoint"))?;
                let h = self.heads.get_mut(head).ok_or_else(|| gone(head))?;
                let before = h.clone();
                h.root = target.root;
                h.base = generation;
                h.parent = Some(target.id);
                h.next_ino = h.next_ino.max(target.next_ino);
                if let Some((id, name)) = left {
                    self.next_checkpoint = self.next_checkpoint.max(id + 1);
                    self.checkpoints.insert(Checkpoint {
                        id: *id,
                        name: name.clone(),
                        root: before.root,
                        generation,
                        next_ino: before.next_ino,
                        head: head.clone(),
                        parent: before.parent,
                        created_us: *created_us,
                        tags: BTreeMap::new(),
                        pinned: false,
                        origin: Origin::LeftBehind,
                        source: None,
                    });
                }
            }
            CatalogOp::Clone {
                from,
                id,
                name,
                created_us,
            } => {
                let c = self
                    .checkpoints
                    .get(from)
                    .ok_or_else(|| gone("checkpoint"))?;
                let head = Head {
                    id: *id,
                    root: c.root,
                    base: generation,
                    next_ino: c.next_ino,
                    parent: Some(c.id),
                    created_us: *created_us,
                };
                self.next_head = self.next_head.max(id + 1);
                self.heads.insert(name.clone(), head);
            }
            CatalogOp::Tag { id, set, remove } => self
                .checkpoints
                .update(*id, |c| {
                    c.tags.extend(set.clone());
                    c.tags.retain(|k, _| !remove.contains(k));
                })
                .ok_or_else(|| gone("checkpoint"))?,
            CatalogOp::Pin { id, on } => self
                .checkpoints
                .update(*id, |c| c.pinned = *on)
                .ok_or_else(|| gone("checkpoint"))?,
            CatalogOp::Rename { id, name } => self
                .checkpoints
                .update(*id, |c| c.name.clone_from(name))
                .ok_or_else(|| gone("checkpoint"))?,
            CatalogOp::RenameHead { head, name } => {
                let h = self.heads.remove(head).ok_or_else(|| gone(head))?;
                self.heads.insert(name.clone(), h);
                for id in self.checkpoints_where(|c| &c.head == head) {
                    self.checkpoints.update(id, |c| c.head.clone_from(name));
                }
            }
            CatalogOp::Delete { id } => {
                let gone = self
                    .checkpoints
                    .remove(id)
                    .ok_or_else(|| gone("checkpoint"))?;
                // Lines go on past the gap.
                for child in self.checkpoints_where(|c| c.parent == Some(*id)) {
                    self.checkpoints.update(child, |c| c.parent = gone.parent);
                }
                let heads = self.heads.values_mut().chain(self.hidden.values_mut());
                for h in heads.filter(|h| h.parent == Some(*id)) {
                    h.parent = gone.parent;
                }
            }
            CatalogOp::DeleteHead { head } => {
                self.heads.remove(head).ok_or_else(|| gone(head))?;
            }
            CatalogOp::Hide { .. }
            | CatalogOp::Unhide { .. }
            | CatalogOp::Rehide { .. }
            | CatalogOp::Receive { .. } => {
                self.apply_hidden(op, generation)?;
                self.version = VERSION;
            }
        }
        Ok(())
    }

    /// The part of [`Catalog::apply`] that is about hidden heads.
    fn apply_hidden(&mut self, op: &CatalogOp, generation: u64) -> Result<(), StoreError> {
        let gone = |what: &str| StoreError::NotFound(format!("there is no {what}"));
        match op {
            CatalogOp::Hide {
                id,
                name,
                from,
                created_us,
            } => {
                if !name.starts_with(HIDDEN) || self.hidden.contains_key(name) {
                    return Err(StoreError::Exists(format!("the name {name} is taken")));
                }
                let (root, next_ino, parent) = match from {
                    None => (0, 1, None),
                    Some(from) => {
                        let c = self.checkpoints.get(from);
                        let c = c.ok_or_else(|| gone("checkpoint"))?;
                        (c.root, c.next_ino, Some(c.id))
                    }
                };
                let head = Head {
                    id: *id,
                    root,
                    base: generation,
                    next_ino,
                    parent,
                    created_us: *created_us,
                };
                self.next_head = self.next_head.max(id + 1);
                self.hidden.insert(name.clone(), head);
            }
            CatalogOp::Unhide { name } => {
                self.hidden.remove(name).ok_or_else(|| gone(name))?;
            }
            CatalogOp::Rehide { from, to } => {
                if !self.hidden.contains_key(to) {
                    return Err(gone(to));
                }
                let h = self.hidden.remove(from).ok_or_else(|| gone(from))?;
                self.hidden.insert(to.clone(), h);
            }
            CatalogOp::Receive {
                hidden,
                id,
                name,
                head,
                tags,
                created_us,
                source,
                next_ino,
            } => {
                let h = self.hidden.remove(hidden).ok_or_else(|| gone(hidden))?;
                self.next_checkpoint = self.next_checkpoint.max(id + 1);
                self.checkpoints.insert(Checkpoint {
                    id: *id,
                    name: name.clone(),
                    root: h.root,
                    generation,
                    next_ino: (*next_ino).max(h.next_ino).min((1 << 40) - 1),
                    head: head.clone(),
                    parent: h.parent,
                    created_us: *created_us,
                    tags: tags.clone(),
                    pinned: false,
                    origin: Origin::Asked,
                    source: Some(source.clone()),
                });
            }
            _ => {}
        }
        Ok(())
    }

    /// Numbers of some checkpoints.
    fn checkpoints_where(&self, f: impl Fn(&Checkpoint) -> bool) -> Vec<u64> {
        let found = self.checkpoints.values().filter(|c| f(c));
        found.map(|c| c.id).collect()
    }

    /// True if the operation makes the catalog larger.
    pub fn adds(op: &CatalogOp) -> bool {
        !matches!(
            op,
            CatalogOp::Pin { .. }
                | CatalogOp::Unhide { .. }
                | CatalogOp::Rehide { .. }
                | CatalogOp::Delete { .. }
                | CatalogOp::DeleteHead { .. }
                | CatalogOp::Rollback { left: None, .. }
        )
    }

    /// True if the operation fixes a state, so that the generation must move on.
    pub fn fixes_state(op: &CatalogOp) -> bool {
        matches!(
            op,
            CatalogOp::Checkpoint { .. }
                | CatalogOp::Rollback { .. }
                | CatalogOp::Clone { .. }
                | CatalogOp::Hide { .. }
                | CatalogOp::Receive { .. }
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        let mut c = Catalog::new(1, 2, 0);
        let plain = String::from_utf8(c.encode()).expect("text");
        assert!(
            plain.contains("\"version\":1") && !plain.contains("hidden"),
            "{plain}"
        );
        assert_eq!(Catalog::decode(plain.as_bytes()).expect("an old one"), c);
        let op = CatalogOp::Hide {
            id: 2,
            name: "@x".into(),
            from: None,
            created_us: 0,
        };
        c.apply(&op, 1).expect("a new name");
        let text = String::from_utf8(c.encode()).expect("text");
        assert!(text.contains("\"version\":2"), "{text}");
        assert_eq!(Catalog::decode(text.as_bytes()).expect("a new one"), c);
        let newer = text.replacen("\"version\":2", "\"version\":3", 1);
        let e = Catalog::decode(newer.as_bytes()).expect_err("newer");
        assert!(matches!(e, StoreError::Newer { found: 3, known: 2 }), "{e}");
    }

    #[test]
    fn hidden_heads_have_names_of_their_own() {
        let mut c = Catalog::new(1, 2, 0);
        let hide = |name: &str, from| CatalogOp::Hide {
            id: 7,
            name: name.into(),
            from,
            created_us: 0,
        };
        assert!(c.apply(&hide("x", None), 1).is_err());
        assert!(c.apply(&hide("@x", Some(5)), 1).is_err());
        c.apply(&hide("@x", None), 1).expect("a new name");
        assert!(c.apply(&hide("@x", None), 2).is_err());
        assert!(c.any_head("@x").is_some() && !c.heads.contains_key("@x"));
        assert_eq!(c.head_by_id(7).map(|h| h.root), Some(0));
        let rehide = |from: &str, to: &str| CatalogOp::Rehide {
            from: from.into(),
            to: to.into(),
        };
        for bad in [rehide("@x", "@y"), rehide("@y", "@x")] {
            assert!(c.apply(&bad, 3).is_err() && c.any_head("@x").is_some());
        }
        let other = CatalogOp::Hide {
            id: 8,
            name: "@y".into(),
            from: None,
            created_us: 0,
        };
        c.apply(&other, 3).expect("a new name");
        c.apply(&rehide("@y", "@x"), 3).expect("both are there");
        assert!(c.any_head("@y").is_none());
        assert_eq!(c.any_head("@x").map(|h| h.id), Some(8));
        let op = CatalogOp::Unhide { name: "@x".into() };
        c.apply(&op, 3).expect("it is there");
        assert!(c.apply(&op, 3).is_err());
    }
}

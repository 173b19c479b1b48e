//! The checkpoints of a catalog: by number, in pieces that copies share, and by name.
//!
//! A commit, `list` and `check` need a copy of the catalog while it goes on changing. A copy costs one reference for 64
//! checkpoints, and a change afterwards copies one piece, so neither holds anybody up however many there are.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::catalog::Checkpoint;

/// Numbers in a piece.
const PIECE: u64 = 64;

/// Checkpoints by number.
#[derive(Debug, Clone, Default)]
pub struct Checkpoints {
    pieces: BTreeMap<u64, Arc<BTreeMap<u64, Checkpoint>>>,
    len: usize,
    /// Numbers by name; a copy has none and looks through all.
    names: Names,
}

#[derive(Debug, Default)]
struct Names(Option<HashMap<String, u64>>);

impl Clone for Names {
    fn clone(&self) -> Self {
        Self(None)
    }
}

impl Checkpoints {
    /// Makes lookups by name fast, in this copy.
    pub fn index(&mut self) {
        let names = self.values().map(|c| (c.name.clone(), c.id)).collect();
        self.names = Names(Some(names));
    }

    /// The checkpoint of a number.
    pub fn get(&self, id: &u64) -> Option<&Checkpoint> {
        self.pieces.get(&(id / PIECE))?.get(id)
    }

    /// The checkpoint of a name.
    pub fn named(&self, name: &str) -> Option<&Checkpoint> {
        match &self.names.0 {
            Some(names) => self.get(names.get(name)?),
            None => self.values().find(|c| c.name == name),
        }
    }

    /// Changes a checkpoint, if it is there. Its number must stay.
    pub fn update<T>(&mut self, id: u64, f: impl FnOnce(&mut Checkpoint) -> T) -> Option<T> {
        let piece = self.pieces.get_mut(&(id / PIECE))?;
        let c = Arc::make_mut(piece).get_mut(&id)?;
        let before = self.names.0.is_some().then(|| c.name.clone());
        let value = f(c);
        if let (Some(before), Some(names)) = (before, &mut self.names.0)
            && before != c.name
        {
            if names.get(&before) == Some(&id) {
                names.remove(&before);
            }
            names.insert(c.name.clone(), id);
        }
        Some(value)
    }

    /// Adds a checkpoint (or replaces the one of its number).
    pub fn insert(&mut self, c: Checkpoint) {
        self.remove(&c.id);
        if let Some(names) = &mut self.names.0 {
            names.insert(c.name.clone(), c.id);
        }
        Arc::make_mut(self.pieces.entry(c.id / PIECE).or_default()).insert(c.id, c);
        self.len += 1;
    }

    /// Takes a checkpoint out.
    pub fn remove(&mut self, id: &u64) -> Option<Checkpoint> {
        let piece = self.pieces.get_mut(&(id / PIECE))?;
        let c = Arc::make_mut(piece).remove(id)?;
        if piece.is_empty() {
            self.pieces.remove(&(id / PIECE));
        }
        if let Some(names) = &mut self.names.0
            && names.get(&c.name) == Some(id)
        {
            names.remove(&c.name);
        }
        self.len -= 1;
        Some(c)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True when there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All, by number.
    pub fn values(&self) -> impl DoubleEndedIterator<Item = &Checkpoint> {
        self.pieces.values().flat_map(|p| p.values())
    }
}

impl PartialEq for Checkpoints {
    fn eq(&self, other: &Self) -> bool {
        self.pieces == other.pieces
    }
}

impl Eq for Checkpoints {}

impl Serialize for Checkpoints {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_map(self.values().map(|c| (c.id, c)))
    }
}

impl<'de> Deserialize<'de> for Checkpoints {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let all = BTreeMap::<u64, Checkpoint>::deserialize(d)?;
        if all.iter().any(|(id, c)| *id != c.id) {
            return Err(serde::de::Error::custom("a checkpoint has two numbers"));
        }
        let mut out = Self::default();
        for c in all.into_values() {
            out.insert(c);
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::super::catalog::Origin;
    use super::*;

    fn checkpoint(id: u64) -> Checkpoint {
        Checkpoint {
            id,
            name: format!("c{id}"),
            root: id,
            generation: id,
            next_ino: 2,
            head: "main".into(),
            parent: None,
            created_us: 0,
            tags: BTreeMap::new(),
            pinned: false,
            origin: Origin::Asked,
            source: None,
        }
    }

    #[test]
    fn a_copy_stays_what_it_was() {
        let mut all = Checkpoints::default();
        all.index();
        for id in (1..1000).rev() {
            all.insert(checkpoint(id));
        }
        let copy = all.clone();
        all.update(500, |c| c.name = "other".into()).unwrap();
        all.remove(&501).unwrap();
        assert_eq!(all.len(), 998);
        assert_eq!(all.named("other").unwrap().id, 500);
        assert!(all.named("c500").is_none() && all.named("c501").is_none());
        assert_eq!((copy.len(), copy.named("c500").unwrap().id), (999, 500));
        assert_eq!(copy.get(&501).unwrap().name, "c501");
        let ids: Vec<u64> = copy.values().map(|c| c.id).collect();
        assert!(ids.is_sorted() && ids.len() == 999);
        let json = serde_json::to_string(&copy).unwrap();
        assert!(json.starts_with("{\"1\":{\"id\":1,"), "{json:.40}");
        assert!(serde_json::from_str::<Checkpoints>(&json).unwrap() == copy);
    }
}

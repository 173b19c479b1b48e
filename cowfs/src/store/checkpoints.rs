//! The checkpoints of a catalog: by number, in pieces that copies share, and by name.
//!
//! A commit, `list` and `check` need a copy of the catalog while it goes on changing. A copy costs one reference for 64
//! checkpoints, and a change afterwards copies one piece, so neither holds anybody up however many there are.
//!
//! A piece has the text of its rows in a list, from the first list on. A piece is changed by [`Piece::change`] alone, which
//! drops the text, so there is none that is out of date.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::catalog::Checkpoint;
use super::row;

/// Numbers in a piece.
const PIECE: u64 = 64;

/// Checkpoints by number.
#[derive(Debug, Clone, Default)]
pub struct Checkpoints {
    pieces: BTreeMap<u64, Arc<Piece>>,
    len: usize,
    /// Numbers by name; a copy has none and looks through all.
    names: Names,
}

#[derive(Debug, Default)]
struct Piece {
    all: BTreeMap<u64, Checkpoint>,
    /// JSON of the rows, with commas between them.
    text: OnceLock<String>,
}

impl Piece {
    /// The checkpoints, to be changed: in a copy, if somebody else has the piece as well.
    fn change(piece: &mut Arc<Self>) -> &mut BTreeMap<u64, Checkpoint> {
        let own = Arc::make_mut(piece);
        own.text.take();
        &mut own.all
    }
}

impl Clone for Piece {
    /// Copied to be changed.
    fn clone(&self) -> Self {
        Self {
            all: self.all.clone(),
            text: OnceLock::new(),
        }
    }
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
        self.pieces.get(&(id / PIECE))?.all.get(id)
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
        let c = Piece::change(piece).get_mut(&id)?;
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
        Piece::change(self.pieces.entry(c.id / PIECE).or_default()).insert(c.id, c);
        self.len += 1;
    }

    /// Takes a checkpoint out.
    pub fn remove(&mut self, id: &u64) -> Option<Checkpoint> {
        let piece = self.pieces.get_mut(&(id / PIECE))?;
        let c = Piece::change(piece).remove(id)?;
        if piece.all.is_empty() {
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
        self.pieces.values().flat_map(|p| p.all.values())
    }

    /// The JSON of the rows of all, piece by piece, with commas inside of a piece.
    pub fn rows(&self) -> impl Iterator<Item = &str> {
        self.pieces
            .values()
            .map(|p| p.text.get_or_init(|| row::text(p.all.values())).as_str())
    }
}

impl PartialEq for Checkpoints {
    fn eq(&self, other: &Self) -> bool {
        self.values().eq(other.values())
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

    fn rows(all: &Checkpoints) -> Vec<row::Row> {
        let text: Vec<&str> = all.rows().collect();
        serde_json::from_str(&format!("[{}]", text.join(","))).unwrap()
    }

    #[test]
    fn rows_are_those_of_the_checkpoints_after_every_change() {
        let mut all = Checkpoints::default();
        all.index();
        let same = |all: &Checkpoints| {
            let want: Vec<row::Row> = all.values().map(row::Row::from).collect();
            assert_eq!(rows(all), want);
            want.len()
        };
        assert_eq!(same(&all), 0);
        for id in 1..200 {
            all.insert(checkpoint(id));
        }
        assert_eq!(same(&all), 199);
        let copy = all.clone();
        all.update(70, |c| c.pinned = true).unwrap();
        same(&all);
        all.update(70, |c| c.tags.insert("k".into(), "\"v\",[".into()))
            .unwrap();
        same(&all);
        all.update(70, |c| c.origin = Origin::LeftBehind).unwrap();
        all.update(71, |c| c.name = "other".into()).unwrap();
        same(&all);
        all.remove(&72).unwrap();
        let mut again = checkpoint(73);
        again.parent = Some(1);
        all.insert(again);
        assert_eq!(same(&all), 198);
        // A whole piece goes.
        for id in 128..192 {
            all.remove(&id).unwrap();
        }
        assert_eq!(same(&all), 134);
        assert_eq!(same(&copy), 199);
        assert!(!rows(&copy)[69].pinned);
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

//! What an upgrade writes down before each step: `upgrades/NAME.json` in the store, outside of what rolls back.
//!
//! A full disk must not come between an upgrade and its way back. So the record and its spare have their blocks from the
//! beginning: a new record is written over the spare, and the two exchange their names.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, RenameFlags, renameat2};
use serde::{Deserialize, Serialize};

use crate::control::{CheckpointInfo, Failure};

/// Version of the record.
pub(super) const VERSION: u32 = 1;
/// Room for what is added to a record later on, bytes.
const ROOM: usize = 32 << 10;
const BLOCK: usize = 4096;

/// How far an upgrade has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum State {
    /// The service is being stopped.
    Stopping,
    /// It has stopped.
    Stopped,
    /// There is a checkpoint to come back to.
    Checkpointed,
    /// The upgrade runs.
    Running,
    /// The new version is being started.
    Starting,
    /// It is being checked.
    Checking,
    /// It is good; what is left is to say so.
    Checked,
    /// Going back to the checkpoint.
    RollingBack,
    /// The old version is being started and checked.
    Restarting,
    /// Ended: upgraded.
    Done,
    /// Ended: the old version serves.
    RolledBack,
    /// Ended: neither.
    Failed,
}

impl State {
    /// As in the record.
    pub fn name(self) -> &'static str {
        match self {
            State::Stopping => "stopping",
            State::Stopped => "stopped",
            State::Checkpointed => "checkpointed",
            State::Running => "running",
            State::Starting => "starting",
            State::Checking => "checking",
            State::Checked => "checked",
            State::RollingBack => "rolling_back",
            State::Restarting => "restarting",
            State::Done => "done",
            State::RolledBack => "rolled_back",
            State::Failed => "failed",
        }
    }

    fn ended(self) -> bool {
        matches!(self, State::Done | State::RolledBack | State::Failed)
    }
}

/// What is written down.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Journal {
    pub version: u32,
    pub state: State,
    pub name: String,
    pub head: String,
    pub mountpoint: PathBuf,
    pub stop: String,
    pub run: String,
    pub start: String,
    pub check: String,
    pub check_timeout_s: u64,
    /// Number of the checkpoint, when there is one.
    #[serde(default)]
    pub checkpoint: Option<u64>,
    /// What the rollback leaves behind gets this name, which nothing had when it was written down.
    #[serde(default)]
    pub keep_as: Option<String>,
    pub why: Option<String>,
}

impl Journal {
    /// The upgrade's checkpoint: by its number or, if it was not noted in time, by its name and tag.
    pub fn checkpoint_in<'a>(&self, list: &'a [CheckpointInfo]) -> Option<&'a CheckpointInfo> {
        list.iter().find(|c| match self.checkpoint {
            Some(id) => c.id == id,
            None => c.name == self.name && c.tags.get("upgrade") == Some(&self.name),
        })
    }
}

/// The file of a record.
#[derive(Debug)]
pub(super) struct JournalFile {
    dir: PathBuf,
    path: PathBuf,
    spare: PathBuf,
    size: usize,
}

fn failed(path: &Path, e: &dyn std::fmt::Display) -> Failure {
    Failure::new(format!("the upgrade's record {}: {e}", path.display()))
}

impl JournalFile {
    fn of(dir: &Path, name: &str) -> Self {
        Self {
            dir: dir.to_owned(),
            path: dir.join(format!("{name}.json")),
            spare: dir.join(format!(".{name}.spare")),
            size: 0,
        }
    }

    /// Writes the first record, and takes the room for all later ones.
    pub fn create(dir: &Path, j: &Journal) -> Result<Self, Failure> {
        let mut file = Self::of(dir, &j.name);
        let bytes = file.bytes(j)?;
        file.size = (bytes.len() + ROOM).next_multiple_of(BLOCK);
        let bytes = file.bytes(j)?;
        let write = || -> io::Result<()> {
            let fresh = || File::create(&file.spare);
            fill(&fresh()?, &bytes)?;
            fs::rename(&file.spare, &file.path)?;
            fill(&fresh()?, &bytes)?;
            File::open(&file.dir)?.sync_all()
        };
        write().map_err(|e| {
            // Half a record would stand for an upgrade that was begun.
            let _ = fs::remove_file(&file.path);
            let _ = fs::remove_file(&file.spare);
            failed(&file.path, &e)
        })?;
        Ok(file)
    }

    /// The file of an upgrade that was begun earlier.
    pub fn open(dir: &Path, name: &str) -> Self {
        let mut file = Self::of(dir, name);
        for p in [&file.path, &file.spare] {
            let len = p.metadata().map_or(0, |m| m.len());
            file.size = file.size.max(usize::try_from(len).unwrap_or(0));
        }
        file
    }

    /// The record, with spaces behind it up to the size of the file.
    fn bytes(&self, j: &Journal) -> Result<Vec<u8>, Failure> {
        let mut b = serde_json::to_vec_pretty(j).map_err(|e| failed(&self.path, &e))?;
        b.push(b'\n');
        b.resize(self.size.max(b.len()), b' ');
        Ok(b)
    }

    /// Writes the record whole or not at all.
    pub fn write(&mut self, j: &Journal) -> Result<(), Failure> {
        let bytes = self.bytes(j)?;
        self.size = bytes.len();
        let write = || -> io::Result<()> {
            let spare = File::options()
                .create(true)
                .truncate(false)
                .write(true)
                .open(&self.spare)?;
            fill(&spare, &bytes)?;
            match renameat2(
                AT_FDCWD,
                &self.spare,
                AT_FDCWD,
                &self.path,
                RenameFlags::RENAME_EXCHANGE,
            ) {
                // Not every filesystem can; then the next record needs new room.
                Err(Errno::EINVAL | Errno::ENOSYS) => fs::rename(&self.spare, &self.path)?,
                r => r?,
            }
            File::open(&self.dir)?.sync_all()
        };
        write().map_err(|e| failed(&self.path, &e))
    }

    /// Takes the spare away, when nothing more is to be written.
    pub fn end(&self) {
        let _ = fs::remove_file(&self.spare);
    }
}

fn fill(mut file: &File, bytes: &[u8]) -> io::Result<()> {
    file.write_all(bytes)?;
    file.sync_all()
}

/// True if an upgrade of this name, of whatever head, was begun and not ended.
pub(super) fn is_unfinished(dir: &Path, name: &str) -> Result<bool, Failure> {
    let path = dir.join(format!("{name}.json"));
    match fs::read(&path) {
        Ok(bytes) => {
            Ok(serde_json::from_slice::<Journal>(&bytes).map_or(true, |j| !j.state.ended()))
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(failed(&path, &e)),
    }
}

/// The upgrade of a head that was begun and not ended. A record that cannot be read is refused: it may be just that one.
pub(super) fn unfinished(dir: &Path, head: &str) -> Result<Option<Journal>, Failure> {
    let list =
        || -> io::Result<Vec<PathBuf>> { fs::read_dir(dir)?.map(|e| Ok(e?.path())).collect() };
    let mut found = None;
    for path in list().map_err(|e| failed(dir, &e))? {
        if path.extension() != Some(OsStr::new("json")) {
            continue;
        }
        let odd = |e: &dyn std::fmt::Display| {
            Failure::new(format!(
                "the record of an upgrade, {}, cannot be read ({e}); if that upgrade is over, move it away",
                path.display()
            ))
        };
        let bytes = fs::read(&path).map_err(|e| odd(&e))?;
        let j: Journal = serde_json::from_slice(&bytes).map_err(|e| odd(&e))?;
        if j.version > VERSION {
            return Err(odd(&"it was written by a newer cowfs"));
        }
        if !j.state.ended() && j.head == head {
            found = Some(j);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal(name: &str, head: &str) -> Journal {
        let s = String::new;
        Journal {
            version: VERSION,
            state: State::Stopping,
            name: name.into(),
            head: head.into(),
            mountpoint: "/mnt".into(),
            stop: s(),
            run: s(),
            start: s(),
            check: s(),
            check_timeout_s: 1,
            checkpoint: None,
            keep_as: None,
            why: None,
        }
    }

    fn dir(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("cowfs-journal-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).expect("a directory");
        dir
    }

    #[test]
    fn a_later_record_takes_no_more_room() {
        let dir = dir("room");
        let mut j = journal("one", "main");
        let mut f = JournalFile::create(&dir, &j).expect("room");
        let len = |p: &Path| p.metadata().expect("there").len();
        let first = len(&f.path);
        assert_eq!(len(&f.spare), first);
        j.why = Some("x".repeat(9000));
        j.state = State::Running;
        for _ in 0..3 {
            f.write(&j).expect("room");
            assert_eq!((len(&f.path), len(&f.spare)), (first, first));
        }
        let back = unfinished(&dir, "main").expect("readable").expect("one");
        assert_eq!((back.state, back.why), (State::Running, j.why.clone()));
        assert!(unfinished(&dir, "other").expect("readable").is_none());
        j.state = State::RolledBack;
        JournalFile::open(&dir, "one").write(&j).expect("room");
        assert!(unfinished(&dir, "main").expect("readable").is_none());
        let _ = fs::remove_dir_all(&dir);
    }

    #[test]
    fn what_cannot_be_read_is_refused_by_name() {
        let dir = dir("odd");
        for (text, says) in [
            ("{", "EOF"),
            (r#"{"version":1,"state":"napping"}"#, "napping"),
        ] {
            fs::write(dir.join("odd.json"), text).expect("room");
            let e = unfinished(&dir, "main").expect_err("odd").message;
            assert!(e.contains("odd.json") && e.contains(says), "{e}");
        }
        let mut j = journal("odd", "main");
        j.version = VERSION + 1;
        fs::write(dir.join("odd.json"), serde_json::to_vec(&j).expect("JSON")).expect("room");
        assert!(unfinished(&dir, "main").is_err());
        let _ = fs::remove_dir_all(&dir);
    }
}

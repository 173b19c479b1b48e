//! The journal: what must be put back in a target if we die while one of its threads is away from its own code.
//!
//! A file of little-endian words: magic, state (0 nothing to do, 1 to repair), pid, start time, address of the borrowed
//! tail of the vdso (0: none), scratch address (0: none), scratch length, four descriptors of the target to close (or
//! -1), number of threads; for each of them its number, signal mask, and 27 registers; and last the blake3 (first 8
//! bytes) of all before. It is rewritten in one piece.

use super::Error;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

const MAGIC: u64 = u64::from_le_bytes(*b"UMLJRNL1");
const HEAD: usize = 12;
const THREAD: usize = 29;
const MOST: u64 = 1 << 20;

/// Where journals are.
pub const DIRECTORY: &str = "/run/umlctl/journal";

/// What to put back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Something is to be put back.
    pub active: bool,
    /// The process.
    pub pid: i32,
    /// Its start time (`proc::Stat`): with the number it names the process for good.
    pub start_time: u64,
    /// Where the loop was written; 0 if nowhere.
    pub vdso_tail: u64,
    /// The scratch; 0 if none is mapped.
    pub scratch: u64,
    /// Its length.
    pub scratch_len: u64,
    /// Descriptors that were opened in the target, or -1.
    pub fds: [i32; 4],
    /// The threads that are away from their own code.
    pub away: Vec<Away>,
}

/// A thread that is away from its own code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Away {
    /// The thread.
    pub tid: i32,
    /// Its signal mask.
    pub sigmask: u64,
    /// Its registers, 27 words.
    pub regs: Vec<u64>,
}

impl Record {
    /// Nothing to put back in this process.
    #[must_use]
    pub fn idle(pid: i32, start_time: u64) -> Self {
        Self {
            active: false,
            pid,
            start_time,
            vdso_tail: 0,
            scratch: 0,
            scratch_len: 0,
            fds: [-1; 4],
            away: Vec::new(),
        }
    }

    fn encode(&self) -> Vec<u8> {
        let mut words = vec![
            MAGIC,
            u64::from(self.active),
            self.pid as u64,
            self.start_time,
            self.vdso_tail,
            self.scratch,
            self.scratch_len,
        ];
        words.extend(self.fds.map(|fd| fd as i64 as u64));
        words.push(self.away.len() as u64);
        for a in &self.away {
            words.extend([a.tid as u64, a.sigmask]);
            words.extend_from_slice(&a.regs);
        }
        let mut out: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let sum = blake3::hash(&out);
        out.extend_from_slice(&sum.as_bytes()[..8]);
        out
    }

    fn decode(bytes: &[u8]) -> Result<Self, &'static str> {
        let words: Vec<u64> = bytes
            .chunks_exact(8)
            .map(|c| u64::from_le_bytes(c.try_into().unwrap_or_default()))
            .collect();
        if words.len() <= HEAD || words[0] != MAGIC {
            return Err("it does not begin as one");
        }
        let n = usize::try_from(words[HEAD - 1].min(MOST)).unwrap_or_default();
        let end = HEAD + n * THREAD;
        if words.len() <= end {
            return Err("it is cut off");
        }
        if blake3::hash(&bytes[..end * 8]).as_bytes()[..8] != words[end].to_le_bytes() {
            return Err("its sum is wrong");
        }
        Ok(Self {
            active: words[1] != 0,
            pid: words[2] as i32,
            start_time: words[3],
            vdso_tail: words[4],
            scratch: words[5],
            scratch_len: words[6],
            fds: std::array::from_fn(|i| words[7 + i] as i32),
            away: words[HEAD..end]
                .chunks_exact(THREAD)
                .map(|w| Away {
                    tid: w[0] as i32,
                    sigmask: w[1],
                    regs: w[2..].to_vec(),
                })
                .collect(),
        })
    }
}

/// An open journal.
#[derive(Debug)]
pub struct Journal {
    file: File,
    path: PathBuf,
    /// What it says.
    pub record: Record,
}

impl Journal {
    /// Makes the journal of a process, in `directory`. One that says that there is something to repair is an error.
    pub fn create(directory: &Path, pid: i32, start_time: u64) -> Result<Self, Error> {
        let path = directory.join(pid.to_string());
        let io = |e| Error::Journal(path.clone(), e);
        std::fs::create_dir_all(directory).map_err(io)?;
        if let Ok(old) = Self::open(&path)
            && old.record.active
            && old.record.pid == pid
            && old.record.start_time == start_time
        {
            return Err(Error::NeedsRescue(pid));
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io)?;
        let journal = Self {
            file,
            path,
            record: Record::idle(pid, start_time),
        };
        journal.write()?;
        Ok(journal)
    }

    /// Opens a journal that is there.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let io = |e| Error::Journal(path.into(), e);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(io)?;
        let mut bytes = vec![0u8; file.metadata().map_err(io)?.len().min(MOST * 300) as usize];
        file.read_exact_at(&mut bytes, 0).map_err(io)?;
        let record = Record::decode(&bytes).map_err(|why| Error::BadJournal(path.into(), why))?;
        Ok(Self {
            file,
            path: path.into(),
            record,
        })
    }

    /// Writes the record. It reaches the page cache before this returns, which outlives us.
    pub fn write(&self) -> Result<(), Error> {
        self.file
            .write_all_at(&self.record.encode(), 0)
            .map_err(|e| Error::Journal(self.path.clone(), e))
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the file.
    pub fn remove(&self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back_and_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let mut j = Journal::create(dir.path(), 77, 5).unwrap();
        let away = vec![
            Away {
                tid: 78,
                sigmask: 9,
                regs: (0..27).collect()
            };
            3
        ];
        j.record = Record {
            active: true,
            vdso_tail: 7,
            fds: [4, -1, -1, -1],
            away,
            ..j.record
        };
        j.write().unwrap();
        assert_eq!(Journal::open(j.path()).unwrap().record, j.record);
        assert!(matches!(
            Journal::create(dir.path(), 77, 5),
            Err(Error::NeedsRescue(77))
        ));
        assert!(Journal::create(dir.path(), 77, 6).is_ok());
        let good = j.record.encode();
        for len in 0..good.len() - 8 {
            assert!(Record::decode(&good[..len]).is_err());
        }
        for i in 0..good.len() {
            let mut bad = good.clone();
            bad[i] ^= 0x40;
            assert!(Record::decode(&bad).is_err(), "byte {i}");
        }
    }
}

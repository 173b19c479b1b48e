//! The journal: what must be put back in a target if we die while one of its threads is away from its own code.
//!
//! A record of little-endian words: magic, sequence number, state (bit 0: to repair; bit 1: held by SIGSTOP), pid, start time, address
//! of the borrowed tail of the vdso (0: none), scratch address (0: none), scratch length, four descriptors of the target
//! to close (or -1), number of threads; for each of them its number, signal mask, and 27 registers; and last the blake3
//! (first 8 bytes) of all before.
//!
//! The file has two places for a record, at 0 and at 256 MiB (it is sparse). A record goes where the last but one was: a
//! write of more than a page can be cut off by a kill, and then the one before it still says what there is to repair. The
//! valid record with the higher sequence number counts.
//!
//! Who uses the journal has it locked (flock). So nobody repairs a target whose saver lives.

use super::Error;
use crate::proc;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const MAGIC: u64 = u64::from_le_bytes(*b"UMLJRNL2");
const HEAD: usize = 13;
const THREAD: usize = 29;
const MOST: u64 = 1 << 20;
const SECOND: u64 = 256 << 20;
/// How long a new saver waits for the guardian of one before it.
const PATIENCE: Duration = Duration::from_secs(1);

/// Where journals are.
pub const DIRECTORY: &str = "/run/umlctl/journal";

/// What to put back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Something is to be put back.
    pub active: bool,
    /// The process may be stopped by a SIGSTOP of ours.
    pub held: bool,
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
            held: false,
            pid,
            start_time,
            vdso_tail: 0,
            scratch: 0,
            scratch_len: 0,
            fds: [-1; 4],
            away: Vec::new(),
        }
    }

    /// Whether the process has ended. One whose first thread has ended is alive as long as it has others.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        match proc::stat(self.pid) {
            Ok(s) if s.start_time != self.start_time => true,
            Ok(s) if "ZX".contains(s.state) => {
                proc::threads(self.pid).map_or(true, |t| t.len() <= 1)
            }
            Ok(_) => false,
            Err(e) => matches!(e, proc::Error::Gone(_)),
        }
    }

    /// The bytes of a record.
    #[must_use]
    pub fn encode(&self, sequence: u64) -> Vec<u8> {
        let mut words = vec![
            MAGIC,
            sequence,
            u64::from(self.active) | u64::from(self.held) << 1,
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

    /// The reverse, with the sequence number; what is wrong with the bytes is the error.
    pub fn decode(bytes: &[u8]) -> Result<(u64, Self), &'static str> {
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
        if words[1] == u64::MAX {
            return Err("its number is the last there is");
        }
        let record = Self {
            active: words[2] & 1 != 0,
            held: words[2] & 2 != 0,
            pid: words[3] as i32,
            start_time: words[4],
            vdso_tail: words[5],
            scratch: words[6],
            scratch_len: words[7],
            fds: std::array::from_fn(|i| words[8 + i] as i32),
            away: words[HEAD..end]
                .chunks_exact(THREAD)
                .map(|w| Away {
                    tid: w[0] as i32,
                    sigmask: w[1],
                    regs: w[2..].to_vec(),
                })
                .collect(),
        };
        Ok((words[1], record))
    }

    /// The record that counts. `None`: nothing was ever written whole, so nothing was done to the target.
    fn read(file: &File) -> std::io::Result<Result<(u64, Self), &'static str>> {
        let len = file.metadata()?.len();
        let mut best: Result<(u64, Self), &'static str> = Err("it is empty");
        for at in [0, SECOND] {
            if len <= at {
                continue;
            }
            let mut bytes = vec![0u8; (len - at).min(HEAD as u64 * 8) as usize];
            file.read_exact_at(&mut bytes, at)?;
            // What does not begin as a record is not read any further: its length would be anything.
            if bytes.starts_with(&MAGIC.to_le_bytes()) {
                let n = bytes
                    .last_chunk::<8>()
                    .map_or(0, |w| u64::from_le_bytes(*w).min(MOST));
                let whole = (HEAD as u64 + n * THREAD as u64 + 1) * 8;
                bytes = vec![0; (len - at).min(whole) as usize];
                file.read_exact_at(&mut bytes, at)?;
            }
            match (Self::decode(&bytes), &best) {
                (Ok(r), Ok(b)) if r.0 <= b.0 => {}
                (Ok(r), _) => best = Ok(r),
                (Err(e), Err(_)) => best = Err(e),
                (Err(_), Ok(_)) => {}
            }
        }
        Ok(best)
    }
}

/// An open journal.
#[derive(Debug)]
pub struct Journal {
    file: Flock<File>,
    path: PathBuf,
    sequence: u64,
    /// What it says.
    pub record: Record,
}

impl Journal {
    /// Makes the journal of a process, in `directory`. One that says that there is something to repair is an error, and so
    /// is one that another program is using.
    pub fn create(directory: &Path, pid: i32, start_time: u64) -> Result<Self, Error> {
        let path = directory.join(pid.to_string());
        let io = |e| Error::Journal(path.clone(), e);
        std::fs::create_dir_all(directory).map_err(io)?;
        let begin = Instant::now();
        let file = loop {
            let open = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path);
            match lock(open.map_err(io)?, &path, pid) {
                Ok(Some(file)) => break file,
                Ok(None) => {}
                Err(Error::InUse(_)) if begin.elapsed() < PATIENCE => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(e) => return Err(e),
            }
        };
        let sequence = match Record::read(&file).map_err(io)? {
            Ok((_, old)) if old.active && old.pid == pid && old.start_time == start_time => {
                return Err(Error::NeedsRescue(pid));
            }
            Ok((sequence, _)) => sequence,
            Err(_) => {
                file.set_len(0).map_err(io)?;
                0
            }
        };
        let mut journal = Self {
            file,
            path,
            sequence,
            record: Record::idle(pid, start_time),
        };
        journal.write()?;
        Ok(journal)
    }

    /// Takes over a journal whose user is dead. `None`: there is none, or nothing was ever written to it.
    pub fn take_over(path: &Path) -> Result<Option<Self>, Error> {
        let io = |e| Error::Journal(path.into(), e);
        let pid = path.file_name().and_then(|n| n.to_str()?.parse().ok());
        loop {
            let file = match OpenOptions::new().read(true).write(true).open(path) {
                Ok(f) => f,
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
                Err(e) => return Err(io(e)),
            };
            let Some(file) = lock(file, path, pid.unwrap_or_default())? else {
                continue;
            };
            if file.metadata().map_err(io)?.len() == 0 {
                std::fs::remove_file(path).map_err(io)?;
                return Ok(None);
            }
            let (sequence, record) = Record::read(&file)
                .map_err(io)?
                .map_err(|why| Error::BadJournal(path.into(), why))?;
            return Ok(Some(Self {
                file,
                path: path.into(),
                sequence,
                record,
            }));
        }
    }

    /// What a journal says, whoever uses it.
    pub fn look(path: &Path) -> Result<Record, Error> {
        let io = |e| Error::Journal(path.into(), e);
        let file = File::open(path).map_err(io)?;
        let (_, record) = Record::read(&file)
            .map_err(io)?
            .map_err(|why| Error::BadJournal(path.into(), why))?;
        Ok(record)
    }

    /// Writes the record. It reaches the page cache before this returns, which outlives us.
    pub fn write(&mut self) -> Result<(), Error> {
        self.sequence += 1;
        let at = if self.sequence.is_multiple_of(2) {
            SECOND
        } else {
            0
        };
        self.file
            .write_all_at(&self.record.encode(self.sequence), at)
            .map_err(|e| Error::Journal(self.path.clone(), e))
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the file.
    pub fn remove(&self) {
        // Once removed there may be a new one at the same name.
        if is_at(&self.file, &self.path) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Drop for Journal {
    /// One that says that there is something to repair stays, for whoever repairs.
    fn drop(&mut self) {
        if !self.record.active || self.record.is_gone() {
            self.remove();
        }
    }
}

/// Locks an open journal. `None`: it was removed meanwhile.
fn lock(file: File, path: &Path, pid: i32) -> Result<Option<Flock<File>>, Error> {
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(file) if is_at(&file, path) => Ok(Some(file)),
        Ok(_) => Ok(None),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => Err(Error::InUse(pid)),
        Err((_, e)) => Err(Error::Journal(path.into(), e.into())),
    }
}

fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), std::fs::metadata(path)) {
        (Ok(a), Ok(b)) => (a.dev(), a.ino()) == (b.dev(), b.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back_and_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let (me, start) = (
            std::process::id().cast_signed(),
            proc::stat(std::process::id().cast_signed())
                .unwrap()
                .start_time,
        );
        let mut j = Journal::create(dir.path(), me, start).unwrap();
        let path = j.path().to_owned();
        assert!(matches!(Journal::take_over(&path), Err(Error::InUse(p)) if p == me));
        let away = vec![
            Away {
                tid: 78,
                sigmask: 9,
                regs: (0..27).collect()
            };
            30
        ];
        for tail in 7..10 {
            j.record = Record {
                active: true,
                held: tail == 8,
                vdso_tail: tail,
                fds: [4, -1, -1, -1],
                away: away.clone(),
                ..j.record.clone()
            };
            j.write().unwrap();
            assert_eq!(Journal::look(&path).unwrap(), j.record);
        }
        let last = j.record.clone();
        let good = last.encode(3);
        drop(j);
        assert!(matches!(
            Journal::create(dir.path(), me, start),
            Err(Error::NeedsRescue(p)) if p == me
        ));

        // A write that was cut off leaves the record before it.
        let mut j = Journal::take_over(&path).unwrap().unwrap();
        assert_eq!(j.record, last);
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        j.record.vdso_tail = 99;
        let next = j.record.encode(j.sequence + 1);
        for cut in [8, 4096, next.len() - 8] {
            let at = if (j.sequence + 1).is_multiple_of(2) {
                SECOND
            } else {
                0
            };
            file.write_all_at(&next[..cut], at).unwrap();
            file.write_all_at(&[0x55; 8], at + cut as u64).unwrap();
            assert_eq!(Journal::look(&path).unwrap(), last, "cut at {cut}");
        }
        drop(j);
        // Another process of the same number, and one that had nothing to repair.
        let j = Journal::create(dir.path(), me, start + 1).unwrap();
        assert!(!j.record.active);
        drop(j);
        assert!(!path.exists());
        assert!(Journal::take_over(&path).unwrap().is_none());

        for len in 0..good.len() - 8 {
            assert!(Record::decode(&good[..len]).is_err());
        }
        for i in (0..good.len()).step_by(3) {
            let mut bad = good.clone();
            bad[i] ^= 0x40;
            assert!(Record::decode(&bad).is_err(), "byte {i}");
        }
        assert!(Record::decode(&last.encode(u64::MAX - 1)).is_ok());
        assert!(Record::decode(&last.encode(u64::MAX)).is_err());
    }
}

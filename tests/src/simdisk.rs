//! A disk in memory that loses, tears and reorders what was not synced when the power is cut.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cowfs::store::disk::{Disk, DiskFile, Space};

use crate::Rng;

const BLOCK: usize = 4096;
/// What a disk writes at once.
const SECTOR: usize = 512;

type Blocks = BTreeMap<u64, Arc<[u8; BLOCK]>>;

#[derive(Debug, Clone)]
enum Change {
    Write(u64, Vec<u8>),
    Punch(u64, u64),
    Len(u64),
}

#[derive(Debug, Clone, Default)]
struct Image {
    blocks: Blocks,
    len: u64,
}

impl Image {
    fn write(&mut self, off: u64, data: &[u8]) {
        let mut done = 0;
        while done < data.len() {
            let at = off + done as u64;
            let (block, start) = (at / BLOCK as u64, (at % BLOCK as u64) as usize);
            let n = (BLOCK - start).min(data.len() - done);
            let b = self
                .blocks
                .entry(block)
                .or_insert_with(|| Arc::new([0; BLOCK]));
            Arc::make_mut(b)[start..start + n].copy_from_slice(&data[done..done + n]);
            done += n;
        }
        self.len = self.len.max(off + data.len() as u64);
    }

    fn zero(&mut self, off: u64, len: u64) {
        let end = off + len;
        let mut at = off;
        while at < end {
            let block = at / BLOCK as u64;
            let next = ((block + 1) * BLOCK as u64).min(end);
            if next - at == BLOCK as u64 {
                self.blocks.remove(&block);
            } else if let Some(b) = self.blocks.get_mut(&block) {
                let start = (at % BLOCK as u64) as usize;
                Arc::make_mut(b)[start..start + (next - at) as usize].fill(0);
            }
            at = next;
        }
    }

    fn apply(&mut self, c: &Change) {
        match c {
            Change::Write(off, data) => self.write(*off, data),
            Change::Punch(off, len) => self.zero(*off, *len),
            Change::Len(len) => {
                if *len < self.len {
                    self.zero(*len, self.len - len);
                }
                self.len = *len;
            }
        }
    }
}

#[derive(Debug, Default)]
struct FileState {
    now: Image,
    durable: Image,
    pending: Vec<Change>,
    /// The name is on disk.
    named: bool,
}

#[derive(Debug, Default)]
struct State {
    files: BTreeMap<String, FileState>,
    /// Operations until the power goes.
    left: Option<u64>,
    operations: u64,
}

/// The disk.
#[derive(Debug, Clone, Default)]
pub struct SimDisk {
    state: Arc<Mutex<State>>,
}

fn lock(m: &Mutex<State>) -> MutexGuard<'_, State> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    fn step(&mut self) -> io::Result<()> {
        self.operations += 1;
        match &mut self.left {
            Some(0) => Err(io::Error::from_raw_os_error(libc::EIO)),
            Some(n) => {
                *n -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

impl SimDisk {
    /// Lets the power go after `n` more operations that change something: all later ones fail.
    pub fn cut_after(&self, n: u64) {
        lock(&self.state).left = Some(n);
    }

    /// Operations so far.
    pub fn operations(&self) -> u64 {
        lock(&self.state).operations
    }

    /// Power is back: each change that was not synced has happened or not, whole or in part, in any order.
    pub fn crash(&self, rng: &mut Rng) {
        let mut s = lock(&self.state);
        s.left = None;
        s.files.retain(|_, f| f.named || rng.below(2) == 0);
        for f in s.files.values_mut() {
            let mut pending = std::mem::take(&mut f.pending);
            for i in (1..pending.len()).rev() {
                pending.swap(i, rng.below(i as u64 + 1) as usize);
            }
            let keep = rng.below(3);
            for c in &pending {
                let happens = match keep {
                    0 => false,
                    1 => true,
                    _ => rng.below(2) == 0,
                };
                if !happens {
                    continue;
                }
                match c {
                    Change::Write(off, data) if rng.below(4) == 0 => {
                        // Torn: only some of its sectors.
                        for (i, piece) in data.chunks(SECTOR).enumerate() {
                            if rng.below(2) == 0 {
                                f.durable.write(off + (i * SECTOR) as u64, piece);
                            }
                        }
                    }
                    c => f.durable.apply(c),
                }
            }
            f.now = f.durable.clone();
            f.named = true;
        }
    }

    /// A copy of everything as it is now, for tests that damage it.
    pub fn flip(&self, name: &str, off: u64, mask: u8) -> bool {
        let mut s = lock(&self.state);
        let Some(f) = s.files.get_mut(name) else {
            return false;
        };
        if off >= f.now.len {
            return false;
        }
        let block = off / BLOCK as u64;
        let b = f
            .now
            .blocks
            .entry(block)
            .or_insert_with(|| Arc::new([0; BLOCK]));
        Arc::make_mut(b)[(off % BLOCK as u64) as usize] ^= mask;
        f.durable = f.now.clone();
        true
    }

    /// Cuts a file short.
    pub fn truncate(&self, name: &str, len: u64) {
        if let Some(f) = lock(&self.state).files.get_mut(name) {
            f.now.apply(&Change::Len(len));
            f.durable = f.now.clone();
        }
    }

    /// Names and lengths of the files.
    pub fn files(&self) -> Vec<(String, u64)> {
        lock(&self.state)
            .files
            .iter()
            .map(|(n, f)| (n.clone(), f.now.len))
            .collect()
    }

    /// An independent copy.
    pub fn copy(&self) -> Self {
        let s = lock(&self.state);
        let files = s
            .files
            .iter()
            .map(|(n, f)| {
                let state = FileState {
                    now: f.now.clone(),
                    durable: f.now.clone(),
                    pending: Vec::new(),
                    named: true,
                };
                (n.clone(), state)
            })
            .collect();
        Self {
            state: Arc::new(Mutex::new(State {
                files,
                ..State::default()
            })),
        }
    }
}

impl Disk for SimDisk {
    fn open(&self, name: &str, create: bool) -> io::Result<Arc<dyn DiskFile>> {
        let mut s = lock(&self.state);
        if !s.files.contains_key(name) {
            if !create {
                return Err(io::Error::from_raw_os_error(libc::ENOENT));
            }
            s.step()?;
            s.files.insert(name.to_owned(), FileState::default());
        }
        drop(s);
        Ok(Arc::new(SimFile {
            state: Arc::clone(&self.state),
            name: name.to_owned(),
        }))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut s = lock(&self.state);
        s.step()?;
        s.files.remove(name);
        Ok(())
    }

    fn make_dir(&self, _: &str) -> io::Result<()> {
        Ok(())
    }

    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        let prefix = format!("{dir}/");
        Ok(lock(&self.state)
            .files
            .keys()
            .filter_map(|n| n.strip_prefix(&prefix).map(str::to_owned))
            .collect())
    }

    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        let mut s = lock(&self.state);
        s.step()?;
        for (n, f) in &mut s.files {
            if n.rsplit_once('/').map_or("", |p| p.0) == dir {
                f.named = true;
            }
        }
        Ok(())
    }

    fn space(&self) -> io::Result<Space> {
        Ok(Space {
            total_bytes: 1 << 40,
            free_bytes: 1 << 39,
            avail_bytes: 1 << 39,
        })
    }
}

#[derive(Debug)]
struct SimFile {
    state: Arc<Mutex<State>>,
    name: String,
}

impl SimFile {
    fn change(&self, c: Change) -> io::Result<()> {
        let mut s = lock(&self.state);
        s.step()?;
        let f = s
            .files
            .get_mut(&self.name)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))?;
        f.now.apply(&c);
        f.pending.push(c);
        Ok(())
    }
}

impl DiskFile for SimFile {
    fn read_at(&self, buf: &mut [u8], off: u64) -> io::Result<()> {
        let s = lock(&self.state);
        buf.fill(0);
        let Some(f) = s.files.get(&self.name) else {
            return Err(io::Error::from_raw_os_error(libc::ENOENT));
        };
        let mut done = 0;
        while done < buf.len() {
            let at = off + done as u64;
            let start = (at % BLOCK as u64) as usize;
            let n = (BLOCK - start).min(buf.len() - done);
            if let Some(b) = f.now.blocks.get(&(at / BLOCK as u64)) {
                buf[done..done + n].copy_from_slice(&b[start..start + n]);
            }
            done += n;
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], off: u64) -> io::Result<()> {
        self.change(Change::Write(off, buf.to_vec()))
    }

    fn sync(&self) -> io::Result<()> {
        let mut s = lock(&self.state);
        s.step()?;
        if let Some(f) = s.files.get_mut(&self.name) {
            // As on ext4: syncing a new file brings its name along.
            f.named = true;
            f.pending.clear();
            f.durable = f.now.clone();
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(lock(&self.state)
            .files
            .get(&self.name)
            .map_or(0, |f| f.now.len))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(Change::Len(len))
    }

    fn punch(&self, off: u64, len: u64) -> io::Result<()> {
        self.change(Change::Punch(off, len))
    }

    fn allocate(&self, off: u64, len: u64) -> io::Result<()> {
        let have = self.len()?;
        if have < off + len {
            self.change(Change::Len(off + len))?;
        }
        Ok(())
    }
}

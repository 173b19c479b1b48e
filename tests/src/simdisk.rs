//! A disk in memory that loses, tears and reorders what was not synced when the power is cut, that can be full, and that
//! can fail now and then.
//!
//! A failed sync is as on Linux: what was to be written counts as clean from then on. It stays readable, but no later sync
//! brings it to the disk, unless it is written again.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cowfs::store::Store;
use cowfs::store::disk::{Disk, DiskFile, Space};

use crate::Rng;

const BLOCK: usize = 4096;
/// What a disk writes at once.
const SECTOR: usize = 512;

type Blocks = BTreeMap<u64, Arc<[u8; BLOCK]>>;

/// A new store on a disk of its own.
pub fn store() -> Arc<Store> {
    SimDisk::default().store()
}

#[derive(Debug, Clone)]
enum Change {
    Write(u64, Vec<u8>),
    Punch(u64, u64),
    Allocate(u64, u64),
    Len(u64),
}

impl Change {
    /// Bytes that need blocks.
    fn needs(&self) -> (u64, u64) {
        match self {
            Change::Write(off, data) => (*off, off + data.len() as u64),
            Change::Allocate(off, len) => (*off, off + len),
            Change::Punch(..) | Change::Len(_) => (0, 0),
        }
    }
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

    /// Blocks of a range that are not there.
    fn missing(&self, (from, to): (u64, u64)) -> u64 {
        let (from, to) = (from / BLOCK as u64, to.div_ceil(BLOCK as u64));
        to - from - self.blocks.range(from..to).count() as u64
    }

    fn apply(&mut self, c: &Change) {
        match c {
            Change::Write(off, data) => self.write(*off, data),
            Change::Punch(off, len) => self.zero(*off, *len),
            Change::Allocate(off, len) => {
                let zeros = Arc::new([0; BLOCK]);
                for b in off / BLOCK as u64..(off + len).div_ceil(BLOCK as u64) {
                    self.blocks.entry(b).or_insert_with(|| Arc::clone(&zeros));
                }
                self.len = self.len.max(off + len);
            }
            Change::Len(len) => {
                if *len < self.len {
                    self.zero(*len, self.len - len);
                }
                self.len = *len;
            }
        }
    }
}

#[derive(Debug, Clone, Default)]
struct FileState {
    now: Image,
    durable: Image,
    pending: Vec<Change>,
    /// The name is on disk.
    named: bool,
}

impl FileState {
    /// Blocks in use. One that was given back counts until that is durable: it may come back when the power is cut, so
    /// no host gives it to another file before.
    fn used(&self) -> u64 {
        let gives = |c: &Change| matches!(c, Change::Punch(..) | Change::Len(_));
        let mut n = self.now.blocks.len();
        if self.pending.iter().any(gives) {
            let now = &self.now.blocks;
            n += self
                .durable
                .blocks
                .keys()
                .filter(|b| !now.contains_key(b))
                .count();
        }
        n as u64
    }
}

#[derive(Debug, Default)]
struct State {
    files: BTreeMap<String, FileState>,
    /// Operations until the power goes.
    left: Option<u64>,
    operations: u64,
    /// Blocks that fit.
    capacity: Option<u64>,
    /// One in so many operations fails.
    one_in: Option<(u64, Rng)>,
    /// The next operation of a kind on a file fails.
    next: Vec<(&'static str, What, i32)>,
}

/// What can be made to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// A write.
    Write,
    /// A sync.
    Sync,
    /// A change of the length, a reservation or a hole.
    Shape,
    /// Making or removing a file, or syncing a directory.
    Name,
}

type Hook = Box<dyn FnOnce() + Send>;

/// Run once, in the middle of a write.
#[derive(Default)]
struct Hooks(Mutex<Option<(String, Hook)>>);

impl std::fmt::Debug for Hooks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hooks")
    }
}

/// The disk.
#[derive(Debug, Clone, Default)]
pub struct SimDisk {
    state: Arc<Mutex<State>>,
    hooks: Arc<Hooks>,
}

fn lock(m: &Mutex<State>) -> MutexGuard<'_, State> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    fn step(&mut self, name: &str, what: What) -> io::Result<()> {
        self.operations += 1;
        match &mut self.left {
            Some(0) => return Err(io::Error::from_raw_os_error(libc::EIO)),
            Some(n) => *n -= 1,
            None => {}
        }
        if let Some(i) = self
            .next
            .iter()
            .position(|n| name.starts_with(n.0) && n.1 == what)
        {
            return Err(io::Error::from_raw_os_error(self.next.remove(i).2));
        }
        if let Some((one_in, rng)) = &mut self.one_in
            && rng.below(*one_in) == 0
        {
            // A sync fails with ENOSPC where space is promised and given late (thin provisioning, quotas, NFS).
            let errno = if what == What::Sync && rng.below(3) == 0 {
                libc::ENOSPC
            } else {
                libc::EIO
            };
            return Err(io::Error::from_raw_os_error(errno));
        }
        Ok(())
    }

    /// Blocks in use.
    fn used(&self) -> u64 {
        self.files.values().map(FileState::used).sum()
    }
}

impl SimDisk {
    /// A new store on this disk.
    pub fn store(&self) -> Arc<Store> {
        Store::init_on(Arc::new(self.clone())).expect("a new store");
        self.open_store()
    }

    /// Opens the store that is on this disk.
    pub fn open_store(&self) -> Arc<Store> {
        Store::open_on(Arc::new(self.clone()), None).expect("it opens")
    }

    /// Lets the power go after `n` more operations that change something: all later ones fail.
    pub fn cut_after(&self, n: u64) {
        lock(&self.state).left = Some(n);
    }

    /// Makes one in `n` operations that change something fail; `None` ends that.
    pub fn fail_one_in(&self, n: Option<u64>, seed: u64) {
        lock(&self.state).one_in = n.map(|n| (n, Rng(seed)));
    }

    /// Makes the next operation of a kind on a file whose name begins so fail.
    pub fn fail_next(&self, name: &'static str, what: What, errno: i32) {
        lock(&self.state).next.push((name, what, errno));
    }

    /// True when all that was to fail has failed.
    pub fn has_failed(&self) -> bool {
        lock(&self.state).next.is_empty()
    }

    /// Sets how many blocks fit; `None` for as many as come.
    pub fn set_capacity(&self, blocks: Option<u64>) {
        lock(&self.state).capacity = blocks;
    }

    /// Blocks in use.
    pub fn used_blocks(&self) -> u64 {
        lock(&self.state).used()
    }

    /// Runs `f` in the middle of the next write to a file whose name begins so: before its bytes are there.
    pub fn in_next_write(&self, name: &str, f: impl FnOnce() + Send + 'static) {
        *self.hooks.0.lock().unwrap_or_else(PoisonError::into_inner) =
            Some((name.to_owned(), Box::new(f)));
    }

    /// Operations so far.
    pub fn operations(&self) -> u64 {
        lock(&self.state).operations
    }

    /// Power is back: each change that was not synced has happened or not, whole or in part, in any order.
    pub fn crash(&self, rng: &mut Rng) {
        let mut s = lock(&self.state);
        s.left = None;
        s.one_in = None;
        s.next.clear();
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

    /// An independent copy, also of what is not synced.
    pub fn copy_unsynced(&self) -> Self {
        let s = lock(&self.state);
        let files = s.files.iter().map(|(n, f)| (n.clone(), f.clone()));
        Self {
            state: Arc::new(Mutex::new(State {
                files: files.collect(),
                ..State::default()
            })),
            hooks: Arc::default(),
        }
    }

    /// An independent copy of everything as it is now.
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
            hooks: Arc::default(),
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
            s.step(name, What::Name)?;
            s.files.insert(name.to_owned(), FileState::default());
        }
        drop(s);
        Ok(Arc::new(SimFile {
            state: Arc::clone(&self.state),
            hooks: Arc::clone(&self.hooks),
            name: name.to_owned(),
        }))
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut s = lock(&self.state);
        s.step(name, What::Name)?;
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
        s.step(dir, What::Name)?;
        for (n, f) in &mut s.files {
            if n.rsplit_once('/').map_or("", |p| p.0) == dir {
                f.named = true;
            }
        }
        Ok(())
    }

    fn space(&self) -> io::Result<Space> {
        let s = lock(&self.state);
        let total = s.capacity.unwrap_or(1 << 28);
        let free = total.saturating_sub(s.used()) * BLOCK as u64;
        Ok(Space {
            total_bytes: total * BLOCK as u64,
            free_bytes: free,
            avail_bytes: free,
        })
    }
}

#[derive(Debug)]
struct SimFile {
    state: Arc<Mutex<State>>,
    hooks: Arc<Hooks>,
    name: String,
}

impl SimFile {
    fn change(&self, c: Change) -> io::Result<()> {
        let what = match c {
            Change::Write(..) => What::Write,
            _ => What::Shape,
        };
        let mut s = lock(&self.state);
        s.step(&self.name, what)?;
        let room = s.capacity.map(|c| c.saturating_sub(s.used()));
        let f = s
            .files
            .get_mut(&self.name)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))?;
        if room.is_some_and(|room| f.now.missing(c.needs()) > room) {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
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
        let hook = {
            let mut h = self.hooks.0.lock().unwrap_or_else(PoisonError::into_inner);
            let is_it = h.as_ref().is_some_and(|h| self.name.starts_with(&h.0));
            is_it.then(|| h.take()).flatten()
        };
        if let Some((_, f)) = hook {
            f();
        }
        self.change(Change::Write(off, buf.to_vec()))
    }

    fn sync(&self) -> io::Result<()> {
        let mut s = lock(&self.state);
        let done = s.step(&self.name, What::Sync);
        let is_off = s.left == Some(0);
        let mut rng = Rng(s.operations);
        if let Some(f) = s.files.get_mut(&self.name) {
            if done.is_ok() {
                // As on ext4: syncing a new file brings its name along.
                f.named = true;
                for c in std::mem::take(&mut f.pending) {
                    f.durable.apply(&c);
                }
            } else if !is_off {
                for c in std::mem::take(&mut f.pending) {
                    if !matches!(c, Change::Write(..)) || rng.below(2) == 0 {
                        f.durable.apply(&c);
                    }
                }
            }
        }
        done
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
        self.change(Change::Allocate(off, len))
    }
}

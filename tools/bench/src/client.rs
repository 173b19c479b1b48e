//! The operations that are timed inside a fresh process: no start-up cost, no warm state of the bench.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use nix::sys::stat::{FileStat, SFlag, lstat};

use crate::history::reader;
use crate::run::Done;

const PAGE: u64 = 4096;
const CHUNK: usize = 1 << 20;
/// Files in one directory of a populated tree.
const PER_DIR: u64 = 1000;
/// Size of a populated file, bytes.
const SMALL: usize = 1024;

/// One operation.
#[derive(Debug, Subcommand)]
pub enum Op {
    /// Write a new file front to back, then fsync
    SeqWrite { path: PathBuf, bytes: u64 },
    /// Read a file front to back
    SeqRead { path: PathBuf },
    /// Read pages at random
    RandRead { path: PathBuf, ops: u64, seed: u64 },
    /// Write pages at random
    RandWrite { path: PathBuf, ops: u64, seed: u64 },
    /// Write pages at random, fsync after each
    FsyncWrite { path: PathBuf, ops: u64, seed: u64 },
    /// Map a file and read it
    MmapRead { path: PathBuf },
    /// Read all directories and lstat all entries
    Stat { path: PathBuf },
    /// Make files of 1 KiB
    Populate { path: PathBuf, files: u64 },
    /// Overwrite some of them
    Change {
        path: PathBuf,
        files: u64,
        count: u64,
        seed: u64,
    },
    /// Sum of the contents of those that `change` with this seed would take
    Digest {
        path: PathBuf,
        files: u64,
        count: u64,
        seed: u64,
    },
    /// Overwrite files at random, whole, until so many percent of the bytes are new
    Rewrite {
        path: PathBuf,
        percent: u64,
        seed: u64,
    },
    /// Read all files of a tree
    ReadTree { path: PathBuf },
    /// Open files of a tree at random and read a page of each
    ReadPlaces { path: PathBuf, ops: u64, seed: u64 },
    /// Stay inside a directory with a file open, until stdin ends
    Hold { path: PathBuf },
}

/// Runs one and prints its [`Done`].
pub fn main(op: &Op) -> Result<()> {
    if let Op::Hold { path } = op {
        return hold(path);
    }
    let (ns, n, sum) = match op {
        Op::SeqWrite { path, bytes } => seq_write(path, *bytes),
        Op::SeqRead { path } => seq_read(path),
        Op::RandRead { path, ops, seed } => rand_read(path, *ops, *seed),
        Op::RandWrite { path, ops, seed } => rand_write(path, *ops, *seed, false),
        Op::FsyncWrite { path, ops, seed } => rand_write(path, *ops, *seed, true),
        Op::MmapRead { path } => mmap_read(path),
        Op::Stat { path } => timed(|| walk(path, &mut |_, _| Ok(())).map(|n| (n, 0))),
        Op::Populate { path, files } => timed(|| populate(path, *files).map(|()| (*files, 0))),
        Op::Change {
            path,
            files,
            count,
            seed,
        } => timed(|| change(path, *files, *count, *seed)),
        Op::Digest {
            path,
            files,
            count,
            seed,
        } => timed(|| digest(path, *files, *count, *seed)),
        Op::Rewrite {
            path,
            percent,
            seed,
        } => timed(|| rewrite(path, *percent, *seed).map(|n| (n, 0))),
        Op::ReadTree { path } => reader::all(path),
        Op::ReadPlaces { path, ops, seed } => reader::places(path, *ops, *seed),
        Op::Hold { .. } => return Ok(()),
    }?;
    println!("{}", serde_json::to_string(&Done { ns, n, sum })?);
    Ok(())
}

/// Nanoseconds, number, sum.
pub type Timed = Result<(u64, u64, u64)>;

/// Runs it by the clock.
pub fn timed(f: impl FnOnce() -> Result<(u64, u64)>) -> Timed {
    let start = Instant::now();
    let (n, sum) = f()?;
    let ns = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
    Ok((ns, n, sum))
}

/// xorshift64*: good enough to choose places and fill pages, and the same everywhere.
#[derive(Debug)]
pub struct Random(u64);

impl Random {
    /// The same seed, the same numbers.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 8) % n.max(1)
    }

    /// Fills with noise.
    pub fn fill(&mut self, buf: &mut [u8]) {
        for c in buf.chunks_mut(8) {
            let w = self.next().to_le_bytes();
            c.copy_from_slice(&w[..c.len()]);
        }
    }
}

fn sum_of(buf: &[u8]) -> u64 {
    buf.iter().fold(0, |a: u64, b| {
        a.rotate_left(5)
            .wrapping_mul(31)
            .wrapping_add(u64::from(*b))
    })
}

fn open(path: &Path) -> Result<File> {
    File::open(path).with_context(|| format!("opening {}", path.display()))
}

fn open_rw(path: &Path) -> Result<File> {
    let f = OpenOptions::new().read(true).write(true).open(path);
    f.with_context(|| format!("opening {}", path.display()))
}

fn seq_write(path: &Path, bytes: u64) -> Timed {
    let mut buf = vec![0; CHUNK];
    Random::new(bytes).fill(&mut buf);
    timed(|| {
        let f = File::create(path).with_context(|| format!("making {}", path.display()))?;
        let mut at = 0;
        while at < bytes {
            let n = usize::try_from(bytes - at).unwrap_or(CHUNK).min(CHUNK);
            f.write_all_at(&buf[..n], at).context("writing")?;
            at += n as u64;
        }
        f.sync_all().context("fsync")?;
        Ok((bytes, 0))
    })
}

fn seq_read(path: &Path) -> Timed {
    let mut buf = vec![0; CHUNK];
    timed(|| {
        let f = open(path)?;
        let mut at = 0;
        loop {
            let n = f.read_at(&mut buf, at).context("reading")?;
            if n == 0 {
                return Ok((at, 0));
            }
            at += n as u64;
        }
    })
}

fn pages(f: &File) -> Result<u64> {
    match f.metadata().context("stat")?.len() / PAGE {
        0 => bail!("the file is smaller than a page"),
        n => Ok(n),
    }
}

fn rand_read(path: &Path, ops: u64, seed: u64) -> Timed {
    let f = open(path)?;
    let pages = pages(&f)?;
    let mut random = Random::new(seed);
    let mut buf = [0; PAGE as usize];
    timed(|| {
        for _ in 0..ops {
            f.read_exact_at(&mut buf, random.below(pages) * PAGE)
                .context("reading")?;
        }
        Ok((ops, 0))
    })
}

fn rand_write(path: &Path, ops: u64, seed: u64, sync: bool) -> Timed {
    let f = open_rw(path)?;
    let pages = pages(&f)?;
    let mut random = Random::new(seed);
    let mut buf = [0; PAGE as usize];
    random.fill(&mut buf);
    timed(|| {
        for i in 0..ops {
            buf[..8].copy_from_slice(&i.to_le_bytes());
            f.write_all_at(&buf, random.below(pages) * PAGE)
                .context("writing")?;
            if sync {
                f.sync_all().context("fsync")?;
            }
        }
        Ok((ops, 0))
    })
}

fn mmap_read(path: &Path) -> Timed {
    timed(|| {
        let f = open(path)?;
        let len = f.metadata().context("stat")?.len();
        let sum = crate::sys::mmap_sum(&f, usize::try_from(len).context("size")?)?;
        Ok((len, sum))
    })
}

/// Calls `f` for every entry below `dir` after its lstat; how many there are. lstat(2), as find, git, tar and rsync call
/// it: Rust's own metadata asks for birth times as well, which FUSE caches only after a request of their own.
pub fn walk(dir: &Path, f: &mut dyn FnMut(&Path, &FileStat) -> Result<()>) -> Result<u64> {
    let mut n = 0;
    let mut stack = vec![dir.to_owned()];
    while let Some(d) = stack.pop() {
        for e in std::fs::read_dir(&d).with_context(|| format!("reading {}", d.display()))? {
            let e = e.with_context(|| format!("reading {}", d.display()))?;
            let path = e.path();
            let m = lstat(&path).with_context(|| format!("lstat of {}", path.display()))?;
            n += 1;
            f(&path, &m)?;
            if kind(&m) == SFlag::S_IFDIR {
                stack.push(path);
            }
        }
    }
    Ok(n)
}

/// Its type.
pub fn kind(m: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(m.st_mode) & SFlag::S_IFMT
}

fn name_of(dir: &Path, i: u64) -> PathBuf {
    dir.join(format!("d{:04}/f{i:07}", i / PER_DIR))
}

fn populate(dir: &Path, files: u64) -> Result<()> {
    let mut buf = [0; SMALL];
    for i in 0..files {
        if i % PER_DIR == 0 {
            let d = dir.join(format!("d{:04}", i / PER_DIR));
            let made = std::fs::DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(&d);
            made.with_context(|| format!("making {}", d.display()))?;
        }
        Random::new(i + 1).fill(&mut buf);
        let path = name_of(dir, i);
        let f = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o644)
            .open(&path);
        let mut f = f.with_context(|| format!("making {}", path.display()))?;
        f.write_all(&buf)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// The files a seed chooses, spread evenly from a random start, all different.
fn chosen(files: u64, count: u64, seed: u64) -> impl Iterator<Item = u64> {
    let count = count.min(files);
    let start = Random::new(seed).below(files);
    (0..count).map(move |i| (start + i * (files / count.max(1)).max(1)) % files)
}

fn change(dir: &Path, files: u64, count: u64, seed: u64) -> Result<(u64, u64)> {
    let mut random = Random::new(seed ^ 0xC0FF_EE00);
    let mut buf = [0; SMALL];
    let mut sum = 0_u64;
    for i in chosen(files, count, seed) {
        random.fill(&mut buf);
        sum = sum.wrapping_add(sum_of(&buf));
        let path = name_of(dir, i);
        let f = OpenOptions::new().write(true).open(&path);
        let f = f.with_context(|| format!("opening {}", path.display()))?;
        f.write_all_at(&buf, 0)
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok((count, sum))
}

fn digest(dir: &Path, files: u64, count: u64, seed: u64) -> Result<(u64, u64)> {
    let mut sum = 0_u64;
    for i in chosen(files, count, seed) {
        let path = name_of(dir, i);
        let data = std::fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        sum = sum.wrapping_add(sum_of(&data));
    }
    Ok((count, sum))
}

fn rewrite(dir: &Path, percent: u64, seed: u64) -> Result<u64> {
    let mut files = Vec::new();
    walk(dir, &mut |p, m| {
        if kind(m) == SFlag::S_IFREG {
            files.push((p.to_owned(), u64::try_from(m.st_size).unwrap_or(0)));
        }
        Ok(())
    })?;
    files.sort();
    let goal = files.iter().map(|f| f.1).sum::<u64>() * percent / 100;
    let mut random = Random::new(seed);
    let mut done = 0;
    while done < goal && !files.is_empty() {
        let i = usize::try_from(random.below(files.len() as u64)).unwrap_or(0);
        let (path, len) = files.swap_remove(i);
        let len = len.min(goal - done);
        let mut buf = vec![0; usize::try_from(len).context("size")?];
        random.fill(&mut buf);
        let f = OpenOptions::new().write(true).open(&path);
        let f = f.with_context(|| format!("opening {}", path.display()))?;
        f.write_all_at(&buf, 0)
            .with_context(|| format!("writing {}", path.display()))?;
        done += len;
    }
    Ok(done)
}

fn hold(dir: &Path) -> Result<()> {
    let inside = dir.join("d0000");
    std::env::set_current_dir(&inside).with_context(|| format!("going to {}", inside.display()))?;
    let _open = open(Path::new("f0000000"))?;
    println!("ready");
    std::io::stdin()
        .read_line(&mut String::new())
        .context("waiting")?;
    Ok(())
}

//! Reading a tree, inside a process of its own.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::client::{Random, Timed, kind, timed, walk};
use nix::sys::stat::SFlag;

const PAGE: u64 = 4096;
const BUFFER: usize = 128 << 10;

/// Reads all files of a tree, in the order of its directories, as tar does; bytes.
pub fn all(dir: &Path) -> Timed {
    let mut buf = vec![0; BUFFER];
    timed(|| {
        let mut bytes = 0;
        walk(dir, &mut |path, m| {
            if kind(m) == SFlag::S_IFREG {
                let mut f = open(path)?;
                loop {
                    match f.read(&mut buf) {
                        Ok(0) => break,
                        Ok(n) => bytes += n as u64,
                        Err(e) => {
                            return Err(e).with_context(|| format!("reading {}", path.display()));
                        }
                    }
                }
            }
            Ok(())
        })?;
        Ok((bytes, 0))
    })
}

/// Opens files at random and reads a page of each: every page of the tree is as likely as any other. The walk that finds
/// the files is not counted.
pub fn places(dir: &Path, ops: u64, seed: u64) -> Timed {
    let mut files: Vec<(PathBuf, u64)> = Vec::new();
    let mut pages = 0_u64;
    walk(dir, &mut |path, m| {
        let n = u64::try_from(m.st_size).unwrap_or(0).div_ceil(PAGE);
        if kind(m) == SFlag::S_IFREG && n > 0 {
            files.push((path.to_owned(), pages));
            pages += n;
        }
        Ok(())
    })?;
    // Every filesystem has its own order; the same places are read on all.
    let mut sizes: Vec<u64> = files.windows(2).map(|w| w[1].1 - w[0].1).collect();
    sizes.push(pages - files.last().map_or(0, |f| f.1));
    let mut sorted: Vec<(PathBuf, u64)> = files.into_iter().map(|f| f.0).zip(sizes).collect();
    sorted.sort();
    let mut first = 0;
    for f in &mut sorted {
        (f.1, first) = (first, first + f.1);
    }
    let mut random = Random::new(seed);
    let mut buf = [0; PAGE as usize];
    timed(|| {
        for _ in 0..ops {
            let page = random.below(pages);
            let i = sorted.partition_point(|f| f.1 <= page) - 1;
            let (path, first) = &sorted[i];
            open(path)?
                .read_at(&mut buf, (page - first) * PAGE)
                .with_context(|| format!("reading {}", path.display()))?;
        }
        Ok((ops, 0))
    })
}

fn open(path: &Path) -> Result<File> {
    File::open(path).with_context(|| format!("opening {}", path.display()))
}

//! The files of a machine's snapshot beside its manifest: `memory` (sparse, as long as the guest's memory), `private`
//! (main's own pages, one behind the other), and for `memory` and `disk.cow` the sums of their chunks.

use super::Error;
use crate::sparse;
use nix::errno::Errno;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes that have one sum.
pub const CHUNK: u64 = 64 << 10;
const SUM: usize = 32;
/// The guest's memory.
pub const MEMORY: &str = "memory";
/// Sums of it.
pub const MEMORY_SUMS: &str = "memory.sums";
/// Main's own pages.
pub const PRIVATE: &str = "private";
/// The disk's difference to its base.
pub const DISK: &str = "disk.cow";
/// Sums of it.
pub const DISK_SUMS: &str = "disk.sums";

/// The sums of a file's chunks; the last chunk may be short.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sums(Vec<[u8; SUM]>);

impl Sums {
    /// Computes them. Holes are not read.
    pub fn of(file: &File, path: &Path) -> Result<Self, Error> {
        let io = |e| Error::Io(path.into(), "read", e);
        let len = file.metadata().map_err(io)?.len();
        let zeroes = *blake3::hash(&vec![0; CHUNK as usize]).as_bytes();
        let count = len.div_ceil(CHUNK) as usize;
        let mut sums = vec![zeroes; count];
        let mut buffer = vec![0; CHUNK as usize];
        let mut next = 0;
        let mut one = |i: u64| -> Result<(), Error> {
            let at = i * CHUNK;
            let bytes = &mut buffer[..(len - at).min(CHUNK) as usize];
            file.read_exact_at(bytes, at).map_err(io)?;
            sums[i as usize] = *blake3::hash(bytes).as_bytes();
            Ok(())
        };
        while let Some((start, end)) =
            sparse::next(file, next * CHUNK, len).map_err(|e| Error::Sys("SEEK_DATA", e))?
        {
            for i in (start / CHUNK).max(next)..end.div_ceil(CHUNK) {
                one(i)?;
            }
            next = end.div_ceil(CHUNK);
            if next * CHUNK >= len {
                break;
            }
        }
        if !len.is_multiple_of(CHUNK) {
            one(count as u64 - 1)?;
        }
        Ok(Self(sums))
    }

    /// Writes them to a file; gives blake3 of it, hexadecimal.
    pub fn write(&self, path: &Path) -> Result<String, Error> {
        let io = |e| Error::Io(path.into(), "write", e);
        let bytes = self.0.as_flattened();
        let mut file = File::create(path).map_err(io)?;
        file.write_all(bytes).map_err(io)?;
        file.sync_all().map_err(io)?;
        Ok(blake3::hash(bytes).to_hex().to_string())
    }

    /// Reads them; `sum` is blake3 of the file. They are of `of`, which has `len` bytes.
    pub fn load(path: &Path, sum: &str, of: &Path, len: u64) -> Result<Self, Error> {
        let io = |e| Error::Io(path.into(), "read", e);
        let wrong = || Error::Damaged(path.into(), "its sum is wrong".into());
        let wanted = len.div_ceil(CHUNK).saturating_mul(SUM as u64);
        let file = File::open(path).map_err(io)?;
        // The file may have any length: it is read into memory only if it has the one that it should have.
        if file.metadata().map_err(io)?.len() != wanted {
            return Err(match sum_of(path)? == sum {
                // The sums are what they were, so it is not them.
                true => Error::Damaged(of.into(), "its length is wrong".into()),
                false => wrong(),
            });
        }
        let mut bytes = Vec::new();
        file.take(wanted).read_to_end(&mut bytes).map_err(io)?;
        if blake3::hash(&bytes).to_hex().as_str() != sum {
            return Err(wrong());
        }
        Ok(Self(bytes.as_chunks::<SUM>().0.to_vec()))
    }

    /// Whether a chunk has the right bytes.
    #[must_use]
    pub fn fits(&self, chunk: u64, bytes: &[u8]) -> bool {
        self.0
            .get(chunk as usize)
            .is_some_and(|s| blake3::hash(bytes).as_bytes() == s)
    }

    /// Checks a whole file; the first chunk that does not fit is the error.
    pub fn check(&self, file: &File, path: &Path) -> Result<(), Error> {
        let now = Self::of(file, path)?;
        if now.0.len() != self.0.len() {
            return Err(Error::Damaged(path.into(), "its length is wrong".into()));
        }
        match now.0.iter().zip(&self.0).position(|(a, b)| a != b) {
            None => Ok(()),
            Some(i) => {
                let at = i as u64 * CHUNK;
                let what = format!("bytes {at} to {} are not what was saved", at + CHUNK);
                Err(Error::Damaged(path.into(), what))
            }
        }
    }
}

/// Opens a file of a snapshot.
pub fn open(dir: &Path, name: &str) -> Result<(File, PathBuf), Error> {
    let path = dir.join(name);
    let file = File::open(&path).map_err(|e| Error::Io(path.clone(), "open", e))?;
    Ok((file, path))
}

/// blake3 of bytes, hexadecimal.
#[must_use]
pub fn sum(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex().to_string()
}

/// blake3 of a file, hexadecimal.
pub fn sum_of(path: &Path) -> Result<String, Error> {
    let io = |e| Error::Io(path.into(), "read", e);
    let mut hasher = blake3::Hasher::new();
    let file = File::open(path).map_err(io)?;
    hasher.update_reader(&file).map_err(io)?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// Makes sure that a directory's entries are on the disk.
pub fn sync_dir(dir: &Path) -> Result<(), Error> {
    File::open(dir)
        .and_then(|f| f.sync_all())
        .map_err(|e| Error::Io(dir.into(), "sync", e))
}

/// What an error of the host means to a caller who asks for memory that a snapshot has.
#[must_use]
pub fn errno_of(e: &std::io::Error) -> Errno {
    Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_see_every_change_and_skip_holes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        file.set_len(10 * CHUNK + 100).unwrap();
        file.write_all_at(b"x", 3 * CHUNK + 5).unwrap();
        file.write_all_at(b"y", 10 * CHUNK + 99).unwrap();
        let sums = Sums::of(&file, &path).unwrap();
        let at = dir.path().join("sums");
        let sum = sums.write(&at).unwrap();
        let back = Sums::load(&at, &sum, &path, 10 * CHUNK + 100).unwrap();
        assert_eq!(back, sums);
        back.check(&file, &path).unwrap();
        for at in [0, 3 * CHUNK + 5, 7 * CHUNK, 10 * CHUNK + 50] {
            let mut old = [0];
            file.read_exact_at(&mut old, at).unwrap();
            file.write_all_at(b"z", at).unwrap();
            let e = back.check(&file, &path).unwrap_err();
            assert!(e.to_string().contains("damaged"), "{e}");
            file.write_all_at(&old, at).unwrap();
        }
        let damaged = |len| match Sums::load(&at, &sum, &path, len) {
            Err(Error::Damaged(path, _)) => path,
            other => panic!("{other:?}"),
        };
        assert_eq!(damaged(10 * CHUNK), path);
        std::fs::write(&at, b"short").unwrap();
        assert_eq!(damaged(10 * CHUNK + 100), at);
        std::fs::write(&at, [0; 11 * SUM]).unwrap();
        assert_eq!(damaged(10 * CHUNK + 100), at);
    }

    #[test]
    fn sums_that_are_too_many_take_no_memory() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("sums");
        let len = 64 << 20;
        File::create(&at).unwrap().set_len(len).unwrap();
        let before = peak();
        let e = Sums::load(&at, "no sum", dir.path(), CHUNK).unwrap_err();
        assert!(e.to_string().contains("sum is wrong"), "{e}");
        assert!(peak() - before < len >> 10, "it was read into memory");
    }

    /// KiB that this process has ever had in memory at most.
    fn peak() -> u64 {
        let text = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:"));
        let words = line.unwrap().split_ascii_whitespace().next();
        words.unwrap().parse().unwrap()
    }
}

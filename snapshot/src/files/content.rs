//! Contents of files without a name, which are saved in the snapshot (`files/N`), and their sums.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::error::Error;
use super::{Kind, OpenFile};
use crate::sparse;

/// What holds nothing but zeroes is not in the sum: it may be a hole here and none there.
const CHUNK: usize = 64 << 10;

/// Where content `number` is.
pub(super) fn path(dir: &Path, number: u32) -> PathBuf {
    dir.join("files").join(number.to_string())
}

/// Opens a content. What is there may be anything, also a link to somewhere else.
fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
}

/// Number, bytes and sum of the content of a file, if it has one.
fn of(kind: &Kind) -> Option<(u32, u64, &str)> {
    match kind {
        Kind::Unlinked(u) => Some((u.saved, u.size, &u.sum)),
        Kind::Memfd(m) => Some((m.saved, m.size, &m.sum)),
        _ => None,
    }
}

/// Puts the sums of what was saved into the manifest.
pub(super) fn seal(files: &mut [OpenFile], dir: &Path) -> Result<(), Error> {
    for file in files {
        let (number, sum) = match &mut file.kind {
            Kind::Unlinked(u) => (u.saved, &mut u.sum),
            Kind::Memfd(m) => (m.saved, &mut m.sum),
            _ => continue,
        };
        let path = path(dir, number);
        let done = open(&path).and_then(|f| sum_of(&f));
        *sum = done.map_err(|source| Error::Save { path, source })?;
    }
    Ok(())
}

/// Checks all contents that are saved in the snapshot in `dir`. The error is a path, and what is wrong with it.
pub fn check_contents(files: &[OpenFile], dir: &Path) -> Result<(), (PathBuf, String)> {
    for file in files {
        if let Some((number, size, sum)) = of(&file.kind) {
            let path = path(dir, number);
            if let Err(what) = open(&path)
                .map_err(|e| format!("it cannot be opened: {e}"))
                .and_then(|f| check(&f, size, sum))
            {
                return Err((path, what));
            }
        }
    }
    Ok(())
}

fn check(file: &File, size: u64, sum: &str) -> Result<(), String> {
    let failed = |e: io::Error| format!("it cannot be read: {e}");
    let stat = file.metadata().map_err(failed)?;
    if !stat.is_file() || stat.len() != size {
        return Err("it has not the size that the manifest says".to_owned());
    }
    if sum_of(file).map_err(failed)? != sum {
        return Err("its sum is wrong: bytes of it were changed".to_owned());
    }
    Ok(())
}

/// Gives a file the content `number`, which must be what was saved.
pub(super) fn restore(
    at: usize,
    dir: &Path,
    (number, size, sum): (u32, u64, &str),
    to: &File,
) -> Result<(), Error> {
    let path = path(dir, number);
    let name = path.display();
    let from = open(&path).map_err(Error::restore(at, format!("read {name}")))?;
    let stat = from.metadata();
    let stat = stat.map_err(Error::restore(at, format!("read {name}")))?;
    // Before anything of so many bytes is copied.
    if !stat.is_file() || stat.len() != size {
        let what = format!("{name} has not the size that the manifest says");
        return Err(Error::damaged(at, what));
    }
    let what = format!("copy {name}; free space for it");
    copy_sparse(&from, to).map_err(Error::restore(at, what))?;
    // The copy is looked at: nobody else can change it any more.
    check(to, size, sum).map_err(|what| Error::damaged(at, format!("{name}: {what}")))
}

/// Calls `each` with the parts of a file that are not holes.
fn data(
    file: &File,
    size: u64,
    mut each: impl FnMut(u64, u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut at = 0;
    while at < size
        && let Some((start, end)) = sparse::next(file, at, size)?
    {
        each(start, end)?;
        at = end;
    }
    Ok(())
}

/// Copies content, with its holes. Both files are used by offset; only `from` is sought in.
pub(super) fn copy_sparse(from: &File, to: &File) -> io::Result<()> {
    let size = from.metadata()?.len();
    to.set_len(size)?;
    let mut buffer = vec![0; 1 << 18];
    data(from, size, |mut position, end| {
        while position < end {
            let want = usize::try_from(end - position)
                .unwrap_or(usize::MAX)
                .min(buffer.len());
            let n = from.read_at(&mut buffer[..want], position)?;
            if n == 0 {
                break;
            }
            to.write_all_at(&buffer[..n], position)?;
            position += n as u64;
        }
        Ok(())
    })
}

/// blake3, hexadecimal, over the length, and offset and bytes of each chunk that has a byte that is not zero.
fn sum_of(file: &File) -> io::Result<String> {
    let size = file.metadata()?.len();
    let mut hasher = blake3::Hasher::new();
    hasher.update(&size.to_le_bytes());
    let mut buffer = vec![0; CHUNK];
    let mut next = 0;
    data(file, size, |start, end| {
        let mut at = (start & !(CHUNK as u64 - 1)).max(next);
        while at < end.min(size) {
            let len = (size - at).min(CHUNK as u64) as usize;
            file.read_exact_at(&mut buffer[..len], at)?;
            if buffer[..len].iter().any(|&b| b != 0) {
                hasher.update(&at.to_le_bytes());
                hasher.update(&buffer[..len]);
            }
            at += CHUNK as u64;
        }
        next = next.max(at);
        Ok(())
    })?;
    Ok(hasher.finalize().to_hex().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holes_and_zeroes_have_the_same_sum_and_every_other_change_another() {
        let holes = tempfile::tempfile().unwrap();
        let full = tempfile::tempfile().unwrap();
        let size = 10 * CHUNK as u64 + 100;
        holes.set_len(size).unwrap();
        full.write_all_at(&vec![0; size as usize], 0).unwrap();
        for f in [&holes, &full] {
            f.write_all_at(b"x", 3 * CHUNK as u64 + 5000).unwrap();
            f.write_all_at(b"y", size - 1).unwrap();
        }
        let sum = sum_of(&full).unwrap();
        assert_eq!(sum_of(&holes).unwrap(), sum);
        let copy = tempfile::tempfile().unwrap();
        copy_sparse(&holes, &copy).unwrap();
        check(&copy, size, &sum).unwrap();
        for at in [0, 3 * CHUNK as u64 + 5000, 9 * CHUNK as u64, size - 1] {
            let mut old = [0];
            copy.read_exact_at(&mut old, at).unwrap();
            copy.write_all_at(&[old[0] ^ 1], at).unwrap();
            assert!(check(&copy, size, &sum).is_err(), "byte {at}");
            copy.write_all_at(&old, at).unwrap();
        }
        check(&copy, size, &sum).unwrap();
        copy.set_len(size + 1).unwrap();
        assert!(check(&copy, size, &sum).is_err());
        assert!(check(&copy, size + 1, &sum).is_err());
    }
}

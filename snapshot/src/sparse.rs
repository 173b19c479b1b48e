//! Where a file has data, and where holes.

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use std::fs::File;

/// The first extent of data at or behind `at`, of a file of `len` bytes: its begin and end. The file is sought in.
///
/// # Errors
/// Those of lseek(2); a file system that knows of no holes has none.
pub(crate) fn next(file: &File, at: u64, len: u64) -> Result<Option<(u64, u64)>, Errno> {
    let start = match lseek(file, at.cast_signed(), Whence::SeekData) {
        Ok(start) => start,
        Err(Errno::ENXIO) => return Ok(None),
        Err(Errno::EINVAL) => return Ok(Some((at, len))),
        Err(e) => return Err(e),
    };
    let end = lseek(file, start, Whence::SeekHole)?;
    Ok(Some((start.cast_unsigned(), end.cast_unsigned().min(len))))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn data_is_found_behind_holes() {
        let file = tempfile::tempfile().unwrap();
        let len = 40 << 12;
        file.set_len(len).unwrap();
        file.write_all_at(&[1; 8192], 16 << 12).unwrap();
        let (start, end) = next(&file, 0, len).unwrap().unwrap();
        assert!(start <= 16 << 12 && end >= 18 << 12, "{start} {end}");
        assert_eq!(next(&file, end, len), Ok(None));
        assert_eq!(next(&file, start, end - 1), Ok(Some((start, end - 1))));
    }
}

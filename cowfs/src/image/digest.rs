//! What is in a base, noted beside it as `b3sum` writes it: the header of a COW file knows size and time only.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::copy::At;
use super::error::{ImageError, Result};
use super::open::regular;
use super::publish::Fresh;

/// Reads a file by offset, so that a shared position does not matter.
struct Reader<'a>(&'a File, u64);

impl io::Read for Reader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let n = self.0.read_at(buf, self.1)?;
        self.1 += n as u64;
        Ok(n)
    }
}

/// Where the digest of a base is noted.
pub fn digest_path(base: &Path) -> PathBuf {
    let mut name = base.as_os_str().to_owned();
    name.push(".b3");
    name.into()
}

/// The digest of a file's contents, in hex.
pub(super) fn of(at: At<'_>) -> Result<String> {
    let mut h = blake3::Hasher::new();
    h.update_reader(Reader(at.file, 0))
        .map_err(ImageError::io(at.path, "reading"))?;
    Ok(h.finalize().to_hex().to_string())
}

/// The digest that was noted, if any was.
pub(super) fn noted(base: &Path) -> Result<Option<String>> {
    let path = digest_path(base);
    let failed = ImageError::io(&path, "reading");
    let file = match regular(&path, false) {
        Ok(f) => f,
        Err(ImageError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Ok(None);
        }
        Err(e) => return Err(e),
    };
    // 64 digits stand before the name; whoever made it longer does not make this read more.
    let mut b = [0; 64];
    file.read_exact_at(&mut b, 0).map_err(failed)?;
    Ok(Some(String::from_utf8_lossy(&b).into_owned()))
}

/// Forgets a digest, before its base is replaced: after a crash none is better than a wrong one. True if there was one.
pub(super) fn forget(base: &Path) -> Result<bool> {
    let path = digest_path(base);
    match std::fs::remove_file(&path) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(ImageError::io(&path, "removing")(e)),
    }
}

/// Notes the digest of a base.
pub(super) fn note(base: &Path) -> Result<String> {
    let file = regular(base, false)?;
    let digest = of(At {
        path: base,
        file: &file,
    })?;
    let path = digest_path(base);
    let name = base.file_name().unwrap_or_default().to_string_lossy();
    let fresh = Fresh::new(&path, true)?;
    fresh
        .at()
        .file
        .write_all_at(format!("{digest}  {name}\n").as_bytes(), 0)
        .map_err(ImageError::io(&path, "writing"))?;
    fresh.publish(true)?;
    Ok(digest)
}

//! Opening images, and whether a COW file and its base still belong together.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::chain;
use super::copy::At;
use super::error::{ImageError, Result};
use super::header::{HEADER_LEN, Header, Layout, is_cow};

/// An open COW file with a header that is good and a bitmap that is whole.
#[derive(Debug)]
pub struct Cow {
    path: PathBuf,
    file: File,
    header: Header,
    layout: Layout,
}

/// Opens a regular file and nothing else; a FIFO does not block.
pub(super) fn regular(path: &Path, write: bool) -> Result<File> {
    let file = OpenOptions::new()
        .read(true)
        .write(write)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(ImageError::io(path, "opening"))?;
    let meta = file.metadata().map_err(ImageError::io(path, "stat"))?;
    if !meta.is_file() {
        return Err(ImageError::NotRegular(path.to_owned()));
    }
    Ok(file)
}

/// The first bytes of a file, at most a header.
pub(super) fn beginning(path: &Path, file: &File) -> Result<Vec<u8>> {
    let mut b = vec![0; HEADER_LEN];
    let mut n = 0;
    while n < b.len() {
        match file.read_at(&mut b[n..], n as u64) {
            Ok(0) => break,
            Ok(more) => n += more,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(ImageError::io(path, "reading")(e)),
        }
    }
    b.truncate(n);
    Ok(b)
}

pub(super) fn len(path: &Path, file: &File) -> Result<u64> {
    let meta = file.metadata().map_err(ImageError::io(path, "stat"))?;
    Ok(meta.len())
}

impl Cow {
    /// Opens a COW file for reading.
    ///
    /// # Errors
    /// When there is none, or it is damaged. The base is not looked at.
    pub fn open(path: &Path) -> Result<Self> {
        Self::of(path, regular(path, false)?)
    }

    /// Takes a file that is open; `path` is for messages.
    ///
    /// # Errors
    /// As of [`Cow::open`].
    pub fn of(path: &Path, file: File) -> Result<Self> {
        let header = Header::parse(path, &beginning(path, &file)?)?;
        let layout = header.layout();
        let (need, have) = (layout.bitmap_offset + layout.bitmap_len, len(path, &file)?);
        if have < need {
            return Err(ImageError::Truncated {
                path: path.to_owned(),
                what: "the bitmap".into(),
                need,
                have,
            });
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            header,
            layout,
        })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Where its parts lie.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    pub(super) fn at(&self) -> At<'_> {
        At {
            path: &self.path,
            file: &self.file,
        }
    }

    /// Opens the base, which must be what the header says.
    ///
    /// # Errors
    /// When it is gone, has changed, or is a COW file itself.
    pub fn base(&self) -> Result<File> {
        let base = &self.header.base;
        // Its own error names the COW file too.
        let file = match regular(base, false) {
            Err(ImageError::Io { source, .. }) => {
                return Err(ImageError::BaseMissing {
                    cow: self.path.clone(),
                    base: base.clone(),
                    source,
                });
            }
            other => other?,
        };
        if is_cow(&beginning(base, &file)?) {
            chain::chain(&self.path)?;
            return Err(ImageError::IsCow(base.clone()));
        }
        let meta = file.metadata().map_err(ImageError::io(base, "stat"))?;
        let changed = |what| ImageError::BaseChanged {
            cow: self.path.clone(),
            base: base.clone(),
            what,
        };
        if meta.len() != self.header.size {
            let what = format!("its size was {}, and is {}", self.header.size, meta.len());
            return Err(changed(what));
        }
        if meta.mtime() != i64::from(self.header.mtime) {
            return Err(changed(format!(
                "it was last written {} s after 1970, and now {} s",
                self.header.mtime,
                meta.mtime()
            )));
        }
        Ok(file)
    }
}

/// Whether a COW file can be given to a guest: its header is good, its bitmap whole, its base there and unchanged. These are
/// the guest kernel's own questions, and it does not start when one of them is answered with no.
///
/// # Errors
/// What is wrong, and what to do.
pub fn check(cow: &Path) -> Result<Cow> {
    let c = Cow::open(cow)?;
    c.base()?;
    Ok(c)
}

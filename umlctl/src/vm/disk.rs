//! The COW disk: the header of a version-3 file, which `ubd` of the guest's kernel goes on with.

use super::{Error, io};
use std::fs::File;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

const MAGIC: u32 = 0x4f4f_4f4d;
const VERSION: u32 = 3;
const SECTOR: u32 = 512;
const ALIGNMENT: u32 = 4096;
/// Room for the path, with the zero behind it.
const PATH: usize = 4096;

/// Checks that a file can be a VM's image.
///
/// # Errors
/// It cannot; the error says why and what to do.
pub fn check_image(image: &Path) -> Result<(), Error> {
    let bad = |why: &str| Error::Image {
        path: image.to_owned(),
        why: why.to_owned(),
    };
    let meta = std::fs::metadata(image).map_err(|e| {
        bad(&match e.kind() {
            std::io::ErrorKind::NotFound => {
                "it is not there; tools/image-busybox makes one".to_owned()
            }
            _ => e.to_string(),
        })
    })?;
    if !meta.is_file() {
        return Err(bad("it is no regular file"));
    }
    if meta.len() == 0 {
        return Err(bad("it is empty"));
    }
    File::open(image).map_err(|e| bad(&e.to_string()))?;
    Ok(())
}

/// Makes an empty COW disk on an image.
///
/// # Errors
/// The image cannot be used, or the file cannot be made.
pub fn create(path: &Path, image: &Path) -> Result<(), Error> {
    check_image(image)?;
    let meta = std::fs::metadata(image).map_err(io("read", image))?;
    let bad = |why: &str| Error::Image {
        path: image.to_owned(),
        why: why.to_owned(),
    };
    let name = image.as_os_str().as_bytes();
    if name.len() >= PATH {
        return Err(bad("its path is longer than a COW disk has room for"));
    }
    let mtime = u32::try_from(meta.mtime())
        .map_err(|_| bad("its modification time does not fit a COW disk; touch it"))?;
    let mut header = Vec::with_capacity(32 + PATH);
    header.extend(MAGIC.to_be_bytes());
    header.extend(VERSION.to_be_bytes());
    header.extend(mtime.to_be_bytes());
    header.extend(meta.len().to_be_bytes());
    header.extend(SECTOR.to_be_bytes());
    header.extend(ALIGNMENT.to_be_bytes());
    header.extend(0u32.to_be_bytes());
    header.extend(name);
    header.resize(32 + PATH, 0);
    let align = |n: u64| n.next_multiple_of(u64::from(ALIGNMENT));
    let bitmap = meta.len().div_ceil(u64::from(SECTOR)).div_ceil(8);
    let data = align(align(header.len() as u64) + bitmap);
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(io("make", path))?;
    file.write_all(&header).map_err(io("write", path))?;
    file.set_len(data).map_err(io("write", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("base");
        File::create(&image).unwrap().set_len(64 << 20).unwrap();
        let cow = dir.path().join("cow");
        create(&cow, &image).unwrap();
        let bytes = std::fs::read(&cow).unwrap();
        assert_eq!(bytes[..8], [0x4f, 0x4f, 0x4f, 0x4d, 0, 0, 0, 3]);
        assert_eq!(bytes[12..20], (64u64 << 20).to_be_bytes());
        assert_eq!(bytes[20..32], [0, 0, 2, 0, 0, 0, 16, 0, 0, 0, 0, 0]);
        let path = image.as_os_str().as_bytes();
        assert_eq!(&bytes[32..32 + path.len()], path);
        // 131072 sectors, so 16 KiB of bitmap behind 8 KiB.
        assert_eq!(bytes.len(), 8192 + 16384);
        assert!(bytes[32 + path.len()..].iter().all(|b| *b == 0));
        assert!(create(&cow, &image).is_err(), "never over another");
    }
}

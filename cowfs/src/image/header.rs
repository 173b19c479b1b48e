//! The header of a COW file and where its parts lie. No I/O here.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::error::{ImageError, Result};

/// Bytes of a header.
pub const HEADER_LEN: usize = 4128;
/// Bytes of a sector; the guest kernel knows no other size.
pub const SECTOR: u64 = 512;
/// What the guest kernel and uml_mkcow write.
const ALIGNMENT: u32 = 4096;
/// Largest alignment taken from a file, that of the largest pages.
const ALIGNMENT_MAX: u32 = 1 << 16;
/// Room for the base's path with its NUL.
const PATH_LEN: usize = 4096;
const MAGIC: [u8; 4] = *b"OOOM";
/// Version 1 was in the order of the machine that wrote it.
const MAGIC_LITTLE: [u8; 4] = *b"MOOO";
/// The guest kernel holds the place of the data in 32 bits with a sign: bitmaps of 2 GiB, less the header.
const SIZE_MAX: u64 = ((1 << 31) - (1 << 17)) * 8 * SECTOR;

/// What a version-3 header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Modification time of the base, seconds.
    pub mtime: u32,
    /// Size of the base.
    pub size: u64,
    /// Bitmap and data begin at multiples of this.
    pub alignment: u32,
    /// The base, an absolute path.
    pub base: PathBuf,
}

/// Where the parts of a COW file lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Where the bitmap begins.
    pub bitmap_offset: u64,
    /// Bytes of the bitmap.
    pub bitmap_len: u64,
    /// Where the data begins.
    pub data_offset: u64,
    /// Sectors of the disk.
    pub sectors: u64,
    /// Bytes of a whole COW file.
    pub len: u64,
}

/// True if a file that begins like this is a COW file of whatever version.
pub fn is_cow(beginning: &[u8]) -> bool {
    beginning.starts_with(&MAGIC) || beginning.starts_with(&MAGIC_LITTLE)
}

/// A big-endian number of 32 bits.
fn u32_at(b: &[u8; HEADER_LEN], at: usize) -> u32 {
    let mut v = [0; 4];
    v.copy_from_slice(&b[at..at + 4]);
    u32::from_be_bytes(v)
}

impl Header {
    /// The header for a base.
    ///
    /// # Errors
    /// When the format has no room for its size, time or path.
    pub fn new(base: &Path, size: u64, mtime: i64) -> Result<Self> {
        check_size(base, size)?;
        let unfit = |what, fix| ImageError::Unfit {
            path: base.to_owned(),
            what,
            fix,
        };
        let name = base.as_os_str().as_bytes();
        if name.len() >= PATH_LEN || !base.is_absolute() || name.contains(&0) {
            return Err(unfit(
                "a path that is relative or of 4096 bytes and more",
                "move the base nearer to the root",
            ));
        }
        let mtime = u32::try_from(mtime).map_err(|_| {
            unfit(
                "a modification time before 1970 or after 2106",
                "touch the base",
            )
        })?;
        Ok(Self {
            mtime,
            size,
            alignment: ALIGNMENT,
            base: base.to_owned(),
        })
    }

    /// Reads a header. `path` is for messages only.
    ///
    /// # Errors
    /// When it is none, of another version, or holds what no such header holds.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let owned = || path.to_owned();
        if !is_cow(bytes) {
            return Err(ImageError::NotCow(owned()));
        }
        let Some(b) = bytes.first_chunk::<HEADER_LEN>() else {
            return Err(ImageError::Truncated {
                path: owned(),
                what: "the header".into(),
                need: HEADER_LEN as u64,
                have: bytes.len() as u64,
            });
        };
        let found = match bytes.starts_with(&MAGIC) {
            true => u32_at(b, 4),
            false => u32_at(b, 4).swap_bytes(),
        };
        if found != 3 {
            return Err(ImageError::Version {
                path: owned(),
                found,
            });
        }
        let field = |what: String| ImageError::Field {
            path: owned(),
            what,
        };
        // The padding shifts the format, always 0, to where a path must begin.
        if b[32..36] == [0; 4] && b[36] != 0 {
            return Err(ImageError::OldLayout(owned()));
        }
        let (sector, alignment, format) = (u32_at(b, 20), u32_at(b, 24), u32_at(b, 28));
        if u64::from(sector) != SECTOR {
            return Err(field(format!("sectors of {sector} bytes instead of 512")));
        }
        if !alignment.is_power_of_two() || !(512..=ALIGNMENT_MAX).contains(&alignment) {
            return Err(field(format!("an alignment of {alignment} bytes")));
        }
        if format != 0 {
            return Err(field(format!("COW format {format} instead of 0")));
        }
        let size = u64::from(u32_at(b, 12)) << 32 | u64::from(u32_at(b, 16));
        check_size(path, size)?;
        let name = &b[32..];
        let end = name.iter().position(|c| *c == 0);
        let base = PathBuf::from(OsStr::from_bytes(&name[..end.unwrap_or(0)]));
        if !base.is_absolute() {
            return Err(field(format!(
                "{:?} as the base, which is no absolute path",
                base
            )));
        }
        Ok(Self {
            mtime: u32_at(b, 8),
            size,
            alignment,
            base,
        })
    }

    /// The header's bytes.
    pub fn encode(&self) -> [u8; HEADER_LEN] {
        let mut b = [0; HEADER_LEN];
        b[..4].copy_from_slice(&MAGIC);
        b[4..8].copy_from_slice(&3_u32.to_be_bytes());
        b[8..12].copy_from_slice(&self.mtime.to_be_bytes());
        b[12..20].copy_from_slice(&self.size.to_be_bytes());
        b[20..24].copy_from_slice(&512_u32.to_be_bytes());
        b[24..28].copy_from_slice(&self.alignment.to_be_bytes());
        let name = self.base.as_os_str().as_bytes();
        // `new` and `parse` let no longer one in; the last byte stays NUL whatever comes.
        let n = name.len().min(PATH_LEN - 1);
        b[32..32 + n].copy_from_slice(&name[..n]);
        b
    }

    /// Where the parts lie.
    pub fn layout(&self) -> Layout {
        let align = u64::from(self.alignment);
        let sectors = self.size.div_ceil(SECTOR);
        let bitmap_offset = (HEADER_LEN as u64).next_multiple_of(align);
        let bitmap_len = sectors.div_ceil(8);
        let data_offset = (bitmap_offset + bitmap_len).next_multiple_of(align);
        Layout {
            bitmap_offset,
            bitmap_len,
            data_offset,
            sectors,
            len: data_offset + self.size,
        }
    }
}

fn check_size(path: &Path, size: u64) -> Result<()> {
    if size == 0 || size > SIZE_MAX {
        return Err(ImageError::Size {
            path: path.to_owned(),
            size,
            max: SIZE_MAX,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn good() -> Header {
        Header::new(Path::new("/images/base"), 1 << 20, 1_500_000_000).expect("it fits")
    }

    #[test]
    fn the_layout_is_the_kernels() {
        let l = good().layout();
        assert_eq!((l.bitmap_offset, l.bitmap_len), (8192, 256));
        assert_eq!((l.data_offset, l.len), (12288, 12288 + (1 << 20)));
        // The last byte of the bitmap stands for one sector, and that is not whole.
        let odd = Header::new(Path::new("/b"), 8 * 512 * 4096 + 1, 0).expect("it fits");
        assert_eq!(odd.layout().bitmap_len, 4097);
        assert_eq!(odd.layout().data_offset, 16384);
    }

    #[test]
    fn each_wrong_field_is_named() {
        let path = Path::new("/x");
        for (at, bytes, says) in [
            (0, &b"MZ\0\0"[..], "no COW file"),
            (4, &[0, 0, 0, 2], "version 2"),
            (4, &[0, 0, 0, 4], "version 4"),
            (0, b"MOOO\x01\0\0\0", "version 1"),
            (12, &[0; 8], "0 bytes"),
            (12, &[0xff; 8], "18446744073709551615 bytes"),
            (20, &[0, 0, 4, 0], "sectors of 1024"),
            (24, &[0, 0, 0, 0], "alignment of 0"),
            (24, &[0x80, 0, 0, 0], "alignment of 2147483648"),
            (24, &[0, 0, 0x0c, 0], "alignment of 3072"),
            (28, &[0, 0, 0, 1], "COW format 1"),
            (32, b"\0\0\0\0/b", "before 2006"),
            (32, b"relative", "no absolute path"),
            (32, &[b'/'; 4096], "no absolute path"),
        ] {
            let mut b = good().encode();
            b[at..at + bytes.len()].copy_from_slice(bytes);
            let e = Header::parse(path, &b).expect_err(says).to_string();
            assert!(e.contains(says) && e.contains("/x"), "{e}");
        }
        let short = Header::parse(path, &good().encode()[..4127]).expect_err("short");
        assert!(short.to_string().contains("header ends at byte 4128"));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let long = PathBuf::from(format!("/{}", "x".repeat(4095)));
        assert!(Header::new(&long, 512, 0).is_err());
        assert!(Header::new(Path::new("b"), 512, 0).is_err());
        assert!(Header::new(Path::new("/b"), 512, -1).is_err());
        assert!(Header::new(Path::new("/b"), 512, 1 << 32).is_err());
        assert!(Header::new(Path::new("/b"), 0, 0).is_err());
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(mtime: u32, size in 1..SIZE_MAX, name in "/[a-z/]{0,200}") {
            let h = Header::new(Path::new(&name), size, i64::from(mtime)).expect("it fits");
            prop_assert_eq!(Header::parse(Path::new("/x"), &h.encode()).expect("ours"), h);
        }

        #[test]
        fn no_header_makes_it_panic(mut b in prop::collection::vec(any::<u8>(), 0..HEADER_LEN + 8), magic: bool) {
            if magic && b.len() > 32 {
                b[..8].copy_from_slice(b"OOOM\0\0\0\x03");
                b[20..32].copy_from_slice(&[0, 0, 2, 0, 0, 0, 16, 0, 0, 0, 0, 0]);
            }
            if let Ok(h) = Header::parse(Path::new("/x"), &b) {
                let l = h.layout();
                prop_assert!(l.len > l.data_offset && l.data_offset >= l.bitmap_offset + l.bitmap_len);
            }
        }
    }
}

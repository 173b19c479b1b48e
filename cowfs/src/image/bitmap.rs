//! The bitmap: one bit a sector, lowest bit first. Read and written by windows, however large the disk is.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::copy::{At, next_data, read_padded};
use super::error::{ImageError, Result};
use super::header::Layout;

/// Bytes of a window.
const WINDOW: usize = 1 << 16;

/// Turns bytes of a bitmap into runs of set bits.
#[derive(Debug, Default)]
struct Scanner {
    open: Option<u64>,
}

impl Scanner {
    fn bytes(
        &mut self,
        first: u64,
        bytes: &[u8],
        each: &mut dyn FnMut(Range<u64>) -> Result<()>,
    ) -> Result<()> {
        for (i, byte) in bytes.iter().enumerate() {
            let at = first + i as u64 * 8;
            match (*byte, self.open) {
                (0, None) | (0xff, Some(_)) => {}
                (0xff, None) => self.open = Some(at),
                _ => self.bits(at, *byte, each)?,
            }
        }
        Ok(())
    }

    fn bits(
        &mut self,
        first: u64,
        byte: u8,
        each: &mut dyn FnMut(Range<u64>) -> Result<()>,
    ) -> Result<()> {
        for bit in 0..8 {
            let at = first + bit;
            match (byte >> bit & 1 == 1, self.open) {
                (true, None) => self.open = Some(at),
                (false, Some(start)) => {
                    self.open = None;
                    each(start..at)?;
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Calls for each run of sectors that the COW file has, in order. Returns how many bits are set behind the last sector.
pub(super) fn runs(
    cow: At<'_>,
    layout: &Layout,
    each: &mut dyn FnMut(Range<u64>) -> Result<()>,
) -> Result<u64> {
    let mut stray = 0;
    let mut clamp = |r: Range<u64>| {
        let end = r.end.min(layout.sectors);
        stray += r.end - end.max(r.start);
        if r.start < end {
            each(r.start..end)?;
        }
        Ok(())
    };
    let mut scanner = Scanner::default();
    let mut buf = vec![0; WINDOW];
    let mut at = 0;
    while at < layout.bitmap_len {
        if scanner.open.is_none() {
            // Nothing is set in a hole.
            let data = next_data(cow.file, layout.bitmap_offset + at)
                .map_err(ImageError::io(cow.path, "looking for data"))?;
            at = match data {
                Some(d) => d - layout.bitmap_offset,
                None => layout.bitmap_len,
            };
            if at >= layout.bitmap_len {
                break;
            }
        }
        let n = usize::try_from(layout.bitmap_len - at)
            .unwrap_or(WINDOW)
            .min(WINDOW);
        read_padded(cow, layout.bitmap_offset + at, &mut buf[..n])?;
        scanner.bytes(at * 8, &buf[..n], &mut clamp)?;
        at += n as u64;
    }
    if let Some(start) = scanner.open {
        clamp(start..layout.bitmap_len * 8)?;
    }
    Ok(stray)
}

/// Writes a bitmap from its beginning to its end.
#[derive(Debug)]
pub(super) struct Writer<'a> {
    path: &'a Path,
    file: &'a File,
    offset: u64,
    /// Window in the buffer.
    window: u64,
    buf: Vec<u8>,
}

impl<'a> Writer<'a> {
    /// For a file whose bitmap is a hole.
    pub fn new(to: At<'a>, layout: &Layout) -> Self {
        Self {
            path: to.path,
            file: to.file,
            offset: layout.bitmap_offset,
            window: 0,
            buf: vec![0; WINDOW],
        }
    }

    /// Sets the bits of these sectors; they must not be before those of the last call.
    pub fn set(&mut self, sectors: Range<u64>) -> Result<()> {
        for s in sectors {
            let (byte, bit) = (s / 8, s % 8);
            let window = byte / WINDOW as u64;
            if window != self.window {
                self.flush()?;
                self.window = window;
            }
            let at = usize::try_from(byte % WINDOW as u64).unwrap_or(0);
            self.buf[at] |= 1 << bit;
        }
        Ok(())
    }

    /// Writes what is still here. The window is written to its last byte that is not zero only, as the data follows.
    pub fn flush(&mut self) -> Result<()> {
        let used = self.buf.iter().rposition(|b| *b != 0).map_or(0, |n| n + 1);
        let at = self.offset + self.window * WINDOW as u64;
        self.file
            .write_all_at(&self.buf[..used], at)
            .map_err(ImageError::io(self.path, "writing"))?;
        self.buf.fill(0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::image::Header;

    #[test]
    fn the_lowest_bit_comes_first() {
        let mut out = Vec::new();
        let mut s = Scanner::default();
        let bytes = [0b0000_0011, 0xff, 0b1000_0001, 0, 0xff, 0xff, 0];
        s.bytes(0, &bytes, &mut |r| {
            out.push(r);
            Ok(())
        })
        .expect("no error");
        assert_eq!(out, [0..2, 8..17, 23..24, 32..48]);
    }

    fn at(file: &File) -> At<'_> {
        At {
            path: Path::new("/x"),
            file,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn what_is_set_is_read(set in prop::collection::btree_set(0..2_000_000_u64, 0..200), long in 0..1_200_000_u64) {
            let h = Header::new(Path::new("/b"), 2_000_000 * 512, 0).expect("it fits");
            let layout = h.layout();
            let file = crate::image::publish::unnamed(&std::env::temp_dir()).expect("a file");
            file.set_len(layout.len).expect("room");
            // Also a run that goes over windows.
            let all: BTreeSet<u64> = set.into_iter().chain(long..long + 600_000).collect();
            let mut w = Writer::new(at(&file), &layout);
            for s in &all {
                w.set(*s..*s + 1).expect("room");
            }
            w.flush().expect("room");
            let mut read = BTreeSet::new();
            let stray = runs(at(&file), &layout, &mut |r| {
                read.extend(r);
                Ok(())
            }).expect("whole");
            prop_assert_eq!(stray, 0);
            prop_assert!(read == all);
        }
    }
}

//! `/proc/PID/maps` and the flags of `/proc/PID/smaps`.

use super::Error;
use std::collections::HashMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

/// One mapping.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Map {
    /// First address.
    pub start: u64,
    /// One past the last.
    pub end: u64,
    /// PROT_ bits.
    pub prot: i32,
    /// MAP_SHARED; else private.
    pub shared: bool,
    /// Offset in the file, bytes.
    pub offset: u64,
    /// Device of the file.
    pub dev: u64,
    /// Inode of the file; 0 for none.
    pub ino: u64,
    /// What it is.
    pub kind: MapKind,
}

/// What a mapping is of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MapKind {
    /// Anonymous, with the name that PR_SET_VMA_ANON_NAME gave it. Heap and main stack are among these.
    Anonymous(Option<String>),
    /// A file; `deleted` if its name is gone.
    File {
        /// Its path.
        path: PathBuf,
        /// The kernel says " (deleted)".
        deleted: bool,
    },
    /// A mapping of the kernel's own: `[vdso]`, `[vvar]`, ...
    Special(String),
}

/// The mappings of a process.
pub fn maps(pid: i32) -> Result<Vec<Map>, Error> {
    let path = super::path(pid, "maps");
    parse_maps(&super::read_bytes(pid, "maps")?).map_err(|line| Error::Parse(path, line))
}

/// Parses the text of `maps`; the line that is not understood is the error.
pub fn parse_maps(text: &[u8]) -> Result<Vec<Map>, String> {
    text.split(|&b| b == b'\n')
        .filter(|l| !l.is_empty())
        .map(|l| parse_line(l).ok_or_else(|| String::from_utf8_lossy(l).into_owned()))
        .collect()
}

fn parse_line(line: &[u8]) -> Option<Map> {
    let mut parts = line.splitn(6, |&b| b == b' ');
    let mut text = || std::str::from_utf8(parts.next()?).ok();
    let (range, perms, offset, dev, ino) = (text()?, text()?, text()?, text()?, text()?);
    let (start, end) = range.split_once('-')?;
    let (major, minor) = dev.split_once(':')?;
    let ino: u64 = ino.parse().ok()?;
    let perms = perms.as_bytes();
    let bit = |i: usize, c: u8, v: i32| if perms.get(i) == Some(&c) { v } else { 0 };
    let name = parts.next().unwrap_or_default().trim_ascii_start();
    Some(Map {
        start: hex(start)?,
        end: hex(end)?,
        prot: bit(0, b'r', libc::PROT_READ)
            | bit(1, b'w', libc::PROT_WRITE)
            | bit(2, b'x', libc::PROT_EXEC),
        shared: perms.get(3) == Some(&b's'),
        offset: hex(offset)?,
        dev: libc::makedev(
            u32::from_str_radix(major, 16).ok()?,
            u32::from_str_radix(minor, 16).ok()?,
        ),
        ino,
        kind: kind(name, ino),
    })
}

fn hex(s: &str) -> Option<u64> {
    u64::from_str_radix(s, 16).ok()
}

fn kind(name: &[u8], ino: u64) -> MapKind {
    if ino != 0 || name.starts_with(b"/") {
        let (name, deleted) = name
            .strip_suffix(b" (deleted)")
            .map_or((name, false), |n| (n, true));
        return MapKind::File {
            path: PathBuf::from(OsString::from_vec(unescape(name))),
            deleted,
        };
    }
    let text = String::from_utf8_lossy(name).into_owned();
    if text.is_empty() || text == "[heap]" || text == "[stack]" {
        MapKind::Anonymous(None)
    } else if let Some(n) = text
        .strip_prefix("[anon:")
        .and_then(|n| n.strip_suffix(']'))
    {
        MapKind::Anonymous(Some(n.into()))
    } else {
        MapKind::Special(text)
    }
}

/// The kernel writes a newline in a name as `\012`.
fn unescape(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    let mut i = 0;
    while i < name.len() {
        if name[i..].starts_with(b"\\012") {
            out.push(b'\n');
            i += 4;
        } else {
            out.push(name[i]);
            i += 1;
        }
    }
    out
}

/// The two-letter flags of each mapping (`VmFlags` in smaps), by first address. Walks page tables: slow.
pub fn vm_flags(pid: i32) -> Result<HashMap<u64, Vec<String>>, Error> {
    Ok(parse_vm_flags(&super::read(pid, "smaps")?))
}

/// The same from the text of `smaps`.
#[must_use]
pub fn parse_vm_flags(text: &str) -> HashMap<u64, Vec<String>> {
    let mut out = HashMap::new();
    let mut start = None;
    for line in text.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if let Some(s) = start {
                out.insert(
                    s,
                    flags.split_ascii_whitespace().map(str::to_owned).collect(),
                );
            }
        } else if let Some((range, _)) = line.split_once(' ')
            && let Some((s, _)) = range.split_once('-')
        {
            start = hex(s);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_every_kind() {
        let text = b"55d0c0a00000-55d0c0a02000 r--p 00001000 fe:00 1234    /usr/bin/a b\n\
            7ff000000000-7ff000021000 rw-p 00000000 00:00 0 \n\
            7ff100000000-7ff100001000 rw-s 00000000 00:01 77           /memfd:x (deleted)\n\
            7ff200000000-7ff200001000 rw-p 00000000 00:00 0            [anon:name of it]\n\
            7ffe00000000-7ffe00021000 rw-p 00000000 00:00 0            [stack]\n\
            7ffe00100000-7ffe00102000 r-xp 00000000 00:00 0            [vdso]\n";
        let maps = parse_maps(text).unwrap();
        assert_eq!(maps.len(), 6);
        assert_eq!(
            maps[0].kind,
            MapKind::File {
                path: "/usr/bin/a b".into(),
                deleted: false
            }
        );
        assert_eq!(
            (maps[0].offset, maps[0].ino, maps[0].prot),
            (0x1000, 1234, libc::PROT_READ)
        );
        assert_eq!(maps[1].kind, MapKind::Anonymous(None));
        assert_eq!(
            maps[2].kind,
            MapKind::File {
                path: "/memfd:x".into(),
                deleted: true
            }
        );
        assert!(maps[2].shared);
        assert_eq!(maps[3].kind, MapKind::Anonymous(Some("name of it".into())));
        assert_eq!(maps[4].kind, MapKind::Anonymous(None));
        assert_eq!(maps[5].kind, MapKind::Special("[vdso]".into()));
        assert!(parse_maps(b"nonsense\n").is_err());
        assert!(!maps_of_self().is_empty());
    }

    fn maps_of_self() -> Vec<Map> {
        maps(std::process::id().cast_signed()).unwrap()
    }
}

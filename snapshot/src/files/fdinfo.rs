//! `/proc/PID/fdinfo/N`: text in, numbers out.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// The text of one fdinfo file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Info {
    /// File offset.
    pub pos: u64,
    /// Flags as of open(2), with O_CLOEXEC of the descriptor.
    pub flags: i32,
    /// All lines.
    pub text: String,
}

impl Info {
    /// Reads it anew from its open file.
    pub(super) fn read(file: &File, buffer: &mut Vec<u8>) -> io::Result<Self> {
        if buffer.len() < 4096 {
            buffer.resize(4096, 0);
        }
        let mut len = 0;
        loop {
            let n = file.read_at(&mut buffer[len..], len as u64)?;
            len += n;
            // Short texts come in one piece; a longer one ends with an empty read.
            if n == 0 || (len < 1024 && len == n) {
                break;
            }
            if len == buffer.len() {
                buffer.resize(len * 2, 0);
            }
        }
        Self::parse(&String::from_utf8_lossy(&buffer[..len]))
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "fdinfo has an unknown form"))
    }

    /// Parses the text.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut info = Self {
            text: text.to_owned(),
            ..Self::default()
        };
        // Offsets of some files of /proc are addresses above the positive numbers.
        info.pos = info.value("pos:")?.parse::<i64>().ok()?.cast_unsigned();
        info.flags = i32::from_str_radix(info.value("flags:")?, 8).ok()?;
        Some(info)
    }

    /// What follows a key at the start of a line.
    pub(super) fn value(&self, key: &str) -> Option<&str> {
        self.text
            .lines()
            .find_map(|line| line.strip_prefix(key))
            .map(str::trim)
    }

    /// The lines with a key, without it.
    pub(super) fn values<'a>(&'a self, key: &'a str) -> impl Iterator<Item = &'a str> + 'a {
        self.text
            .lines()
            .filter_map(move |line| line.strip_prefix(key))
            .map(str::trim)
    }

    /// A pair of numbers, as `it_value: (1, 500)`.
    pub(super) fn pair(&self, key: &str) -> Option<(u64, u64)> {
        let (a, b) = self
            .value(key)?
            .strip_prefix('(')?
            .strip_suffix(')')?
            .split_once(',')?;
        Some((a.trim().parse().ok()?, b.trim().parse().ok()?))
    }
}

/// A field of a line of `key:value` pairs, whose values may be set off by spaces (`tfd:        5 events:       19`).
pub(super) fn field<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let mut from = 0;
    while let Some(at) = line.get(from..)?.find(key) {
        let start = from + at;
        let end = start + key.len();
        let whole = start == 0 || line.as_bytes().get(start - 1) == Some(&b' ');
        if whole && line.as_bytes().get(end) == Some(&b':') {
            return line.get(end + 1..)?.split_ascii_whitespace().next();
        }
        from = end;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernels_text() {
        let text = "pos:\t17\nflags:\t02000002\nmnt_id:\t15\nit_value: (0, 49406829)\n";
        let info = Info::parse(text).unwrap();
        assert_eq!((info.pos, info.flags), (17, libc::O_RDWR | libc::O_CLOEXEC));
        assert_eq!(info.pair("it_value:"), Some((0, 49_406_829)));
        assert_eq!(Info::parse("pos:\t17\n"), None);
        assert_eq!(Info::parse("pos:\t-1\nflags:\t0\n").unwrap().pos, u64::MAX);
    }

    #[test]
    fn reads_fields_of_a_line() {
        let line = "       5 events:       19 data:          7  pos:0 ino:2a sdev:11";
        assert_eq!(field(line, "events"), Some("19"));
        assert_eq!(field(line, "ino"), Some("2a"));
        assert_eq!(field(line, "o"), None);
        assert_eq!(field("ignored_mask:0 mask:3", "mask"), Some("3"));
    }
}

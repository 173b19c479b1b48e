//! What the kernel says is mounted: /proc/PID/mountinfo.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where.
    pub point: PathBuf,
    /// Of a cowfs: its store, and what is shown, a head or `@CHECKPOINT`.
    pub cowfs: Option<(PathBuf, String)>,
}

/// Undoes the octal escapes.
fn unescape(b: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(b.len());
    let mut i = 0;
    while i < b.len() {
        let octal = b
            .get(i + 1..i + 4)
            .and_then(|d| std::str::from_utf8(d).ok())
            .and_then(|d| u8::from_str_radix(d, 8).ok());
        match octal {
            Some(c) if b[i] == b'\\' => {
                out.push(c);
                i += 4;
            }
            _ => {
                out.push(b[i]);
                i += 1;
            }
        }
    }
    out
}

fn path(b: &[u8]) -> PathBuf {
    OsString::from_vec(b.to_vec()).into()
}

fn entry(line: &[u8]) -> Option<Entry> {
    let fields: Vec<&[u8]> = line.split(|c| *c == b' ').collect();
    let point = path(&unescape(fields.get(4)?));
    // Optional fields end with a dash.
    let dash = fields.iter().position(|f| *f == b"-")?;
    let mut cowfs = None;
    if fields.get(dash + 1) == Some(&b"fuse.cowfs".as_slice()) {
        let source = unescape(fields.get(dash + 2)?);
        let at = source.iter().rposition(|c| *c == b'#')?;
        let shown = String::from_utf8_lossy(&source[at + 1..]).into_owned();
        cowfs = Some((path(&source[..at]), shown));
    }
    Some(Entry { point, cowfs })
}

/// The mounts of a mountinfo, lower ones first.
#[must_use]
pub fn parse(text: &[u8]) -> Vec<Entry> {
    text.split(|c| *c == b'\n').filter_map(entry).collect()
}

/// The mounts that a process sees (`self`, or a number).
///
/// # Errors
/// When /proc is not there, or the process is gone.
pub fn of(process: &str) -> std::io::Result<Vec<Entry>> {
    Ok(parse(&std::fs::read(format!("/proc/{process}/mountinfo"))?))
}

/// Store and what is shown, of the cowfs that is mounted at exactly this path (the topmost).
pub(crate) fn mounted_at(path: &Path, mounts: &[Entry]) -> Option<(PathBuf, String)> {
    let top = mounts.iter().rev().find(|m| m.point == path)?;
    top.cowfs.clone()
}

/// Where else a mount lives on: other mount points, and processes of other mount namespaces that have it.
pub(crate) fn elsewhere(store: &Path, shown: &str) -> Vec<String> {
    let is_it = |e: &Entry| {
        e.cowfs
            .as_ref()
            .is_some_and(|c| c.0 == store && c.1 == shown)
    };
    let here = of("self").unwrap_or_default();
    let mut out: Vec<String> = here
        .iter()
        .filter(|e| is_it(e))
        .map(|e| e.point.display().to_string())
        .collect();
    let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
    let mut seen = vec![namespace("self")];
    for pid in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = pid.file_name().to_string_lossy().into_owned();
        if !pid.bytes().all(|c| c.is_ascii_digit()) {
            continue;
        }
        let ns = namespace(&pid);
        if ns.is_none() || seen.contains(&ns) {
            continue;
        }
        seen.push(ns);
        if of(&pid).is_ok_and(|m| m.iter().any(is_it)) {
            out.push(format!("the mount namespace of process {pid}"));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_topmost_mount() {
        let info = b"36 35 98:0 / /mnt/a\\040b rw - fuse.cowfs /st\\040ore\\043main rw\n\
                     37 35 98:0 / /mnt/c rw shared:1 - ext4 /dev/x rw\n\
                     38 35 98:0 / /mnt/a\\040b rw shared:2 - fuse.cowfs /other#@one rw\n\
                     39 35 98:0 / /mnt/d rw - fuse.cowfs /d#main rw\n\
                     40 35 98:0 / /mnt/d rw - tmpfs none rw\n\
                     broken line\n";
        let m = parse(info);
        assert_eq!(m.len(), 5);
        assert_eq!(m[0].cowfs, Some(("/st ore".into(), "main".into())));
        assert_eq!(
            mounted_at(Path::new("/mnt/a b"), &m),
            Some(("/other".into(), "@one".into()))
        );
        assert_eq!(mounted_at(Path::new("/mnt/c"), &m), None);
        assert_eq!(mounted_at(Path::new("/mnt/d"), &m), None, "it is covered");
    }
}

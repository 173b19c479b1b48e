//! Parsing `/proc`: text in, structs out. Nothing here attaches to a process or changes one.

mod maps;
mod stat;
mod status;

pub use maps::{Map, MapKind, maps, parse_maps, parse_vm_flags, vm_flags};
pub use stat::{Ran, Stat, parse as parse_stat, ran, stat};
pub use status::{Status, parse as parse_status, status};

use std::path::{Path, PathBuf};

/// Reading `/proc` failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such process (any more).
    #[error("process {0} does not exist (any more)")]
    Gone(i32),
    /// A file could not be read.
    #[error("cannot read {0}")]
    Read(PathBuf, #[source] std::io::Error),
    /// A file did not look as this program expects.
    #[error("{0} has a line that is not understood: {1:?}")]
    Parse(PathBuf, String),
}

/// The path `/proc/PID/NAME`.
#[must_use]
pub fn path(pid: i32, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/{name}"))
}

fn read(pid: i32, name: &str) -> Result<String, Error> {
    let bytes = read_bytes(pid, name)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The bytes of `/proc/PID/NAME`.
pub fn read_bytes(pid: i32, name: &str) -> Result<Vec<u8>, Error> {
    let path = path(pid, name);
    std::fs::read(&path).map_err(|e| failed(pid, &path, e))
}

/// The target of the link `/proc/PID/NAME`.
pub fn link(pid: i32, name: &str) -> Result<PathBuf, Error> {
    let path = path(pid, name);
    std::fs::read_link(&path).map_err(|e| failed(pid, &path, e))
}

fn failed(pid: i32, path: &Path, e: std::io::Error) -> Error {
    let gone = e.raw_os_error() == Some(libc::ESRCH) || e.kind() == std::io::ErrorKind::NotFound;
    if gone && !Path::new(&format!("/proc/{pid}")).exists() {
        Error::Gone(pid)
    } else {
        Error::Read(path.into(), e)
    }
}

/// The threads of a process, by rising number.
pub fn threads(pid: i32) -> Result<Vec<i32>, Error> {
    let path = path(pid, "task");
    let dir = std::fs::read_dir(&path).map_err(|e| failed(pid, &path, e))?;
    let mut tids: Vec<i32> = dir
        .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    tids.sort_unstable();
    Ok(tids)
}

/// The children of a process (of all its threads), by rising number.
pub fn children(pid: i32) -> Result<Vec<i32>, Error> {
    let mut all = Vec::new();
    for tid in threads(pid)? {
        if let Ok(text) = read(pid, &format!("task/{tid}/children")) {
            all.extend(
                text.split_ascii_whitespace()
                    .filter_map(|w| w.parse::<i32>().ok()),
            );
        }
    }
    all.sort_unstable();
    Ok(all)
}

/// A mark that changes whenever a process or a thread is made, by whomever: the number that was given out last, and how many
/// there are (proc_loadavg(5)). Two that are equal tell that nothing was made in between; none is equal to nothing.
///
/// Only a thread that is made with a number of the caller's choice (`set_tid` of clone3(2)) just as another one ends goes
/// unnoticed.
#[must_use]
pub fn births() -> Option<(u64, u64)> {
    let text = std::fs::read_to_string("/proc/loadavg").ok()?;
    let mut fields = text.split_ascii_whitespace().skip(3);
    let all = fields.next()?.split_once('/')?.1.parse().ok()?;
    Some((fields.next()?.parse().ok()?, all))
}

/// A process and all that descend from it, parents before children.
pub fn tree(root: i32) -> Result<Vec<i32>, Error> {
    let mut all = vec![root];
    let mut next = 0;
    while next < all.len() {
        match children(all[next]) {
            Ok(c) => all.extend(c),
            Err(Error::Gone(_)) if next > 0 => {}
            Err(e) => return Err(e),
        }
        next += 1;
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_birth_is_seen() {
        let before = births().unwrap();
        let living = std::thread::spawn(|| births().unwrap());
        assert_ne!(living.join().unwrap(), before);
    }
}

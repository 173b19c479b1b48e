//! `umlctl logs`.

use super::args::Logs;
use super::find;
use crate::vm::home::Vm;
use anyhow::{Context, Result};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Shows the log. What the kernel says comes to the console, too, once there is one; before that only its own log has it.
pub fn run(a: &Logs, _json: bool) -> Result<u8> {
    let vm = find(&a.name)?;
    let mut out = std::io::stdout().lock();
    if !a.kernel {
        // Put aside when it had grown large.
        let _ = copy(&vm.console_log().with_extension("log.1"), 0, &mut out);
    }
    let mut path = source(&vm, a.kernel);
    let mut at = copy(&path, 0, &mut out)?;
    if !a.follow {
        return Ok(0);
    }
    loop {
        let over = !vm.locked();
        if path != source(&vm, a.kernel) {
            (path, at) = (source(&vm, a.kernel), 0);
        }
        // A shorter file is a new one.
        if std::fs::metadata(&path).is_ok_and(|m| m.size() < at) {
            at = 0;
        }
        at = copy(&path, at, &mut out)?;
        if over {
            return Ok(0);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// The console's log, or if that is still empty the kernel's.
fn source(vm: &Vm, kernel: bool) -> PathBuf {
    let empty = std::fs::metadata(vm.console_log()).map_or(true, |m| m.len() == 0);
    if kernel || empty {
        vm.kernel_log()
    } else {
        vm.console_log()
    }
}

/// Copies from an offset on; returns where it ends.
fn copy(path: &Path, from: u64, out: &mut impl Write) -> Result<u64> {
    use std::io::Seek;
    let mut file = match File::open(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(from),
        other => other.with_context(|| format!("cannot read {}", path.display()))?,
    };
    file.seek(std::io::SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    match out.write_all(&bytes).and_then(|()| out.flush()) {
        // Who looks has seen enough.
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        other => other?,
    }
    Ok(from + bytes.len() as u64)
}

//! Who holds the TCP connections of processes that were ended by `umlctl snapshot --kill` until they are resumed: a process
//! that has their sockets, silent, and listens in the snapshot's directory. What a peer sends meanwhile is lost, and sent
//! again; without it the host would answer by a reset.

use super::args::Hold;
use crate::control::{may, short};
use crate::sys::fd::{inherited, pass};
use anyhow::{Context, Result};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use snapshot::files::Held;
use std::fs::{Permissions, remove_file, set_permissions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Where it listens, in the snapshot's directory.
const NAME: &str = "held";
/// So long it waits for a resume. A peer has then been without an answer for so long that it gives up soon.
const PATIENCE: Duration = Duration::from_secs(600);
/// How long an answer may take.
const SOON: Duration = Duration::from_secs(5);

/// Starts it. If it cannot be started the connections end here, and their peers are not told.
pub fn spawn(sockets: Vec<OwnedFd>, dir: &Path) {
    if let Err(e) = start(&sockets, dir) {
        eprintln!(
            "umlctl: nobody holds its connections, a peer that sends before it is resumed gets a reset: {e:#}"
        );
        Held::from_sockets(sockets).discard();
    }
}

fn start(sockets: &[OwnedFd], dir: &Path) -> Result<()> {
    let (mut ready, report) = std::io::pipe().context("cannot make a pipe")?;
    let report = OwnedFd::from(report);
    let numbers: Vec<i32> = sockets.iter().map(AsRawFd::as_raw_fd).collect();
    let list: Vec<String> = numbers.iter().map(i32::to_string).collect();
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let mut command = Command::new(program);
    command
        .arg("hold")
        .arg(std::path::absolute(dir)?)
        .args(["--sockets", &list.join(",")])
        .args(["--report-fd", &report.as_raw_fd().to_string()])
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0);
    let passed: Vec<i32> = numbers.into_iter().chain([report.as_raw_fd()]).collect();
    pass(&mut command, &passed);
    command.spawn().context("cannot start who holds them")?;
    drop(report);
    // It has them when it says so.
    ready
        .read_exact(&mut [0])
        .context("who was to hold them has ended")
}

/// `umlctl hold`: holds them.
pub fn run(a: &Hold) -> Result<u8> {
    let sockets: Vec<OwnedFd> = a.sockets.iter().filter_map(|&fd| inherited(fd)).collect();
    let held = Held::from_sockets(sockets);
    let report = inherited(a.report_fd).context("this is not for people")?;
    let _ = nix::unistd::setsid();
    let path = a.dir.join(NAME);
    let listener = short(&path, UnixListener::bind)?;
    set_permissions(&path, Permissions::from_mode(0o600))?;
    std::fs::File::from(report).write_all(b"+")?;
    let asked = wait(&listener);
    let _ = remove_file(&path);
    held.discard();
    // Now the addresses are free.
    let _ = asked.map(|mut s| s.write_all(b"+"));
    Ok(0)
}

/// Waits for somebody who may, and says so.
fn wait(listener: &UnixListener) -> Option<UnixStream> {
    let end = Instant::now() + PATIENCE;
    loop {
        let left = PollTimeout::try_from(end.saturating_duration_since(Instant::now())).ok()?;
        let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, left) {
            Ok(0) => return None,
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(_) => return None,
        }
        let Ok((mut socket, _)) = listener.accept() else {
            continue;
        };
        let _ = socket.set_read_timeout(Some(SOON));
        if may(&socket) && socket.read_exact(&mut [0]).is_ok() {
            return Some(socket);
        }
    }
}

/// Has who holds the connections of a snapshot let go of them, if anybody does.
pub fn let_go(dir: &Path) {
    let Ok(mut socket) = short(&dir.join(NAME), UnixStream::connect) else {
        return;
    };
    let _ = socket.set_read_timeout(Some(SOON));
    let _ = socket.write_all(b"g");
    let _ = socket.read_exact(&mut [0]);
}

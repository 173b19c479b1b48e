//! Starting what a stream is for.

use crate::{power, sys};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use umlctl_agent::archive;
use umlctl_agent::exec::{Exec, What};

/// Of open(2).
const O_NOCTTY: i32 = 0o400;

/// A started process, and our ends.
pub struct Child {
    /// Its number; also that of its session and process group.
    pub pid: i32,
    /// Where its input is written.
    pub input: OwnedFd,
    /// Where its output is read, and its error output if that is apart.
    pub output: OwnedFd,
    /// See above.
    pub error: Option<OwnedFd>,
    /// Whether it is on a terminal; that is then both input and output.
    pub terminal: bool,
}

/// Starts it.
///
/// # Errors
/// As a shell has it, 126 or 127, and a message.
pub fn start(exec: &Exec) -> Result<Child, (i32, String)> {
    let failed = |e: io::Error| (126, format!("umlctl: {e}"));
    match exec.terminal {
        Some(size) if exec.what == What::Command => on_terminal(exec, size),
        _ => {
            let (input, output, error) = (
                sys::pipe().map_err(failed)?,
                sys::pipe().map_err(failed)?,
                sys::pipe().map_err(failed)?,
            );
            for ours in [&input.1, &output.0, &error.0] {
                sys::set_nonblocking(ours).map_err(failed)?;
            }
            let theirs = [input.0, output.1, error.1];
            let pid = match exec.what {
                What::Command => command(exec, theirs, false)?,
                what => builtin(what, exec, &theirs).map_err(failed)?,
            };
            Ok(Child {
                pid,
                input: input.1,
                output: output.0,
                error: Some(error.0),
                terminal: false,
            })
        }
    }
}

fn on_terminal(exec: &Exec, (rows, columns): (u16, u16)) -> Result<Child, (i32, String)> {
    let failed = |e: io::Error| (126, format!("umlctl: no terminal: {e}"));
    if !Path::new("/dev/pts/ptmx").exists() {
        // The guest has not mounted it (yet). Before a terminal is made, which belongs to one mount.
        let _ = std::fs::create_dir("/dev/pts");
        sys::mount_at("devpts", "/dev/pts", "devpts", 0, "").map_err(failed)?;
    }
    let master = File::options()
        .read(true)
        .write(true)
        .open("/dev/ptmx")
        .map(OwnedFd::from)
        .map_err(failed)?;
    let number = sys::unlock_terminal(&master).map_err(failed)?;
    let path = format!("/dev/pts/{number}");
    // Not to become the agent's own terminal.
    let slave = File::options()
        .read(true)
        .write(true)
        .custom_flags(O_NOCTTY)
        .open(&path)
        .map(OwnedFd::from)
        .map_err(failed)?;
    sys::set_size(&master, rows, columns);
    sys::set_nonblocking(&master).map_err(failed)?;
    let copy = || slave.try_clone().map_err(failed);
    let theirs = [copy()?, copy()?, copy()?];
    let pid = command(exec, theirs, true)?;
    Ok(Child {
        pid,
        input: master.try_clone().map_err(failed)?,
        output: master,
        error: None,
        terminal: true,
    })
}

fn command(
    exec: &Exec,
    [input, output, error]: [OwnedFd; 3],
    terminal: bool,
) -> Result<i32, (i32, String)> {
    let Some((program, arguments)) = exec.arguments.split_first() else {
        return Err((127, "umlctl: no command".into()));
    };
    let program = OsStr::from_bytes(program);
    let home = if Path::new("/root").is_dir() {
        "/root"
    } else {
        "/"
    };
    let mut command = Command::new(program);
    command
        .args(arguments.iter().map(|a| OsStr::from_bytes(a)))
        .env_clear()
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .env("HOME", home)
        .envs(exec.environment.iter().filter_map(|e| {
            let at = e.iter().position(|b| *b == b'=')?;
            Some((OsStr::from_bytes(&e[..at]), OsStr::from_bytes(&e[at + 1..])))
        }))
        .current_dir(home)
        .stdin(Stdio::from(input))
        .stdout(Stdio::from(output))
        .stderr(Stdio::from(error));
    sys::before_exec(&mut command, terminal);
    match command.spawn() {
        // Reaped with all others.
        Ok(child) => Ok(i32::try_from(child.id()).unwrap_or_default()),
        Err(e) => {
            let code = if e.kind() == io::ErrorKind::NotFound {
                127
            } else {
                126
            };
            Err((code, format!("umlctl: {}: {e}", program.display())))
        }
    }
}

/// What the agent itself does, in a child.
fn builtin(what: What, exec: &Exec, theirs: &[OwnedFd; 3]) -> io::Result<i32> {
    let pid = sys::fork_process()?;
    if pid != 0 {
        return Ok(pid);
    }
    sys::own_signals();
    sys::new_session();
    sys::unblock();
    sys::become_stdio([
        theirs[0].as_raw_fd(),
        theirs[1].as_raw_fd(),
        theirs[2].as_raw_fd(),
    ]);
    let path = exec
        .arguments
        .first()
        .map_or(Path::new("/"), |p| Path::new(OsStr::from_bytes(p)));
    let (mut input, mut output) = (BufReader::new(io::stdin()), BufWriter::new(io::stdout()));
    let mut incomplete = false;
    let result = match what {
        What::Send => archive::send(path, &mut output, &mut |p| {
            incomplete = true;
            eprintln!(
                "{}: left out, it is neither a file nor a directory nor a link",
                p.display()
            );
        })
        .and_then(|()| output.flush()),
        What::Receive => archive::receive(path, &mut input, 0o7777).map(drop),
        What::PowerOff | What::Command => power::off(),
    };
    sys::exit_now(match result {
        Ok(()) if incomplete => 3,
        Ok(()) => 0,
        Err(e) => {
            eprintln!("{e}");
            1
        }
    })
}

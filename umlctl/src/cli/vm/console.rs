//! `umlctl console`, and `umlctl run` without --detach.

use super::args::One;
use super::raw::Raw;
use super::{connect, find};
use crate::control::Request;
use crate::vm::home::Vm;
use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::io::{self, ErrorKind, IsTerminal, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

/// Ctrl-]
const LEAVE: u8 = 0x1d;

/// Why the console was left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Left {
    /// The VM has ended.
    End,
    /// The user wanted to, or nobody reads what we write.
    Wish,
    /// A signal told us to end.
    Signal,
}

/// Attaches to a console.
pub fn run(a: &One) -> Result<u8> {
    let vm = find(&a.name)?;
    let (socket, rest) = connect(&vm)?.switch(&Request::Console)?;
    if io::stdin().is_terminal() {
        eprintln!("umlctl: the console of {}; Ctrl-] leaves it", vm.name());
    }
    attach(socket, &rest).map(|_| 0)
}

/// Shows a VM's console until it ends, and returns its exit code. A signal to end ends the VM.
pub fn run_attached(vm: &Vm) -> Result<u8> {
    let left = match connect(vm).and_then(|c| Ok(c.switch(&Request::Console)?)) {
        Ok((socket, rest)) => attach(socket, &rest)?,
        // It has ended before we were there.
        Err(_) if !vm.locked() => Left::End,
        Err(e) => return Err(e),
    };
    match left {
        Left::Wish => {
            eprintln!(
                "umlctl: {0} runs on; `umlctl console {0}` comes back to it",
                vm.name()
            );
            return Ok(0);
        }
        Left::Signal => drop(super::ask_until_end(vm, &Request::Stop { timeout_s: 10 })),
        Left::End => {}
    }
    super::end::gone(vm)?;
    let exit = vm.state()?.exit;
    exit.map(crate::vm::state::Exit::code)
        .with_context(|| format!("the supervisor of {} was killed", vm.name()))
}

/// Standard input goes in, and what comes out goes to standard output.
fn attach(mut socket: UnixStream, rest: &[u8]) -> Result<Left> {
    let terminal = io::stdin().is_terminal();
    let mut set = SigSet::empty();
    for s in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        set.add(s);
    }
    set.thread_block().context("cannot block signals")?;
    let signals =
        SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC).context("cannot make a signalfd")?;
    let _raw = if terminal { Some(Raw::enter()?) } else { None };
    if show(rest)? {
        return Ok(Left::Wish);
    }
    let mut input_open = true;
    loop {
        let stdin = io::stdin();
        let mut fds = vec![
            PollFd::new(socket.as_fd(), PollFlags::POLLIN),
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
        ];
        if input_open {
            fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e).context("cannot wait"),
        }
        let any = |i: usize| fds.get(i).and_then(PollFd::any).unwrap_or(false);
        let (output, signal, input) = (any(0), any(1), any(2));
        if signal {
            return Ok(Left::Signal);
        }
        let mut bytes = [0; 16384];
        if output {
            match socket.read(&mut bytes) {
                Ok(0) => return Ok(Left::End),
                Ok(n) if show(&bytes[..n])? => return Ok(Left::Wish),
                Err(e) if e.kind() == ErrorKind::ConnectionReset => return Ok(Left::End),
                Err(e) if e.kind() != ErrorKind::Interrupted => {
                    return Err(e).context("the console");
                }
                _ => {}
            }
        }
        if input {
            match nix::unistd::read(&stdin, &mut bytes) {
                Err(Errno::EINTR | Errno::EAGAIN) => {}
                Ok(0) | Err(_) => input_open = false,
                Ok(n) => {
                    let leave = bytes[..n].iter().position(|b| terminal && *b == LEAVE);
                    match socket.write_all(&bytes[..leave.unwrap_or(n)]) {
                        // It has ended; what it said last is still to be shown.
                        Err(_) => input_open = false,
                        Ok(()) if leave.is_some() => return Ok(Left::Wish),
                        Ok(()) => {}
                    }
                }
            }
        }
    }
}

/// Shows. True if nobody looks.
fn show(bytes: &[u8]) -> Result<bool> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(true),
        other => other.map(|()| false).context("cannot write"),
    }
}

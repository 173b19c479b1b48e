//! A program in the guest with our standard input, output and error output.

use super::{Ended, Error, Session, ended};
use crate::sys::terminal;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::io::{self, ErrorKind, Write};
use std::os::fd::AsFd;
use umlctl_agent::wire::{Kind, MAX_DATA, channel};

/// Credit is given back in pieces of this size, or when all that was there is written.
const PIECE: usize = 16 << 10;
/// Who presses ^C so often wants to leave, whatever becomes of the program.
const ENOUGH: u32 = 3;

/// Signals that go to the program.
const FORWARDED: [Signal; 4] = [
    Signal::SIGINT,
    Signal::SIGTERM,
    Signal::SIGHUP,
    Signal::SIGQUIT,
];

/// How it came to an end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The program has ended.
    Ended(Ended),
    /// Nobody reads our output any more.
    NoReader,
    /// The user wanted to leave.
    Left,
}

/// The state of the loop.
struct Exec<'a> {
    session: &'a mut Session,
    signals: SignalFd,
    on_terminal: bool,
    input_open: bool,
    interrupts: u32,
    owed: [usize; 2],
}

/// Signals are blocked and read by the loop. To be called before there are other threads.
///
/// # Errors
/// The kernel's.
fn signals() -> io::Result<SignalFd> {
    let mut set = SigSet::empty();
    FORWARDED.into_iter().for_each(|s| set.add(s));
    set.add(Signal::SIGWINCH);
    set.thread_block()?;
    Ok(SignalFd::with_flags(
        &set,
        SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK,
    )?)
}

/// Runs until it has ended.
///
/// # Errors
/// The VM ends, or the connection breaks.
pub fn run(session: &mut Session, on_terminal: bool) -> Result<Outcome, Error> {
    let signals = signals().map_err(Error::Here)?;
    Exec {
        session,
        signals,
        on_terminal,
        input_open: true,
        interrupts: 0,
        owed: [0; 2],
    }
    .run()
}

impl Exec<'_> {
    fn run(&mut self) -> Result<Outcome, Error> {
        loop {
            while let Some(frame) = self.session.heard() {
                let out = match frame.kind {
                    Kind::Stdout => self.output(channel::STDOUT, &frame.payload),
                    Kind::Stderr => self.output(channel::STDERR, &frame.payload),
                    _ => Ok(()),
                };
                match out {
                    Err(Error::Here(e)) if e.kind() == ErrorKind::BrokenPipe => {
                        return Ok(Outcome::NoReader);
                    }
                    other => other?,
                }
                if let Some(e) = ended(&frame)? {
                    return Ok(Outcome::Ended(e));
                }
            }
            self.pay(1)?;
            let (signal, input, socket) = self.wait()?;
            if signal && self.signal()? {
                return Ok(Outcome::Left);
            }
            if input {
                self.input()?;
            }
            if socket {
                self.session.listen()?;
            }
        }
    }

    /// Waits for a signal, input, or the agent.
    fn wait(&self) -> Result<(bool, bool, bool), Error> {
        let stdin = io::stdin();
        let mut fds = vec![
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.session.fd(), PollFlags::POLLIN),
        ];
        if self.input_open && self.session.credit() > 0 {
            fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(Error::Here(e.into())),
        }
        let any = |i: usize| fds.get(i).and_then(PollFd::any).unwrap_or(false);
        Ok((any(0), any(2), any(1)))
    }

    /// Forwards signals. True if the user wants to leave.
    fn signal(&mut self) -> Result<bool, Error> {
        while let Ok(Some(info)) = self.signals.read_signal() {
            let Some(signal) = i32::try_from(info.ssi_signo)
                .ok()
                .and_then(|n| Signal::try_from(n).ok())
            else {
                continue;
            };
            if signal == Signal::SIGWINCH {
                if let (true, Some((rows, columns))) =
                    (self.on_terminal, terminal::size(io::stdout()))
                {
                    let mut payload = rows.to_le_bytes().to_vec();
                    payload.extend(columns.to_le_bytes());
                    self.session.send(Kind::WinSize, payload)?;
                }
                continue;
            }
            self.interrupts += u32::from(signal == Signal::SIGINT);
            if self.interrupts >= ENOUGH {
                return Ok(true);
            }
            self.session
                .send(Kind::Signal, (signal as i32).to_le_bytes())?;
        }
        Ok(false)
    }

    fn input(&mut self) -> Result<(), Error> {
        let mut bytes = [0; MAX_DATA];
        let most = self.session.credit().min(MAX_DATA);
        match nix::unistd::read(io::stdin(), &mut bytes[..most]) {
            Err(Errno::EINTR | Errno::EAGAIN) => Ok(()),
            // Whatever is wrong with it, nothing more comes.
            Ok(0) | Err(_) => {
                self.input_open = false;
                self.session.send(Kind::Eof, [channel::STDIN])
            }
            Ok(n) => self.session.input(&bytes[..n]),
        }
    }

    fn output(&mut self, channel: u8, bytes: &[u8]) -> Result<(), Error> {
        let written = if channel == channel::STDOUT {
            let mut out = io::stdout().lock();
            out.write_all(bytes).and_then(|()| out.flush())
        } else {
            io::stderr().write_all(bytes)
        };
        written.map_err(Error::Here)?;
        self.owed[usize::from(channel - channel::STDOUT)] += bytes.len();
        self.pay(PIECE)
    }

    /// Gives back credit, if it is at least so much.
    fn pay(&mut self, least: usize) -> Result<(), Error> {
        for (channel, owed) in (channel::STDOUT..).zip(&mut self.owed) {
            if *owed >= least {
                self.session.grant(channel, *owed)?;
                *owed = 0;
            }
        }
        Ok(())
    }
}

//! `umlctl exec`.

use super::args::Exec;
use super::raw::Raw;
use super::{connect, find};
use crate::agent::Session;
use crate::agent::exec::{Outcome, run as stream};
use crate::sys::terminal;
use anyhow::{Result, bail};
use std::io::IsTerminal;
use std::os::unix::ffi::OsStringExt;
use umlctl_agent::exec::{Exec as Wanted, What};

/// For a terminal that does not say how large it is.
const USUAL_SIZE: (u16, u16) = (24, 80);

/// What a shell has for a program that ended by SIGPIPE, and by SIGINT.
const NO_READER: u8 = 128 + 13;
const LEFT: u8 = 128 + 2;

/// Runs a program in the guest, and ends as it ends.
pub fn run(a: &Exec) -> Result<u8> {
    let vm = find(&a.name)?;
    let bytes =
        |list: &[std::ffi::OsString]| list.iter().cloned().map(OsStringExt::into_vec).collect();
    let mut wanted = Wanted::new(What::Command, bytes(&a.command));
    for e in &a.env {
        if !e.contains('=') {
            bail!("--env {e}: write NAME=VALUE");
        }
        wanted.environment.push(e.clone().into_bytes());
    }
    if a.tty {
        if !std::io::stdin().is_terminal() || !std::io::stdout().is_terminal() {
            bail!("--tty needs a terminal, and standard input or output is none");
        }
        wanted.terminal = Some(terminal::size(std::io::stdout()).unwrap_or(USUAL_SIZE));
        if let Ok(term) = std::env::var("TERM") {
            wanted.environment.push(format!("TERM={term}").into_bytes());
        }
    }
    let mut session = Session::begin(connect(&vm)?, &wanted)?;
    let raw = if a.tty { Some(Raw::enter()?) } else { None };
    let outcome = stream(&mut session, a.tty);
    drop(raw);
    Ok(match outcome? {
        Outcome::Ended(e) => e.code(),
        Outcome::NoReader => NO_READER,
        Outcome::Left => {
            eprintln!("umlctl: the program does not end; hanging up");
            LEFT
        }
    })
}

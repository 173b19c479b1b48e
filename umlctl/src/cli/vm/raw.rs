//! A terminal that passes all keys on.

use nix::sys::termios::{self, SetArg, Termios};
use std::io;

/// Standard input in raw mode; put back when dropped.
#[derive(Debug)]
pub struct Raw(Termios);

impl Raw {
    /// Sets it.
    ///
    /// # Errors
    /// It is no terminal.
    pub fn enter() -> io::Result<Self> {
        let before = termios::tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        termios::cfmakeraw(&mut raw);
        termios::tcsetattr(io::stdin(), SetArg::TCSADRAIN, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _ = termios::tcsetattr(io::stdin(), SetArg::TCSADRAIN, &self.0);
    }
}

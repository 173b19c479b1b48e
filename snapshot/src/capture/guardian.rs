//! The process that watches over a snapshot: `docs/snapshot.md`, section 3.

use super::Error;
use crate::target::journal::Journal;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The process that repairs targets if we die.
#[derive(Debug)]
pub struct Guardian(Option<std::process::Child>, Vec<PathBuf>);

impl Guardian {
    /// Starts `program` for the targets that these journals are of; without a program there is none.
    pub fn start<'a>(
        program: Option<&Path>,
        journals: impl Iterator<Item = &'a Path>,
    ) -> Result<Self, Error> {
        let Some(program) = program else {
            return Ok(Self(None, Vec::new()));
        };
        let fail = |e| Error::Guardian(program.into(), e);
        let journals: Vec<PathBuf> = journals.map(Into::into).collect();
        let mut command = Command::new(program);
        command
            .arg("rescue")
            .arg("--watch")
            .arg(std::process::id().to_string());
        command.args(&journals);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(fail)?;
        // It says that it holds a descriptor of us: from then on it will see us end.
        let mut byte = [0u8];
        if let Some(out) = &mut child.stdout {
            out.read_exact(&mut byte).map_err(fail)?;
        }
        Ok(Self(Some(child), journals))
    }

    /// It is needed no more.
    pub fn end(self) {
        drop(self);
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        let active = |p: &PathBuf| Journal::look(p).is_ok_and(|r| r.active);
        if self.1.iter().any(active) {
            // It repairs after our end what we could not.
            return;
        }
        if let Some(child) = &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

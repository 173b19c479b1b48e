//! Replies whose bytes lie in files of the host: splice(2) takes them from the host's page cache to the kernel's buffers,
//! with one copy instead of two.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::{pipe2, write};

/// Size of a pipe, a page for each of its slots: a header and the largest read, wherever its parts begin. More takes
/// CAP_SYS_RESOURCE.
const PIPE_BYTES: i32 = 1 << 20;
/// Largest read that is asked for, so that a pipe holds the answer.
pub(super) const READ_MAX: usize = 512 << 10;

/// A part of a reply.
#[derive(Debug)]
pub struct Piece<'a> {
    /// File of the host.
    pub file: &'a File,
    /// Where it begins there.
    pub offset: u64,
    /// Bytes.
    pub len: usize,
}

/// Where a thread's replies go.
#[derive(Debug)]
pub(super) struct Way {
    dev: Arc<File>,
    pipe: Option<(OwnedFd, OwnedFd)>,
    /// There are no pipes as they are needed.
    useless: bool,
}

impl Way {
    /// To this device.
    pub fn new(dev: Arc<File>) -> Self {
        Self {
            dev,
            pipe: None,
            useless: false,
        }
    }

    /// False if it is not worth trying.
    pub fn is_of_use(&self) -> bool {
        !self.useless
    }

    /// Sends a header with the pieces behind it. An error leaves nothing behind: it can be sent in another way.
    ///
    /// # Errors
    /// The host's, or the device's.
    pub fn send(&mut self, header: &[u8], pieces: &[Piece<'_>]) -> io::Result<()> {
        // Taken out: what an error leaves in a pipe goes with it.
        let pipe = match self.pipe.take() {
            Some(p) => p,
            None => new_pipe().inspect_err(|_| self.useless = true)?,
        };
        let mut filled = write(&pipe.1, header)?;
        for p in pieces {
            let mut off = i64::try_from(p.offset).map_err(io::Error::other)?;
            let mut left = p.len;
            while left > 0 {
                let flags = SpliceFFlags::SPLICE_F_NONBLOCK;
                match splice(p.file, Some(&mut off), &pipe.1, None, left, flags)? {
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    n => {
                        left -= n;
                        filled += n;
                    }
                }
            }
        }
        splice(
            &pipe.0,
            None,
            &*self.dev,
            None,
            filled,
            SpliceFFlags::empty(),
        )?;
        self.pipe = Some(pipe);
        Ok(())
    }
}

fn new_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let pipe = pipe2(OFlag::O_CLOEXEC)?;
    fcntl(&pipe.1, FcntlArg::F_SETPIPE_SZ(PIPE_BYTES))?;
    Ok(pipe)
}

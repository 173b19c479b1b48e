//! A snapshot that is being taken: a thread does it, and wakes the loop when there is something to tell.

use super::{Error, system};
use crate::snapshots::store::Figures;
use crate::snapshots::take::{Job, Learned, take};
use nix::unistd::Pid;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::sync::{Arc, Mutex, PoisonError};

/// What the thread tells.
#[derive(Debug)]
pub enum Event {
    /// The point in time is fixed, and the machine runs again.
    Fixed(Figures),
    /// All is saved.
    Saved(Figures),
    /// There is no snapshot: why.
    Failed(String),
}

/// Learns about a machine, in a thread, so that its first snapshot need not. If it fails the first snapshot does it.
pub fn meet(main: Pid, learned: Arc<Mutex<Learned>>) {
    let run = move || {
        let mut learned = learned.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(e) = snapshot::uml::capture::meet(main.as_raw(), &mut learned) {
            tracing::debug!("not met: {}", snapshot::resume::text(&e));
        }
    };
    let thread = std::thread::Builder::new().name("meet".into()).spawn(run);
    if let Err(e) = thread {
        tracing::debug!("not met: {e}");
    }
}

/// A snapshot that is being taken.
#[derive(Debug)]
pub struct Capture {
    /// The client that has asked for it.
    pub client: u32,
    events: Receiver<Event>,
    wake: std::io::PipeReader,
    over: bool,
}

impl Capture {
    /// Starts the thread.
    ///
    /// # Errors
    /// The kernel's.
    pub fn start(job: Job, learned: Arc<Mutex<Learned>>, client: u32) -> Result<Self, Error> {
        let (wake, mut waker) = std::io::pipe().map_err(system("make a pipe"))?;
        let (sender, events) = channel();
        let run = move || {
            let mut tell = |event| {
                // The loop is gone only when the whole process goes.
                let _ = sender.send(event);
                let _ = waker.write_all(b"!");
            };
            let mut learned = learned.lock().unwrap_or_else(PoisonError::into_inner);
            let result = take(&job, &mut learned, &mut |figures| {
                tell(Event::Fixed(figures))
            });
            tell(match result {
                Ok(figures) => Event::Saved(figures),
                Err(e) => Event::Failed(snapshot::resume::text(&e)),
            });
        };
        std::thread::Builder::new()
            .name("snapshot".into())
            .spawn(run)
            .map_err(system("start a thread"))?;
        Ok(Self {
            client,
            events,
            wake,
            over: false,
        })
    }

    /// Becomes readable when there is something.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// The next thing, if there is one. Waits for it if `block` is set.
    pub fn next(&mut self, block: bool) -> Option<Event> {
        if self.over {
            return None;
        }
        let got = match block {
            true => self.events.recv().map_err(|_| TryRecvError::Disconnected),
            false => self.events.try_recv(),
        };
        let event = match got {
            Ok(event) => event,
            Err(TryRecvError::Empty) => return None,
            Err(TryRecvError::Disconnected) => {
                Event::Failed("the thread that took it has failed".into())
            }
        };
        let mut byte = [0; 1];
        let _ = nix::unistd::read(&self.wake, &mut byte);
        self.over = !matches!(event, Event::Fixed(_));
        Some(event)
    }

    /// Whether there is no more to come.
    #[must_use]
    pub fn over(&self) -> bool {
        self.over
    }
}

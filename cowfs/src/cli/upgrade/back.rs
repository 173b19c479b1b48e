//! The way back of an upgrade: nothing ends it but the rollback, the start and the check themselves.

use super::journal::State;
use super::{Upgrade, keep_name, list};
use crate::control::{Answer, CheckpointInfo, Failure, Request};
use crate::store::Origin;

/// Rolled back and healthy again.
const UNHEALTHY: u8 = 12;
/// Rolling back, or the service after it, failed.
const ROLLBACK_FAILED: u8 = 13;

impl Upgrade {
    /// Nothing was changed: the service as it was.
    pub(super) fn start_again(&mut self, e: Failure) -> Result<u8, Failure> {
        let mut failure = e;
        self.turn_back();
        if let Err(e) = self.start() {
            failure = Failure {
                code: ROLLBACK_FAILED,
                message: format!("{failure}; and the service could not be started again: {e}"),
            };
        }
        self.journal.why = Some(failure.message.clone());
        self.unpin();
        Err(self.failed(failure))
    }

    /// Goes back to the checkpoint, if there was one, and starts the old version.
    pub(super) fn take_back(&mut self, why: String) -> Result<u8, Failure> {
        let changed = !matches!(self.journal.state, State::Stopping | State::Stopped);
        self.turn_back();
        self.report.say(&format!("the upgrade failed: {why}"));
        self.journal.why = Some(why.clone());
        match self.old_version(changed) {
            Ok(()) => {
                self.unpin();
                self.end(State::RolledBack, UNHEALTHY);
                Ok(UNHEALTHY)
            }
            Err(e) => {
                let j = &mut self.journal;
                j.why = Some(format!("{why}; then: {e}"));
                let message = format!(
                    "the upgrade failed: {why}\nand so did the way back: {e}\nby hand: 'cowfs rollback {} {}', then start the service; the log is {}",
                    j.mountpoint.display(),
                    j.name,
                    self.runner.log_path().display()
                );
                self.unpin();
                Err(self.failed(Failure {
                    code: ROLLBACK_FAILED,
                    message,
                }))
            }
        }
    }

    fn turn_back(&mut self) {
        if let Err(e) = self.runner.turn_back() {
            self.report.warn(format!("the log of the way back: {e}"));
        }
    }

    fn old_version(&mut self, changed: bool) -> Result<(), Failure> {
        if changed {
            self.note(State::RollingBack);
            self.report
                .say(&format!("rolling back to {}", self.journal.name));
            // What is broken may not stop properly; that is no reason to stay with it.
            if let Err(e) = self.stop() {
                self.report.warn(e.message);
            }
            self.step("rollback", Upgrade::rollback)?;
            self.note(State::Restarting);
        }
        self.start()?;
        self.check()
    }

    /// True if what the rollback leaves behind is there: then it was done.
    fn is_back(&self, all: &[CheckpointInfo]) -> bool {
        all.iter().any(|c| {
            c.origin == Origin::LeftBehind
                && c.head == self.journal.head
                && Some(&c.name) == self.journal.keep_as.as_ref()
        })
    }

    fn rollback(&mut self) -> Result<(), Failure> {
        let listed = list(&self.target)?;
        // Only a rollback before an interruption can have left that.
        if self.is_back(&listed.1) {
            return Ok(());
        }
        let to = self
            .journal
            .checkpoint_in(&listed.1)
            .ok_or_else(|| Failure::new(format!("checkpoint {} is gone", self.journal.name)))?;
        let keep = keep_name(&listed, &self.journal.name);
        let request = Request::Rollback {
            head: self.journal.head.clone(),
            checkpoint: to.name.clone(),
            discard: false,
            dry_run: false,
            keep_as: Some(keep.clone()),
        };
        self.journal.keep_as = Some(keep);
        self.note(State::RollingBack);
        match self.target.ask(&request) {
            Ok(Answer::Rollback { .. }) => Ok(()),
            Ok(_) => Err(Failure::new("the daemon answered something else")),
            // Short of space the head may be back without this being on disk yet.
            Err(e) if list(&self.target).is_ok_and(|l| self.is_back(&l.1)) => {
                self.report
                    .warn(format!("the rollback is not on disk yet: {e}"));
                Ok(())
            }
            Err(e) => Err(e),
        }
    }
}

//! `cowfs upgrade`: stop, checkpoint, run, start, check; on failure back to the checkpoint by itself.
//!
//! What it does is written down before each step ([`journal`]). An upgrade that was killed half way is ended by
//! `cowfs upgrade MOUNTPOINT --resume`.
//!
//! States: `stopping`, `stopped`, `checkpointed`, `running`, `starting`, `checking`, `checked`, then `done`; or, from any
//! of them before `checked`, `rolling_back` (if there was a checkpoint), `restarting`, then `rolled_back` or `failed`. The
//! checkpoint is pinned until the end.
//!
//! On the way there a record that cannot be written is a failure. On the way back nothing is but the rollback, the start
//! and the check themselves.

mod back;
mod journal;
mod report;
mod runner;

use std::fs::{self, File};
use std::path::Path;
use std::time::Instant;

use super::args::{Cli, UpgradeArgs};
use super::locate::Target;
use crate::control::{Answer, CheckpointInfo, Failure, HeadInfo, Request};
use crate::names;
use crate::store::now_us;
use journal::{Journal, JournalFile, State, VERSION};
use report::Report;
use runner::Runner;

struct Upgrade {
    target: Target,
    journal: Journal,
    file: JournalFile,
    runner: Runner,
    report: Report,
}

type Listed = (Vec<HeadInfo>, Vec<CheckpointInfo>);

fn list(target: &Target) -> Result<Listed, Failure> {
    match target.ask(&Request::List)? {
        Answer::List(l) => Ok(l.whole()),
        _ => Err(Failure::new("the daemon answered something else")),
    }
}

fn is_taken((heads, checkpoints): &Listed, name: &str) -> bool {
    heads.iter().any(|h| h.name == name) || checkpoints.iter().any(|c| c.name == name)
}

/// A name that nothing has, for what a rollback leaves behind.
fn keep_name(listed: &Listed, name: &str) -> String {
    let base = format!("failed-{name}");
    let numbered = (2..).map(|n| format!("{base}-{n}"));
    std::iter::once(base.clone())
        .chain(numbered)
        .find(|n| !is_taken(listed, n))
        .unwrap_or(base)
}

/// Runs the command.
pub(super) fn run(cli: &Cli, a: &UpgradeArgs) -> Result<u8, Failure> {
    let target = Target::of(&a.mountpoint)?;
    let Some((mountpoint, _)) = target.mount.clone() else {
        return Err(Failure::new("an upgrade needs a mounted head"));
    };
    let head = target.head()?;
    let dir = target.store.join("upgrades");
    let _lock = lock(&dir)?;
    let old = journal::unfinished(&dir, &head)?;
    let journal = match (a.resume, old) {
        (true, Some(j)) => Journal { mountpoint, ..j },
        (true, None) => return Err(Failure::new("there is no unfinished upgrade to resume")),
        (false, Some(j)) => {
            return Err(Failure::new(format!(
                "upgrade {} was not finished; take it back with 'cowfs upgrade {} --resume'",
                j.name,
                mountpoint.display()
            )));
        }
        (false, None) => {
            let text = |o: &Option<String>| o.clone().unwrap_or_default();
            Journal {
                version: VERSION,
                state: State::Stopping,
                name: new_name(&target, &dir, a.name.as_deref())?,
                head,
                mountpoint,
                stop: text(&a.stop),
                run: text(&a.run),
                start: text(&a.start),
                check: text(&a.check),
                check_timeout_s: a.check_timeout,
                checkpoint: None,
                keep_as: None,
                why: None,
            }
        }
    };
    if a.dry_run {
        return report::plan(cli, &journal, a.resume);
    }
    runner::watch_signals()?;
    let (file, runner) = if a.resume {
        let runner = Runner::resume(&dir, &journal.name)?;
        (JournalFile::open(&dir, &journal.name), runner)
    } else {
        let runner = Runner::new(&dir, &journal.name)?;
        match JournalFile::create(&dir, &journal) {
            Ok(file) => (file, runner),
            Err(e) => {
                runner.end();
                return Err(e);
            }
        }
    };
    let mut u = Upgrade {
        target,
        journal,
        file,
        runner,
        report: Report::new(cli),
    };
    if a.resume { u.resume() } else { u.upgrade() }
}

/// One upgrade of a store at a time.
fn lock(dir: &Path) -> Result<File, Failure> {
    let failed = |e: std::io::Error| Failure::new(format!("{}: {e}", dir.display()));
    fs::create_dir_all(dir).map_err(failed)?;
    let lock = File::create(dir.join("lock")).map_err(failed)?;
    if lock.try_lock().is_err() {
        return Err(Failure {
            code: 11,
            message: "another upgrade of this store is going on".into(),
        });
    }
    Ok(lock)
}

/// The name of a new upgrade, which nothing may have yet.
fn new_name(target: &Target, dir: &Path, wanted: Option<&str>) -> Result<String, Failure> {
    let name = match wanted {
        Some(n) => n.to_owned(),
        None => format!("upgrade-{}", names::timestamp(now_us())),
    };
    let listed = list(target)?;
    names::check(&name)?;
    names::check(&keep_name(&listed, &name))?;
    if is_taken(&listed, &name) || journal::is_unfinished(dir, &name)? {
        return Err(Failure::new(format!(
            "the name {name} is taken; nothing was done"
        )));
    }
    Ok(name)
}

impl Upgrade {
    fn upgrade(&mut self) -> Result<u8, Failure> {
        if let Err(e) = self.prepare() {
            return self.start_again(e);
        }
        if let Err(e) = self.new_version() {
            return self.take_back(e.message);
        }
        Ok(self.done())
    }

    fn resume(&mut self) -> Result<u8, Failure> {
        self.runner.outlived()?;
        let state = self.journal.state;
        let found = format!("it was interrupted while {}", state.name());
        self.report
            .say(&format!("upgrade {}: {found}", self.journal.name));
        if state == State::Checked {
            return Ok(self.done());
        }
        self.take_back(found)
    }

    fn enter(&mut self, state: State) -> Result<(), Failure> {
        self.journal.state = state;
        self.file.write(&self.journal)?;
        crate::fault::point(&format!("upgrade:{}", state.name()));
        Ok(())
    }

    /// As [`Upgrade::enter`], where nothing may keep it from going on.
    fn note(&mut self, state: State) {
        if let Err(e) = self.enter(state) {
            self.report.warn(e.message);
        }
    }

    /// Does a step, says how it went, and keeps the time.
    fn step(
        &mut self,
        name: &'static str,
        f: impl FnOnce(&mut Self) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let start = Instant::now();
        let result = f(self);
        self.report.step(name, start, result.is_ok());
        result
    }

    fn stop(&mut self) -> Result<(), Failure> {
        self.step("stop", |u| {
            u.runner.command(&u.journal, "stop", &u.journal.stop)
        })
    }

    fn start(&mut self) -> Result<(), Failure> {
        self.step("start", |u| {
            u.runner.command(&u.journal, "start", &u.journal.start)
        })
    }

    fn check(&mut self) -> Result<(), Failure> {
        self.step("check", |u| u.runner.healthy(&u.journal))
    }

    /// All before anything changes.
    fn prepare(&mut self) -> Result<(), Failure> {
        crate::fault::point("upgrade:stopping");
        self.stop()?;
        self.enter(State::Stopped)?;
        self.step("checkpoint", Upgrade::checkpoint)?;
        self.enter(State::Checkpointed)
    }

    /// Makes the checkpoint, which nobody can delete until the upgrade has ended.
    fn checkpoint(&mut self) -> Result<(), Failure> {
        let j = &self.journal;
        let answer = self.target.ask(&Request::Checkpoint {
            head: j.head.clone(),
            name: Some(j.name.clone()),
            tags: std::iter::once(("upgrade".to_owned(), j.name.clone())).collect(),
            wait: true,
        })?;
        let Answer::Checkpoint { id, .. } = answer else {
            return Err(Failure::new("the daemon answered something else"));
        };
        self.target.ask(&Request::Pin {
            head: Some(j.head.clone()),
            checkpoint: j.name.clone(),
            on: true,
        })?;
        self.journal.checkpoint = Some(id);
        let (_, all) = list(&self.target)?;
        if !all.iter().any(|c| c.id == id && c.pinned) {
            return Err(Failure::new("somebody took the checkpoint away"));
        }
        Ok(())
    }

    fn new_version(&mut self) -> Result<(), Failure> {
        self.runner.interrupted()?;
        self.enter(State::Running)?;
        self.step("run", |u| {
            u.runner.command(&u.journal, "run", &u.journal.run)
        })?;
        self.runner.interrupted()?;
        self.enter(State::Starting)?;
        self.start()?;
        self.runner.interrupted()?;
        self.enter(State::Checking)?;
        self.check()?;
        self.note(State::Checked);
        Ok(())
    }

    /// The upgrade is over, so its checkpoint is one like others.
    fn unpin(&mut self) {
        let unpin = || -> Result<(), Failure> {
            let (_, all) = list(&self.target)?;
            match self.journal.checkpoint_in(&all) {
                Some(c) if c.pinned => self
                    .target
                    .ask(&Request::Pin {
                        head: Some(self.journal.head.clone()),
                        checkpoint: c.name.clone(),
                        on: false,
                    })
                    .map(drop),
                _ => Ok(()),
            }
        };
        if let Err(e) = unpin() {
            let name = &self.journal.name;
            self.report
                .warn(format!("checkpoint {name} stays pinned: {e}"));
        }
    }

    fn done(&mut self) -> u8 {
        self.unpin();
        self.end(State::Done, 0);
        0
    }

    fn failed(&mut self, f: Failure) -> Failure {
        self.end(State::Failed, f.code);
        f
    }

    fn end(&mut self, state: State, code: u8) {
        self.note(state);
        self.file.end();
        self.runner.end();
        self.report.end(&self.journal, code);
    }
}

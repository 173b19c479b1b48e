//! `cowfs upgrade`: stop, checkpoint, run, start, check; on failure back to the checkpoint by itself.
//!
//! What it does is written down before each step, in `upgrades/NAME.json` of the store, outside of what rolls back. An
//! upgrade that was killed half way is taken back by `cowfs upgrade MOUNTPOINT --resume`.
//!
//! States: `stopping`, `stopped`, `checkpointed`, `running`, `starting`, `checking`, then `done`; or, from any of them
//! after `stopped`, `rolling_back`, `restarting`, then `rolled_back` or `failed`.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::args::{Cli, UpgradeArgs};
use super::locate::Target;
use super::output::{self, duration};
use crate::control::{Answer, Failure, Request};
use crate::names;
use crate::store::now_us;

/// Rolled back and healthy again.
const UNHEALTHY: u8 = 12;
/// Rolling back, or the service after it, failed.
const ROLLBACK_FAILED: u8 = 13;
/// Pause between tries of the check.
const AGAIN: Duration = Duration::from_millis(300);
/// Bytes of a failed command's output that are shown.
const TAIL: u64 = 2000;

/// Set by SIGINT and SIGTERM: the upgrade counts as failed.
static STOPPED: AtomicBool = AtomicBool::new(false);

/// What is written down.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Journal {
    version: u32,
    state: String,
    name: String,
    head: String,
    mountpoint: PathBuf,
    stop: String,
    run: String,
    start: String,
    check: String,
    check_timeout_s: u64,
    why: Option<String>,
}

/// One step as reported.
#[derive(Debug, Serialize)]
struct Step {
    step: &'static str,
    ok: bool,
    elapsed_us: u64,
}

struct Upgrade<'a> {
    cli: &'a Cli,
    target: Target,
    journal: Journal,
    dir: PathBuf,
    log: File,
    steps: Vec<Step>,
}

fn failed(what: &str, e: &dyn std::fmt::Display) -> Failure {
    Failure::new(format!("{what}: {e}"))
}

/// Writes a file whole or not at all.
fn write_journal(dir: &Path, j: &Journal) -> Result<(), Failure> {
    let path = dir.join(format!("{}.json", j.name));
    let fresh = dir.join(format!(".{}.new", j.name));
    let bytes = serde_json::to_vec_pretty(j).map_err(|e| failed("the upgrade's record", &e))?;
    let write = || -> std::io::Result<()> {
        let mut f = File::create(&fresh)?;
        f.write_all(&bytes)?;
        f.sync_all()?;
        fs::rename(&fresh, &path)?;
        File::open(dir)?.sync_all()
    };
    write().map_err(|e| failed("the upgrade's record", &e))
}

/// The upgrade of a mount that was begun and not ended.
fn unfinished(dir: &Path, mountpoint: &Path) -> Result<Option<Journal>, Failure> {
    let entries = match fs::read_dir(dir) {
        Ok(e) => e,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed("the records of upgrades", &e)),
    };
    for entry in entries.flatten() {
        let path = entry.path();
        if path.extension().is_none_or(|e| e != "json") {
            continue;
        }
        let Ok(bytes) = fs::read(&path) else { continue };
        let Ok(j) = serde_json::from_slice::<Journal>(&bytes) else {
            continue;
        };
        let ended = matches!(j.state.as_str(), "done" | "rolled_back" | "failed");
        if !ended && j.mountpoint == mountpoint {
            return Ok(Some(j));
        }
    }
    Ok(None)
}

/// Runs the command.
pub(super) fn run(cli: &Cli, a: &UpgradeArgs) -> Result<u8, Failure> {
    let target = Target::of(&a.mountpoint)?;
    let Some((mountpoint, _)) = target.mount.clone() else {
        return Err(Failure::new("an upgrade needs a mounted head"));
    };
    let head = target.head()?;
    let dir = target.store.join("upgrades");
    fs::create_dir_all(&dir).map_err(|e| failed("the records of upgrades", &e))?;
    let lock = File::create(dir.join("lock")).map_err(|e| failed("the upgrades' lock", &e))?;
    if lock.try_lock().is_err() {
        return Err(Failure {
            code: 11,
            message: "another upgrade of this store is going on".into(),
        });
    }
    let old = unfinished(&dir, &mountpoint)?;
    let journal = match (a.resume, old) {
        (true, Some(j)) => j,
        (true, None) => return Err(Failure::new("there is no unfinished upgrade to resume")),
        (false, Some(j)) => {
            return Err(Failure::new(format!(
                "upgrade {} was not finished; take it back with 'cowfs upgrade {} --resume'",
                j.name,
                mountpoint.display()
            )));
        }
        (false, None) => {
            let name = match &a.name {
                Some(n) => n.clone(),
                None => format!("upgrade-{}", names::timestamp(now_us())),
            };
            names::check(&name)?;
            let text = |o: &Option<String>| o.clone().unwrap_or_default();
            Journal {
                version: 1,
                state: "stopping".into(),
                name,
                head,
                mountpoint,
                stop: text(&a.stop),
                run: text(&a.run),
                start: text(&a.start),
                check: text(&a.check),
                check_timeout_s: a.check_timeout,
                why: None,
            }
        }
    };
    if a.dry_run {
        plan(cli, &journal);
        return Ok(0);
    }
    watch_signals()?;
    let log = File::options()
        .create(true)
        .append(true)
        .read(true)
        .open(dir.join(format!("{}.log", journal.name)))
        .map_err(|e| failed("the upgrade's log", &e))?;
    let mut u = Upgrade {
        cli,
        target,
        journal,
        dir,
        log,
        steps: Vec::new(),
    };
    if a.resume {
        let state = u.journal.state.clone();
        u.say(&format!(
            "upgrade {} was interrupted while {state}",
            u.journal.name
        ));
        if matches!(state.as_str(), "stopping" | "stopped") {
            // Nothing was changed yet.
            u.step("start", |u| u.command("start", &u.journal.start.clone()))?;
            u.enter("rolled_back")?;
            return Ok(u.report(UNHEALTHY, None));
        }
        return u.take_back(format!("it was interrupted while {state}"));
    }
    u.upgrade()
}

fn plan(cli: &Cli, j: &Journal) {
    let steps = [
        format!("stop:       {}", j.stop),
        format!("checkpoint: {} of head {}", j.name, j.head),
        format!("run:        {}", j.run),
        format!("start:      {}", j.start),
        format!("check:      {} (up to {} s)", j.check, j.check_timeout_s),
        format!(
            "on failure: stop, roll back to {}, start, check; exit 12",
            j.name
        ),
    ];
    if cli.json {
        output::json(json!({ "steps": steps }));
    } else {
        for s in steps {
            println!("{s}");
        }
    }
}

fn watch_signals() -> Result<(), Failure> {
    use nix::sys::signal::{SigSet, Signal};
    let mut set = SigSet::empty();
    for s in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        set.add(s);
    }
    set.thread_block().map_err(|e| failed("signals", &e))?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            while set.wait().is_ok() {
                STOPPED.store(true, Ordering::SeqCst);
            }
        })
        .map_err(|e| failed("signals", &e))?;
    Ok(())
}

impl Upgrade<'_> {
    fn say(&self, line: &str) {
        if !self.cli.json {
            eprintln!("{line}");
        }
    }

    fn enter(&mut self, state: &str) -> Result<(), Failure> {
        self.journal.state = state.into();
        write_journal(&self.dir, &self.journal)?;
        crate::fault::point(&format!("upgrade:{state}"));
        Ok(())
    }

    /// Does a step, says how it went, and keeps the time.
    fn step(
        &mut self,
        name: &'static str,
        f: impl FnOnce(&mut Self) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let start = Instant::now();
        let result = f(self);
        let elapsed_us = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        let state = if result.is_ok() { "ok" } else { "FAILED" };
        self.say(&format!("{name:<10}  {state:<6}  {}", duration(elapsed_us)));
        self.steps.push(Step {
            step: name,
            ok: result.is_ok(),
            elapsed_us,
        });
        result
    }

    /// Runs a command, its output going to the log.
    fn command(&mut self, step: &str, cmd: &str) -> Result<(), Failure> {
        self.command_for(step, cmd, None)
    }

    fn command_for(
        &mut self,
        step: &str,
        cmd: &str,
        limit: Option<Duration>,
    ) -> Result<(), Failure> {
        let out = |e: std::io::Error| failed("the upgrade's log", &e);
        writeln!(self.log, "--- {step}: {cmd}").map_err(out)?;
        let from = self.log.seek(SeekFrom::End(0)).map_err(out)?;
        let mut child = Command::new("sh")
            .arg("-c")
            .arg(cmd)
            .current_dir("/")
            .env("COWFS_MOUNTPOINT", &self.journal.mountpoint)
            .env("COWFS_CHECKPOINT", &self.journal.name)
            .env("COWFS_STEP", step)
            .stdin(Stdio::null())
            .stdout(self.log.try_clone().map_err(out)?)
            .stderr(self.log.try_clone().map_err(out)?)
            .process_group(0)
            .spawn()
            .map_err(|e| failed("sh", &e))?;
        let begun = Instant::now();
        let status = loop {
            if let Some(s) = child.try_wait().map_err(|e| failed("sh", &e))? {
                break Some(s);
            }
            let interrupted = STOPPED.load(Ordering::SeqCst) && limit.is_some();
            if interrupted || limit.is_some_and(|l| begun.elapsed() > l) {
                let group = nix::unistd::Pid::from_raw(child.id().cast_signed());
                let _ = nix::sys::signal::killpg(group, nix::sys::signal::Signal::SIGKILL);
                let _ = child.wait();
                break None;
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        match status {
            Some(s) if s.success() => Ok(()),
            other => {
                let how = other.map_or("did not end in time".into(), |s| s.to_string());
                let tail = self.tail(from);
                Err(Failure::new(format!("'{step}' failed ({how}){tail}")))
            }
        }
    }

    /// The end of what a command has printed.
    fn tail(&mut self, from: u64) -> String {
        let mut read = || -> std::io::Result<String> {
            let end = self.log.seek(SeekFrom::End(0))?;
            self.log
                .seek(SeekFrom::Start(from.max(end.saturating_sub(TAIL))))?;
            let mut b = Vec::new();
            self.log.read_to_end(&mut b)?;
            Ok(String::from_utf8_lossy(&b).trim().to_owned())
        };
        match read() {
            Ok(t) if !t.is_empty() => format!(":\n{t}"),
            _ => String::new(),
        }
    }

    fn interrupted(&self) -> Result<(), Failure> {
        if STOPPED.load(Ordering::SeqCst) {
            return Err(Failure::new("it was interrupted by a signal"));
        }
        Ok(())
    }

    /// Tries the check until it succeeds or time is up.
    fn healthy(&mut self) -> Result<(), Failure> {
        let cmd = self.journal.check.clone();
        let until = Instant::now() + Duration::from_secs(self.journal.check_timeout_s);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            match self.command_for("check", &cmd, Some(left.max(Duration::from_millis(100)))) {
                Ok(()) => return Ok(()),
                Err(e) if Instant::now() >= until => return Err(e),
                Err(e) => {
                    self.interrupted().map_err(|_| e)?;
                    std::thread::sleep(AGAIN.min(until.saturating_duration_since(Instant::now())));
                }
            }
        }
    }

    fn upgrade(&mut self) -> Result<u8, Failure> {
        let j = self.journal.clone();
        self.enter("stopping")?;
        if let Err(e) = self.step("stop", |u| u.command("stop", &j.stop)) {
            // Nothing was changed: back to where we were.
            let _ = self.step("start", |u| u.command("start", &j.start));
            self.enter("failed")?;
            return Err(e);
        }
        self.enter("stopped")?;
        let checkpoint = self.step("checkpoint", |u| {
            let request = Request::Checkpoint {
                head: j.head.clone(),
                name: Some(j.name.clone()),
                tags: std::iter::once(("upgrade".to_owned(), j.name.clone())).collect(),
                wait: true,
            };
            super::ask(&u.target, &request).map(drop)
        });
        if let Err(e) = checkpoint {
            let _ = self.step("start", |u| u.command("start", &j.start));
            self.enter("failed")?;
            return Err(e);
        }
        self.enter("checkpointed")?;
        if let Err(e) = self.new_version(&j) {
            return self.take_back(e.message);
        }
        self.enter("done")?;
        Ok(self.report(0, None))
    }

    fn new_version(&mut self, j: &Journal) -> Result<(), Failure> {
        self.enter("running")?;
        self.step("run", |u| u.command("run", &j.run))?;
        self.interrupted()?;
        self.enter("starting")?;
        self.step("start", |u| u.command("start", &j.start))?;
        self.interrupted()?;
        self.enter("checking")?;
        self.step("check", Upgrade::healthy)
    }

    /// Goes back to the checkpoint and starts the old version.
    fn take_back(&mut self, why: String) -> Result<u8, Failure> {
        let j = self.journal.clone();
        self.journal.why = Some(why.clone());
        self.enter("rolling_back")?;
        self.say(&format!(
            "the upgrade failed: {why}\nrolling back to {}",
            j.name
        ));
        STOPPED.store(false, Ordering::SeqCst);
        // What is broken may not stop properly; that is no reason to stay with it.
        if let Err(e) = self.step("stop", |u| u.command("stop", &j.stop)) {
            self.say(&e.message);
        }
        let back = self.old_version(&j);
        match back {
            Ok(()) => {
                self.enter("rolled_back")?;
                Ok(self.report(UNHEALTHY, Some(&why)))
            }
            Err(e) => {
                self.journal.why = Some(format!("{why}; then: {e}"));
                self.enter("failed")?;
                let message = format!(
                    "the upgrade failed: {why}\nand so did the way back: {e}\nby hand: 'cowfs rollback {} {}', then start the service; the log is {}",
                    j.mountpoint.display(),
                    j.name,
                    self.dir.join(format!("{}.log", j.name)).display()
                );
                Err(Failure {
                    code: ROLLBACK_FAILED,
                    message,
                })
            }
        }
    }

    fn old_version(&mut self, j: &Journal) -> Result<(), Failure> {
        self.step("rollback", |u| {
            let request = Request::Rollback {
                head: j.head.clone(),
                checkpoint: j.name.clone(),
                discard: false,
                dry_run: false,
                keep_as: Some(format!("failed-{}", j.name)),
            };
            match super::ask(&u.target, &request) {
                // A rollback that was interrupted after it was done has used the name.
                Err(e) if e.message.contains("is taken") => Ok(()),
                Ok(Answer::Rollback { .. }) => Ok(()),
                Ok(_) => Err(Failure::new("the daemon answered something else")),
                Err(e) => Err(e),
            }
        })?;
        self.enter("restarting")?;
        self.step("start", |u| u.command("start", &j.start))?;
        self.step("check", Upgrade::healthy)
    }

    /// The end: prints and gives the exit code.
    fn report(&mut self, code: u8, why: Option<&str>) -> u8 {
        let j = &self.journal;
        if self.cli.json {
            output::json(json!({
                "name": j.name, "state": j.state, "why": why,
                "steps": self.steps, "exit_code": code,
            }));
        } else if code == 0 {
            eprintln!(
                "upgraded; to take it back: stop, 'cowfs rollback {} {}', start",
                j.mountpoint.display(),
                j.name
            );
            println!("{}", j.name);
        } else {
            eprintln!(
                "rolled back; the service is healthy again. What failed is kept as failed-{}",
                j.name
            );
            if let Some(w) = why {
                eprintln!("why: {w}");
            }
            println!("{}", j.name);
        }
        code
    }
}

//! Runs an upgrade's commands, with their output in its log.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::signal::{SigSet, Signal, killpg};

use super::super::sys;
use super::journal::Journal;
use crate::control::Failure;

/// Bytes of a failed command's output that are shown.
const TAIL: u64 = 2000;
/// Pause between tries of the check.
const AGAIN: Duration = Duration::from_millis(300);
/// Blocks that the log of the way back has from the beginning, bytes.
const RESERVED: i64 = 1 << 20;

/// Set by SIGINT, SIGTERM and SIGHUP: the upgrade counts as failed.
static STOPPED: AtomicBool = AtomicBool::new(false);

/// Notes signals from now on, instead of ending by them.
pub(super) fn watch_signals() -> Result<(), Failure> {
    let failed = |e: &dyn std::fmt::Display| Failure::new(format!("signals: {e}"));
    let mut set = SigSet::empty();
    for s in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        set.add(s);
    }
    set.thread_block().map_err(|e| failed(&e))?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            while set.wait().is_ok() {
                STOPPED.store(true, Ordering::SeqCst);
            }
        })
        .map_err(|e| failed(&e))?;
    Ok(())
}

/// Changes with every boot of the machine.
fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .unwrap_or_default()
        .trim()
        .to_owned()
}

/// True if a process of this group is alive (one that has ended and that nobody has waited for does not count).
fn is_at_work(group: i32) -> bool {
    let stats = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    stats
        .filter_map(|e| std::fs::read_to_string(e.path().join("stat")).ok())
        .any(|stat| {
            // Behind the name, which may hold anything: state, parent, group (proc_pid_stat(5)).
            let mut fields = stat
                .rsplit(')')
                .next()
                .unwrap_or_default()
                .split_whitespace();
            let state = fields.next();
            let pgrp = fields.nth(1).and_then(|g| g.parse().ok());
            pgrp == Some(group) && !matches!(state, Some("Z" | "X"))
        })
}

/// Runs commands.
#[derive(Debug)]
pub(super) struct Runner {
    log: File,
    path: PathBuf,
    way_back: File,
    way_back_path: PathBuf,
    /// Names the process group of the command at work.
    group_path: PathBuf,
    /// True as long as the upgrade can be given up; the way back goes to its end.
    heeds_signals: bool,
}

fn open(path: &Path) -> Result<File, Failure> {
    File::options()
        .create(true)
        .append(true)
        .read(true)
        .open(path)
        .map_err(|e| Failure::new(format!("the upgrade's log {}: {e}", path.display())))
}

impl Runner {
    /// Opens the logs of a new upgrade. The way back has one of its own, whose blocks are reserved now: a disk that the
    /// upgrade has filled must not keep the old version from being started.
    pub fn new(dir: &Path, name: &str) -> Result<Self, Failure> {
        let runner = Self::resume(dir, name)?;
        let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let reserved = fallocate(&runner.way_back, keep, 0, RESERVED);
        // Not every filesystem can; that is no reason to refuse.
        if matches!(reserved, Err(Errno::ENOSPC | Errno::EDQUOT)) {
            runner.end();
            return Err(Failure::new(
                "the store's disk has no room for an upgrade and its way back; nothing was done",
            ));
        }
        Ok(runner)
    }

    /// Opens the logs of an upgrade that was begun earlier.
    pub fn resume(dir: &Path, name: &str) -> Result<Self, Failure> {
        let path = dir.join(format!("{name}.log"));
        let way_back_path = dir.join(format!("{name}.rollback.log"));
        Ok(Self {
            log: open(&path)?,
            path,
            way_back: open(&way_back_path)?,
            way_back_path,
            group_path: dir.join(format!("{name}.group")),
            heeds_signals: true,
        })
    }

    /// From now on it is the way back: its log is used, and no signal ends it.
    pub fn turn_back(&mut self) -> io::Result<()> {
        self.heeds_signals = false;
        self.log = self.way_back.try_clone()?;
        self.path.clone_from(&self.way_back_path);
        Ok(())
    }

    /// Where the output of the last commands is.
    pub fn log_path(&self) -> &Path {
        &self.path
    }

    /// Gives back what was reserved, and takes an unused log away.
    pub fn end(&self) {
        let Ok(len) = self.way_back.metadata().map(|m| m.len()) else {
            return;
        };
        // At the same length, what lies behind the end goes.
        let _ = self.way_back.set_len(len);
        if len == 0 {
            let _ = std::fs::remove_file(&self.way_back_path);
        }
    }

    /// An error if a signal came.
    pub fn interrupted(&self) -> Result<(), Failure> {
        if self.heeds_signals && STOPPED.load(Ordering::SeqCst) {
            return Err(Failure::new("it was interrupted by a signal"));
        }
        Ok(())
    }

    /// Runs a command to its end.
    pub fn command(&mut self, j: &Journal, step: &str, cmd: &str) -> Result<(), Failure> {
        self.run(j, step, cmd, None)
    }

    /// Tries the check until it succeeds or time is up.
    pub fn healthy(&mut self, j: &Journal) -> Result<(), Failure> {
        let until = Instant::now() + Duration::from_secs(j.check_timeout_s);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let limit = left.max(Duration::from_millis(100));
            match self.run(j, "check", &j.check, Some(limit)) {
                Ok(()) => return Ok(()),
                Err(e) if Instant::now() >= until => return Err(e),
                Err(_) => {
                    self.interrupted()?;
                    std::thread::sleep(AGAIN.min(until.saturating_duration_since(Instant::now())));
                }
            }
        }
    }

    fn run(
        &mut self,
        j: &Journal,
        step: &str,
        cmd: &str,
        limit: Option<Duration>,
    ) -> Result<(), Failure> {
        let failed = |e: io::Error| Failure::new(format!("'{step}' could not be run: {e}"));
        // A log that cannot be written is no reason to do nothing.
        let _ = writeln!(self.log, "--- {step}: {cmd}");
        let from = self.log.seek(SeekFrom::End(0)).unwrap_or(0);
        let mut command = Command::new("sh");
        command
            .arg("-c")
            .arg(cmd)
            .current_dir("/")
            .env("COWFS_MOUNTPOINT", &j.mountpoint)
            .env("COWFS_CHECKPOINT", &j.name)
            .env("COWFS_STEP", step)
            .stdin(Stdio::null())
            .stdout(self.log.try_clone().map_err(failed)?)
            .stderr(self.log.try_clone().map_err(failed)?)
            .process_group(0);
        sys::unblock_signals(&mut command);
        let mut child = command.spawn().map_err(failed)?;
        self.note_group(child.id());
        let status = self.wait(&mut child, limit).map_err(failed)?;
        let _ = std::fs::remove_file(&self.group_path);
        if status.is_some_and(|s| s.success()) {
            return Ok(());
        }
        let how = status.map_or("it did not end in time".into(), |s| s.to_string());
        let tail = self.tail(from);
        Err(Failure::new(format!("'{step}' failed ({how}){tail}")))
    }

    /// Notes the process group of a command, so that a later `--resume` can see whether it outlived the upgrade. Of no
    /// use after the machine has booted again, so it need not be on disk.
    fn note_group(&self, pid: u32) {
        if let Err(e) = std::fs::write(&self.group_path, format!("{} {pid}", boot_id())) {
            tracing::debug!(error = %e, "the command's process group was not noted");
        }
    }

    /// An error if a command of the interrupted upgrade is still at work: it would go on in the tree that comes back.
    pub fn outlived(&self) -> Result<(), Failure> {
        let Ok(text) = std::fs::read_to_string(&self.group_path) else {
            return Ok(());
        };
        let (boot, pid) = text.split_once(' ').unwrap_or_default();
        let Ok(pid) = pid.parse() else {
            return Ok(());
        };
        if boot == boot_id() && is_at_work(pid) {
            return Err(Failure::new(format!(
                "a command of the interrupted upgrade is still at work, as process group {pid}; wait for its end, or end it with 'kill -- -{pid}', and try again"
            )));
        }
        Ok(())
    }

    /// Waits for a command; one that has a limit is killed by it, and by a signal to the upgrade.
    fn wait(
        &self,
        child: &mut std::process::Child,
        limit: Option<Duration>,
    ) -> io::Result<Option<ExitStatus>> {
        let begun = Instant::now();
        loop {
            if let Some(s) = child.try_wait()? {
                return Ok(Some(s));
            }
            if limit.is_some_and(|l| begun.elapsed() > l || self.interrupted().is_err()) {
                let group = nix::unistd::Pid::from_raw(child.id().cast_signed());
                let _ = killpg(group, Signal::SIGKILL);
                child.wait()?;
                return Ok(None);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The end of what a command has printed.
    fn tail(&mut self, from: u64) -> String {
        let mut read = || -> io::Result<String> {
            let end = self.log.seek(SeekFrom::End(0))?;
            self.log
                .seek(SeekFrom::Start(from.max(end.saturating_sub(TAIL))))?;
            let mut b = Vec::new();
            (&mut self.log).take(TAIL).read_to_end(&mut b)?;
            Ok(String::from_utf8_lossy(&b).trim().to_owned())
        };
        match read() {
            Ok(t) if !t.is_empty() => format!(":\n{t}"),
            _ => String::new(),
        }
    }
}

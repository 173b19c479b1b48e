//! Starting targets, asking them, and running the commands that are measured on them.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use serde_json::Value;

use super::target::{Resumed, Seen};
use crate::run::check_interrupted;
use crate::sys;

/// Nothing that is measured takes longer, unless it hangs.
const LIMIT: Duration = Duration::from_secs(120);

/// What a target is to be.
#[derive(Debug, Clone, Copy, Default)]
pub struct Kind {
    /// Megabytes (2^20)
    pub mb: u64,
    /// Threads; 0 is 1
    pub threads: u64,
    /// Does it write all the time?
    pub busy: bool,
    /// Does it sleep most of the time?
    pub idle: bool,
}

/// A running target. Killed when dropped.
#[derive(Debug)]
pub struct Running {
    /// Its number, also after a resume
    pub pid: i32,
    dir: PathBuf,
}

impl Running {
    /// Starts one and waits until its memory is written.
    pub fn start(dir: &Path, kind: Kind) -> Result<Self> {
        let _ = std::fs::remove_dir_all(dir);
        std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))?;
        let me = std::env::current_exe().context("finding myself")?;
        let mut c = Command::new(me);
        c.arg("target")
            .arg("--mb")
            .arg(kind.mb.to_string())
            .arg("--threads")
            .arg(kind.threads.max(1).to_string())
            .arg("--dir")
            .arg(dir);
        if kind.busy {
            c.arg("--busy");
        }
        if kind.idle {
            c.arg("--idle");
        }
        let errors = File::create(dir.join("errors")).context("a file for errors")?;
        let child = c
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors)
            .spawn()
            .context("starting a target")?;
        let target = Self {
            pid: i32::try_from(child.id()).context("its number")?,
            dir: dir.into(),
        };
        target.wait_for("seen.json", |_| true)?;
        Ok(target)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        kill(Pid::from_raw(self.pid), signal).with_context(|| format!("signalling {}", self.pid))
    }

    /// What it has seen since it was asked last; it begins anew.
    pub fn ask(&self) -> Result<Seen> {
        let _ = std::fs::remove_file(self.dir.join("seen.json"));
        self.signal(Signal::SIGUSR1)?;
        let text = self.wait_for("seen.json", |_| true)?;
        serde_json::from_str(&text).with_context(|| format!("the target's answer: {text}"))
    }

    /// Has it change one percent of its pages.
    pub fn change(&self) -> Result<()> {
        self.signal(Signal::SIGUSR2)?;
        // It looks for changes before it answers.
        std::thread::sleep(Duration::from_millis(20));
        self.ask().map(drop)
    }

    /// Prepares for a resume: what the target is to do when it notices.
    pub fn expect(&self, all: bool) -> Result<()> {
        let _ = std::fs::remove_file(self.dir.join("resumed.jsonl"));
        std::fs::write(self.dir.join("resume"), if all { "all" } else { "work" })
            .context("telling it to work")
    }

    /// Waits for what resumed targets say.
    pub fn resumed(&self, lines: usize) -> Result<Vec<Resumed>> {
        let text = self.wait_for("resumed.jsonl", |t| {
            t.ends_with('\n') && t.lines().count() >= lines
        })?;
        let said: Vec<Resumed> = text
            .lines()
            .map(serde_json::from_str)
            .collect::<Result<_, _>>()
            .with_context(|| format!("the target's answer: {text}"))?;
        if let Some(wrong) = said.iter().find(|r| !r.right) {
            bail!(
                "the resumed process has WRONG MEMORY in its first {} bytes",
                wrong.bytes
            );
        }
        Ok(said)
    }

    /// Waits until it has ended; it is our child, or became it.
    pub fn gone(&self) -> Result<()> {
        let end = Instant::now() + LIMIT;
        loop {
            match waitpid(Pid::from_raw(self.pid), Some(WaitPidFlag::WNOHANG)) {
                Ok(s) if s.pid().is_some() => return Ok(()),
                Err(Errno::ECHILD) if !alive(self.pid) => return Ok(()),
                Err(Errno::ECHILD) | Ok(_) if Instant::now() < end => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Ok(_) => bail!("process {} does not end", self.pid),
                Err(e) => return Err(e).context("waiting for a target"),
            }
        }
    }

    /// Kills it and its copies.
    pub fn kill(&self) -> Result<()> {
        let end = Instant::now() + LIMIT;
        loop {
            let left = self.copies();
            if left.is_empty() {
                break;
            }
            for &pid in &left {
                match kill(Pid::from_raw(pid), Signal::SIGKILL) {
                    Ok(()) | Err(Errno::ESRCH) => {}
                    Err(e) => return Err(e).context("killing a target"),
                }
            }
            if Instant::now() > end {
                bail!("processes {left:?} do not end");
            }
            reap();
            std::thread::sleep(Duration::from_millis(1));
        }
        self.gone()?;
        let _ = std::fs::remove_file(self.dir.join("resume"));
        reap();
        Ok(())
    }

    /// Numbers of all processes that are copies of it.
    pub fn copies(&self) -> Vec<i32> {
        let mark = self.dir.display().to_string();
        let all = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        all.filter_map(|e| e.file_name().to_str()?.parse().ok())
            .filter(|pid: &i32| {
                std::fs::read_to_string(format!("/proc/{pid}/cmdline"))
                    .is_ok_and(|c| c.split('\0').any(|a| a == mark) && c.contains("\0target\0"))
            })
            .collect()
    }

    fn wait_for(&self, name: &str, good: impl Fn(&str) -> bool) -> Result<String> {
        let path = self.dir.join(name);
        let end = Instant::now() + LIMIT;
        loop {
            check_interrupted()?;
            if let Ok(text) = std::fs::read_to_string(&path)
                && good(&text)
            {
                return Ok(text);
            }
            // Copies may have other numbers.
            if !alive(self.pid) && self.copies().is_empty() {
                let why = std::fs::read_to_string(self.dir.join("errors")).unwrap_or_default();
                bail!("the target {} has ended: {}", self.pid, why.trim());
            }
            if Instant::now() > end {
                bail!("the target {} does not answer ({name})", self.pid);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Err(e) = self.kill() {
            eprintln!("bench: {e:#}");
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Is there such a process, and not only what is left of one?
fn alive(pid: i32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| {
        s.rsplit(')')
            .next()
            .is_some_and(|r| !r.trim_start().starts_with(['Z', 'X']))
    })
}

/// Takes leave of helpers that became our children and have ended.
fn reap() {
    while waitpid(None, Some(WaitPidFlag::WNOHANG)).is_ok_and(|s| s.pid().is_some()) {}
}

/// A command that has ended well.
#[derive(Debug)]
pub struct Ran {
    /// When it was started; nanoseconds since 1970
    pub start_ns: u64,
    /// Its wall time
    pub wall: Duration,
    /// What it printed
    pub text: String,
}

/// Runs a command to its end. What it leaves behind may keep its output open, so that goes to files.
pub fn run(mut c: Command, work: &Path) -> Result<Ran> {
    check_interrupted()?;
    let (out, err) = (work.join("stdout"), work.join("stderr"));
    c.stdin(Stdio::null())
        .stdout(File::create(&out).context("a file for output")?)
        .stderr(File::create(&err).context("a file for errors")?);
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let start = Instant::now();
    let mut child = c.spawn().with_context(|| format!("starting {c:?}"))?;
    let pidfd = sys::pidfd(i32::try_from(child.id()).context("its number")?)?;
    let mut ready = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    loop {
        match poll(&mut ready, PollTimeout::from(1000_u16)) {
            Ok(0) | Err(Errno::EINTR) if start.elapsed() < LIMIT => {
                if let Err(e) = check_interrupted() {
                    let _ = child.kill();
                    let _ = child.wait();
                    return Err(e);
                }
            }
            Ok(0) | Err(_) => {
                let _ = child.kill();
                let _ = child.wait();
                bail!("{c:?} takes longer than {} s", LIMIT.as_secs());
            }
            Ok(_) => break,
        }
    }
    let wall = start.elapsed();
    let status = child.wait().with_context(|| format!("waiting for {c:?}"))?;
    let read = |p| std::fs::read_to_string(p).unwrap_or_default();
    if !status.success() {
        bail!("{c:?}: {status}: {}", read(&err).trim());
    }
    Ok(Ran {
        start_ns: u64::try_from(since.unwrap_or_default().as_nanos()).unwrap_or(0),
        wall,
        text: read(&out),
    })
}

/// `umlctl --json`, run to its end; what it printed.
pub fn umlctl(program: &Path, work: &Path, args: &[&str]) -> Result<(Ran, Value)> {
    let mut c = Command::new(program);
    c.arg("--json").args(args);
    let ran = run(c, work)?;
    let line = ran.text.lines().next().unwrap_or("");
    let value = serde_json::from_str(line).with_context(|| format!("umlctl's answer: {line}"))?;
    Ok((ran, value))
}

/// A number of umlctl's answer.
pub fn number(answer: &Value, field: &str) -> Result<f64> {
    answer[field]
        .as_f64()
        .with_context(|| format!("umlctl's answer has no {field}: {answer}"))
}

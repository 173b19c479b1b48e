//! Running commands and clients, placing them on CPUs, settling the machine between samples.

use std::ffi::OsStr;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// Where clients and daemons run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Placement {
    /// Where the scheduler likes
    Unpinned,
    /// All of them on one CPU
    Pinned,
}

impl Placement {
    /// Both, in the order they run.
    pub const ALL: [Self; 2] = [Self::Unpinned, Self::Pinned];

    /// Name in results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unpinned => "unpinned",
            Self::Pinned => "pinned",
        }
    }
}

/// Places this process (and with it what it starts from now on), and all threads of `daemons`.
pub fn place(placement: Placement, daemons: &[i32]) -> Result<()> {
    let mut set = CpuSet::new();
    match placement {
        // The kernel leaves out CPUs that do not exist or that our cpuset forbids.
        Placement::Unpinned => (0..CpuSet::count())
            .try_for_each(|c| set.set(c))
            .context("making a CPU set")?,
        Placement::Pinned => set.set(pin_cpu()?).context("making a CPU set")?,
    }
    sched_setaffinity(Pid::from_raw(0), &set).context("placing the bench")?;
    for pid in daemons {
        for task in std::fs::read_dir(format!("/proc/{pid}/task"))
            .with_context(|| format!("threads of {pid}"))?
        {
            let task = task.context("threads")?;
            let tid: i32 = task
                .file_name()
                .to_string_lossy()
                .parse()
                .context("thread id")?;
            // A thread may have ended meanwhile.
            let _ = sched_setaffinity(Pid::from_raw(tid), &set);
        }
    }
    Ok(())
}

/// The CPU of the pinned half: the last we may use (the first takes most interrupts).
fn pin_cpu() -> Result<usize> {
    let now = sched_getaffinity(Pid::from_raw(0)).context("reading the affinity")?;
    (0..CpuSet::count())
        .rev()
        .find(|c| now.is_set(*c).unwrap_or(false))
        .context("no CPU to run on")
}

/// Fails if the run was interrupted.
pub fn check_interrupted() -> Result<()> {
    if crate::sys::interrupted() {
        bail!("interrupted");
    }
    Ok(())
}

/// A command with its arguments, quiet, in the C locale.
pub fn command<S: AsRef<OsStr>>(program: impl AsRef<OsStr>, args: &[S]) -> Command {
    let mut c = Command::new(program);
    c.args(args)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    c
}

/// Runs to the end; its wall time. Any exit code in `good` is success.
pub fn timed_codes(mut c: Command, good: &[i32]) -> Result<Duration> {
    check_interrupted()?;
    c.stderr(Stdio::piped());
    let start = Instant::now();
    let child = c.spawn().with_context(|| format!("starting {c:?}"))?;
    let out = child
        .wait_with_output()
        .with_context(|| format!("waiting for {c:?}"))?;
    let took = start.elapsed();
    check_interrupted()?;
    if !out.status.code().is_some_and(|n| good.contains(&n)) {
        bail!(
            "{c:?}: {}: {}",
            out.status,
            String::from_utf8_lossy(&out.stderr).trim()
        );
    }
    Ok(took)
}

/// Runs to a successful end; its wall time.
pub fn timed(c: Command) -> Result<Duration> {
    timed_codes(c, &[0])
}

/// Runs a command that leaves a daemon behind, which would keep a pipe of ours open.
pub fn detached(mut c: Command) -> Result<()> {
    check_interrupted()?;
    let log = std::fs::File::from(
        memfd_create("stderr", MFdFlags::MFD_CLOEXEC).context("a file for stderr")?,
    );
    c.stderr(log.try_clone().context("a file for stderr")?);
    let status = c.status().with_context(|| format!("running {c:?}"))?;
    if !status.success() {
        let mut text = [0; 4096];
        let n = log.read_at(&mut text, 0).unwrap_or(0);
        bail!(
            "{c:?}: {status}: {}",
            String::from_utf8_lossy(&text[..n]).trim()
        );
    }
    Ok(())
}

/// Runs to a successful end; its wall time and what it printed.
pub fn output(mut c: Command) -> Result<(Duration, String)> {
    check_interrupted()?;
    c.stdout(Stdio::piped()).stderr(Stdio::piped());
    let start = Instant::now();
    let out = c.output().with_context(|| format!("running {c:?}"))?;
    let took = start.elapsed();
    if !out.status.success() {
        bail!(
            "{c:?}: {}: {}",
            out.status,
            String::from_utf8_lossy(&out.stderr).trim()
        );
    }
    Ok((took, String::from_utf8_lossy(&out.stdout).into_owned()))
}

/// What a client process reports.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Done {
    /// Time of the operation alone, without the process's start; nanoseconds
    pub ns: u64,
    /// Bytes, operations or entries
    pub n: u64,
    /// Checksum of what was read, where that is wanted
    pub sum: u64,
}

impl Done {
    /// Seconds.
    pub fn seconds(&self) -> f64 {
        self.ns as f64 / 1e9
    }

    /// Per second.
    pub fn rate(&self) -> f64 {
        self.n as f64 / self.seconds().max(1e-9)
    }
}

/// Runs one operation in a fresh process of this program.
pub fn client(op: &str, path: &Path, numbers: &[u64]) -> Result<Done> {
    let (_, text) = output(client_command(op, path, numbers)?)?;
    serde_json::from_str(&text).with_context(|| format!("the answer of client {op}: {text}"))
}

fn client_command(op: &str, path: &Path, numbers: &[u64]) -> Result<Command> {
    let me = std::env::current_exe().context("finding myself")?;
    let mut c = command(me, &["client", op]);
    c.arg(path).args(numbers.iter().map(u64::to_string));
    Ok(c)
}

/// A process that stays inside a directory, with a file open there. Killed when dropped.
#[derive(Debug)]
pub struct Holder(Child);

impl Holder {
    /// Starts it and waits until it is inside.
    pub fn start(dir: &Path) -> Result<Self> {
        use std::io::{BufRead, BufReader};
        let mut c = client_command("hold", dir, &[])?;
        c.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = c.spawn().context("starting a process inside")?;
        let out = child.stdout.take().context("its output")?;
        let holder = Self(child);
        let mut line = String::new();
        BufReader::new(out)
            .read_line(&mut line)
            .context("waiting for the process inside")?;
        if line.trim() != "ready" {
            bail!("the process inside {} did not start", dir.display());
        }
        Ok(holder)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Writes everything back, so that the next sample does not pay for the last.
pub fn settle() {
    nix::unistd::sync();
}

/// Writes everything back and drops the page cache, names and inodes of all filesystems.
pub fn drop_caches() -> Result<()> {
    settle();
    std::fs::write("/proc/sys/vm/drop_caches", "3").context("dropping caches")
}

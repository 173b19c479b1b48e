//! cowfs, by its command line.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::Value;

use super::{FsUnderTest, is_mounted, make_dir, pids_with_argument, remove_dir, unmount_by_force};
use crate::cli::Plan;
use crate::run::{command, detached, output, timed};

/// Column of cowfs with the mount option `writeback`.
pub const WRITEBACK: &str = "cowfs-writeback";

/// cowfs.
#[derive(Debug)]
pub struct Cowfs {
    name: &'static str,
    binary: PathBuf,
    options: Option<String>,
    dir: PathBuf,
    root: PathBuf,
    complaints: Vec<anyhow::Error>,
}

/// The part of a JSON answer that is read here.
#[derive(Debug, Deserialize)]
struct Answer {
    elapsed_us: f64,
}

/// How long a call took, microseconds.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// As the daemon says
    pub inside: f64,
    /// The whole command
    pub outside: f64,
}

impl Cowfs {
    /// Store and mount point below this directory.
    pub fn new(plan: &Plan, dir: &Path) -> Result<Self> {
        let mut fs = Self::of(plan.cowfs.as_deref().context("no cowfs to measure")?, dir);
        fs.options = plan.mount_options.clone();
        Ok(fs)
    }

    /// The same for a binary, without mount options.
    pub fn of(binary: &Path, dir: &Path) -> Self {
        Self {
            name: "cowfs",
            binary: binary.to_owned(),
            options: None,
            dir: dir.to_owned(),
            root: dir.join("mnt"),
            complaints: Vec::new(),
        }
    }

    /// As [`Cowfs::new`], with the mount option `writeback`.
    pub fn with_writeback(plan: &Plan, dir: &Path) -> Result<Self> {
        let mut fs = Self::new(plan, dir)?;
        fs.name = WRITEBACK;
        fs.options = Some(match fs.options.take() {
            Some(o) => format!("{o},writeback"),
            None => "writeback".into(),
        });
        Ok(fs)
    }

    /// Their name in results.
    pub fn label(&self) -> &'static str {
        self.name
    }

    /// Directory of the store.
    pub fn store(&self) -> PathBuf {
        self.dir.join("store")
    }

    /// Daemons of the store.
    pub fn pids(&self) -> Vec<i32> {
        pids_with_argument(&self.store())
    }

    /// Mounts its head.
    pub fn mount(&self) -> Result<()> {
        let mut c = command(&self.binary, &["mount"]);
        if let Some(o) = &self.options {
            c.args(["-o", o]);
        }
        c.arg(self.store()).arg(&self.root);
        detached(c)
    }

    /// Mounts a checkpoint, read-only.
    pub fn mount_checkpoint(&self, checkpoint: &str, at: &Path) -> Result<()> {
        let mut c = command(&self.binary, &["mount", "--at", checkpoint]);
        c.arg(self.store()).arg(at);
        detached(c)
    }

    /// Unmounts its head, which ends the daemon if nothing else is mounted.
    pub fn unmount(&mut self) -> Result<()> {
        let root = self.root.clone();
        self.unmount_last(&root)
    }

    /// Unmounts what is the last mount of the daemon, and waits for its end.
    pub fn unmount_last(&mut self, at: &Path) -> Result<()> {
        let mut c = command(&self.binary, &["unmount"]);
        c.arg(at);
        if let Err(e) = timed(c) {
            if is_mounted(at) {
                return Err(e);
            }
            self.complaints
                .push(e.context("unmounted, but the command failed"));
        }
        // The daemon writes the rest and gives the lock back; until then a new one is refused.
        let start = Instant::now();
        while !self.pids().is_empty() {
            if start.elapsed() > Duration::from_secs(60) {
                bail!("the daemon does not end");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// `cowfs VERB MOUNTPOINT ARGS --json`.
    pub fn call(&self, verb: &str, args: &[&str]) -> Result<Call> {
        let mut c = command(&self.binary, &[verb]);
        c.arg(&self.root).args(args).arg("--json");
        let (took, text) = output(c)?;
        let answer: Answer = serde_json::from_str(&text)
            .with_context(|| format!("the answer of cowfs {verb}: {text}"))?;
        Ok(Call {
            inside: answer.elapsed_us,
            outside: took.as_secs_f64() * 1e6,
        })
    }

    /// `cowfs VERB MOUNTPOINT ARGS --json`: how long the command took, and what it printed.
    pub fn answer(&self, verb: &str, args: &[&str]) -> Result<(Duration, Value)> {
        let mut c = command(&self.binary, &[verb]);
        c.arg(&self.root).args(args).arg("--json");
        let (took, text) = output(c)?;
        let answer = serde_json::from_str(&text)
            .with_context(|| format!("the answer of cowfs {verb}: {text}"))?;
        Ok((took, answer))
    }

    /// Asks the daemon for a checkpoint as the command does, without starting a command: the round trip over its socket,
    /// microseconds.
    pub fn checkpoint_by_socket(&self, name: &str) -> Result<f64> {
        let request = serde_json::json!({
            "request": "checkpoint", "head": "main", "name": name, "tags": {}, "wait": false,
        });
        let (took, text) = self.ask(&request)?;
        let _: Answer =
            serde_json::from_str(&text).with_context(|| format!("the daemon's answer: {text}"))?;
        Ok(took.as_secs_f64() * 1e6)
    }

    /// One request over the daemon's socket: how long it took to have the whole answer, and the answer.
    pub fn ask(&self, request: &Value) -> Result<(Duration, String)> {
        let socket = self.store().join("control.sock");
        let start = Instant::now();
        let mut stream = UnixStream::connect(&socket)
            .with_context(|| format!("connecting to {}", socket.display()))?;
        stream
            .write_all(format!("{request}\n").as_bytes())
            .context("asking the daemon")?;
        let mut text = String::new();
        BufReader::new(&stream)
            .read_line(&mut text)
            .context("the daemon's answer")?;
        Ok((start.elapsed(), text))
    }

    /// How long mounting takes: after a clean end, and after the daemon was killed with a log to replay. Microseconds.
    pub fn mount_times(&mut self) -> Result<(f64, f64)> {
        let timed_mount = |fs: &Self| -> Result<f64> {
            let start = Instant::now();
            fs.mount()?;
            std::fs::read_dir(fs.root.join("d0000")).context("reading the tree")?;
            Ok(start.elapsed().as_secs_f64() * 1e6)
        };
        self.unmount()?;
        let clean = timed_mount(self)?;
        for i in 0..2_000 {
            std::fs::write(self.root.join(format!("d0000/late{i}")), [7; 700])
                .context("writing before the crash")?;
        }
        let last = self.root.join("d0000/late1999");
        std::fs::File::open(last)
            .and_then(|f| f.sync_all())
            .context("syncing before the crash")?;
        for pid in self.pids() {
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL)
                .context("killing the daemon")?;
        }
        unmount_by_force(&self.root);
        while !self.pids().is_empty() {
            std::thread::sleep(Duration::from_millis(5));
        }
        let crashed = timed_mount(self)?;
        if !self.root.join("d0000/late1999").exists() {
            bail!("what was synced before the crash is gone");
        }
        Ok((clean, crashed))
    }

    /// What starting the command alone takes, microseconds: a share of every whole call.
    pub fn spawn_us(&self) -> Result<f64> {
        Ok(timed(command(&self.binary, &["--version"]))?.as_secs_f64() * 1e6)
    }

    /// Number of the daemon.
    fn daemon(&self) -> Result<i32> {
        self.pids().first().copied().context("no daemon")
    }

    /// Resident memory of the daemon, bytes.
    pub fn rss(&self) -> Result<f64> {
        self.memory("VmRSS")
    }

    /// The most that the daemon's resident memory has been since [`Cowfs::peak_anew`], bytes.
    pub fn peak(&self) -> Result<f64> {
        self.memory("VmHWM")
    }

    /// From here on the peak of the daemon's memory is counted anew.
    pub fn peak_anew(&self) -> Result<()> {
        let path = format!("/proc/{}/clear_refs", self.daemon()?);
        std::fs::write(&path, "5").with_context(|| format!("writing {path}"))
    }

    /// A field of the daemon's status, bytes.
    fn memory(&self, field: &'static str) -> Result<f64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.daemon()?))
            .context("status of the daemon")?;
        let line = status
            .lines()
            .find_map(|l| l.strip_prefix(field)?.strip_prefix(':'))
            .context(field)?;
        let kib: f64 = line.trim().trim_end_matches(" kB").parse().context(field)?;
        Ok(kib * 1024.0)
    }
}

impl FsUnderTest for Cowfs {
    fn name(&self) -> &'static str {
        self.name
    }

    fn setup(&mut self) -> Result<()> {
        make_dir(&self.root)?;
        let mut c = command(&self.binary, &["init"]);
        c.arg(self.store());
        timed(c)?;
        self.mount()
    }

    fn root(&self) -> &Path {
        &self.root
    }

    fn remount(&mut self) -> Result<()> {
        self.unmount()?;
        self.mount()
    }

    fn complaints(&mut self) -> Vec<anyhow::Error> {
        std::mem::take(&mut self.complaints)
    }

    fn teardown(&mut self) {
        if self.unmount().is_err() {
            unmount_by_force(&self.root);
        }
        remove_dir(&self.dir);
    }
}

impl Drop for Cowfs {
    fn drop(&mut self) {
        if self.dir.exists() {
            self.teardown();
        }
    }
}

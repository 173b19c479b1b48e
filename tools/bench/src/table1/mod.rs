//! `bench table1`: the paper's Table 1 again, for `umlctl`, a stop-and-copy of our own and gcore in one run, with CRIU's
//! and the paper's recorded figures beside.

pub(crate) mod drive;
pub(crate) mod measure;
mod more;
pub(crate) mod recorded;
pub(crate) mod report;
pub mod target;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use clap::Parser;
use serde::Serialize;

use crate::results::{machine, median};
use crate::session;

/// Options of `bench table1`.
#[derive(Debug, Parser)]
pub struct Options {
    /// Megabytes (2^20) of the targets
    #[arg(long, value_delimiter = ',', default_value = "32,64,128,1024,4096")]
    pub sizes: Vec<u64>,
    /// Rounds
    #[arg(long, default_value_t = 5)]
    pub rounds: usize,
    /// Only these parts: sizes, threads, writer, since, copies
    #[arg(long, value_delimiter = ',')]
    pub only: Vec<String>,
    /// Where table1.md, table1.json and table1.svg go
    #[arg(long, default_value = "docs/bench")]
    pub out: PathBuf,
    /// Snapshots go here, to a directory of their own (in /dev/shm: to the page cache, without a disk)
    #[arg(long, default_value = "/dev/shm")]
    pub dir: PathBuf,
    /// A directory on a disk, for one row
    #[arg(long, default_value = "/var/tmp")]
    pub disk: PathBuf,
    /// The umlctl to measure (by default the one beside this program, built first if cargo runs this)
    #[arg(long)]
    pub umlctl: Option<PathBuf>,
}

/// What one run does.
#[derive(Debug)]
pub(crate) struct Plan {
    sizes: Vec<u64>,
    rounds: usize,
    only: Vec<String>,
    out: PathBuf,
    work: PathBuf,
    disk: PathBuf,
    umlctl: PathBuf,
    gcore: bool,
}

impl Plan {
    fn wants(&self, part: &str) -> bool {
        session::wants(&self.only, part)
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        for dir in [&self.work, &self.disk] {
            let _ = std::fs::remove_dir_all(dir);
        }
    }
}

/// What was measured: samples by name. Times are seconds, sizes bytes, rates bytes a second.
#[derive(Debug, Serialize)]
pub(crate) struct Samples {
    pub(crate) version: u32,
    pub(crate) about: BTreeMap<String, String>,
    pub(crate) sizes_mb: Vec<u64>,
    pub(crate) samples: BTreeMap<String, Vec<f64>>,
    pub(crate) missing: Vec<String>,
}

impl Samples {
    /// None yet, of this machine.
    pub(crate) fn new(sizes_mb: Vec<u64>) -> Self {
        Self {
            version: 1,
            about: machine(),
            sizes_mb,
            samples: BTreeMap::new(),
            missing: Vec::new(),
        }
    }

    pub(crate) fn add(&mut self, name: impl Into<String>, value: f64) {
        self.samples.entry(name.into()).or_default().push(value);
    }

    pub(crate) fn get(&self, name: &str) -> Option<(f64, f64, f64)> {
        let s = self.samples.get(name)?;
        let low = s.iter().copied().fold(f64::INFINITY, f64::min);
        let high = s.iter().copied().fold(0.0, f64::max);
        Some((median(s)?, low, high))
    }

    pub(crate) fn median(&self, name: &str) -> Option<f64> {
        self.get(name).map(|g| g.0)
    }

    pub(crate) fn miss(&mut self, what: &str, why: &anyhow::Error) {
        let line = format!("{what}: {why:#}");
        eprintln!("bench: {line}");
        if !self.missing.contains(&line) {
            self.missing.push(line);
        }
    }
}

/// Name of a sample of one size.
pub(crate) fn at(row: &str, mb: u64, system: &str) -> String {
    format!("{row}@{mb}/{system}")
}

/// A size for people.
pub(crate) fn size(mb: u64) -> String {
    if mb >= 1024 && mb.is_multiple_of(1024) {
        format!("{} GB", mb / 1024)
    } else {
        format!("{mb} MB")
    }
}

/// The whole run.
pub fn main(o: &Options) -> Result<ExitCode> {
    session::begin("it captures processes and chooses process numbers")?;
    // Resumed processes, and what fills their memory, outlive the command that made them: they become our children.
    nix::sys::prctl::set_child_subreaper(true).context("becoming the parent of orphans")?;
    let plan = plan(o)?;
    let mut samples = Samples::new(plan.sizes.clone());
    let outcome = session::timed(&mut samples, |samples| measure::all(&plan, samples));
    // What was measured before an interrupt is worth having.
    print!("{}", report::write(&plan, &samples)?);
    outcome?;
    Ok(session::exit(&samples))
}

fn plan(o: &Options) -> Result<Plan> {
    session::known(&o.only, &["sizes", "threads", "writer", "since", "copies"])?;
    if o.rounds == 0 || o.sizes.contains(&0) {
        bail!("rounds and sizes begin at 1");
    }
    let umlctl = session::program("umlctl", o.umlctl.as_ref(), build)?;
    session::out_dir(&o.out)?;
    let own = |dir: &PathBuf| session::own_dir(dir, "umlctl");
    let work = own(&o.dir)?;
    let disk = if o.disk == o.dir {
        work.clone()
    } else {
        own(&o.disk)?
    };
    let gcore = Command::new("gcore").output().is_ok();
    Ok(Plan {
        sizes: o.sizes.clone(),
        rounds: o.rounds,
        only: o.only.clone(),
        out: o.out.clone(),
        work,
        disk,
        umlctl,
        gcore,
    })
}

/// The umlctl beside this program; if cargo runs this, it is brought up to date first.
pub(crate) fn build() -> Result<PathBuf> {
    if let Some(cargo) = std::env::var_os("CARGO") {
        let mut c = Command::new(cargo);
        c.args(["build", "--quiet", "-p", "umlctl"]);
        if !cfg!(debug_assertions) {
            c.arg("--release");
        }
        if !c.status().context("running cargo")?.success() {
            bail!("umlctl does not build");
        }
    }
    crate::cli::beside_me("umlctl")
}

//! `bench vm`: how long machines stand still for a snapshot, how fast they come back and multiply, and what they cost,
//! with a bare `linux.uml` and a stop-and-copy of our own beside.

mod boot;
mod fork;
mod guest;
mod net;
mod pause;
mod report;
mod resume;
mod rows;
mod tap;

use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};
use clap::Parser;
use serde_json::Value;

use crate::run::check_interrupted;
use crate::session;
use crate::table1::Samples;
use crate::table1::drive::{Ran, run};

/// What `--only` knows, in the order of a run.
const PARTS: [&str; 6] = ["pause", "big", "resume", "forks", "boot", "steady"];

/// Options of `bench vm`.
#[derive(Debug, Parser)]
pub struct Options {
    /// Few of everything, and nothing of 1 GB: to see that it works
    #[arg(long)]
    pub quick: bool,
    /// Rounds (5; 1 with --quick)
    #[arg(long)]
    pub rounds: Option<usize>,
    /// Only these parts: pause, big, resume, forks, boot, steady
    #[arg(long, value_delimiter = ',', value_name = "PARTS")]
    pub only: Vec<String>,
    /// Snapshots of one machine, for the pause (50; 3 with --quick)
    #[arg(long)]
    pub snapshots: Option<usize>,
    /// Twins made by one command (20; 2 with --quick)
    #[arg(long)]
    pub forks: Option<usize>,
    /// Where vm.md, vm.json and vm.svg go
    #[arg(long, default_value = "docs/bench")]
    pub out: PathBuf,
    /// Machines and snapshots go here, to a directory of their own
    #[arg(long, default_value = "/var/tmp")]
    pub dir: PathBuf,
    /// The umlctl to measure (by default the one beside this program, built first if cargo runs this)
    #[arg(long)]
    pub umlctl: Option<PathBuf>,
}

/// What one run does. Everything that it made is gone when it is dropped.
#[derive(Debug)]
struct Plan {
    only: Vec<String>,
    rounds: usize,
    snapshots: usize,
    forks: usize,
    /// Megabytes (2^20) of the machines whose size matters
    sizes: Vec<u64>,
    out: PathBuf,
    work: PathBuf,
    umlctl: PathBuf,
    image: PathBuf,
}

impl Plan {
    fn wants(&self, part: &str) -> bool {
        session::wants(&self.only, part)
    }

    /// How much a machine of some size has in a file of its own, megabytes: a guest of 1 GB that holds nothing would be one
    /// of 128 MB.
    fn fill(mb: u64) -> u64 {
        if mb >= 1024 { mb / 2 } else { 0 }
    }

    /// `umlctl` with a state root of our own.
    fn command(&self, args: &[&str]) -> Command {
        let mut c = Command::new(&self.umlctl);
        c.env("UMLCTL_HOME", self.home()).arg("--json").args(args);
        c
    }

    fn home(&self) -> PathBuf {
        self.work.join("home")
    }

    /// `umlctl --json`, run to its end; what it printed.
    fn umlctl(&self, args: &[&str]) -> Result<(Ran, Value)> {
        let ran = run(self.command(args), &self.work)?;
        let line = ran.text.lines().next().unwrap_or("");
        let value =
            serde_json::from_str(line).with_context(|| format!("umlctl's answer: {line}"))?;
        Ok((ran, value))
    }

    /// The same for cleaning up, which is done after an interrupt too.
    fn quietly(&self, args: &[&str]) -> Option<Value> {
        let out = self.command(args).stdin(Stdio::null()).output().ok()?;
        if !out.status.success() {
            eprintln!(
                "bench: umlctl {}: {}",
                args.join(" "),
                String::from_utf8_lossy(&out.stderr).trim()
            );
        }
        serde_json::from_slice(&out.stdout).ok()
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // Not only what is known here: a command that was interrupted may have made more.
        let list = self.quietly(&["list"]).unwrap_or_default();
        let names: Vec<&str> = list["vms"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|v| v["name"].as_str())
            .collect();
        if !names.is_empty() {
            let args: Vec<&str> = ["rm", "-f"].into_iter().chain(names).collect();
            self.quietly(&args);
        }
        if let Err(e) = std::fs::remove_dir_all(&self.work) {
            eprintln!("bench: left behind: {}: {e}", self.work.display());
        }
    }
}

/// The whole run.
pub fn main(o: &Options) -> Result<ExitCode> {
    session::begin("machines need namespaces")?;
    let mut plan = plan(o)?;
    let mut samples = Samples::new(plan.sizes.clone());
    let outcome = session::observed(&mut samples, |samples| measure(&mut plan, samples));
    // What was measured before an interrupt is worth having.
    print!("{}", report::write(&plan, &samples)?);
    outcome?;
    Ok(session::exit(&samples))
}

fn measure(plan: &mut Plan, samples: &mut Samples) -> Result<()> {
    plan.image = guest::image(plan)?;
    let parts: [fn(&Plan, &mut Samples) -> Result<()>; PARTS.len()] = [
        pause::all,
        pause::sizes,
        resume::all,
        fork::all,
        boot::all,
        boot::steady,
    ];
    for (name, part) in PARTS.into_iter().zip(parts) {
        if plan.wants(name) {
            eprintln!("bench: {name}");
            if let Err(e) = part(plan, samples) {
                check_interrupted()?;
                samples.miss(name, &e);
            }
        }
    }
    Ok(())
}

fn plan(o: &Options) -> Result<Plan> {
    session::known(&o.only, &PARTS)?;
    let number = |given: Option<usize>, full, quick| {
        let n = given.unwrap_or(if o.quick { quick } else { full });
        if n == 0 {
            bail!("rounds, snapshots and forks begin at 1");
        }
        Ok(n)
    };
    let (rounds, snapshots, forks) = (
        number(o.rounds, 5, 1)?,
        number(o.snapshots, 50, 3)?,
        number(o.forks, 20, 2)?,
    );
    let umlctl = session::program("umlctl", o.umlctl.as_ref(), crate::table1::build)?;
    session::out_dir(&o.out)?;
    let work = session::own_dir(&session::whole(&o.dir)?, "umlctl")?;
    Ok(Plan {
        only: o.only.clone(),
        rounds,
        snapshots,
        forks,
        sizes: if o.quick {
            vec![64, 128]
        } else {
            vec![64, 128, 1024]
        },
        out: o.out.clone(),
        image: work.join("image"),
        work,
        umlctl,
    })
}

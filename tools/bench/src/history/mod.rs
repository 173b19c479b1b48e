//! `bench history`: ten roots that differ by an upgrade each, kept by cowfs, btrfs, restic and borg: how much they take, how
//! long it takes to store the next and to bring the first back, and how fast they are read. `--only scale`: what many
//! files and many checkpoints cost. `--only background`: what giving space back costs programs.

mod background;
mod borg;
mod btrfs;
mod cowfs;
mod peer;
pub mod reader;
mod report;
mod restic;
mod roots;
mod scale;
mod tree;
mod versions;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Parser;

use crate::peers::remove_dir;
use crate::run::check_interrupted;
use crate::session;
use crate::table1::Samples;

/// What `--only` knows, in the order of a run; the first is only done if it is named.
const PARTS: [&str; 4] = ["roots", "versions", "scale", "background"];

/// Options of `bench history`.
#[derive(Debug, Parser)]
pub struct Options {
    /// Three roots, one round, few files: to see that it works
    #[arg(long)]
    pub quick: bool,
    /// Rounds of bringing back, reading, the scale and the background rows (3; 1 with --quick)
    #[arg(long)]
    pub rounds: Option<usize>,
    /// Only these parts: versions, scale, background; or roots, which only makes the roots
    #[arg(long, value_delimiter = ',', value_name = "PARTS")]
    pub only: Vec<String>,
    /// Peers beside cowfs and the native filesystem
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "btrfs,restic,restic-max,borg"
    )]
    pub peers: Vec<String>,
    /// Roots, at most 10 (10; 3 with --quick)
    #[arg(long)]
    pub versions: Option<usize>,
    /// Files of the scale rows (1000000; 20000 with --quick)
    #[arg(long)]
    pub files: Option<u64>,
    /// Checkpoints of the scale rows (1000; 100 with --quick)
    #[arg(long)]
    pub checkpoints: Option<usize>,
    /// Roots are kept here for later runs; they take up to 8 GB
    #[arg(long, default_value = "/var/tmp/cowfs-bench-roots")]
    pub cache: PathBuf,
    /// Where history.md and history.json go
    #[arg(long, default_value = "docs/bench")]
    pub out: PathBuf,
    /// Work here, in a directory of its own; its filesystem is the native one
    #[arg(long, default_value = "/var/tmp")]
    pub dir: PathBuf,
    /// The cowfs to measure (the one beside this program)
    #[arg(long)]
    pub cowfs: Option<PathBuf>,
}

/// What one run does. Its directory is gone when it is dropped.
#[derive(Debug)]
struct Plan {
    only: Vec<String>,
    peers: Vec<String>,
    rounds: usize,
    versions: usize,
    files: u64,
    checkpoints: usize,
    cache: PathBuf,
    out: PathBuf,
    work: PathBuf,
    cowfs: PathBuf,
}

impl Plan {
    fn wants(&self, part: &str) -> bool {
        session::wants(&self.only, part)
    }
}

impl Drop for Plan {
    fn drop(&mut self) {
        // A mount that could not be taken away is not deleted through: that stays on one filesystem.
        remove_dir(&self.work);
    }
}

/// The whole run.
///
/// # Errors
/// If it cannot begin, or was interrupted. What went wrong with one system is in the report, and the exit code is 3.
pub fn main(o: &Options) -> Result<ExitCode> {
    session::begin("it mounts filesystems and drops caches")?;
    if o.only.iter().any(|p| p == "roots") {
        roots::make(&o.cache, o.versions.unwrap_or(roots::MOST).min(roots::MOST))?;
        return Ok(ExitCode::SUCCESS);
    }
    let plan = plan(o)?;
    let mut samples = Samples::new(Vec::new());
    let mut roots = Vec::new();
    let outcome = session::observed(&mut samples, |samples| measure(&plan, samples, &mut roots));
    // What was measured before an interrupt is worth having.
    print!("{}", report::write(&plan, &samples, &roots)?);
    outcome?;
    Ok(session::exit(&samples))
}

fn measure(plan: &Plan, samples: &mut Samples, roots: &mut Vec<roots::Root>) -> Result<()> {
    if plan.wants("versions") {
        *roots = roots::make(&plan.cache, plan.versions)?;
        versions::all(plan, roots, samples)?;
    }
    if plan.wants("scale")
        && let Err(e) = scale::all(plan, samples)
    {
        check_interrupted()?;
        samples.miss("scale", &e);
    }
    if plan.wants("background")
        && let Err(e) = background::all(plan, samples)
    {
        check_interrupted()?;
        samples.miss("background", &e);
    }
    Ok(())
}

fn plan(o: &Options) -> Result<Plan> {
    session::known(&o.only, &PARTS)?;
    if let Some(p) = o
        .peers
        .iter()
        .find(|p| !p.is_empty() && !peer::PEERS.contains(&p.as_str()))
    {
        bail!("there is no peer {p}: there are {}", peer::PEERS.join(", "));
    }
    let pick = |full, quick| if o.quick { quick } else { full };
    let versions = o.versions.unwrap_or(pick(roots::MOST, 3));
    if !(2..=roots::MOST).contains(&versions) {
        bail!("there are 2 to {} versions", roots::MOST);
    }
    let rounds = o.rounds.unwrap_or(pick(3, 1));
    let checkpoints = o.checkpoints.unwrap_or(pick(1000, 100));
    let files = o.files.unwrap_or(if o.quick { 20_000 } else { 1_000_000 });
    if rounds == 0 || checkpoints < scale::FEW + 2 || files < scale::SMALLEST {
        bail!(
            "rounds begin at 1, checkpoints at {}, files at {}",
            scale::FEW + 2,
            scale::SMALLEST
        );
    }
    let cowfs = session::program("cowfs", o.cowfs.as_ref(), || crate::cli::beside_me("cowfs"))?;
    session::out_dir(&o.out)?;
    let work = session::own_dir(&session::whole(&o.dir)?, "cowfs")?;
    Ok(Plan {
        only: o.only.clone(),
        peers: o.peers.iter().filter(|p| !p.is_empty()).cloned().collect(),
        rounds,
        versions,
        files,
        checkpoints,
        cache: o.cache.clone(),
        out: o.out.clone(),
        work,
        cowfs,
    })
}

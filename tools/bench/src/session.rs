//! What the reports beside the main table have in common: how a run begins, what is said about it, and how it ends.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::sys;
use crate::table1::Samples;

/// The beginning of every run. `why` it has to be root's: what it does.
///
/// # Errors
/// If this is not root, or signals cannot be caught.
pub fn begin(why: &str) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("run this as root: {why}");
    }
    sys::catch_signals()?;
    sys::keep_descriptors()
}

/// Refuses parts that there are not.
///
/// # Errors
/// The first of them.
pub fn known(only: &[String], parts: &[&str]) -> Result<()> {
    match only.iter().find(|p| !parts.contains(&p.as_str())) {
        Some(p) => bail!("there is no part {p}: there are {}", parts.join(", ")),
        None => Ok(()),
    }
}

/// Is a part asked for? All are if none is named.
pub fn wants(only: &[String], part: &str) -> bool {
    only.is_empty() || only.iter().any(|o| o == part)
}

/// The whole path of a program that is measured: the one that is given, or else that of `beside`.
///
/// # Errors
/// It is not there.
pub fn program(
    name: &str,
    given: Option<&PathBuf>,
    beside: impl FnOnce() -> Result<PathBuf>,
) -> Result<PathBuf> {
    let path = match given {
        Some(p) => p.clone(),
        None => beside()?,
    };
    path.canonicalize()
        .with_context(|| format!("{}: build {name}, or give --{name} PATH", path.display()))
}

/// Makes a directory of this process's own in another one.
///
/// # Errors
/// The kernel's.
pub fn own_dir(parent: &Path, name: &str) -> Result<PathBuf> {
    let dir = parent.join(format!("{name}-bench.{}", std::process::id()));
    std::fs::create_dir(&dir).with_context(|| format!("making {}", dir.display()))?;
    Ok(dir)
}

/// Makes a directory for reports, if it is not there.
///
/// # Errors
/// The kernel's.
pub fn out_dir(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir).with_context(|| format!("making {}", dir.display()))
}

/// The whole path of a directory that is there.
///
/// # Errors
/// It is not.
pub fn whole(dir: &Path) -> Result<PathBuf> {
    dir.canonicalize()
        .with_context(|| format!("finding {}", dir.display()))
}

/// Measures, and notes how long that took, and what else the machine had to do.
///
/// # Errors
/// Those of `measure`; what was measured before is worth having.
pub fn observed(
    samples: &mut Samples,
    measure: impl FnOnce(&mut Samples) -> Result<()>,
) -> Result<()> {
    if cfg!(debug_assertions) {
        samples.about.insert("build".into(), "debug".into());
    }
    let before = load();
    let outcome = timed(samples, measure);
    let load = format!("{before} before, {} after", load());
    samples.about.insert("load".into(), load);
    outcome
}

/// As [`observed`], but only how long it took.
///
/// # Errors
/// As of [`observed`].
pub fn timed(
    samples: &mut Samples,
    measure: impl FnOnce(&mut Samples) -> Result<()>,
) -> Result<()> {
    let start = Instant::now();
    let outcome = measure(samples);
    let took = format!("{:.0} s", start.elapsed().as_secs_f64());
    samples.about.insert("took".into(), took);
    outcome
}

/// The exit code of a run: whether all was measured.
pub fn exit(samples: &Samples) -> ExitCode {
    if samples.missing.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(crate::PARTIAL)
    }
}

/// How many processes wanted a CPU in the last minute: whether others had work for the machine.
fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}

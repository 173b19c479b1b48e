//! `umlctl fork`: a snapshot that nobody keeps, and copies of it.

use super::args::Fork;
use super::{resume, time};
use anyhow::{Context, Result};
use snapshot::capture::run::{self, snapshot};
use snapshot::image::store;
use snapshot::resume::Options;
use snapshot::resume::image::Snapshot;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Where snapshots are while copies are made of them.
const DIRECTORY: &str = "/run/umlctl/fork";

/// The snapshot's directory. What copies still read is open; the names are not needed.
struct Gone(PathBuf);

impl Drop for Gone {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Makes twins of a running process.
pub fn run(a: &Fork, pid: i32, json: bool) -> Result<u8> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(DIRECTORY)
        .with_context(|| format!("cannot make {DIRECTORY}"))?;
    let dir = Gone(Path::new(DIRECTORY).join(format!("{}-{}", pid, std::process::id())));
    let options = run::Options {
        tree: a.tree,
        guardian: Some(std::env::current_exe().context("cannot find this program's own file")?),
        ..run::Options::new(pid, &dir.0)
    };
    let report = snapshot(&options)?;
    let manifest = store::load(&dir.0)?;
    let source = Snapshot::open(&dir.0, &manifest)?;
    let options = Options {
        dir: dir.0.clone(),
        withheld: resume::withheld(json),
        ..Options::default()
    };
    let copies = resume::copies(&manifest, &source, &options, a.count.unwrap_or(1))?;
    if json {
        println!("{}", resume::list(&copies));
    } else {
        for c in &copies {
            let us = u64::try_from(c.resume.as_micros()).unwrap_or(u64::MAX);
            println!(
                "process {} runs, a twin of {} as of {} ago; resumed in {}",
                c.pid,
                pid,
                time(report.total_us),
                time(us)
            );
        }
    }
    Ok(0)
}

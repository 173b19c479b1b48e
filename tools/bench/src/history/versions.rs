//! The ten versions, stored one after the other by everybody; the first brought back, checked, and read.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, bail};

use super::peer::{self, Keeper, NATIVE};
use super::roots::{Root, name};
use super::{Plan, tree};
use crate::peers::make_dir;
use crate::run::{check_interrupted, client, drop_caches, settle};
use crate::table1::Samples;

/// Pages read at random in one sample.
const PLACES: u64 = 500;

/// Name of a sample: what, of which system.
pub fn of(what: &str, system: &str) -> String {
    format!("{what}/{system}")
}

/// Name of a sample of one version.
pub fn at(what: &str, version: usize, system: &str) -> String {
    of(&format!("{what}@{version:02}"), system)
}

/// All of it. A system in which something goes wrong is left out from there on.
///
/// # Errors
/// If the bench itself cannot go on, or was interrupted.
pub fn all(plan: &Plan, roots: &[Root], samples: &mut Samples) -> Result<()> {
    let native = plan.work.join(NATIVE).join("root");
    make_dir(&native)?;
    let mut keepers = peer::make(plan, &native, |k, e| samples.miss(k, e))?;
    for (i, root) in roots.iter().enumerate() {
        eprintln!("bench: version {} of {}", i + 1, roots.len());
        settle();
        let copied = tree::sync(&root.dir, &native)?;
        samples.add(at("rsync", i + 1, NATIVE), copied.took.as_secs_f64());
        samples.add(at("changed_files", i + 1, NATIVE), copied.files);
        samples.add(at("changed_bytes", i + 1, NATIVE), copied.bytes);
        samples.add(at("size", i + 1, NATIVE), tree::allocated(&native)?);
        each(&mut keepers, samples, "storing", |k, s| {
            store(k, root, i + 1, s)
        })?;
    }
    let (first, last) = (name(1), name(roots.len()));
    let hashes = [hash_of(roots.first())?, hash_of(roots.last())?];
    for round in 0..plan.rounds {
        eprintln!("bench: bringing back, round {}", round + 1);
        each(&mut keepers, samples, "bringing back", |k, s| {
            back(k, &first, &hashes[0], round, s)?;
            // Where the tree itself went back it also comes forth again.
            if k.live().is_some() {
                back(k, &last, &hashes[1], round, s)?;
            }
            Ok(())
        })?;
    }
    for round in 0..plan.rounds {
        eprintln!("bench: reading, round {}", round + 1);
        if let Some(root) = roots.first() {
            read(NATIVE, &root.dir, round, samples)?;
            drop_caches()?;
            places(NATIVE, &root.dir, round, samples)?;
        }
        each(&mut keepers, samples, "reading", |k, s| {
            if !k.reads_differently() {
                return Ok(());
            }
            let dir = k.open(&first)?;
            read(k.name(), &dir, round, s)?;
            k.close()?;
            let dir = k.open(&first)?;
            drop_caches()?;
            places(k.name(), &dir, round, s)?;
            k.close()
        })?;
    }
    Ok(())
}

/// Does something with every system; one that fails is noted and dropped.
fn each(
    keepers: &mut Vec<Box<dyn Keeper>>,
    samples: &mut Samples,
    what: &str,
    mut f: impl FnMut(&mut dyn Keeper, &mut Samples) -> Result<()>,
) -> Result<()> {
    let mut failed = Vec::new();
    for (i, k) in keepers.iter_mut().enumerate() {
        check_interrupted()?;
        if let Err(e) = f(k.as_mut(), samples) {
            check_interrupted()?;
            samples.miss(&format!("{}: {what}", k.name()), &e);
            failed.push(i);
        }
    }
    for i in failed.into_iter().rev() {
        keepers.remove(i);
    }
    Ok(())
}

fn hash_of(root: Option<&Root>) -> Result<String> {
    root.map_or(Ok(String::new()), |r| tree::hash(&r.dir))
}

fn store(k: &mut dyn Keeper, root: &Root, n: usize, samples: &mut Samples) -> Result<()> {
    // What others have written does not cost this one anything. What it has written itself by rsync, if the tree is in
    // its store, does: that has to get to the disk before a version is stored.
    settle();
    if let Some(live) = k.live() {
        let took = tree::sync(&root.dir, &live)?.took;
        samples.add(at("rsync", n, k.name()), took.as_secs_f64());
    }
    let version = name(n);
    let stored = k.store(&version)?;
    samples.add(at("store", n, k.name()), stored.as_secs_f64());
    let mut sum = stored;
    let tidied: BTreeMap<&str, Duration> = k.tidy(&version)?.into_iter().collect();
    for (what, took) in &tidied {
        sum += *took;
        samples.add(at(what, n, k.name()), took.as_secs_f64());
    }
    if !tidied.is_empty() {
        samples.add(at("sum", n, k.name()), sum.as_secs_f64());
    }
    settle();
    samples.add(at("size", n, k.name()), k.bytes()?);
    Ok(())
}

/// Brings a version back, and in the first round compares all of it.
fn back(
    k: &mut dyn Keeper,
    version: &str,
    hash: &str,
    round: usize,
    samples: &mut Samples,
) -> Result<()> {
    settle();
    let back = k.bring_back(version)?;
    samples.add(of("back", k.name()), back.took.as_secs_f64());
    if let Some(inside) = back.inside {
        samples.add(of("back_inside", k.name()), inside.as_secs_f64());
    }
    if round == 0 {
        if tree::hash(&back.tree)? != hash {
            bail!("{version} is NOT THE TREE that was stored");
        }
        samples.add(of("verified", k.name()), 1.0);
    }
    Ok(())
}

fn read(system: &str, dir: &Path, round: usize, samples: &mut Samples) -> Result<()> {
    drop_caches()?;
    for row in ["read_cold", "read_warm"] {
        let done = client("read-tree", dir, &[])?;
        samples.add(of(row, system), done.rate());
        let bytes = done.n as f64;
        if round == 0 && row == "read_cold" {
            samples.add(of("read_bytes", system), bytes);
        }
    }
    Ok(())
}

fn places(system: &str, dir: &Path, round: usize, samples: &mut Samples) -> Result<()> {
    let seed = u64::try_from(round).unwrap_or(0) + 1;
    let done = client("read-places", dir, &[PLACES, seed])?;
    samples.add(of("places", system), done.rate());
    Ok(())
}

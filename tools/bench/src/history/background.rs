//! What giving space back costs programs: a job alone, and beside the collection that follows a prune, in turn. Once with
//! checkpoints as they were written, once packed, where the collection also writes frames anew.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use serde_json::{Value, json};

use super::Plan;
use super::tree::allocated;
use crate::client::Random;
use crate::peers::{Cowfs, FsUnderTest};
use crate::results::median;
use crate::run::{check_interrupted, settle};
use crate::table1::Samples;

/// What the checkpoints are like when they go.
pub const KINDS: [(&str, &str); 2] = [("plain", "as written"), ("packed", "packed")];
/// Parts of the job, and their titles.
pub const JOBS: [(&str, &str); 2] = [
    ("small", "create, write, fsync, read 10 files of 16 KiB"),
    ("large", "read 8 MiB that the kernel has not cached"),
];
/// Checkpoints that go in a round, and files that differ in each.
const VICTIMS: usize = 25;
const FILES: u64 = 300;
/// Files of the tree; of each checkpoint's files a fourth outlives it, in frames that are mostly dead.
const NAMES: u64 = 400;
/// Bytes of each at most.
const BYTES: u64 = 24 << 10;
/// Files of a unit of the job, their bytes, and those of the large file.
const SMALL: usize = 10;
const SMALL_BYTES: usize = 16 << 10;
const LARGE: usize = 8 << 20;
/// Units of the job alone, before each prune and after its collection.
const ALONE: usize = 20;
/// Fewer units beside a collection make no ratio.
const FEWEST: usize = 5;
/// A collection takes no longer than this.
const AT_MOST: Duration = Duration::from_secs(60);

/// Name of a sample.
pub fn id(kind: &str, job: &str, with: &str) -> String {
    format!("background_{job}_{with}@{kind}")
}

/// All rows.
///
/// # Errors
/// If something of cowfs fails, or the run was interrupted.
pub fn all(plan: &Plan, samples: &mut Samples) -> Result<()> {
    for (kind, _) in KINDS {
        eprintln!("bench: beside a collection, {kind}");
        let mut fs = Cowfs::of(&plan.cowfs, &plan.work.join(format!("background-{kind}")));
        fs.setup()?;
        let mut scene = Scene {
            fs,
            kind,
            rng: Random::new(7),
            made: 0,
            samples,
        };
        scene.prepare()?;
        for _ in 0..plan.rounds + 2 {
            scene.round()?;
        }
    }
    Ok(())
}

struct Scene<'a> {
    fs: Cowfs,
    kind: &'static str,
    rng: Random,
    made: usize,
    samples: &'a mut Samples,
}

impl Scene<'_> {
    fn prepare(&mut self) -> Result<()> {
        for dir in ["data", "job"] {
            fs::create_dir(self.fs.root().join(dir)).context("making a directory")?;
        }
        let mut large = vec![0; LARGE];
        self.rng.fill(&mut large);
        fs::write(self.fs.root().join("large"), large).context("writing the large file")
    }

    /// One prune, and the job before and beside what it leaves to do.
    fn round(&mut self) -> Result<()> {
        for _ in 0..VICTIMS {
            self.checkpoint()?;
        }
        if self.kind == "packed" {
            let names: Vec<String> = (self.made - VICTIMS..self.made).map(name).collect();
            let mut args: Vec<&str> = Vec::new();
            for n in &names {
                args.extend(["--checkpoint", n]);
            }
            self.fs.answer("pack", &args)?;
        }
        self.fs.answer("gc", &["--wait"])?;
        settle();
        self.fs.peak_anew()?;
        let mut alone = Vec::new();
        for _ in 0..ALONE {
            alone.push(self.unit()?);
        }
        let before = self.fs.peak()?;
        let freed = self.store_bytes()?;
        self.fs.peak_anew()?;
        let runs = self.runs()?;
        let start = Instant::now();
        let (took, _) = self.fs.answer("prune", &["--keep-last", "1"])?;
        self.samples.add(
            format!("background_prune@{}", self.kind),
            took.as_secs_f64(),
        );
        let mut beside = Vec::new();
        while self.runs()? == runs {
            let took = self.unit()?;
            // Only what was beside it all the time.
            if self.runs()? == runs {
                beside.push(took);
            }
            if start.elapsed() > AT_MOST {
                bail!("the collection does not end");
            }
        }
        let took = start.elapsed().as_secs_f64();
        let kind = self.kind;
        let after = self.fs.peak()?;
        let left = self.store_bytes()?;
        for _ in 0..ALONE {
            alone.push(self.unit()?);
        }
        self.add(&alone, &beside);
        for (what, value) in [
            ("took", took),
            ("peak_alone", before),
            ("peak_beside", after),
            ("freed", freed - left),
        ] {
            self.samples.add(format!("background_{what}@{kind}"), value);
        }
        Ok(())
    }

    /// The next checkpoint, most of which is its own.
    fn checkpoint(&mut self) -> Result<()> {
        check_interrupted()?;
        let mut bytes = vec![0; usize::try_from(BYTES).context("a size")?];
        for _ in 0..FILES {
            let len = usize::try_from(self.rng.below(BYTES) + 1).context("a size")?;
            self.rng.fill(&mut bytes[..len]);
            let file = format!("data/{}", self.rng.below(NAMES));
            fs::write(self.fs.root().join(file), &bytes[..len]).context("writing a file")?;
        }
        self.fs.call("checkpoint", &[&name(self.made)])?;
        self.made += 1;
        Ok(())
    }

    /// The job once: seconds of each part.
    fn unit(&mut self) -> Result<[f64; 2]> {
        check_interrupted()?;
        let dir = self.fs.root().join("job");
        let bytes = vec![1; SMALL_BYTES];
        let large = File::open(self.fs.root().join("large")).context("opening the large file")?;
        posix_fadvise(&large, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)
            .with_context(|| format!("dropping the cache of file {}", large.as_raw_fd()))?;
        let start = Instant::now();
        for i in 0..SMALL {
            small(&dir.join(i.to_string()), &bytes)?;
        }
        let first = start.elapsed().as_secs_f64();
        let start = Instant::now();
        let mut buf = vec![0; 128 << 10];
        let mut sum = 0;
        loop {
            let n = (&large).read(&mut buf).context("reading the large file")?;
            if n == 0 {
                break;
            }
            sum += n;
        }
        let second = start.elapsed().as_secs_f64();
        if sum != LARGE {
            bail!("the large file has {sum} bytes");
        }
        for i in 0..SMALL {
            fs::remove_file(dir.join(i.to_string())).context("removing a file")?;
        }
        Ok([first, second])
    }

    /// Notes a round's units, and what the median of those beside a collection is to that of the others.
    fn add(&mut self, alone: &[[f64; 2]], beside: &[[f64; 2]]) {
        for (part, (job, _)) in JOBS.iter().enumerate() {
            let mut of = |units: &[[f64; 2]], with| {
                let took: Vec<f64> = units.iter().map(|u| u[part]).collect();
                for seconds in &took {
                    self.samples.add(id(self.kind, job, with), *seconds);
                }
                median(&took)
            };
            let medians = of(alone, "alone").zip(of(beside, "beside"));
            // One or two say nothing.
            if let Some((a, b)) = medians.filter(|_| beside.len() >= FEWEST) {
                self.samples.add(id(self.kind, job, "ratio"), b / a);
            }
        }
    }

    fn stats(&self) -> Result<Value> {
        let (_, text) = self.fs.ask(&json!({ "request": "stats" }))?;
        serde_json::from_str(&text).with_context(|| format!("the daemon's answer: {text}"))
    }

    /// Collections that are done.
    fn runs(&self) -> Result<u64> {
        let runs = self.stats()?["store"]["gc_runs"].as_u64();
        runs.context("the number of collections")
    }

    /// Bytes of blocks that contents take.
    fn store_bytes(&self) -> Result<f64> {
        settle();
        let mut sum = allocated(&self.fs.store().join("data"))?;
        let packs = self.fs.store().join("packs");
        if packs.exists() {
            sum += allocated(&packs)?;
        }
        Ok(sum)
    }
}

fn small(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut f = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(path)
        .context("making a small file")?;
    f.write_all(bytes).context("writing a small file")?;
    f.sync_all().context("syncing a small file")?;
    let read = fs::read(path).context("reading a small file")?;
    if read != bytes {
        bail!("a small file is not what was written");
    }
    Ok(())
}

fn name(n: usize) -> String {
    format!("b{n:05}")
}

//! Taking a snapshot, in a thread of the supervisor.

use super::store::{About, Error as StoreError, Figures, Store, VERSION};
use crate::vm::config::Net;
use crate::vm::home::Vm;
use crate::vm::name::Name;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use snapshot::uml::capture::{Request, Stats, capture};
use snapshot::uml::image::{self, Sums};
use std::fs::File;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Descriptors of main that every machine is given anew: console, kernel log, agent.
const EXTERNALS: [i32; 4] = [0, 1, 2, 4];
/// And this one, if it has a network.
const TAP: i32 = 3;

/// What is known about a machine once it was captured.
pub type Learned = Option<snapshot::uml::capture::Learned>;

/// Taking a snapshot failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The machine.
    #[error(transparent)]
    Capture(#[from] snapshot::uml::Error),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The VM's own files.
    #[error(transparent)]
    Vm(#[from] crate::vm::Error),
    /// The disk.
    #[error("cannot open the disk {0}")]
    Disk(std::path::PathBuf, #[source] std::io::Error),
}

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Job {
    /// The machine.
    pub vm: Vm,
    /// The guest's kernel.
    pub main: Pid,
    /// The keeper, which takes all with it.
    pub keeper: Pid,
    /// The snapshot's name.
    pub name: Name,
    /// End the machine at the point in time.
    pub kill: bool,
    /// Copy everything in the stop.
    pub stop_and_copy: bool,
    /// It is to outlast a power cut.
    pub durable: bool,
}

fn us(d: Duration) -> u64 {
    u64::try_from(d.as_micros()).unwrap_or(u64::MAX)
}

fn figures(s: &Stats, durable: Option<Duration>) -> Figures {
    Figures {
        pause_us: us(s.pause),
        stop_us: us(s.stop),
        state_us: us(s.state),
        mark_us: us(s.scan),
        copy_us: us(s.copy),
        prepare_us: us(s.first),
        rest_us: us(s.rest),
        disk_us: us(s.disk),
        durable_us: durable.map(us),
        bytes_ahead: s.ahead_bytes,
        bytes_in_stop: s.stop_bytes,
    }
}

/// Takes it. `fixed` is called when the point in time is fixed and the machine runs again.
///
/// # Errors
/// There is no snapshot then, and the machine goes on, unless it has ended.
pub fn take(
    job: &Job,
    learned: &mut Learned,
    fixed: &mut dyn FnMut(Figures),
) -> Result<Figures, Error> {
    let begun = std::time::Instant::now();
    let staging = Store::of(&job.vm.home()).begin(&job.name)?;
    let mut config = job.vm.config()?;
    config.name = job.vm.name().clone();
    let mut externals = EXTERNALS.to_vec();
    if config.net == Net::Nat {
        externals.push(TAP);
    }
    let path = job.vm.disk();
    let disk = File::open(&path).map_err(|e| Error::Disk(path.clone(), e))?;
    let copy = staging.dir.join(image::DISK);
    let mut duplicate = || {
        let options = cowfs::image::DuplicateOptions {
            sync: false,
            ..Default::default()
        };
        cowfs::image::duplicate_file_with(&disk, &copy, options)
            .map(drop)
            .map_err(|e| snapshot::resume::text(&e))
    };
    let mut end = || {
        let _ = kill(job.keeper, Signal::SIGKILL);
    };
    let mut tell = |s: &Stats| fixed(figures(s, None));
    let (mut machine, stats) = capture(&mut Request {
        main: job.main.as_raw(),
        dir: &staging.dir,
        externals: &externals,
        learned,
        durable: job.durable,
        stop_and_copy: job.stop_and_copy,
        kill: if job.kill { Some(&mut end) } else { None },
        fixed: Some(&mut tell),
        disk: Some(&mut duplicate),
        inspect: None,
    })?;
    let file = File::open(&copy).map_err(|e| Error::Disk(copy.clone(), e))?;
    machine.disk_sums = Some(Sums::of(&file, &copy)?.write(&staging.dir.join(image::DISK_SUMS))?);
    if job.durable {
        file.sync_all().map_err(|e| Error::Disk(copy.clone(), e))?;
    }
    let taken = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let about = About {
        version: VERSION,
        vm: config,
        taken_us: us(taken),
        figures: figures(&stats, None),
    };
    staging.publish(&machine, &about)?;
    Ok(figures(&stats, Some(begun.elapsed())))
}

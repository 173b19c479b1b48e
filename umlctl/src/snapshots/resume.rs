//! Making a machine of a snapshot: its directory and disk, by the command; and the guest's kernel, by the keeper.

use super::store::{self, Error as StoreError, Snapshot};
use crate::net::pool::Pool;
use crate::supervisor::launch;
use crate::supervisor::start::{MainFds, Start};
use crate::sys::fd;
use crate::vm::cmdline::PRIVATE;
use crate::vm::config::Net;
use crate::vm::home::{Home, Lock, Vm};
use crate::vm::name::Name;
use nix::unistd::Pid;
use snapshot::files::{OpenFile, paths, relocate};
use snapshot::uml::image;
use snapshot::uml::manifest::Machine;
use snapshot::uml::rebuild::{Plan, rebuild};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Making a machine failed. Nothing of it is left.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The snapshot.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The VM's files.
    #[error(transparent)]
    Vm(#[from] crate::vm::Error),
    /// The network.
    #[error(transparent)]
    Net(#[from] crate::net::Error),
    /// The disk.
    #[error(transparent)]
    Disk(#[from] cowfs::image::ImageError),
    /// The supervisor.
    #[error(transparent)]
    Start(#[from] crate::supervisor::Error),
    /// Another VM has the name.
    #[error(
        "there is a VM {0} already, which is not the one of the snapshot: give another name with --name"
    )]
    Taken(String),
    /// The VM that the snapshot was taken of runs.
    #[error(
        "{0} runs: give the new one another name with --name, or end it first with `umlctl kill {0}`"
    )]
    Runs(String),
    /// A file operation failed.
    #[error("cannot {0} {path}", path = .1.display())]
    Io(&'static str, PathBuf, #[source] std::io::Error),
}

fn io<'a>(what: &'static str, path: &'a Path) -> impl Fn(std::io::Error) -> Error + 'a {
    move |e| Error::Io(what, path.into(), e)
}

/// A machine that runs again.
#[derive(Debug)]
pub struct Made {
    /// The VM.
    pub vm: Vm,
    /// From the request until the guest's kernel ran.
    pub resume: Duration,
}

/// Makes a machine of a snapshot. Without a name it is the VM of the snapshot itself, which must not run.
///
/// `undo` removes a new VM of which nothing runs.
///
/// # Errors
/// Nothing was made.
pub fn make(
    home: &Home,
    snapshot: &Snapshot,
    name: Option<&Name>,
    undo: &dyn Fn(&Vm),
) -> Result<Made, Error> {
    let begun = Instant::now();
    let about = snapshot.about()?;
    let machine = snapshot.machine()?;
    if let Some(sums) = &machine.disk_sums {
        store::check(&snapshot.dir, image::DISK, image::DISK_SUMS, sums)?;
    }
    let disk = snapshot.dir.join(image::DISK);
    cowfs::image::check(&disk)?;
    let name = name.unwrap_or(&about.vm.name);
    let (vm, lock, old) = place(home, name, &about)?;
    let new = old.is_none();
    let made = prepare(&vm, lock, about.vm, old.and_then(|o| o.net_index), snapshot);
    match made {
        Ok(()) => Ok(Made {
            vm,
            resume: begun.elapsed(),
        }),
        Err(e) => {
            if new {
                undo(&vm);
            }
            Err(e)
        }
    }
}

type Old = Option<crate::vm::config::Config>;

/// The VM's directory: a new one, or that of the VM that the snapshot was taken of.
fn place(home: &Home, name: &Name, about: &store::About) -> Result<(Vm, Lock, Old), Error> {
    match home.create(name) {
        Ok((vm, lock)) => Ok((vm, lock, None)),
        Err(crate::vm::Error::Exists(_)) => {
            let vm = home.find(name)?;
            let lock = vm.lock().map_err(|e| match e {
                crate::vm::Error::Running(name) => Error::Runs(name),
                e => e.into(),
            })?;
            let old = vm.config()?;
            let same = (&old.name, old.created, &old.image)
                == (&about.vm.name, about.vm.created, &about.vm.image);
            if !same {
                return Err(Error::Taken(name.to_string()));
            }
            Ok((vm, lock, Some(old)))
        }
        Err(e) => Err(e.into()),
    }
}

fn prepare(
    vm: &Vm,
    lock: Lock,
    mut config: crate::vm::config::Config,
    index: Option<u32>,
    snapshot: &Snapshot,
) -> Result<(), Error> {
    let copy = vm.dir().join("disk.new");
    let _ = fs::remove_file(&copy);
    let options = cowfs::image::DuplicateOptions {
        sync: false,
        ..Default::default()
    };
    cowfs::image::duplicate_with(&snapshot.dir.join(image::DISK), &copy, options)?;
    fs::rename(&copy, vm.disk()).map_err(io("put in place", &copy))?;
    config.name = vm.name().clone();
    if config.net == Net::Nat {
        let wanted = index.or(config.net_index);
        config.net_index = Some(Pool::lock()?.take(vm, wanted)?);
    }
    config.save(&vm.config_path())?;
    Ok(launch::spawn(vm, lock, Some(&snapshot.dir))?)
}

/// How the keeper makes the guest's kernel of a snapshot.
#[derive(Debug)]
pub struct Resume {
    /// The snapshot's directory.
    pub dir: PathBuf,
    /// The machine.
    pub machine: Machine,
    /// Where its disk is now.
    pub disk: PathBuf,
    /// Over this the file with its memory comes.
    pub channel: OwnedFd,
}

impl Start for Resume {
    fn descriptors(&self) -> Vec<RawFd> {
        vec![self.channel.as_raw_fd()]
    }

    fn start(&self, fds: MainFds) -> Result<Pid, String> {
        let memory = receive(&self.channel)?;
        let mut files = self.machine.files.clone();
        place_files(&mut files, &self.disk).map_err(|e| format!("cannot place its files: {e}"))?;
        let mut externals = BTreeMap::new();
        let again = fds.console.try_clone().map_err(|e| format!("dup: {e}"))?;
        externals.insert(0, fds.console);
        externals.insert(1, again);
        externals.insert(2, fds.kernel_log);
        externals.extend(fds.tap.map(|t| (3, t)));
        externals.insert(4, fds.agent);
        let plan = Plan {
            machine: &self.machine,
            dir: &self.dir,
            files,
            memory,
            externals,
        };
        let main = rebuild(plan).map_err(|e| snapshot::resume::text(&e))?;
        Ok(Pid::from_raw(main))
    }
}

/// Files of the guest's kernel are in the private file system, which is empty; its disk is the VM's.
fn place_files(files: &mut [OpenFile], disk: &Path) -> std::io::Result<()> {
    for path in paths(files) {
        if path.starts_with(PRIVATE) {
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            if path.extension().is_none_or(|e| e != "sock") && is_file(files, &path) {
                File::create(&path)?.set_len(64)?;
            }
        }
    }
    let name = disk.file_name();
    relocate(files, &|path| {
        if path.starts_with(PRIVATE) {
            return Some(path.to_owned());
        }
        // The only file of that name that a guest's kernel of ours has open.
        (path.file_name() == name && name.is_some()).then(|| disk.to_owned())
    })
}

fn is_file(files: &[OpenFile], path: &Path) -> bool {
    files
        .iter()
        .any(|f| matches!(&f.kind, snapshot::files::Kind::Regular(r) if r.path == path))
}

/// Takes a descriptor that comes over a socket; a text that comes instead says why there is none.
pub fn receive(channel: &OwnedFd) -> Result<OwnedFd, String> {
    let (text, fd) = fd::receive(channel).map_err(|e| format!("its memory did not come: {e}"))?;
    fd.ok_or_else(|| match text.is_empty() {
        true => "its memory did not come".into(),
        false => String::from_utf8_lossy(&text).into_owned(),
    })
}

/// Gives the keeper the file with the machine's memory.
///
/// # Errors
/// The keeper is gone.
pub fn give(channel: &OwnedFd, memory: &File) -> Result<(), nix::errno::Errno> {
    fd::send(channel, b"m", Some(memory.as_raw_fd()))
}

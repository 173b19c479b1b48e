//! `umlctl run`, and the supervisor that it starts.

use super::args::{Run, Supervise};
use super::{ask_until_end, find};
use crate::control::{Request, WaitFor};
use crate::net::pool::Pool;
use crate::supervisor::launch;
use crate::vm::config::{self, Config, Net};
use crate::vm::home::{Home, Lock, Vm};
use crate::vm::name::Name;
use crate::vm::state::Phase;
use crate::vm::{Error, cmdline, disk};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Starts a VM.
pub fn run(a: &Run, json: bool) -> Result<u8> {
    let home = Home::from_env()?;
    let name: Name = a.name.parse()?;
    let vm = match &a.image {
        Some(image) => create(&home, &name, image, a)?,
        None => again(&home, &name)?,
    };
    if !a.detach {
        return super::console::run_attached(&vm);
    }
    if !a.no_wait {
        eprintln!("umlctl: {name} boots");
        let state = ask_until_end(
            &vm,
            &Request::Wait {
                until: WaitFor::Agent,
            },
        )
        .with_context(|| format!("{name} did not come up; `umlctl logs {name}` may say why"))?;
        if state.phase != Phase::Running {
            bail!(
                "{name} has {} before it was up; `umlctl logs {name}` may say why",
                state.phase.word()
            );
        }
    }
    if json {
        println!("{}", super::list::value(&vm)?);
    } else {
        println!("{name}");
    }
    Ok(0)
}

/// A new VM. If it cannot be started nothing is left of it.
fn create(home: &Home, name: &Name, image: &Path, a: &Run) -> Result<Vm> {
    // All that can be wrong is looked at before anything is made.
    disk::check_image(image)?;
    let image = image
        .canonicalize()
        .with_context(|| format!("cannot find {}", image.display()))?;
    let mut config = Config {
        version: config::VERSION,
        name: name.clone(),
        image,
        mem_bytes: config::memory(&a.mem)?,
        net: a.net,
        net_index: None,
        kernel: kernel(a.kernel.as_deref())?,
        append: cmdline::split_append(&a.append)?,
        raid6: a.raid6,
        created: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |d| d.as_secs()),
    };
    cmdline::arguments(&config, &home.place(name))?;
    anyhow::ensure!(
        nix::unistd::geteuid().is_root(),
        "a VM needs a pid and a network namespace, which only root may make: run this as root"
    );
    let (vm, lock) = home.create(name)?;
    let made = prepare(&vm, &mut config).and_then(|()| Ok(launch::spawn(&vm, lock, None)?));
    if let Err(e) = made {
        super::end::remove(&vm).context("cannot clean up")?;
        return Err(e);
    }
    Ok(vm)
}

fn prepare(vm: &Vm, config: &mut Config) -> Result<()> {
    disk::create(&vm.disk(), &config.image)?;
    if config.net == Net::Nat {
        config.net_index = Some(Pool::lock()?.take(vm, None)?);
    }
    config.save(&vm.config_path())?;
    Ok(())
}

/// A VM that has ended.
fn again(home: &Home, name: &Name) -> Result<Vm> {
    let vm = match home.find(name) {
        Err(Error::NoVm(..)) => bail!(Error::Image {
            path: PathBuf::from("(none)"),
            why: format!("there is no VM {name} yet: give the image for a new one by --image"),
        }),
        other => other?,
    };
    let lock: Lock = vm.lock()?;
    let mut config = vm.config()?;
    disk::check_image(&config.image)?;
    if config.net == Net::Nat {
        // The host may have been booted since, or the number given to another.
        let index = Pool::lock()?.take(&vm, config.net_index)?;
        if config.net_index != Some(index) {
            config.net_index = Some(index);
            config.save(&vm.config_path())?;
        }
    }
    launch::spawn(&vm, lock, None)?;
    Ok(vm)
}

/// The kernel's program.
fn kernel(given: Option<&Path>) -> Result<PathBuf> {
    let from_env = std::env::var_os("UMLCTL_LINUX").map(PathBuf::from);
    let found = match given.map(Path::to_owned).or(from_env) {
        Some(path) => path,
        None => search("linux.uml").context(
            "there is no linux.uml in PATH: install the package user-mode-linux, or give one by --kernel",
        )?,
    };
    found
        .canonicalize()
        .with_context(|| format!("the kernel {} cannot be used", found.display()))
}

/// Looks for a program in PATH.
pub fn search(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path)
        .map(|d| d.join(program))
        .find(|p| p.is_file())
}

/// The process behind a VM.
pub fn supervise(a: &Supervise) -> Result<u8> {
    let exit = launch::supervise(&find(&a.name)?, a.lock_fd, a.report_fd, a.resume.as_deref())?;
    Ok(exit.code())
}

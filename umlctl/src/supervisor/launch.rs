//! From `umlctl run` to a supervisor: the one starts the other as a process of its own, and is told how it went.

use super::agent::Channel;
use super::console::{Console, open_log};
use super::keeper::{Keeper, Plan, launch};
use super::run::{Parts, Supervisor, block_signals};
use super::start::{Boot, MainFds};
use super::{Error, system};
use crate::net::netns::{self, Making};
use crate::snapshots::memory;
use crate::snapshots::resume::{Resume, give};
use crate::sys::fd::inherited;
use crate::vm::config::{Config, Net};
use crate::vm::home::{Lock, Vm};
use crate::vm::state::{Exit, Phase, State};
use crate::vm::{cmdline, initrd};
use std::fs::{DirBuilder, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What the private file system may hold beside the guest's memory.
const PRIVATE_EXTRA: u64 = 64 << 20;

/// Starts a supervisor, and returns when the guest's kernel runs: booted, or made of the snapshot in a directory. The VM's lock goes over to it.
///
/// # Errors
/// It could not start the VM, and has ended.
pub fn spawn(vm: &Vm, lock: Lock, resume: Option<&Path>) -> Result<(), Error> {
    let io = |what, path: std::path::PathBuf| move |source| Error::Io { what, path, source };
    let (read, write) = std::io::pipe().map_err(system("make a pipe"))?;
    let log = open_log(vm.supervisor_log())?;
    let program = std::env::current_exe().map_err(system("find this program's own file"))?;
    let (lock_fd, report_fd) = (lock.file().as_raw_fd(), write.as_raw_fd());
    let mut command = Command::new(program);
    command
        .arg("supervise")
        .arg(vm.name().as_str())
        .args(["--lock-fd", &lock_fd.to_string()])
        .args(["--report-fd", &report_fd.to_string()])
        .env("UMLCTL_HOME", vm.home().path())
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log.try_clone().map_err(io("open", vm.supervisor_log()))?)
        .stderr(log);
    if let Some(dir) = resume {
        command.arg("--resume").arg(dir);
    }
    crate::sys::fd::pass(&mut command, &[lock_fd, report_fd]);
    // Away from the caller's terminal and its signals.
    command.process_group(0);
    let mut child = command.spawn().map_err(system("start a supervisor"))?;
    drop((write, lock));
    let mut line = String::new();
    let _ = BufReader::new(read).read_line(&mut line);
    match line.trim_end().split_once(' ') {
        Some(("ok", _)) => Ok(()),
        Some(("error", text)) => {
            let _ = child.wait();
            Err(Error::Start(
                serde_json::from_str::<String>(text).unwrap_or_default(),
            ))
        }
        _ => Err(Error::Start(format!(
            "its supervisor has ended; {} may say why",
            vm.supervisor_log().display()
        ))),
    }
}

/// The life of a supervisor.
///
/// # Errors
/// It was not started by [`spawn`], or could not start the VM; whoever called `spawn` is told.
pub fn supervise(
    vm: &Vm,
    lock: RawFd,
    report: RawFd,
    resume: Option<&Path>,
) -> Result<Exit, Error> {
    let lock = inherited(lock).ok_or(Error::ByHand)?;
    let mut report = File::from(inherited(report).ok_or(Error::ByHand)?);
    let lock = Lock::take(File::from(lock))
        .map_err(system("take the lock"))?
        .ok_or(Error::ByHand)?;
    let _ = nix::unistd::setsid();
    match begin(vm, &lock, resume) {
        Ok(supervisor) => {
            supervisor.save();
            let _ = report.write_all(b"ok 1\n");
            drop(report);
            let result = supervisor.run();
            drop(lock);
            result
        }
        Err(e) => {
            let text = format!("{:#}", anyhow::Error::from(e));
            let _ = State::new(Phase::Created).save(&vm.state_path());
            let quoted = serde_json::to_string(&text).unwrap_or_default();
            let _ = report.write_all(format!("error {quoted}\n").as_bytes());
            Err(Error::Start(text))
        }
    }
}

/// Everything up to a running main. One thread, from beginning to end: see [`launch`].
fn begin(vm: &Vm, lock: &Lock, resume: Option<&Path>) -> Result<Supervisor, Error> {
    let config = vm.config()?;
    let mut state = State::new(Phase::Starting);
    state.supervisor = Some(std::process::id().cast_signed());
    state.save(&vm.state_path())?;
    crate::sys::signal::set(
        nix::sys::signal::Signal::SIGHUP,
        nix::sys::signal::SigHandler::SigIgn,
    )
    .map_err(system("ignore a signal"))?;
    let signals = block_signals()?;
    let listener = listen(vm)?;
    let Network { making, tap, netns } = connect(&config)?;
    let kernel_log = vm.kernel_log();
    if resume.is_none() {
        initrd::write(&vm.initrd())?;
        // That of the last time is of no use beside this one.
        let _ = std::fs::remove_file(&kernel_log);
    }
    let (console, console_end) = Console::new(vm)?;
    let (agent, agent_end) = Channel::new()?;
    private_place()?;
    let base = Base {
        fds: MainFds {
            console: console_end,
            kernel_log: OwnedFd::from(open_log(kernel_log)?),
            tap,
            agent: agent_end,
        },
        netns,
        private_bytes: config.mem_bytes + PRIVATE_EXTRA,
        needed: [vm.dir(), &config.image, &config.kernel]
            .into_iter()
            .chain(resume)
            .map(Path::to_owned)
            .collect(),
        lock: lock.file().as_raw_fd(),
    };
    let keeper = match resume {
        None => boot(vm, &config, base, making)?,
        Some(dir) => rebuild(vm, dir, base, making)?,
    };
    let mut supervisor = Supervisor::new(Parts {
        vm: vm.clone(),
        state,
        keeper,
        console,
        agent,
        listener,
        signals,
    });
    if resume.is_some() {
        supervisor.resumed();
    }
    Ok(supervisor)
}

/// What a keeper is given, however main comes to be.
struct Base {
    fds: MainFds,
    netns: Option<OwnedFd>,
    private_bytes: u64,
    needed: Vec<PathBuf>,
    lock: RawFd,
}

impl Base {
    fn plan<S>(self, start: S) -> Plan<S> {
        Plan {
            start,
            fds: self.fds,
            netns: self.netns,
            private_bytes: self.private_bytes,
            needed: self.needed,
            lock: self.lock,
        }
    }
}

fn boot(vm: &Vm, config: &Config, base: Base, network: Option<Making>) -> Result<Keeper, Error> {
    let arguments = cmdline::arguments(config, vm)?;
    let start = Boot::new(&config.kernel, &arguments)
        .map_err(|_| Error::Start("a zero in its arguments".into()))?;
    let keeper = launch(base.plan(start), |_| Ok(()))?;
    // Not before main is known: a kernel may end at once, and then it is a VM that has ended.
    match finish(network) {
        Ok(()) => Ok(keeper),
        Err(e) => {
            keeper.end();
            Err(e)
        }
    }
}

/// The keeper is forked while there is one thread; then another process serves its memory, and the file is handed over.
fn rebuild(vm: &Vm, dir: &Path, base: Base, network: Option<Making>) -> Result<Keeper, Error> {
    let machine = snapshot::uml::manifest::load(dir).map_err(|e| start_error(&e))?;
    let (ours, theirs) = crate::sys::fd::messages().map_err(system("make a socket pair"))?;
    let start = Resume {
        dir: dir.to_owned(),
        machine: machine.clone(),
        disk: vm.disk(),
        channel: theirs,
    };
    launch(base.plan(start), |keeper| {
        let _ = std::fs::remove_file(vm.dir().join(memory::DAMAGE));
        let file = memory::spawn(vm.dir(), dir, &machine, keeper).map_err(|e| start_error(&e))?;
        give(&ours, &file).map_err(system("hand over the machine's memory"))?;
        finish(network)
    })
}

fn start_error(e: &dyn std::error::Error) -> Error {
    Error::Start(snapshot::resume::text(e))
}

/// A VM's network.
#[derive(Default)]
struct Network {
    making: Option<Making>,
    tap: Option<OwnedFd>,
    netns: Option<OwnedFd>,
}

/// Begins to make the VM's network namespace anew. What the guest needs to start is there.
fn connect(config: &Config) -> Result<Network, Error> {
    match (config.net, config.net_index) {
        (Net::Nat, Some(index)) => {
            let (making, tap) = netns::begin(index)?;
            Ok(Network {
                making: Some(making),
                tap: Some(tap),
                netns: Some(netns::open(index)?),
            })
        }
        _ => Ok(Network::default()),
    }
}

fn finish(network: Option<Making>) -> Result<(), Error> {
    Ok(network.map_or(Ok(()), Making::finish)?)
}

/// Where the keeper mounts the private file system, in a mount namespace of its own: an empty directory for everybody else.
fn private_place() -> Result<(), Error> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(cmdline::PRIVATE)
        .map_err(|source| Error::Io {
            what: "make",
            path: cmdline::PRIVATE.into(),
            source,
        })
}

fn listen(vm: &Vm) -> Result<UnixListener, Error> {
    let path = vm.socket();
    let io = |source| Error::Io {
        what: "listen at",
        path: path.clone(),
        source,
    };
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(io(e)),
        _ => {}
    }
    // The directory has mode 0700, so nobody gets in between.
    let listener = crate::control::short(&path, UnixListener::bind).map_err(io)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).map_err(io)?;
    listener.set_nonblocking(true).map_err(io)?;
    Ok(listener)
}

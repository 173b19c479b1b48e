//! Starting and being the daemon of a store.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::signal::{SigSet, Signal};

use super::args::Cli;
use super::output;
use crate::control::{self, Answer, Client, Failure, MountSpec, Pending, Request};
use crate::service::Service;
use crate::store::{StoreError, superblock};

/// How long the process waits, when all is done, for the last answers to be taken.
const LAST_ANSWERS: Duration = Duration::from_secs(5);

fn shown(a: &Answer, cli: &Cli) {
    if let Answer::Mounted { mountpoint } = a {
        output::done(cli, &format!("mounted at {}", mountpoint.display()));
    }
}

/// Mounts: by the daemon that serves the store, or by a new one.
pub(super) fn mount(
    cli: &Cli,
    store: &Path,
    spec: &MountSpec,
    foreground: bool,
) -> Result<u8, Failure> {
    let mut spec = spec.clone();
    spec.mountpoint = spec.mountpoint.canonicalize().map_err(|e| {
        Failure::new(format!(
            "the mount point {}: {e}",
            spec.mountpoint.display()
        ))
    })?;
    let store = store.canonicalize().map_err(|e| Failure {
        code: 10,
        message: format!("{}: {e}", store.display()),
    })?;
    if !store.join(superblock::FILE).is_file() {
        return Err(StoreError::NoStore(store.display().to_string()).into());
    }
    if let Some(mut c) = Client::connect(&store)? {
        if foreground {
            return Err(Failure {
                code: 11,
                message: "a daemon serves this store already; without --foreground it will serve this mount as well".into(),
            });
        }
        shown(&c.ask(&Request::Mount(spec))?, cli);
        return Ok(0);
    }
    if foreground {
        log_to_stderr();
        let (service, pending) = open(&store)?;
        let mountpoint = service.mount(&spec)?;
        shown(&Answer::Mounted { mountpoint }, cli);
        notify_systemd();
        let served = service.serve();
        pending.wait(LAST_ANSWERS);
        served?;
        return Ok(0);
    }
    let exe = std::env::current_exe().map_err(|e| Failure::new(format!("finding myself: {e}")))?;
    std::fs::create_dir_all(store.join("logs"))
        .and_then(|()| {
            std::fs::File::options()
                .create(true)
                .append(true)
                .open(store.join("logs/daemon.log"))
        })
        .map_err(|e| Failure::new(format!("the daemon's log: {e}")))
        .and_then(|log| {
            let mut child = Command::new(exe)
                .arg("daemon")
                .arg(&store)
                .current_dir("/")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(log)
                .spawn()
                .map_err(|e| Failure::new(format!("starting the daemon: {e}")))?;
            let gone = || {
                Failure::new(format!(
                    "the daemon ended before it mounted; see {}",
                    store.join("logs/daemon.log").display()
                ))
            };
            let mut line = serde_json::to_vec(&spec).map_err(|e| Failure::new(e.to_string()))?;
            line.push(b'\n');
            let mut stdin = child.stdin.take().ok_or_else(gone)?;
            stdin.write_all(&line).map_err(|_| gone())?;
            drop(stdin);
            let mut answer = String::new();
            BufReader::new(child.stdout.take().ok_or_else(gone)?)
                .read_line(&mut answer)
                .map_err(|_| gone())?;
            match serde_json::from_str(&answer) {
                Ok(Answer::Error(f)) => Err(f),
                Ok(a) => {
                    shown(&a, cli);
                    Ok(0)
                }
                Err(_) => Err(gone()),
            }
        })
}

fn log_to_stderr() {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_env("COWFS_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    // A second call, in tests, changes nothing.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(false)
        .with_writer(std::io::stderr)
        .try_init();
}

/// Opens the store and listens; SIGTERM and SIGINT unmount.
fn open(store: &Path) -> Result<(Arc<Service>, Arc<Pending>), Failure> {
    // Blocked before any thread begins, so that all of them leave the signals to the one that waits for them.
    let mut signals = SigSet::empty();
    for s in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        signals.add(s);
    }
    signals
        .thread_block()
        .map_err(|e| Failure::new(format!("signals: {e}")))?;
    let service = Service::open(store)?;
    let asked = Arc::clone(&service);
    let pending = control::listen(store, Arc::new(move |r| asked.reply(r)))
        .map_err(|e| Failure::new(format!("the control socket: {e}")))?;
    let told = Arc::clone(&service);
    std::thread::Builder::new()
        .name("cowfs-signals".into())
        .spawn(move || {
            while let Ok(s) = signals.wait() {
                if s != Signal::SIGHUP {
                    tracing::info!(signal = s.as_str(), "unmounting");
                    told.unmount_all();
                }
            }
        })
        .map_err(|e| Failure::new(format!("no thread for signals: {e}")))?;
    Ok((service, pending))
}

/// The daemon itself: reads what to mount from stdin, answers on stdout, serves.
pub(super) fn child(store: &Path) -> Result<u8, Failure> {
    log_to_stderr();
    // The starting process does not make it the leader of a group, which could not leave the caller's session.
    if let Err(e) = nix::unistd::setsid() {
        tracing::warn!(error = %e, "still in the session of whoever started it");
    }
    let mut line = String::new();
    std::io::stdin()
        .read_line(&mut line)
        .map_err(|e| Failure::new(e.to_string()))?;
    let spec: MountSpec = serde_json::from_str(&line).map_err(|e| Failure::new(e.to_string()))?;
    let started = open(store).and_then(|(s, pending)| {
        let mountpoint = s.mount(&spec)?;
        Ok((s, pending, mountpoint))
    });
    let (answer, service) = match started {
        Ok((s, pending, mountpoint)) => (Answer::Mounted { mountpoint }, Ok((s, pending))),
        Err(f) => (Answer::Error(f.clone()), Err(f)),
    };
    let json = serde_json::to_string(&answer).unwrap_or_default();
    println!("{json}");
    // Whoever started it waits for no more.
    let null = std::fs::File::options().write(true).open("/dev/null");
    if let Ok(null) = null {
        let _ = nix::unistd::dup2_stdout(&null);
    }
    let (service, pending) = service?;
    let served = service.serve();
    pending.wait(LAST_ANSWERS);
    served?;
    tracing::info!("the last mount is gone; ending");
    Ok(0)
}

/// After an unmount: waits until the daemon has written everything, if that was its last mount.
pub(super) fn wait_for_end(store: &Path) {
    let until = Instant::now() + Duration::from_secs(60);
    let Ok(lock) = std::fs::File::options()
        .write(true)
        .open(store.join("lock"))
    else {
        return;
    };
    while Instant::now() < until {
        if lock.try_lock().is_ok() {
            return;
        }
        let others = Client::connect(store)
            .ok()
            .flatten()
            .and_then(|mut c| c.ask(&Request::Stats).ok());
        if let Some(Answer::Stats { mounts, .. }) = others
            && !mounts.is_empty()
        {
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Tells systemd that a service of Type=notify is ready (sd_notify(3)).
fn notify_systemd() {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    if let Ok(socket) = std::os::unix::net::UnixDatagram::unbound() {
        let _ = socket.send_to(b"READY=1\n", path);
    }
}

//! From the first file system to the real one, as the kernel itself would have done it, with the agent left behind.

use crate::{net, serve, sys};
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// The agent's line.
const LINE: &str = "/dev/ttyS0";
const ROOT: &str = "/root";
/// O_NOCTTY and O_NONBLOCK.
const LINE_FLAGS: i32 = 0o400 | 0o4000;

/// What the kernel's command line says of the root.
struct Wanted {
    device: String,
    kinds: Vec<String>,
    flags: String,
    read_only: bool,
    init: Option<String>,
    network: bool,
}

fn parse(line: &str, known: &str) -> Wanted {
    let mut wanted = Wanted {
        device: "/dev/ubda".into(),
        // Those that need a device. The likeliest first, as the others complain about what is not theirs.
        kinds: std::iter::once("ext4")
            .chain(known.lines().filter(|l| !l.starts_with("nodev")))
            .map(|l| l.trim().to_owned())
            .collect(),
        flags: String::new(),
        read_only: true,
        init: None,
        network: true,
    };
    for word in line.split_whitespace() {
        match word.split_once('=') {
            Some(("root", v)) => wanted.device = v.into(),
            Some(("rootfstype", v)) => wanted.kinds = v.split(',').map(str::to_owned).collect(),
            Some(("rootflags", v)) => wanted.flags = v.into(),
            Some(("init", v)) => wanted.init = Some(v.into()),
            Some(("umlctl.net", "off")) => wanted.network = false,
            None if word == "ro" => wanted.read_only = true,
            None if word == "rw" => wanted.read_only = false,
            // The rest is for the real process 1.
            None if word == "--" => break,
            _ => {}
        }
    }
    wanted
}

fn mount_root(wanted: &Wanted) -> Result<(), String> {
    let flags = if wanted.read_only { sys::MS_RDONLY } else { 0 };
    let mut errors = Vec::new();
    for kind in &wanted.kinds {
        match sys::mount_at(&wanted.device, ROOT, kind, flags, &wanted.flags) {
            Ok(()) => return Ok(()),
            // EINVAL: it is of another kind.
            Err(e) if e.raw_os_error() == Some(22) => {}
            Err(e) => errors.push(format!("as {kind}: {e}")),
        }
    }
    if errors.is_empty() {
        errors.push("no file system that this kernel knows is on it".into());
    }
    Err(format!(
        "cannot mount the root file system {}: {}",
        wanted.device,
        errors.join("; ")
    ))
}

/// Boots. Returns only if it fails.
pub fn boot() -> String {
    match prepare().and_then(|(wanted, devices)| switch(&wanted).map(|()| (wanted, devices))) {
        Err(e) => e,
        Ok((wanted, devices)) => {
            match sys::fork_process() {
                Ok(0) => serve::serve(devices),
                Ok(_) => drop(devices),
                Err(e) => return format!("fork: {e}"),
            }
            start_init(&wanted)
        }
    }
}

/// What the agent opens while it is sure to be there.
pub struct Devices {
    /// The line to the host.
    pub line: OwnedFd,
    /// Nothing.
    pub null: OwnedFd,
    /// The random-number generator.
    pub random: OwnedFd,
}

fn open(path: &str, flags: i32) -> Result<OwnedFd, String> {
    File::options()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path)
        .map(OwnedFd::from)
        .map_err(|e| format!("cannot open {path}: {e}"))
}

fn prepare() -> Result<(Wanted, Devices), String> {
    sys::mount_at("devtmpfs", "/dev", "devtmpfs", 0, "")
        .map_err(|e| format!("cannot mount /dev: {e}"))?;
    sys::mount_at("proc", "/proc", "proc", 0, "")
        .map_err(|e| format!("cannot mount /proc: {e}"))?;
    let read = |path| fs::read_to_string(path).map_err(|e| format!("cannot read {path}: {e}"));
    let wanted = parse(&read("/proc/cmdline")?, &read("/proc/filesystems")?);
    let devices = Devices {
        line: open(LINE, LINE_FLAGS)?,
        null: open("/dev/null", 0)?,
        random: open("/dev/urandom", 0)?,
    };
    sys::make_raw(&devices.line).map_err(|e| format!("cannot set up {LINE}: {e}"))?;
    if wanted.network
        && let Err(e) = net::configure()
    {
        // A VM without a network is better than none.
        eprintln!("umlctl agent: the network could not be configured: {e}");
    }
    mount_root(&wanted)?;
    Ok((wanted, devices))
}

/// Makes the root the root.
fn switch(wanted: &Wanted) -> Result<(), String> {
    let _ = sys::unmount("/proc");
    // As the kernel does it (CONFIG_DEVTMPFS_MOUNT). Where there is no directory for it the root has to do without.
    if Path::new(ROOT).join("dev").is_dir() {
        let _ = sys::mount_at("/dev", &format!("{ROOT}/dev"), "", sys::MS_MOVE, "");
    }
    // Its memory is free when the agent is replaced; the rest at once.
    let _ = fs::remove_file("/agent");
    let failed = |e: std::io::Error| format!("cannot switch to {}: {e}", wanted.device);
    std::env::set_current_dir(ROOT).map_err(failed)?;
    sys::mount_at(".", "/", "", sys::MS_MOVE, "").map_err(failed)?;
    std::os::unix::fs::chroot(".").map_err(failed)?;
    std::env::set_current_dir("/").map_err(failed)
}

/// Becomes the real process 1. What the kernel gave us in arguments and environment is meant for it.
fn start_init(wanted: &Wanted) -> String {
    sys::ignore(sys::signals::PIPE, false);
    let usual = ["/sbin/init", "/init", "/etc/init", "/bin/init", "/bin/sh"];
    let candidates = match &wanted.init {
        Some(init) => vec![init.as_str()],
        None => usual.to_vec(),
    };
    let mut errors = Vec::new();
    for path in candidates {
        let e = Command::new(path).args(std::env::args_os().skip(1)).exec();
        errors.push(format!("{path}: {e}"));
    }
    format!("no init could be started: {}", errors.join("; "))
}

//! A VM's network namespace: made, entered, removed.
//!
//! Made with `ip` and `nft`, by two batches and one rule set, while the VM is started: a resume waits for it. It stays when
//! its VM ends, until `rm`: what is sent to the VM's address goes through to the tap and is lost there, without an
//! answer, so connections that a resumed VM will go on with are not reset. This does not need anybody to be alive.

use super::Error;
use super::names::{self, GATEWAY, GATEWAY_MAC, GUEST, HOST, HOST_MAC, INNER, INNER_MAC, TAP};
use crate::sys::tap;
use crate::vm::cmdline::GUEST_MAC;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Where `ip` keeps names of namespaces.
const NAMES: &str = "/run/netns";
/// The namespace that the calling thread is in.
const OWN: &str = "/proc/thread-self/ns/net";

fn path(index: u32) -> PathBuf {
    Path::new(NAMES).join(names::namespace(index))
}

/// A tool that runs; none once it was waited for.
#[derive(Debug)]
struct Tool(&'static str, Option<Child>);

/// Starts a tool with a text on stdin.
fn start(
    tool: &'static str,
    package: &'static str,
    args: &[&str],
    input: &str,
) -> Result<Tool, Error> {
    let mut child = Command::new(tool)
        .args(args)
        .env("LC_ALL", "C")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|_| Error::NoTool(tool, package))?;
    // All that is written here fits into the pipe. If it ends early its message says more than ours would.
    if let Some(mut stdin) = child.stdin.take() {
        let _ = stdin.write_all(input.as_bytes());
    }
    Ok(Tool(tool, Some(child)))
}

impl Tool {
    fn end(mut self) -> Result<(), Error> {
        let tool = self.0;
        let failed = |message: String| Error::Tool { tool, message };
        let Some(child) = self.1.take() else {
            return Ok(());
        };
        let output = child.wait_with_output();
        let output = output.map_err(|e| failed(e.to_string()))?;
        if output.status.success() {
            return Ok(());
        }
        let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(failed(if message.is_empty() {
            output.status.to_string()
        } else {
            message
        }))
    }
}

/// Before anything is taken away that it works on.
impl Drop for Tool {
    fn drop(&mut self) {
        let _ = self.1.as_mut().map(Child::wait);
    }
}

fn ip(batch: &str) -> Result<Tool, Error> {
    start("ip", "iproute2", &["-batch", "-"], batch)
}

/// The host's side.
fn outside(index: u32) -> String {
    let (ns, veth, address) = (
        names::namespace(index),
        names::outer(index),
        names::address(index),
    );
    format!(
        "link add {veth} address {HOST_MAC} type veth peer name {INNER} address {INNER_MAC} netns {ns}
addr add {HOST}/32 dev {veth}
link set {veth} up
neigh replace {address} lladdr {INNER_MAC} dev {veth} nud permanent
route replace {address}/32 dev {veth} src {HOST}
"
    )
}

/// The namespace's side.
fn inside() -> String {
    format!(
        "link set lo up
link set {TAP} address {GATEWAY_MAC}
addr add {GATEWAY}/24 dev {TAP}
neigh replace {GUEST} lladdr {GUEST_MAC} dev {TAP} nud permanent
link set {INNER} up
route add {HOST}/32 dev {INNER}
neigh replace {HOST} lladdr {HOST_MAC} dev {INNER} nud permanent
route add default via {HOST} dev {INNER}
"
    )
}

/// The rules. The address is exchanged packet by packet. Nothing is sent on a guest's behalf: if it is not there, silence.
fn rules(index: u32) -> String {
    let address = names::address(index);
    format!(
        "table ip umlctl {{
chain before {{
type filter hook prerouting priority -300; policy accept;
notrack
iifname {INNER} ip daddr {address} ip daddr set {GUEST}
iifname {TAP} ip saddr != {GUEST} drop
}}
chain after {{
type filter hook postrouting priority 300; policy accept;
oifname {INNER} ip saddr {GUEST} ip saddr set {address}
}}
chain own {{
type filter hook output priority -300; policy accept;
notrack
icmp type {{ destination-unreachable, time-exceeded }} drop
}}
}}
"
    )
}

fn sysctl(key: &str, value: &str) -> Result<(), Error> {
    let path = Path::new("/proc/sys/net/ipv4").join(key);
    std::fs::write(&path, value).map_err(|source| Error::Io {
        what: "write",
        path,
        source,
    })
}

fn namespace_error(what: &'static str, index: u32) -> impl FnOnce(nix::errno::Errno) -> Error {
    move |e| Error::Io {
        what,
        path: path(index),
        source: e.into(),
    }
}

/// An open namespace.
///
/// # Errors
/// It is not there.
pub fn open(index: u32) -> Result<OwnedFd, Error> {
    let path = path(index);
    File::open(&path)
        .map(OwnedFd::from)
        .map_err(|source| Error::Io {
            what: "open",
            path,
            source,
        })
}

/// Makes an empty namespace, with a name as `ip netns` gives it.
fn add(index: u32) -> Result<(), Error> {
    let path = path(index);
    let io = |what| {
        let path = path.clone();
        move |source| Error::Io { what, path, source }
    };
    std::fs::create_dir_all(NAMES).map_err(io("make the directory of"))?;
    File::create(&path).map_err(io("make"))?;
    away(index, || {
        unshare(CloneFlags::CLONE_NEWNET).map_err(namespace_error("make", index))?;
        let none = None::<&str>;
        mount(Some(OWN), &path, none, MsFlags::MS_BIND, none)
            .map_err(namespace_error("name", index))
    })
}

/// Does something that takes the calling thread to a VM's namespace, and takes it back.
fn away<T>(index: u32, act: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    let back = File::open(OWN).map_err(|source| Error::Io {
        what: "open",
        path: OWN.into(),
        source,
    })?;
    let result = act();
    setns(back, CloneFlags::CLONE_NEWNET).map_err(namespace_error("leave", index))?;
    result
}

/// Does something with the calling thread in a VM's namespace.
fn within<T>(index: u32, act: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
    away(index, || {
        setns(open(index)?, CloneFlags::CLONE_NEWNET).map_err(namespace_error("enter", index))?;
        act()
    })
}

/// Whether a VM's namespace is there, with everything in it. Only the number says what that is, so it is as good as new.
fn is_complete(index: u32) -> bool {
    let forwards = || {
        let path = Path::new("/proc/sys/net/ipv4/ip_forward");
        Ok(std::fs::read_to_string(path).is_ok_and(|t| t.trim() == "1"))
    };
    path(index).exists()
        && nix::net::if_::if_nametoindex(names::outer(index).as_str()).is_ok()
        && within(index, forwards).unwrap_or(false)
}

/// A VM's namespace that is being made. Its tap is there, and takes what a guest sends. If it is not finished, it is removed.
#[derive(Debug)]
pub struct Making {
    index: u32,
    /// What makes the host's side, and the rules.
    tools: Option<(Tool, Tool)>,
    /// It is new, and not whole yet.
    undo: bool,
}

/// Begins to make a VM's namespace and the way to it: the namespace, and its tap, which is opened. One that is there stays,
/// with the connections of the VM that was.
///
/// # Errors
/// A tool's, or another has the tap open; then nothing is left of what was made.
pub fn begin(index: u32) -> Result<(Making, OwnedFd), Error> {
    let tap = |make: fn(&str) -> std::io::Result<OwnedFd>| {
        make(TAP).map_err(|source| Error::Io {
            what: "open the tap in",
            path: path(index),
            source,
        })
    };
    if is_complete(index) {
        let there = Making {
            index,
            tools: None,
            undo: false,
        };
        return Ok((there, within(index, || tap(tap::open))?));
    }
    remove(index)?;
    let mut making = Making {
        index,
        tools: None,
        undo: true,
    };
    add(index)?;
    let outside = ip(&outside(index))?;
    // Rules need no interface of theirs to be there.
    let (rules, tap) = within(index, || {
        let tool = start("nft", "nftables", &["-f", "-"], &rules(index))?;
        Ok((tool, tap(tap::make)?))
    })?;
    making.tools = Some((outside, rules));
    Ok((making, tap))
}

impl Making {
    /// Waits until the host's side is there, and makes the rest.
    ///
    /// # Errors
    /// A tool's; then nothing is left of it.
    pub fn finish(mut self) -> Result<(), Error> {
        let Some((outside, rules)) = self.tools.take() else {
            return Ok(());
        };
        outside.end()?;
        // For packets between VMs. Set for this interface alone: the host need not be a router.
        let forwarding = format!("conf/{}/forwarding", names::outer(self.index));
        sysctl(&forwarding, "1")?;
        within(self.index, || {
            ip(&inside())?.end()?;
            rules.end()?;
            // Last: until the rules stand nothing passes.
            sysctl("ip_forward", "1")
        })?;
        self.undo = false;
        Ok(())
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        // Before that whoever works on it has ended.
        self.tools = None;
        if self.undo {
            let _ = remove(self.index);
        }
    }
}

/// Removes a VM's namespace. The pair goes with it, and the route with the pair. That there is none is no error.
///
/// # Errors
/// A tool's.
pub fn remove(index: u32) -> Result<(), Error> {
    let veth = names::outer(index);
    if nix::net::if_::if_nametoindex(veth.as_str()).is_ok() {
        // At once: a namespace is taken apart some time after its last user.
        ip(&format!("link del {veth}\n"))?.end()?;
    }
    if path(index).exists() {
        ip(&format!("netns del {}\n", names::namespace(index)))?.end()?;
    }
    Ok(())
}

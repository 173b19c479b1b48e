//! Beside a bare `linux.uml`: the time to the first line of init, and the speed of the guest.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::Plan;
use super::guest::Vm;
use super::tap::{GUEST, Tap};
use crate::run::check_interrupted;
use crate::table1::Samples;

/// Megabytes.
const MB: u64 = 128;
/// A guest that writes nothing for so long is lost.
const LIMIT: Duration = Duration::from_secs(120);
/// How often a console is looked at. The same for all that is compared.
const LOOK: Duration = Duration::from_millis(1);
/// Pieces of work of the guest, as its lines name them.
pub const WORK: [&str; 3] = ["cpu", "forks", "disk"];
/// What is compared: its name, and umlctl's options, if it is umlctl.
pub const SYSTEMS: [(&str, Option<&[&str]>); 3] = [
    ("bare", None),
    ("umlctl", Some(&[])),
    ("umlctl-raid6", Some(&["--raid6"])),
];

/// A guest's console as it is written.
struct Console {
    source: Box<dyn Read>,
    /// Does it end when the machine does?
    pipe: bool,
    text: Vec<u8>,
}

impl Console {
    /// When a line was there; what came before it is passed over.
    fn wait(&mut self, line: &str) -> Result<Instant> {
        let line = format!("bench: {line}").into_bytes();
        let begun = Instant::now();
        let mut piece = [0; 4096];
        loop {
            if let Some(end) = self.text.iter().position(|b| *b == b'\n') {
                let got: Vec<u8> = self.text.drain(..=end).collect();
                // Something without an end of line may stand before it, as a prompt does.
                if got.trim_ascii_end().ends_with(&line) {
                    return Ok(Instant::now());
                }
                continue;
            }
            match self.source.read(&mut piece) {
                Ok(0) if self.pipe => bail!("the machine has ended"),
                Ok(0) => {}
                Ok(n) => {
                    self.text.extend(&piece[..n]);
                    continue;
                }
                Err(e) if e.kind() == ErrorKind::WouldBlock => {}
                Err(e) => return Err(e).context("reading a console"),
            }
            check_interrupted()?;
            if begun.elapsed() > LIMIT {
                bail!(
                    "nothing on its console for {} s: {}",
                    LIMIT.as_secs(),
                    String::from_utf8_lossy(&line)
                );
            }
            std::thread::sleep(LOOK);
        }
    }
}

/// A machine of either kind. Ends when dropped.
pub struct Machine<'a> {
    console: Console,
    begun: Instant,
    /// The process that takes the bare one with it
    bare: Option<Child>,
    _vm: Option<Vm<'a>>,
}

impl Drop for Machine<'_> {
    fn drop(&mut self) {
        if let Some(mut child) = self.bare.take() {
            // Ours until it is waited for, so its number is no other's.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn start<'a>(
    plan: &'a Plan,
    role: &str,
    system: Option<&[&str]>,
    number: usize,
) -> Result<Machine<'a>> {
    check_interrupted()?;
    match system {
        None => bare(plan, role, number, None),
        Some(options) => ours(plan, role, options),
    }
}

fn ours<'a>(plan: &'a Plan, role: &str, options: &[&str]) -> Result<Machine<'a>> {
    let (mem, append) = (format!("{MB}M"), format!("bench={role}"));
    let image = plan.image.display().to_string();
    let mut args = vec!["run", "b", "--image", &image, "--mem", &mem];
    args.extend(["--append", &append, "--detach", "--no-wait"]);
    args.extend(options);
    let begun = Instant::now();
    let (_, answer) = plan.umlctl(&args)?;
    let vm = Vm::made(plan, &answer)?;
    let dir = super::net::text(&answer, "dir")?;
    let log = File::open(format!("{dir}/console.log")).context("opening the console's log")?;
    let console = Console {
        source: Box::new(log),
        pipe: false,
        text: Vec::new(),
    };
    Ok(Machine {
        console,
        begun,
        bare: None,
        _vm: Some(vm),
    })
}

/// What umlctl gives its machines too: a pid namespace, a /proc, fixed addresses, memory in a tmpfs, a disk's difference;
/// and a network, if there is a tap for it.
pub fn bare<'a>(
    plan: &'a Plan,
    role: &str,
    number: usize,
    tap: Option<&Tap>,
) -> Result<Machine<'a>> {
    let dir = plan.work.join(format!("bare{number}"));
    std::fs::create_dir(&dir).with_context(|| format!("making {}", dir.display()))?;
    let errors = File::create(dir.join("errors")).context("a file for errors")?;
    let (cow, image) = (dir.join("cow"), &plan.image);
    let mut c = Command::new("unshare");
    c.args(["--pid", "--fork", "--kill-child", "--mount-proc"])
        .args(["setarch", std::env::consts::ARCH, "-R", "linux.uml"])
        .arg(format!("mem={MB}M"))
        .arg(format!("umid=bare{number}"))
        .arg(format!("uml_dir={}/", dir.display()))
        .arg(format!("ubd0={},{}", cow.display(), image.display()))
        .args(["con=null", "con0=fd:0,fd:1", "ssl=null", "root=/dev/ubda"])
        .args(["rw", "init=/init"])
        .arg(format!("bench={role}"))
        .env("TMPDIR", "/dev/shm")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(errors);
    if let Some(tap) = tap {
        c.arg(format!("vec0:transport=tap,ifname={}", tap.name))
            .arg(format!("addr={GUEST}"));
    }
    let begun = Instant::now();
    let mut child = c.spawn().context("starting linux.uml")?;
    let out = child.stdout.take().context("its console")?;
    let flags = fcntl(&out, FcntlArg::F_SETFL(OFlag::O_NONBLOCK));
    let machine = Machine {
        console: Console {
            source: Box::new(out),
            pipe: true,
            text: Vec::new(),
        },
        begun,
        bare: Some(child),
        _vm: None,
    };
    flags.context("setting up its console")?;
    Ok(machine)
}

/// The part `boot`.
pub fn all(plan: &Plan, samples: &mut Samples) -> Result<()> {
    for round in 0..plan.rounds {
        let mut took = Vec::new();
        for (i, (system, options)) in SYSTEMS.into_iter().enumerate() {
            let mut machine = start(plan, "boot", options, round * SYSTEMS.len() + i)?;
            let up = machine.console.wait("init").context(system)?;
            let seconds = up.duration_since(machine.begun).as_secs_f64();
            samples.add(format!("boot/{system}"), seconds);
            took.push(seconds);
        }
        samples.add("boot_ratio/umlctl", took[1] / took[0]);
        samples.add("boot_ratio/umlctl-raid6", took[2] / took[0]);
    }
    Ok(())
}

/// The part `steady`.
pub fn steady(plan: &Plan, samples: &mut Samples) -> Result<()> {
    for round in 0..plan.rounds {
        let mut both = [const { Vec::new() }; 2];
        // Each is the first in every other round.
        for i in [round % 2, 1 - round % 2] {
            let (system, options) = SYSTEMS[i];
            // Other numbers than those of the part `boot`.
            let mut machine = start(plan, "steady", options, 10_000 + round)?;
            both[i] = work(&mut machine.console, samples, system).context(system)?;
        }
        for (i, piece) in WORK.into_iter().chain(["all"]).enumerate() {
            samples.add(format!("steady_ratio/{piece}"), both[1][i] / both[0][i]);
        }
    }
    Ok(())
}

/// Looks at a guest that works; how long it takes for its pieces of work, and for all of them.
fn work(console: &mut Console, samples: &mut Samples, system: &str) -> Result<Vec<f64>> {
    // The first time all of it, so that boot is over and the guest's caches are warm.
    console.wait("start")?;
    let begun = console.wait("start")?;
    let mut last = begun;
    let mut times = Vec::new();
    for piece in WORK {
        let now = console.wait(piece)?;
        times.push(now.duration_since(last).as_secs_f64());
        last = now;
    }
    times.push(last.duration_since(begun).as_secs_f64());
    for (piece, t) in WORK.into_iter().chain(["all"]).zip(&times) {
        samples.add(format!("steady_{piece}/{system}"), *t);
    }
    Ok(times)
}

//! The guests: an image with what they do, and machines of it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::Plan;
use super::net::{first_reply, text};
use crate::table1::drive::run;

/// Where every guest echoes.
pub const ECHO: u16 = 7;
/// Where most of them do so by a new process.
pub const NC: u16 = 9;
/// Where it answers questions.
pub const ASK: u16 = 8;

/// Makes the image.
pub fn image(plan: &Plan) -> Result<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    let root = own
        .ancestors()
        .nth(2)
        .context("finding the root of the repository")?;
    let guest = own.join("guest");
    let watch = plan.work.join("watch");
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let mut c = Command::new(rustc);
    c.args([
        "--edition",
        "2024",
        "-O",
        "-C",
        "target-feature=+crt-static",
        "-o",
    ])
    .arg(&watch)
    .arg(guest.join("watch.rs"));
    run(c, &plan.work).context("compiling the guest's program")?;
    let image = plan.work.join("image");
    let mut c = Command::new(root.join("tools/image-busybox"));
    c.arg(&image).arg("--init").arg(guest.join("init"));
    for (from, to) in [
        (root.join("tools/image/init"), "/init.usual"),
        (guest.join("rc"), "/etc/rc"),
        (watch, "/watch"),
    ] {
        c.arg("--file").arg(format!("{}:{to}", from.display()));
    }
    run(c, &plan.work).context("making the guests' image")?;
    Ok(image)
}

/// A machine. Removed when dropped.
#[derive(Debug)]
pub struct Vm<'a> {
    plan: &'a Plan,
    /// Its name
    pub name: String,
    /// How it is reached from here
    pub address: String,
}

impl<'a> Vm<'a> {
    /// Boots one with so many megabytes, and waits until it answers and its file is full.
    pub fn start(plan: &'a Plan, name: &str, role: &str, mb: u64) -> Result<Self> {
        let fill = Plan::fill(mb);
        let (mem, append) = (format!("{mb}M"), format!("bench={role} fill={fill}"));
        let image = plan.image.display().to_string();
        let mut args = vec!["run", name, "--image", &image, "--mem", &mem];
        args.extend(["--append", &append, "--detach"]);
        // Removed even if it does not come up.
        let mut vm = Self {
            plan,
            name: name.into(),
            address: String::new(),
        };
        let (_, answer) = plan.umlctl(&args)?;
        vm.address = text(&answer, "address")?;
        first_reply(&vm.address, ECHO)?;
        Ok(vm)
    }

    /// One that has just been made.
    pub fn made(plan: &'a Plan, answer: &serde_json::Value) -> Result<Self> {
        Ok(Self {
            plan,
            name: text(answer, "name")?,
            address: text(answer, "address")?,
        })
    }
}

impl Drop for Vm<'_> {
    fn drop(&mut self) {
        // Empty if it was handed on.
        if !self.name.is_empty() {
            self.plan.quietly(&["rm", "-f", &self.name]);
        }
    }
}

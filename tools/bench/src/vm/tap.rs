//! A network interface for a bare machine.

use std::process::Command;

use anyhow::Result;

use super::Plan;
use crate::table1::drive::run;

/// The guest's address: one of those for measurements (RFC 2544).
pub const GUEST: &str = "198.18.85.2";
const HOST: &str = "198.18.85.1/30";

/// A tap of the host. Removed when dropped.
#[derive(Debug)]
pub struct Tap {
    /// Its name
    pub name: String,
}

impl Tap {
    /// Makes it, and sets it up.
    pub fn new(plan: &Plan) -> Result<Self> {
        let tap = Self {
            name: format!("bench{}", std::process::id()),
        };
        let ip = |line: &str| {
            let mut c = Command::new("ip");
            c.args(line.split_whitespace());
            run(c, &plan.work).map(drop)
        };
        ip(&format!("tuntap add dev {} mode tap", tap.name))?;
        ip(&format!("addr add {HOST} dev {}", tap.name))?;
        ip(&format!("link set dev {} up", tap.name))?;
        Ok(tap)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        // If that fails it is an interface that nobody uses.
        let _ = Command::new("ip")
            .args(["link", "del", "dev", &self.name])
            .output();
    }
}

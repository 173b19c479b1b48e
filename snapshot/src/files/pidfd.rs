//! pidfds of processes in the tree.

use serde::{Deserialize, Serialize};

use super::error::Refuse;
use super::fdinfo::Info;

/// A descriptor of a process of the snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pidfd {
    /// Which.
    pub pid: i32,
}

pub(super) fn class(pids: &[i32], info: &Info) -> Result<Pidfd, Refuse> {
    let pid = info
        .value("Pid:")
        .and_then(|text| text.parse::<i32>().ok())
        .unwrap_or(0);
    if pids.contains(&pid) {
        return Ok(Pidfd { pid });
    }
    let reason = if pid > 0 {
        format!("process {pid} is not captured")
    } else {
        "its process has ended".to_owned()
    };
    Err(Refuse::no(
        reason,
        "close it, or capture the tree that it is in",
    ))
}

//! Running processes and User Mode Linux machines, snapshotted, resumed and forked while they run.
//!
//! Processes are the library `snapshot`'s work (`docs/snapshot.md`); the life of a VM is here (`docs/vm.md`):
//!
//! - [`vm`]: what a VM is on disk
//! - [`net`]: its addresses and its network namespace
//! - [`supervisor`]: the process behind it
//! - [`control`]: how verbs talk to that process
//! - [`agent`]: how they talk to the guest
//! - [`snapshots`]: where snapshots of VMs are, how they are taken, and how VMs are made of them

pub mod agent;
pub mod cli;
pub mod control;
pub mod net;
pub mod snapshots;
pub mod supervisor;
pub mod sys;
pub mod vm;

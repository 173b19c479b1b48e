//! Running processes (and, by a later issue, User Mode Linux machines), snapshotted, resumed and forked while they run.
//!
//! The work is done by the library `snapshot`; here is the command line. `docs/snapshot.md` has the design.

pub mod cli;
pub mod snapshots;

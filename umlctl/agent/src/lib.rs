//! What the host's and the guest's end of the agent channel have in common.
//!
//! `docs/vm.md` has the protocol byte by byte.

pub mod archive;
pub mod exec;
pub mod wire;

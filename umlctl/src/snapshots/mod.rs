//! Snapshots of machines: where they are kept, how they are taken, and how a machine is made of one again.

pub mod memory;
pub mod resume;
pub mod store;
pub mod take;

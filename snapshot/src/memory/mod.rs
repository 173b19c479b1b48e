//! Saving a process's memory as it was at one point in time, while it runs: `docs/snapshot.md`, sections 1 and 6.
//!
//! [`Tracker`] write-protects and copies ahead of the point in time, fixes it in tens of microseconds while the caller
//! holds the target stopped, and copies the rest while it runs again. Nothing here stops the target or makes calls in
//! it: the caller does, and hands over a userfaultfd that the target has made.
//!
//! [`plain`] copies what cannot be tracked, in the stop.

mod copy;
mod error;
mod faults;
mod parent;
pub mod place;
pub mod plain;
mod ranges;
mod shared;
mod stats;
mod table;
mod tracker;

pub use error::Error;
pub use parent::Parent;
pub use stats::{Round, Stats};
pub use tracker::{Fence, Frozen, Mappings, Options, SavedSpace, Tracker};

/// Addresses from a first one to before a last one.
pub type Span = std::ops::Range<u64>;

//! Capture of running processes with a pause that does not grow with their size, and their lazy resume.
//!
//! `docs/snapshot.md` has the design: the order of events, the bytes on disk, and what a death at each step leaves.

pub mod capture;
pub mod fault;
pub mod files;
#[doc(hidden)]
pub mod fuzz;
pub mod image;
pub mod memory;
pub mod proc;
pub mod resume;
mod sparse;
pub mod sys;
pub mod target;
pub mod uml;

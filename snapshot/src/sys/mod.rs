//! System calls that have no safe wrapper elsewhere. Every unsafe block of the crate is here.
#![allow(unsafe_code)]

pub mod mapfile;
pub mod pagemap;
pub mod procmem;
pub mod sched;
pub mod uffd;

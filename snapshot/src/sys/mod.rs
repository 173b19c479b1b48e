//! System calls that have no safe wrapper elsewhere. Every unsafe block of the crate is here.
#![allow(unsafe_code)]

pub mod clone;
pub mod fill;
pub mod log;
pub mod ptrace;
pub mod remote;
pub mod scratch;
pub mod signals;

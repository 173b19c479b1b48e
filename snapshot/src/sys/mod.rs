//! System calls that have no safe wrapper elsewhere. Every unsafe block of the crate is here.
#![allow(unsafe_code)]

pub mod limits;
pub mod ptrace;
pub mod remote;

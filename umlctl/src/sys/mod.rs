//! System calls that have no safe wrapper: one file a topic. All of the crate's `unsafe` is here.

#![allow(unsafe_code)]

pub mod fd;
pub mod signal;
pub mod tap;
pub mod terminal;

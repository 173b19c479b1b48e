//! System calls that have no safe wrapper: one file a topic. All of the crate's `unsafe` is here.

#![allow(unsafe_code)]

pub mod calls;
pub mod clone;
pub mod cpu;
pub mod descriptor;
pub mod fdioctl;
pub mod fill;
pub mod handle;
pub mod kcmp;
pub mod limits;
pub mod log;
pub mod mapfile;
pub mod netdev;
pub mod pagemap;
pub mod perf;
pub mod procmem;
pub mod ptrace;
pub mod remote;
pub mod resident;
pub mod sched;
pub mod scratch;
pub mod signals;
pub mod sockopt;
pub mod sysv;
pub mod template;
pub mod uffd;

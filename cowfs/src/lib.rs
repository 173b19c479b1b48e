//! cowfs: a checkpointing filesystem for application roots, with instant checkpoints and live rollback.
//!
//! Data flows one way: [`fuse`] speaks the kernel's protocol, [`mount`] turns its requests into operations of [`fs`]
//! inside batches of [`store`], which keeps [`tree`]s, file data and a log. `docs/design.md` has the whole.

pub mod cli;
pub mod control;
pub(crate) mod errors;
pub mod fault;
pub mod fs;
pub mod fuse;
pub mod history;
pub mod image;
pub mod mount;
pub mod mountinfo;
pub mod names;
pub mod service;
pub mod store;
pub mod tree;

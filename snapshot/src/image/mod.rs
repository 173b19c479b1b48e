//! The snapshot on disk: `docs/snapshot.md`, section 4.

pub mod index;
pub mod manifest;
pub mod pack;
pub mod pages;
pub mod pageset;
pub mod store;
pub mod verified;
pub mod verify;

pub use error::Error;
mod error;

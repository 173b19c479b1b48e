//! The snapshot on disk: `docs/snapshot.md`, section 4.

pub mod manifest;

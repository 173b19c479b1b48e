//! The daemon's control socket: one JSON request a line, one JSON answer a line.

mod client;
mod listing;
mod message;
mod server;

pub use client::Client;
pub use listing::{CheckpointInfo, HeadInfo, Listing, Shown};
pub use message::*;
pub use server::{Pending, listen};

/// File name of the socket in the store.
pub const SOCKET: &str = "control.sock";
/// Longest request, bytes.
const REQUEST_MAX: u64 = 1 << 20;

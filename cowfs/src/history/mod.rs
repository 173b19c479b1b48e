//! What keeps a long history useful: rules for pruning, streams between stores, stores of objects.

mod base;
mod cut;
pub mod prune;
mod receive;
pub mod remote;
pub mod repair;
mod send;
pub mod stream;

pub(crate) use receive::is_receive;
pub use receive::{Received, parse_token, receive, token};
pub use send::{SendOptions, Sent, TransferError, send};

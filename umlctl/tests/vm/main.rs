//! The life of VMs: each test has a state root and an image of its own, and leaves nothing.

mod bad;
mod common;
mod console;
mod copying;
mod exec;
mod hostile;
mod killed;
mod life;
mod network;
mod terminal;

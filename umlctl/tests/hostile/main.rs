//! Never hurt the target: snapshots of targets that check themselves, under whatever may happen.

mod blocking;
mod common;
mod killed;
mod many;
mod refused;
mod restless;

//! Programs from Debian that know nothing of this: snapshotted while they work, ended, resumed, and right.
//!
//! Needs root, and redis-server, nginx, PostgreSQL, sqlite3 and python3 (`tools/setup test`).

mod common;
mod nginx;
mod postgres;
mod python;
mod redis;
mod sqlite;

//! Named fault points: places where a test can make the process die, armed by `COWFS_FAULT=NAME[@COUNT]`.
//!
//! `COWFS_FAULT=commit:superblock` aborts the process the first time the point is reached; with `@3` behind the name the
//! third time. Unarmed points cost one load.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

struct Armed {
    name: String,
    left: AtomicU64,
}

fn armed() -> Option<&'static Armed> {
    static ARMED: OnceLock<Option<Armed>> = OnceLock::new();
    ARMED
        .get_or_init(|| {
            let spec = std::env::var("COWFS_FAULT").ok()?;
            let (name, count) = match spec.split_once('@') {
                Some((name, n)) => (name.to_owned(), n.parse().ok()?),
                None => (spec, 1),
            };
            Some(Armed {
                name,
                left: AtomicU64::new(count),
            })
        })
        .as_ref()
}

/// A place where the process dies if it is armed for this name.
pub fn point(name: &str) {
    if let Some(a) = armed()
        && a.name == name
        && a.left.fetch_sub(1, Ordering::Relaxed) == 1
    {
        eprintln!("fault point {name}: aborting");
        std::process::abort();
    }
}

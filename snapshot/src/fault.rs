//! Named points at which a test can end the program: `SNAPSHOT_FAULT=name[:n]` kills it at the n-th passing (default the
//! first); `SNAPSHOT_FAULT=name[:n]:stop` stops it there with SIGSTOP instead.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

struct Armed {
    name: String,
    left: AtomicU32,
    signal: nix::sys::signal::Signal,
}

static ARMED: OnceLock<Option<Armed>> = OnceLock::new();

/// Passes a named point.
pub fn point(name: &str) {
    let Some(armed) = ARMED.get_or_init(arm) else {
        return;
    };
    if armed.name == name && armed.left.fetch_sub(1, Ordering::Relaxed) == 1 {
        let own = nix::unistd::getpid();
        let _ = nix::sys::signal::kill(own, armed.signal);
        if own.as_raw() == 1 && armed.signal == nix::sys::signal::SIGKILL {
            // The first process of a namespace is deaf to its own signals.
            crate::sys::clone::exit_now(137);
        }
    }
}

fn arm() -> Option<Armed> {
    let text = std::env::var("SNAPSHOT_FAULT").ok()?;
    let mut parts = text.split(':');
    let name = parts.next()?.to_owned();
    let n = parts.next().and_then(|n| n.parse().ok()).unwrap_or(1);
    let stop = parts.next() == Some("stop");
    let signal = if stop {
        nix::sys::signal::SIGSTOP
    } else {
        nix::sys::signal::SIGKILL
    };
    Some(Armed {
        name,
        left: AtomicU32::new(n),
        signal,
    })
}

//! The answering end.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use super::{Answer, Failure, REQUEST_MAX, Reply, Request, SOCKET};

/// Requests that are being answered.
#[derive(Debug, Default)]
pub struct Pending {
    count: Mutex<usize>,
    less: Condvar,
}

impl Pending {
    fn add(&self, n: isize) {
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        *count = count.saturating_add_signed(n);
        drop(count);
        self.less.notify_all();
    }

    /// Waits until every answer is on its way, or for so long at most: whoever asked for the last unmount shall hear of it
    /// before the process ends.
    pub fn wait(&self, at_most: Duration) {
        let until = Instant::now() + at_most;
        let mut count = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        while *count > 0 && Instant::now() < until {
            let left = until.saturating_duration_since(Instant::now());
            count = self
                .less
                .wait_timeout(count, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// Counts one request for as long as it lives.
struct Counted<'a>(&'a Pending);

impl<'a> Counted<'a> {
    fn new(pending: &'a Pending) -> Self {
        pending.add(1);
        Self(pending)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.add(-1);
    }
}

/// Listens in the store and answers every line by `f`, each connection in a thread of its own.
///
/// The caller holds the store's lock, so a socket that is there is a dead daemon's.
///
/// # Errors
/// What the host says.
pub fn listen(
    store: &Path,
    f: Arc<dyn Fn(Request) -> Result<Reply, Failure> + Send + Sync>,
) -> std::io::Result<Arc<Pending>> {
    let pending = Arc::new(Pending::default());
    let count = Arc::clone(&pending);
    let path = store.join(SOCKET);
    match std::fs::remove_file(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    // Bound under a name of its own and moved into place when its mode is right.
    let fresh = store.join(format!("{SOCKET}.new"));
    let _ = std::fs::remove_file(&fresh);
    let listener = UnixListener::bind(&fresh)?;
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(&fresh, &path)?;
    std::thread::Builder::new()
        .name("cowfs-control".into())
        .spawn(move || {
            for stream in listener.incoming() {
                let (f, count) = (Arc::clone(&f), Arc::clone(&count));
                let Ok(stream) = stream else { continue };
                let spawned = std::thread::Builder::new()
                    .name("cowfs-request".into())
                    .spawn(move || {
                        if let Err(e) = serve(stream, f.as_ref(), &count) {
                            tracing::debug!(error = %e, "a client went away");
                        }
                    });
                if let Err(e) = spawned {
                    tracing::error!(error = %e, "no thread for a client");
                }
            }
        })?;
    Ok(pending)
}

fn serve(
    stream: UnixStream,
    f: &(dyn Fn(Request) -> Result<Reply, Failure> + Send + Sync),
    pending: &Pending,
) -> std::io::Result<()> {
    let peer = getsockopt(&stream, PeerCredentials)?;
    let own = nix::unistd::geteuid().as_raw();
    // Whoever connects and says nothing does not hold a thread for ever.
    stream.set_read_timeout(Some(Duration::from_secs(600)))?;
    let mut out = stream.try_clone()?;
    let mut lines = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        let n = (&mut lines)
            .take(REQUEST_MAX)
            .read_until(b'\n', &mut line)?;
        if n == 0 {
            return Ok(());
        }
        let _counted = Counted::new(pending);
        let result = if peer.uid() != 0 && peer.uid() != own {
            Err(Failure::new(
                "only root and the daemon's own user may ask this",
            ))
        } else if line.last() != Some(&b'\n') {
            Err(Failure::new("the request is too long or cut short"))
        } else {
            match serde_json::from_slice(&line) {
                Ok(request) => f(request),
                Err(e) => Err(Failure {
                    code: 2,
                    message: format!("not a request: {e}"),
                }),
            }
        };
        let fatal = line.last() != Some(&b'\n');
        let mut answer = match result {
            Ok(Reply::Line(line)) => line,
            Ok(Reply::Answer(a)) => serde_json::to_vec(&a)?,
            Err(f) => serde_json::to_vec(&Answer::Error(f))?,
        };
        answer.push(b'\n');
        out.write_all(&answer)?;
        if fatal {
            return Ok(());
        }
    }
}

//! The threads that serve the target's faults.

use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::thread::JoinHandle;
use std::time::Duration;

use nix::unistd::gettid;

use super::copy::Room;
use super::place::{self, Place, Side};
use super::shared::{Shared, lock};

/// How often the stand-in looks, and how long the table's holder may read before it steps in.
const STAND_IN: Duration = Duration::from_millis(2);

/// Starts both threads; they end when `stop` is set.
pub(super) fn start(shared: &Arc<Shared>) -> std::io::Result<[JoinHandle<()>; 2]> {
    let (a, b) = (shared.clone(), shared.clone());
    Ok([
        std::thread::Builder::new()
            .name("faults".into())
            .spawn(move || serve(&a))?,
        std::thread::Builder::new()
            .name("stand-in".into())
            .spawn(move || stand_in(&b))?,
    ])
}

fn serve(shared: &Shared) {
    shared.server.tid.store(gettid().as_raw(), SeqCst);
    // The thread that commands the stop is preferred, too, and may be where this one is.
    crate::sys::sched::prefer_this_thread_most();
    let mut place = Place::new(shared.source.pid, Side::With, shared.cpus);
    let mut room = Room::new();
    let mut faults = Vec::with_capacity(64);
    while !shared.stop.load(Relaxed) {
        // The timeout is for `stop`, and for what the stand-in leaves.
        shared.uffd.wait(5);
        faults.append(&mut lock(&shared.aside.faults));
        if let Err(source) = shared.uffd.read(&mut faults) {
            shared.fail(shared.error("read the faults of", 0, 0, source));
            std::thread::sleep(Duration::from_millis(1));
        }
        // All that came together before the copying goes on.
        shared.urgent.fetch_add(1, SeqCst);
        for f in faults.drain(..) {
            shared.serve(f, &mut room);
        }
        shared.urgent.fetch_sub(1, SeqCst);
        if shared.server.late.load(Relaxed) {
            place.stay();
        }
        place.follow();
    }
}

/// After the point in time the table is held while the target's memory is read. A page that the target has given up
/// with MADV_FREE may be taken by the kernel between the look that found it and the read: then the reader itself waits
/// for a missing page that only the thread behind the table could fill. This thread needs no table, and fills it.
fn stand_in(shared: &Shared) {
    let mut faults = Vec::new();
    let mut served = None;
    while !shared.stop.load(Relaxed) {
        std::thread::sleep(STAND_IN);
        let now = shared.uffd.wait(0).then(|| shared.counts.served());
        if now.is_some() && now == served {
            shared.server.late.store(true, Relaxed);
            place::free(shared.server.tid.load(SeqCst), shared.cpus);
        }
        served = now;
        let since = shared.aside.reading.load(SeqCst);
        if since == 0 || shared.now_us().saturating_sub(since) < STAND_IN.as_micros() as u64 {
            continue;
        }
        if shared.uffd.read(&mut faults).is_err() {
            continue;
        }
        for f in faults.drain(..) {
            if f.protected {
                lock(&shared.aside.faults).push(f);
                continue;
            }
            let mut filled = lock(&shared.aside.filled);
            match shared.uffd.zero(f.address, 4096) {
                Ok(_) => filled.push(f.address),
                Err(_) => drop(shared.uffd.wake(f.address, 4096)),
            }
        }
    }
}

//! Doing something in another process's network.

use std::fs;
use std::io;
use std::os::fd::AsFd;

use crate::sys::descriptor;

/// Runs a closure in the network of a process.
pub(super) fn within<T: Send>(
    pid: i32,
    run: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    let path = format!("/proc/{pid}/ns/net");
    if fs::read_link(&path)? == fs::read_link("/proc/self/ns/net")? {
        return run();
    }
    let ns = fs::File::open(path)?;
    // A thread of its own, so that ours stays where it is.
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            descriptor::enter_network(ns.as_fd())?;
            run()
        });
        thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread for another network failed")))
    })
}

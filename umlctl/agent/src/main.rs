//! The guest's end: process 1 until the real one takes over, then a daemon that does what umlctl asks for.

mod boot;
mod child;
mod net;
mod power;
mod serve;
mod stream;
mod sys;

fn main() {
    if std::process::id() != 1 {
        eprintln!("this is the agent that umlctl puts into its VMs; it is of no use elsewhere");
        std::process::exit(2);
    }
    let error = boot::boot();
    // What the kernel makes of the end of process 1 is a panic, and so the end of the VM.
    eprintln!("umlctl agent: {error}");
    std::process::exit(1);
}

//! Resumes a snapshot (of the capture, or one whose manifest is plain JSON, `manifest.json`), waits for its root, and passes its exit status on.
//! For tests: the harness has threads, and a resume must start from a process that has one.

use snapshot::image::manifest::Manifest;
use snapshot::image::store;
use snapshot::resume::image::Snapshot;
use snapshot::resume::source::{PageSource, Plain};
use snapshot::resume::{Options, resume};
use std::path::PathBuf;

fn main() {
    let mut options = Options::default();
    let mut detach = false;
    let mut dir = PathBuf::new();
    for a in std::env::args().skip(1) {
        match a.as_str() {
            "--eager" => options.eager = true,
            "--detach" => detach = true,
            a => dir = a.into(),
        }
    }
    options.dir.clone_from(&dir);
    let (manifest, source): (Manifest, Box<dyn PageSource>) =
        match std::fs::read(dir.join("manifest.json")) {
            Ok(text) => (
                serde_json::from_slice(&text).expect("manifest"),
                Box::new(Plain::open(&dir).expect("pages")),
            ),
            Err(_) => {
                let manifest = store::load(&dir).expect("manifest");
                let source = Snapshot::open(&dir, &manifest).expect("pages");
                (manifest, Box::new(source))
            }
        };
    match resume(&manifest, &*source, &options) {
        Ok(r) => {
            let pager = r.pager.unwrap_or(0);
            eprintln!(
                "resumed {} in {} us, pager {pager}",
                r.pid,
                r.resume.as_micros()
            );
            if detach {
                return;
            }
            std::process::exit(wait(r.pid));
        }
        Err(e) => {
            let mut text = e.to_string();
            let mut source = std::error::Error::source(&e);
            while let Some(s) = source {
                text += &format!(": {s}");
                source = s.source();
            }
            eprintln!("error: {text}");
            std::process::exit(100);
        }
    }
}

fn wait(pid: i32) -> i32 {
    use nix::sys::wait::{WaitStatus, waitpid};
    loop {
        match waitpid(nix::unistd::Pid::from_raw(pid), None) {
            Ok(WaitStatus::Exited(_, code)) => return code,
            Ok(WaitStatus::Signaled(_, signal, _)) => return 128 + signal as i32,
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(e) => panic!("waitpid: {e}"),
        }
    }
}

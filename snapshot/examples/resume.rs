//! Resumes a snapshot whose manifest is plain JSON (`manifest.json`), waits for its root, and passes its exit status on.
//! For tests: the harness has threads, and a resume must start from a process that has one.

use snapshot::resume::{Options, resume, source::Plain};
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
    let text = std::fs::read(dir.join("manifest.json")).expect("manifest");
    let manifest = serde_json::from_slice(&text).expect("manifest");
    let source = Plain::open(&dir).expect("pages");
    match resume(&manifest, &source, &options) {
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

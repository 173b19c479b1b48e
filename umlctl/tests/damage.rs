//! A snapshot that was changed is refused before anything is started.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn umlctl(args: &[&str]) -> Output {
    Command::new("timeout")
        .args(["-s", "KILL", "60", env!("CARGO_BIN_EXE_umlctl")])
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// A sleeping program, saved and ended.
fn saved(dir: &Path) -> String {
    let mut sleep = Command::new("/bin/sleep");
    sleep.arg("0.5");
    let mut child = sleep
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // It must have come to its sleep: before, its program may not be there yet.
    std::thread::sleep(std::time::Duration::from_millis(200));
    let snap = dir.join("snap").to_str().unwrap().to_owned();
    let out = umlctl(&[
        "snapshot",
        "--pid",
        &child.id().to_string(),
        &snap,
        "--kill",
    ]);
    assert!(out.status.success(), "{out:?}");
    child.wait().unwrap();
    snap
}

/// Inverts a bit of a byte that is not in a hole.
fn flip(path: &Path) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let bytes = std::fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    let at = (middle..bytes.len())
        .chain(0..middle)
        .find(|&i| bytes[i] != 0)
        .unwrap();
    file.write_all_at(&[bytes[at] ^ 4], at as u64).unwrap();
}

#[test]
fn a_flipped_bit_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let snap = saved(dir.path());
    // The saver has noted that it is right: nothing but its change time tells that it is not any more. Then it is right
    // again, runs, and is changed after that.
    for good_first in [false, true] {
        for name in ["pages", "index", "manifest"] {
            if good_first {
                let out = umlctl(&["resume", &snap]);
                assert_eq!(out.status.code(), Some(0), "{out:?}");
            }
            let path = Path::new(&snap).join(name);
            let right = std::fs::read(&path).unwrap();
            flip(&path);
            for verb in [
                &["resume", &snap, "--json"][..],
                &["verify", &snap, "--json"],
            ] {
                let out = umlctl(verb);
                let text = String::from_utf8_lossy(&out.stderr);
                assert_eq!(out.status.code(), Some(1), "{name}: {text}");
                assert!(out.stdout.is_empty(), "{name}: {out:?}");
                assert!(text.contains("error"), "{name}: {text}");
            }
            std::fs::write(&path, right).unwrap();
        }
    }
    let out = umlctl(&["resume", &snap, "--verify"]);
    assert_eq!(out.status.code(), Some(0), "{out:?}");
}

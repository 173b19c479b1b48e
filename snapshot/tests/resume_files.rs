//! Open files and shared memory, by the real capture.

mod common;

use snapshot::capture::run::{After, Options, snapshot};
use std::path::Path;
use std::process::{Child, Command};

/// Captures a tree into `dir/s`, and ends it.
fn capture(target: &mut Child, dir: &Path) {
    let options = Options {
        tree: true,
        after: After::Killed,
        journals: dir.join("journals"),
        ..Options::new(target.id().cast_signed(), &dir.join("s"))
    };
    snapshot(&options).unwrap();
    let _ = target.wait();
}

#[test]
fn shared_memory_and_open_files_are_joined_again() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut command = Command::new(common::compile("shared", dir));
    command.arg(dir);
    let mut target = common::start(command, &dir.join("out"), "ready");
    capture(&mut target, dir);
    std::fs::write(dir.join("go"), "").unwrap();
    let (code, _, err) = common::resume(&dir.join("s"), &[]);
    // Its output is a file, which was opened again at the place where it was.
    assert_eq!(
        common::lines(&dir.join("out")),
        ["ready", "all right"],
        "{err}"
    );
    assert_eq!(code, 3, "{err}");
}

/// A file that is not the one that was open any more.
#[test]
fn another_file_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut command = Command::new("/bin/sleep");
    command.arg("1000");
    let out = dir.join("out");
    std::fs::write(&out, "start\n").unwrap();
    let file = std::fs::File::options().append(true).open(&out).unwrap();
    let mut target = command
        .stdin(std::process::Stdio::null())
        .stdout(file)
        .spawn()
        .unwrap();
    capture(&mut target, dir);
    std::fs::remove_file(&out).unwrap();
    std::fs::write(&out, "start\n").unwrap();
    // The new file may have got the old one's number.
    std::fs::write(&out, "").unwrap();
    let (code, _, err) = common::resume(&dir.join("s"), &[]);
    assert_eq!(code, 100, "{err}");
    assert!(err.contains("bring"), "{err}");
}

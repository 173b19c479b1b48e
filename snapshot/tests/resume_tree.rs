//! Trees of processes, and why private memory is not mapped from the snapshot's files.

mod common;

use std::process::Command;

#[test]
fn a_tree_goes_on() {
    let dir = tempfile::tempdir().unwrap();
    let exe = common::compile("tree", dir.path());
    for way in [&["--eager"][..], &[]] {
        let mut target = common::start(Command::new(&exe), &dir.path().join("out"), "ready");
        common::capture(&mut target, dir.path());
        let (code, out, err) = common::resume(dir.path(), way);
        assert_eq!((code, out.as_str()), (0, "all there\n"), "{err}");
    }
}

/// What `docs/snapshot.md` says of private file mappings: a program that gives memory up, or grows it, would get bytes of
/// the snapshot's file where it was promised zeroes.
#[test]
fn a_private_file_mapping_is_not_anonymous_memory() {
    let dir = tempfile::tempdir().unwrap();
    let exe = common::compile("private", dir.path());
    let out = Command::new(exe)
        .arg(dir.path().join("file"))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert_eq!(
        text,
        "file after DONTNEED: 65\nanonymous after DONTNEED: 0\nfile grown: 66\nanonymous grown: 0\n"
    );
}

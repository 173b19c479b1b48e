//! Files and directories that a guest sends. Asserted: never a panic or an endless loop, and nothing outside of the
//! directory that was named is made, changed or removed.
#![no_main]

use std::fs;

use cowfs_fuzz::snap::Dir;
use libfuzzer_sys::fuzz_target;
use umlctl_agent::archive::{receive, send};

fuzz_target!(|data: &[u8]| {
    let dir = Dir::new("archive");
    dir.put("outside", b"untouched");
    fs::create_dir(dir.path().join("other")).expect("room");
    let inside = dir.path().join("in");
    fs::create_dir(&inside).expect("room");
    // What is there already is in the way.
    std::os::unix::fs::symlink("../outside", inside.join("l")).expect("room");
    std::os::unix::fs::symlink("../other", inside.join("d")).expect("room");
    let mut stream = data;
    while let Ok(place) = receive(&inside, &mut stream, 0o777) {
        assert_eq!(place.parent(), Some(inside.as_path()));
        // A link that is sent by its name is what it leads to, which may be all there is.
        if !place.is_symlink() {
            let _ = send(&place, &mut std::io::sink(), &mut |_| {});
        }
    }
    let outside = fs::read(dir.path().join("outside")).expect("it is there");
    assert_eq!(outside, b"untouched");
    let names = fs::read_dir(dir.path()).expect("it is there").count();
    assert_eq!(names, 3);
    let other = fs::read_dir(dir.path().join("other")).expect("it is there");
    assert_eq!(other.count(), 0);
});

//! Snapshots that were changed, cut, or belong to another base: refused, or ended with a reason; never a wrong guest.

use super::common::{Home, make_image, wait};
use std::os::unix::fs::FileExt;
use std::path::Path;

fn flip(path: &Path, at: u64) {
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x40], at).unwrap();
}

fn no_vm(home: &Home, name: &str) {
    home.refused(&["info", name], 10);
    assert!(!home.dir.path().join("vms").join(name).exists());
}

#[test]
fn every_file_that_is_damaged_is_named() {
    let home = Home::new();
    home.boot("a");
    home.run(&["snapshot", "a", "good", "--wait"]);
    home.run(&["rm", "-f", "a"]);
    let store = home.dir.path().join("snapshots");
    for name in [
        "about",
        "machine",
        "private",
        "memory.sums",
        "disk.cow",
        "disk.sums",
    ] {
        for how in ["flip", "cut", "gone"] {
            let bad = store.join("bad");
            let copy = std::process::Command::new("cp")
                .args(["-a", "--sparse=always"])
                .arg(store.join("good"))
                .arg(&bad)
                .status();
            assert!(copy.unwrap().success());
            let file = bad.join(name);
            let len = std::fs::metadata(&file).unwrap().len();
            match how {
                "flip" => flip(&file, len / 2),
                "cut" => std::fs::File::options()
                    .write(true)
                    .open(&file)
                    .unwrap()
                    .set_len(len / 2)
                    .unwrap(),
                _ => std::fs::remove_file(&file).unwrap(),
            }
            let said = home.refused(&["resume", "bad", "--name", "b"], 1);
            assert!(said.contains(name), "{name} {how}: {said}");
            no_vm(&home, "b");
            home.refused(&["verify", "bad"], 1);
            std::fs::remove_dir_all(&bad).unwrap();
        }
    }
    home.run(&["resume", "good", "--name", "b"]);
    home.check("b");
}

#[test]
fn damaged_memory_ends_the_vm_and_says_so() {
    let home = Home::new();
    home.boot("a");
    home.sh("a", "yes 'this is in memory' | head -c 8000000 >/tmp/big");
    home.run(&["snapshot", "a", "s", "--wait"]);
    home.run(&["rm", "-f", "a"]);
    // Everywhere: which page is touched first is the guest's affair.
    let memory = home.dir.path().join("snapshots/s/memory");
    let len = std::fs::metadata(&memory).unwrap().len();
    for at in (4 << 20..len).step_by(64 << 10) {
        flip(&memory, at);
    }
    assert!(home.refused(&["verify", "s"], 1).contains("memory"));
    let out = home.output(&["resume", "s", "--name", "b"]);
    if out.status.success() {
        wait("the VM ends", || home.state("b") == "ended");
        let reason = home.json(&["info", "b"])["reason"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        assert!(
            reason.contains("memory") && reason.contains("damaged"),
            "{reason}"
        );
    } else {
        no_vm(&home, "b");
    }
    // One cut to half its length is refused at once.
    std::fs::File::options()
        .write(true)
        .open(&memory)
        .unwrap()
        .set_len(len / 2)
        .unwrap();
    assert!(
        home.refused(&["resume", "s", "--name", "c"], 1)
            .contains("memory")
    );
    no_vm(&home, "c");
}

#[test]
fn a_changed_base_is_refused() {
    let home = Home::new();
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let base = make_image(dir.path());
    home.run(&["run", "a", "--image", base.to_str().unwrap(), "--detach"]);
    home.run(&["snapshot", "a", "s", "--wait"]);
    home.run(&["rm", "-f", "a"]);
    let file = std::fs::File::options().write(true).open(&base).unwrap();
    file.set_modified(std::time::SystemTime::now() + std::time::Duration::from_secs(100))
        .unwrap();
    let said = home.refused(&["resume", "s", "--name", "b"], 1);
    assert!(said.contains("base.img"), "{said}");
    no_vm(&home, "b");
    std::fs::remove_file(&base).unwrap();
    home.refused(&["resume", "s", "--name", "b"], 1);
    no_vm(&home, "b");
}

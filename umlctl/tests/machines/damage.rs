//! Snapshots that were changed, cut, or belong to another base: refused, or ended with a reason; never a wrong guest.

use super::common::{Home, make_image, wait};
use serde_json::Value;
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

/// Where there are numbers in a document, as JSON pointers.
fn numbers(value: &Value, at: &str, out: &mut Vec<String>) {
    match value {
        Value::Number(_) => out.push(at.to_owned()),
        Value::Array(all) => {
            for (i, v) in all.iter().enumerate() {
                numbers(v, &format!("{at}/{i}"), out);
            }
        }
        Value::Object(all) => {
            for (key, v) in all {
                numbers(v, &format!("{at}/{key}"), out);
            }
        }
        _ => {}
    }
}

/// A manifest by an enemy: every sum is right, and what it says is not. It is refused, or the guest is not what it was;
/// umlctl neither panics nor hangs, and nothing is left of it.
#[test]
fn a_manifest_that_lies() {
    const HEAD: usize = 56;
    let home = Home::new();
    home.boot("a");
    home.run(&["snapshot", "a", "good", "--wait"]);
    home.run(&["rm", "-f", "a"]);
    let store = home.dir.path().join("snapshots");
    let path = store.join("good/machine");
    let good = std::fs::read(&path).unwrap();
    let machine: Value = serde_json::from_slice(&good[HEAD..]).unwrap();
    let mut places = Vec::new();
    numbers(&machine, "", &mut places);
    // The same ones each time. Most numbers are those of mappings: of the others as many.
    let (maps, others): (Vec<_>, Vec<_>) = places
        .iter()
        .partition(|p| p.starts_with("/users/") || p.starts_with("/private/"));
    let mut random = 88_172_645_463_325_252_u64;
    let mut next = move || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random as usize
    };
    let lies = [0, 1, 7, 4096, 1 << 31, 1 << 46, 1 << 63, u64::MAX];
    let mut refused = 0;
    for round in 0..60 {
        let list = if round % 2 == 0 { &maps } else { &others };
        let place = list[next() % list.len()];
        let lie = lies[next() % lies.len()];
        let mut wrong = machine.clone();
        *wrong.pointer_mut(place).unwrap() = lie.into();
        let body = serde_json::to_vec(&wrong).unwrap();
        let mut bytes = good[..16].to_vec();
        bytes.extend((body.len() as u64).to_le_bytes());
        let mut sum = blake3::Hasher::new();
        sum.update(&bytes).update(&body);
        bytes.extend(sum.finalize().as_bytes());
        bytes.extend(&body);
        std::fs::write(&path, &bytes).unwrap();
        let out = home.output(&["resume", "good", "--name", "b"]);
        let said = String::from_utf8_lossy(&out.stderr);
        let code = out.status.code();
        assert!(
            matches!(code, Some(0 | 1)) && !said.contains("panicked"),
            "{place} = {lie}: {code:?} {said}"
        );
        if code == Some(1) {
            refused += 1;
            assert!(said.len() > 20, "{place} = {lie}: {said}");
            no_vm(&home, "b");
        } else {
            home.run(&["rm", "-f", "b"]);
        }
    }
    assert!(refused > 10, "{refused}");
    std::fs::write(&path, &good).unwrap();
    home.run(&["resume", "good", "--name", "b"]);
    home.check("b");
}

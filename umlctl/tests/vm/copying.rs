//! Files and directories into a VM and out of it.

use crate::common::{Home, noise};
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

/// All there is below a directory: name, mode, and contents or target.
fn tree(dir: &Path) -> Vec<(String, u32, Vec<u8>)> {
    let mut all = Vec::new();
    let mut dirs = vec![dir.to_owned()];
    while let Some(d) = dirs.pop() {
        for e in fs::read_dir(&d).unwrap().flatten() {
            let meta = e.metadata().unwrap();
            let contents = if meta.is_symlink() {
                fs::read_link(e.path())
                    .unwrap()
                    .display()
                    .to_string()
                    .into_bytes()
            } else if meta.is_dir() {
                dirs.push(e.path());
                Vec::new()
            } else {
                fs::read(e.path()).unwrap()
            };
            let name = e.path().strip_prefix(dir).unwrap().display().to_string();
            all.push((name, meta.permissions().mode(), contents));
        }
    }
    all.sort();
    all
}

#[test]
fn cp() {
    let home = Home::new();
    home.boot("v");
    let dir = home.dir.path().join("copies");
    let source = dir.join("source");
    fs::create_dir_all(source.join("a/b")).unwrap();
    fs::create_dir(source.join("empty")).unwrap();
    let bytes = noise(700_001, 3);
    fs::write(source.join("a/large"), &bytes).unwrap();
    fs::write(source.join("a/b/none"), b"").unwrap();
    fs::write(source.join("a/name with blanks \u{e4}"), b"x").unwrap();
    fs::set_permissions(source.join("a/large"), fs::Permissions::from_mode(0o750)).unwrap();
    fs::set_permissions(source.join("empty"), fs::Permissions::from_mode(0o711)).unwrap();
    symlink("../nowhere", source.join("a/link")).unwrap();
    let at = |p: &str| dir.join(p).to_str().unwrap().to_owned();

    home.ok(&["cp", &at("source"), "v:/root/there"]);
    let sum = home.sh(
        "v",
        "md5sum < /root/there/a/large; ls /root/there/a | wc -l",
    );
    home.ok(&["cp", "v:/root/there", &at("back")]);
    assert_eq!(tree(&dir.join("back")), tree(&source));
    // Into a directory, under its own name.
    home.ok(&["cp", &at("source/a/large"), "v:/root"]);
    assert_eq!(sum, home.sh("v", "md5sum < /root/large; echo 4"));
    fs::create_dir(dir.join("into")).unwrap();
    home.ok(&["cp", "v:/root/large", &at("into")]);
    assert!(fs::read(dir.join("into/large")).unwrap() == bytes);
    // Over what is there.
    fs::write(dir.join("into/large"), vec![1; 2_000_000]).unwrap();
    home.ok(&["cp", "v:/root/large", &at("into/large")]);
    assert!(fs::read(dir.join("into/large")).unwrap() == bytes);

    let text = home.fails(&["cp", "v:/nosuch", &at("x")], 1);
    assert!(
        text.contains("in the guest") && text.contains("/nosuch"),
        "{text}"
    );
    let text = home.fails(&["cp", &at("source"), "v:/nosuch/x"], 1);
    assert!(
        text.contains("in the guest") && text.contains("/nosuch/x"),
        "{text}"
    );
    let text = home.fails(&["cp", &at("nosuch"), "v:/root"], 1);
    assert!(text.contains("nosuch"), "{text}");
    home.fails(&["cp", "v:/root/large", "/nosuch/x"], 1);
    home.fails(&["cp", "v:/root/large", "v:/root/x"], 1);
    // What is no file, directory or link is left out, and that is said.
    home.sh(
        "v",
        "mkdir /root/odd; mkfifo /root/odd/fifo; echo x > /root/odd/file",
    );
    home.fails(&["cp", "v:/root/odd", &at("odd")], 3);
    assert_eq!(fs::read(dir.join("odd/file")).unwrap(), b"x\n");
    // The guest's disk becomes full in the middle.
    fs::write(dir.join("huge"), vec![7; 400 << 10]).unwrap();
    let text = home.sh(
        "v",
        "mkdir -p /root/small; mount -t tmpfs -o size=100k none /root/small; echo",
    );
    assert_eq!(text, "");
    let text = home.fails(&["cp", &at("huge"), "v:/root/small/"], 1);
    assert!(text.contains("No space"), "{text}");
    // No set-user-id bit comes out of a guest.
    home.sh("v", "echo x > /root/su; chmod 4755 /root/su");
    home.ok(&["cp", "v:/root/su", &at("su")]);
    assert_eq!(
        fs::metadata(dir.join("su")).unwrap().permissions().mode() & 0o7777,
        0o755
    );
    home.ok(&["rm", "-f", "v"]);
}

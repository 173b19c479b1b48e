//! What the tests of history share: trees with something of everything, other stores, and the command.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use cowfs::store::Store;

use crate::Rng;
use crate::driver::{Driver, checkpoint};
use crate::live::{Live, binary};
use crate::simdisk;

/// So many bytes that do not compress.
pub fn noise(rng: &mut Rng, len: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        out.extend_from_slice(&rng.draw().to_le_bytes());
    }
    out.truncate(len);
    out
}

/// Everything that a tree shows but access and change times, as text.
pub fn tree(dir: &Path) -> String {
    let script = "cd \"$1\" && find . -printf '%p %y %m %U %G %s %T@ %n %l\\n' | sort && \
                  find . -type f -print0 | sort -z | xargs -0 -r sha256sum && \
                  getfattr -R -d -m user. . 2>/dev/null | sort";
    let out = Command::new("sh")
        .args(["-c", script, "sh"])
        .arg(dir)
        .output()
        .expect("a shell");
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(
        text.lines().count() > 1,
        "{}",
        String::from_utf8_lossy(&out.stderr)
    );
    text
}

/// A tree with something of everything; `seed` decides contents.
pub fn fill(dir: &Path, seed: u64) {
    let mut rng = Rng(seed);
    fs::create_dir_all(dir.join("d/e")).expect("room");
    for i in 0..40 {
        let len = [0, 1, 700, 5000, 40_000][i % 5] + rng.below(50) as usize;
        fs::write(dir.join(format!("d/f{i}")), noise(&mut rng, len)).expect("room");
    }
    fs::write(dir.join("large"), noise(&mut rng, 3 << 20)).expect("room");
    fs::write(
        dir.join("text"),
        "the same line again and again\n".repeat(9000),
    )
    .expect("room");
    let sparse = fs::File::create(dir.join("sparse")).expect("room");
    sparse.write_all_at(b"far", 5 << 20).expect("room");
    sparse.write_all_at(b"near", 8192).expect("room");
    fs::hard_link(dir.join("text"), dir.join("d/e/link")).expect("room");
    symlink("text", dir.join("symlink")).expect("room");
    fs::set_permissions(dir.join("d/f1"), fs::Permissions::from_mode(0o4711)).expect("ours");
    let set = Command::new("setfattr")
        .args(["-n", "user.x", "-v", "value"])
        .arg(dir.join("d/f2"))
        .status();
    assert!(set.is_ok_and(|s| s.success()), "setfattr");
    fs::copy("/bin/true", dir.join("program")).expect("room");
}

/// What a command said.
pub fn text(out: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    )
}

/// Runs the command.
pub fn cowfs(args: &[&str]) -> Output {
    Command::new(binary())
        .args(args)
        .stdin(Stdio::null())
        .output()
        .expect("the binary runs")
}

/// Runs the command, which must succeed. What it printed.
pub fn ok(args: &[&str]) -> String {
    let out = cowfs(args);
    assert!(out.status.success(), "{args:?}: {}", text(&out));
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// Checks a store that is not mounted, with its contents.
pub fn clean(store: &Path) {
    ok(&["check", "--data", store.to_str().expect("a name")]);
}

/// Shows a checkpoint beside the head, runs `f` on it, and takes it away.
pub fn at<T>(l: &Live, checkpoint: &str, f: impl FnOnce(&Path) -> T) -> T {
    let dir = l.beside("at");
    let shown = dir.display().to_string();
    l.run(&[
        "mount",
        &l.store().display().to_string(),
        &shown,
        "--at",
        checkpoint,
    ]);
    let value = f(&dir);
    l.run(&["unmount", &shown]);
    value
}

/// Bytes of blocks below a directory.
pub fn blocks(dir: &Path) -> u64 {
    let mut sum = 0;
    for e in fs::read_dir(dir).expect("there").flatten() {
        sum += e.metadata().map_or(0, |m| m.blocks() * 512);
    }
    sum
}

/// A second store beside the one of a test.
pub fn other(l: &Live, name: &str) -> PathBuf {
    let store = l.beside("others").join(name);
    ok(&["init", store.to_str().expect("a name")]);
    store
}

/// A checkpoint of another store, as [`tree`] has it.
pub fn shown(l: &Live, store: &Path, checkpoint: &str) -> String {
    let dir = l.beside("shown");
    let (s, d) = (store.display().to_string(), dir.display().to_string());
    ok(&["mount", &s, &d, "--at", checkpoint]);
    let t = tree(&dir);
    ok(&["unmount", &d]);
    t
}

/// A small store with a checkpoint.
pub fn small() -> Arc<Store> {
    let store = simdisk::store();
    let mut d = Driver::new(&store, "main");
    let mut rng = Rng(1);
    for i in 0..20 {
        let f = d.create(1, &format!("file {i}")).expect("room");
        let bytes = noise(&mut rng, 300 * i);
        d.write(f, 0, &bytes).expect("room");
    }
    d.forget_all(&[]);
    checkpoint(&store, "one");
    store
}

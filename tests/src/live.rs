//! Real mounts by the real binary. These tests need root and /dev/fuse. `COWFS_MOUNT_OPTIONS` in the environment, for example
//! `writeback`, is what they mount with.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

/// The binary, as built beside the tests by `cargo build`.
pub fn binary() -> PathBuf {
    let mut dir = std::env::current_exe().expect("the test's own path");
    dir.pop();
    dir.pop();
    let path = dir.join("cowfs");
    assert!(
        path.exists(),
        "{} is missing: run 'cargo build' first, as tools/test does",
        path.display()
    );
    path
}

fn from_environment() -> String {
    std::env::var("COWFS_MOUNT_OPTIONS").unwrap_or_else(|_| "defaults".into())
}

/// Runs a shell command as nobody.
pub fn nobody(script: &str) -> Output {
    let who = ["--reuid=65534", "--regid=65534", "--clear-groups"];
    Command::new("setpriv")
        .args(who)
        .args(["sh", "-c", script])
        .output()
        .expect("setpriv runs")
}

/// A store with its head mounted; taken away at the end.
#[derive(Debug)]
pub struct Live {
    dir: TempDir,
    /// The store is on a small filesystem of its own.
    small: bool,
    /// Mount options.
    options: String,
}

impl Live {
    /// A new store, mounted.
    pub fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("cowfs-test-")
            .tempdir_in("/var/tmp")
            .expect("a directory");
        Self::with(dir, false, from_environment())
    }

    /// As [`Live::new`], mounted with these options.
    pub fn with_options(options: &str) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("cowfs-test-")
            .tempdir_in("/var/tmp")
            .expect("a directory");
        Self::with(dir, false, options.into())
    }

    /// As [`Live::new`], the store on an ext4 of so many MiB.
    pub fn small(mib: u64) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("cowfs-test-")
            .tempdir_in("/var/tmp")
            .expect("a directory");
        let (image, disk) = (dir.path().join("image"), dir.path().join("disk"));
        std::fs::create_dir(&disk).expect("a directory");
        std::fs::File::create(&image)
            .and_then(|f| f.set_len(mib << 20))
            .expect("an image");
        let made = Command::new("mkfs.ext4")
            .args(["-q", "-m0"])
            .arg(&image)
            .status();
        assert!(made.expect("mkfs.ext4").success());
        let mounted = Command::new("mount")
            .args(["-o", "loop"])
            .args([&image, &disk])
            .status();
        assert!(mounted.expect("mount").success());
        Self::with(dir, true, from_environment())
    }

    fn with(dir: TempDir, small: bool, options: String) -> Self {
        std::fs::create_dir(dir.path().join("mnt")).expect("a mount point");
        let live = Self {
            dir,
            small,
            options,
        };
        live.run(&["init", live.store().to_str().expect("a name")]);
        live.mount(&[]);
        live
    }

    /// The store's directory.
    pub fn store(&self) -> PathBuf {
        let up = if self.small { "disk/store" } else { "store" };
        self.dir.path().join(up)
    }

    /// A path below the mount point.
    pub fn at(&self, path: &str) -> PathBuf {
        self.dir.path().join("mnt").join(path)
    }

    /// The mount point.
    pub fn mnt(&self) -> String {
        self.dir.path().join("mnt").display().to_string()
    }

    /// A directory beside store and mount point.
    pub fn beside(&self, name: &str) -> PathBuf {
        let p = self.dir.path().join(name);
        std::fs::create_dir_all(&p).expect("a directory");
        p
    }

    /// Runs a command, whatever comes of it.
    pub fn try_run(&self, args: &[&str], env: &[(&str, &str)]) -> Output {
        Command::new(binary())
            .args(args)
            .envs(env.iter().copied())
            .output()
            .expect("the binary runs")
    }

    /// Runs a command that must succeed; its output.
    pub fn run(&self, args: &[&str]) -> String {
        let out = self.try_run(args, &[]);
        assert!(
            out.status.success(),
            "{args:?}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    /// Mounts the head again.
    pub fn mount(&self, env: &[(&str, &str)]) {
        let (store, mnt) = (self.store().display().to_string(), self.mnt());
        let out = self.try_run(&["mount", "-o", &self.options, &store, &mnt], env);
        assert!(
            out.status.success(),
            "mount: {}",
            String::from_utf8_lossy(&out.stderr)
        );
    }

    /// True if the kernel keeps what is written for a while.
    pub fn writes_back(&self) -> bool {
        self.options.contains("writeback")
    }

    /// The daemon's process.
    pub fn pid(&self) -> i32 {
        let stats = self.run(&["stats", &self.mnt(), "--json"]);
        let v: serde_json::Value = serde_json::from_str(&stats).expect("JSON");
        i32::try_from(v["pid"].as_i64().expect("a pid")).expect("a pid")
    }

    /// Kills the daemon and takes the dead mount away.
    pub fn kill(&self) {
        let pid = nix::unistd::Pid::from_raw(self.pid());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).expect("it runs");
        self.clear();
    }

    /// Takes a dead mount away and waits until the store is free.
    pub fn clear(&self) {
        let _ = nix::mount::umount2(Path::new(&self.mnt()), nix::mount::MntFlags::MNT_DETACH);
        let lock = std::fs::File::options()
            .write(true)
            .open(self.store().join("lock"))
            .expect("a lock");
        for _ in 0..500 {
            if lock.try_lock().is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("the daemon does not end");
    }

    /// Unmounts and checks the store.
    pub fn check(&self) {
        self.run(&["unmount", &self.mnt()]);
        self.check_only();
    }

    /// Checks a store that is not mounted.
    pub fn check_only(&self) {
        let out = self.try_run(&["check", &self.store().display().to_string()], &[]);
        assert!(
            out.status.success(),
            "check: {}{}",
            String::from_utf8_lossy(&out.stdout),
            String::from_utf8_lossy(&out.stderr)
        );
    }
}

impl Default for Live {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        let _ = self.try_run(&["unmount", "--lazy", &self.mnt()], &[]);
        let _ = nix::mount::umount2(Path::new(&self.mnt()), nix::mount::MntFlags::MNT_DETACH);
        // What a test that failed has mounted beside it, also of other stores.
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let points = mounts.lines().filter_map(|l| l.split(' ').nth(4));
        let beside = |p: &&str| Path::new(p).starts_with(self.dir.path());
        for point in points.filter(beside) {
            let _ = self.try_run(&["unmount", "--lazy", point], &[]);
        }
        if self.small {
            let disk = self.dir.path().join("disk");
            let _ = nix::mount::umount2(&disk, nix::mount::MntFlags::MNT_DETACH);
        }
    }
}

//! State roots, VMs, and what is looked at.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

/// Nothing takes so long unless it hangs, however busy the machine is.
pub const LONG: Duration = Duration::from_secs(300);

/// Waits until something is so.
pub fn until(what: &str, mut is: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is() {
        assert!(begin.elapsed() < LONG, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Waits for the end of a process; kills it if it takes too long.
pub fn end_of(child: &mut Child) -> ExitStatus {
    let begin = Instant::now();
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        if begin.elapsed() > LONG {
            let _ = child.kill();
            let _ = child.wait();
            panic!("it does not end");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Standard output, without the last line's end.
pub fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout)
        .trim_end()
        .to_owned()
}

/// Error output.
pub fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Bytes that do not repeat soon, nor compress.
pub fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    std::iter::repeat_with(next).take(length).collect()
}

/// A state root with an image. Removes all its VMs in the end, and looks whether that is so.
#[derive(Debug)]
pub struct Home {
    pub dir: tempfile::TempDir,
}

impl Home {
    pub fn new() -> Self {
        let home = Self::empty();
        let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tools/image-busybox");
        let output = Command::new(tool)
            .arg(home.image())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", err(&output));
        home
    }

    pub fn empty() -> Self {
        Self {
            dir: tempfile::Builder::new()
                .prefix("umlctl-vm")
                .tempdir()
                .unwrap(),
        }
    }

    pub fn image(&self) -> PathBuf {
        self.dir.path().join("base.img")
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_umlctl"));
        command
            .args(args)
            .env("UMLCTL_HOME", self.dir.path().join("home"))
            .env_remove("UMLCTL_LINUX")
            .stdin(Stdio::null());
        command
    }

    /// Runs umlctl to its end.
    pub fn umlctl(&self, args: &[&str]) -> Output {
        self.with_input(args, b"")
    }

    /// The same, with something on its standard input.
    pub fn with_input(&self, args: &[&str], input: &[u8]) -> Output {
        let mut command = self.command(args);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_vec();
        let feeder = std::thread::spawn(move || drop(stdin.write_all(&input)));
        let pid = child.id().to_string();
        let (done, over) = std::sync::mpsc::channel::<()>();
        let watch = std::thread::spawn(move || {
            if over.recv_timeout(LONG) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                let _ = Command::new("kill").args(["-9", &pid]).status();
            }
        });
        let output = child.wait_with_output().unwrap();
        drop(done);
        watch.join().unwrap();
        feeder.join().unwrap();
        output
    }

    /// Runs umlctl, which must succeed; its output.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.umlctl(args);
        assert!(
            output.status.success(),
            "{args:?}: {:?}: {}",
            output.status,
            err(&output)
        );
        out(&output)
    }

    /// Runs umlctl, which must end with this code; its error output.
    pub fn fails(&self, args: &[&str], code: i32) -> String {
        let output = self.umlctl(args);
        assert_eq!(
            output.status.code(),
            Some(code),
            "{args:?}: {}",
            err(&output)
        );
        err(&output)
    }

    /// Starts a VM and waits until it is up.
    pub fn boot(&self, name: &str) {
        let image = self.image();
        self.ok(&[
            "run",
            name,
            "--image",
            image.to_str().unwrap(),
            "--mem",
            "64M",
            "--detach",
        ]);
        self.settle(name);
    }

    /// Waits for the guest's init: the agent is there before it has mounted anything.
    pub fn settle(&self, name: &str) {
        // What it mounts last.
        self.sh(
            name,
            "until grep -q ' /run ' /proc/mounts 2>/dev/null; do sleep 0.1; done",
        );
    }

    /// What `info` says.
    pub fn info(&self, name: &str) -> serde_json::Value {
        serde_json::from_str(&self.ok(&["info", name, "--json"])).unwrap()
    }

    /// Runs a script in the guest, which must succeed; its output.
    pub fn sh(&self, name: &str, script: &str) -> String {
        self.ok(&["exec", name, "--", "sh", "-c", script])
    }

    /// A VM's directory.
    pub fn vm_dir(&self, name: &str) -> PathBuf {
        self.dir.path().join("home/vms").join(name)
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let dir = self.dir.path().join("home/vms");
        let names: Vec<String> = std::fs::read_dir(&dir)
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|e| e.file_name().into_string().ok())
            .collect();
        for name in &names {
            let output = self.umlctl(&["rm", "-f", name]);
            if !std::thread::panicking() {
                assert!(output.status.success(), "rm -f {name}: {}", err(&output));
            }
        }
    }
}

/// All host processes in the pid namespace that a process has for itself.
pub fn namespace_of(pid: i64) -> Vec<i32> {
    let of = |p: &str| std::fs::read_link(format!("/proc/{p}/ns/pid")).ok();
    let Some(wanted) = of(&pid.to_string()) else {
        return Vec::new();
    };
    all_in(&wanted)
}

/// All host processes in this pid namespace.
pub fn all_in(namespace: &Path) -> Vec<i32> {
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|e| e.file_name().to_str()?.parse().ok())
        .filter(|p: &i32| {
            std::fs::read_link(format!("/proc/{p}/ns/pid")).is_ok_and(|n| n == namespace)
        })
        .collect()
}

/// Whether something of a VM's network is there. Another VM may have got its number since.
pub fn network_left(info: &serde_json::Value) -> bool {
    let address: std::net::Ipv4Addr = info["address"].as_str().unwrap().parse().unwrap();
    let [.., x, y] = address.octets().map(u32::from);
    let index = (x - 1) * 254 + y;
    let owner = || std::fs::read_to_string(format!("/run/umlctl/net/{index}")).ok();
    let dir = info["dir"].as_str().unwrap();
    if let Some(owner) = owner() {
        return owner.contains(&format!("{dir}\""));
    }
    let there = Path::new(&format!("/run/netns/umlctl-{index}")).exists()
        || Path::new(&format!("/sys/class/net/umlv{index}")).exists();
    there && owner().is_none()
}

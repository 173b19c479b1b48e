//! A VM under load, driven through the command line as users do.

use serde_json::Value;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// Far more than anything takes; a test that waits longer hangs.
pub const PATIENCE: Duration = Duration::from_secs(240);

/// What the guests do all the time: write, sync, check sums, fork, echo.
const LOAD: &str = r#"#!/bin/sh
nc -ll -p 7 -e cat </dev/null >/dev/null 2>&1 &
(
    mkdir -p /root/w; cd /root/w; i=0
    while :; do
        i=$((i+1)); n=$((i % 4))
        dd if=/dev/urandom of=f$n bs=4k count=8 2>/dev/null
        md5sum f$n >s$n; sync
        for k in 0 1 2 3; do
            [ -f s$k ] && { md5sum -c s$k >/dev/null 2>&1 || echo "round $i file $k" >>/root/wrong; }
        done
        echo $i >/root/count
    done
) </dev/null >/dev/null 2>&1 &
"#;

/// The repository's root.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// The image of guests under load, made once.
pub fn image() -> &'static Path {
    static IMAGE: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let made = IMAGE.get_or_init(|| {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = make_image(dir.path());
        (dir, path)
    });
    &made.1
}

/// Makes such an image in a directory.
pub fn make_image(dir: &Path) -> PathBuf {
    let (rc, out) = (dir.join("rc"), dir.join("base.img"));
    std::fs::write(&rc, LOAD).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&rc, mode).unwrap();
    let made = Command::new(root().join("tools/image-busybox"))
        .arg(&out)
        .args(["--file", &format!("{}:/etc/rc", rc.display())])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert!(
        made.status.success(),
        "{}",
        String::from_utf8_lossy(&made.stderr)
    );
    out
}

/// A state root of its own; everything in it is ended and removed at the end.
pub struct Home {
    pub dir: tempfile::TempDir,
    fault: Option<&'static str>,
}

impl Home {
    pub fn new() -> Self {
        Self::within(Path::new("/var/tmp"))
    }

    pub fn within(parent: &Path) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("umlctl-test")
            .tempdir_in(parent)
            .unwrap();
        Self { dir, fault: None }
    }

    /// From now on what is started dies at a named point.
    pub fn fault(&mut self, point: Option<&'static str>) {
        self.fault = point;
    }

    pub fn output(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_umlctl"));
        command
            .args(args)
            .env("UMLCTL_HOME", self.dir.path())
            .env_remove("SNAPSHOT_FAULT")
            .stdin(Stdio::null());
        if let Some(point) = self.fault {
            command.env("SNAPSHOT_FAULT", point);
        }
        command.output().unwrap()
    }

    /// Runs a command that must succeed; what it prints.
    pub fn run(&self, args: &[&str]) -> String {
        let out = self.output(args);
        let (text, errors) = (
            String::from_utf8_lossy(&out.stdout).into_owned(),
            String::from_utf8_lossy(&out.stderr),
        );
        assert!(
            out.status.success(),
            "{args:?}: {} {text} {errors}",
            out.status
        );
        text
    }

    pub fn json(&self, args: &[&str]) -> Value {
        let all = [args, &["--json"]].concat();
        serde_json::from_str(&self.run(&all)).unwrap()
    }

    /// Runs a command that must fail with a code; its message.
    pub fn refused(&self, args: &[&str], code: i32) -> String {
        let out = self.output(args);
        let errors = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(code), "{args:?}: {errors}");
        errors
    }

    /// Boots a VM under load.
    pub fn boot(&self, name: &str) {
        let image = image().to_str().unwrap();
        self.run(&["run", name, "--image", image, "--detach"]);
        // The agent answers before init has mounted what hides files that were made before.
        wait("/tmp", || {
            let looks = ["exec", name, "--", "grep", "-q", " /tmp ", "/proc/mounts"];
            self.output(&looks).status.success()
        });
    }

    pub fn address(&self, name: &str) -> String {
        self.json(&["info", name])["address"]
            .as_str()
            .unwrap()
            .to_owned()
    }

    pub fn state(&self, name: &str) -> String {
        self.json(&["info", name])["state"]
            .as_str()
            .unwrap()
            .to_owned()
    }

    /// What a shell in the guest prints.
    pub fn sh(&self, name: &str, script: &str) -> String {
        self.run(&["exec", name, "--", "sh", "-c", script])
            .trim()
            .to_owned()
    }

    /// That the guest's load goes on, and has never read what it did not write.
    pub fn check(&self, name: &str) {
        let count = || self.sh(name, "cat /root/count 2>/dev/null || echo 0");
        let before = count();
        wait("the guest's load goes on", || count() != before);
        assert_eq!(
            self.sh(name, "cat /root/wrong 2>/dev/null || true"),
            "",
            "of {name}"
        );
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        self.fault = None;
        let names: Vec<String> = std::fs::read_dir(self.dir.path().join("vms"))
            .into_iter()
            .flatten()
            .flatten()
            .filter_map(|e| e.file_name().into_string().ok())
            .collect();
        for name in &names {
            let _ = self.output(&["rm", "-f", name]);
        }
    }
}

pub fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// A connection to the guest's echo.
pub struct Echo {
    stream: BufReader<TcpStream>,
    count: u64,
}

impl Echo {
    pub fn connect(home: &Home, name: &str) -> Self {
        let address = format!("{}:7", home.address(name));
        let start = Instant::now();
        let stream = loop {
            let to = address.parse().unwrap();
            match TcpStream::connect_timeout(&to, Duration::from_secs(5)) {
                Ok(stream) => break stream,
                Err(e) => assert!(start.elapsed() < PATIENCE, "{address}: {e}"),
            }
            std::thread::sleep(Duration::from_millis(50));
        };
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_nodelay(true).unwrap();
        Self {
            stream: BufReader::new(stream),
            count: 0,
        }
    }

    /// One line there and back.
    pub fn ask(&mut self) {
        self.count += 1;
        let line = format!("line {}\n", self.count);
        self.stream.get_mut().write_all(line.as_bytes()).unwrap();
        let mut back = String::new();
        self.stream.read_line(&mut back).unwrap();
        assert_eq!(back, line);
    }
}

/// Whether a process is there.
pub fn lives(pid: &Value) -> bool {
    let pid = pid.as_i64().unwrap();
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| {
        !s.rsplit(')')
            .next()
            .unwrap_or_default()
            .trim_start()
            .starts_with('Z')
    })
}

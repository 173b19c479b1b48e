//! Starting programs, ending and resuming them, and talking to them.

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Nothing here takes so long.
const LONG: Duration = Duration::from_secs(60);

/// Waits until something is so.
pub fn until(what: &str, mut is: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is() {
        assert!(begin.elapsed() < LONG, "waited in vain: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A port that nobody listens at.
pub fn port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// A program of its own session, with all its descendants; ends with the test.
#[derive(Debug)]
pub struct Program {
    /// Its number, which it has after a resume, too.
    pub pid: i32,
    taken: u32,
}

impl Program {
    /// Starts it in a directory. What it says goes to `said` there.
    pub fn start(command: Command, dir: &Path) -> Self {
        Self::start_with_input(command, dir, Stdio::null())
    }

    /// The same, with something to read.
    pub fn start_with_input(mut command: Command, dir: &Path, input: impl Into<Stdio>) -> Self {
        // What is resumed is nobody's child, and its number is free again only when somebody has waited for it.
        nix::sys::prctl::set_child_subreaper(true).unwrap();
        let said = File::create(dir.join("said")).unwrap();
        command
            .current_dir(dir)
            .stdin(input)
            .stdout(said.try_clone().unwrap())
            .stderr(said)
            .process_group(0);
        let pid = command.spawn().unwrap().id().cast_signed();
        Self { pid, taken: 0 }
    }

    /// `umlctl snapshot` of it and its descendants, with further options. Gives the directory.
    pub fn snapshot(&mut self, dir: &Path, options: &[&str]) -> std::path::PathBuf {
        self.taken += 1;
        let to = dir.join(format!("snapshot-{}", self.taken));
        let mut command = umlctl();
        command
            .args(["snapshot", "--tree", "--pid", &self.pid.to_string()])
            .arg(&to)
            .args(options);
        good(command);
        to
    }

    /// Snapshots and ends it.
    pub fn end(&mut self, dir: &Path) -> std::path::PathBuf {
        let all = tree(self.pid);
        let to = self.snapshot(dir, &["--kill"]);
        for pid in all {
            reap(pid);
        }
        to
    }

    /// Resumes it.
    pub fn resume(&self, from: &Path) {
        let mut command = umlctl();
        command.arg("resume").arg(from).arg("--detach");
        good(command);
        assert!(Path::new(&format!("/proc/{}", self.pid)).exists());
    }
}

/// All descendants of a process, and itself, if they are there.
fn tree(pid: i32) -> Vec<i32> {
    let mut all = vec![pid];
    let mut next = 0;
    while let Some(&pid) = all.get(next) {
        next += 1;
        let path = format!("/proc/{pid}/task/{pid}/children");
        let children = std::fs::read_to_string(path).unwrap_or_default();
        all.extend(
            children
                .split_whitespace()
                .filter_map(|n| n.parse::<i32>().ok()),
        );
    }
    all
}

/// Waits until a process that was killed is gone; its parent may have done so.
fn reap(pid: i32) {
    until("it is gone", || {
        let _ = waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG));
        !Path::new(&format!("/proc/{pid}")).exists()
    });
}

impl Drop for Program {
    fn drop(&mut self) {
        let all = tree(self.pid);
        for &pid in &all {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        if !std::thread::panicking() {
            all.into_iter().for_each(reap);
        }
    }
}

/// The command, which is given a minute.
pub fn umlctl() -> Command {
    let mut command = Command::new("timeout");
    command
        .args(["--foreground", "-s", "KILL", "60"])
        .arg(env!("CARGO_BIN_EXE_umlctl"))
        .stdin(Stdio::null());
    command
}

/// Runs to the end, and must succeed; what it leaves behind keeps its outputs, so these are files.
pub fn good(mut command: Command) -> String {
    let (mut out, mut err) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let status = command
        .stdout(out.try_clone().unwrap())
        .stderr(err.try_clone().unwrap())
        .status()
        .unwrap();
    let text = |file: &mut File| {
        let mut text = String::new();
        std::io::Seek::rewind(file).unwrap();
        file.read_to_string(&mut text).unwrap();
        text
    };
    assert!(
        status.success(),
        "{command:?}: {status}: {}",
        text(&mut err)
    );
    text(&mut out)
}

/// A connection that speaks in lines.
#[derive(Debug)]
pub struct Lines {
    reader: BufReader<TcpStream>,
}

impl Lines {
    /// Connects, when somebody listens.
    pub fn connect(port: u16) -> Self {
        let mut stream = None;
        until("somebody listens", || {
            stream = TcpStream::connect(("127.0.0.1", port)).ok();
            stream.is_some()
        });
        let stream = stream.unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        Self {
            reader: BufReader::new(stream),
        }
    }

    /// Sends a text.
    pub fn send(&mut self, text: &str) {
        self.reader.get_mut().write_all(text.as_bytes()).unwrap();
    }

    /// The next line, without its end.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.reader.read_line(&mut line).unwrap();
        assert!(line.ends_with('\n'), "the connection has ended: {line:?}");
        line.trim_end().into()
    }

    /// So many bytes.
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.reader.read_exact(&mut bytes).unwrap();
        bytes
    }
}

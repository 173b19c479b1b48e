//! A real guest on our COW files, and ours on the guest kernel's.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use cowfs::image;
use cowfs_tests::image::{Images, holds};
use cowfs_tests::live::Live;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

/// How long a guest may take for a step on a machine that does much else.
const PATIENCE: Duration = Duration::from_secs(300);

/// Runs when the guest has booted: leaves traces on the disk, says so, and waits for a line.
const RC: &str = "#!/bin/sh
stty -echo
echo boot >>/root/boots
dd if=/dev/urandom of=/root/blob bs=4096 count=300 2>/dev/null
sync
echo \"BOOTS $(wc -l </root/boots)\"
echo \"SUM $(md5sum </root/blob)\"
echo READY
read line
mount -o remount,ro /
poweroff -f
";

/// A running guest.
struct Guest {
    child: Child,
    stdin: Option<ChildStdin>,
    console: Receiver<Vec<u8>>,
    said: String,
}

fn pump(mut out: ChildStdout) -> Receiver<Vec<u8>> {
    let (tx, rx) = channel();
    std::thread::spawn(move || {
        let mut buf = [0; 4096];
        while let Ok(n @ 1..) = out.read(&mut buf) {
            if tx.send(buf[..n].to_vec()).is_err() {
                break;
            }
        }
    });
    rx
}

impl Guest {
    /// Boots; `disk` is what stands behind `ubd0=`.
    fn boot(i: &Images, disk: &str) -> Self {
        let dir = i.at("uml");
        fs::create_dir_all(&dir).expect("room");
        let arg = |s: &str| format!("{s}{}/", dir.display());
        let mut child = Command::new("setarch")
            .args([
                "x86_64",
                "-R",
                "linux.uml",
                "mem=96M",
                "con=null",
                "con0=fd:0,fd:1",
            ])
            .args([
                "root=/dev/ubda",
                "rw",
                "init=/init",
                "umid=guest",
                &arg("uml_dir="),
            ])
            .arg(format!("ubd0={disk}"))
            .env("TMPDIR", &dir)
            .current_dir(i.at(""))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .expect("setarch runs");
        let console = pump(child.stdout.take().expect("a pipe"));
        Self {
            stdin: child.stdin.take(),
            child,
            console,
            said: String::new(),
        }
    }

    /// Waits until the console has said this.
    fn wait_for(&mut self, what: &str) {
        let end = Instant::now() + PATIENCE;
        while !self.said.contains(what) {
            match self
                .console
                .recv_timeout(end.saturating_duration_since(Instant::now()))
            {
                Ok(b) => self.said.push_str(&String::from_utf8_lossy(&b)),
                Err(RecvTimeoutError::Timeout) => panic!("no {what}: {}", self.said),
                Err(RecvTimeoutError::Disconnected) => panic!("ended, no {what}: {}", self.said),
            }
        }
    }

    /// What stands behind a word at the beginning of a line.
    fn told(&self, word: &str) -> &str {
        let line = self.said.lines().find_map(|l| l.strip_prefix(word));
        line.unwrap_or_else(|| panic!("no {word}: {}", self.said))
            .trim()
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).expect("a pid"))
    }

    /// Stops or continues the guest kernel. Its children are traced by it, and it panics when they get such signals.
    fn signal(&self, signal: Signal) {
        kill(self.pid(), signal).expect("it runs");
    }

    /// Lets it power off.
    fn end(mut self) {
        let mut stdin = self.stdin.take().expect("open");
        stdin.write_all(b"go\n").expect("it reads");
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("our child") {
                assert!(status.success(), "{status}: {}", self.said);
                return;
            }
            assert!(Instant::now() < end, "it does not end: {}", self.said);
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // All its processes are in one group; what is left of a guest that ended is nothing.
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = killpg(self.pid(), Signal::SIGKILL);
            let _ = self.child.wait();
        }
        // Those that wait for its disk have the files open until they are gone, too.
        let end = Instant::now() + PATIENCE;
        while killpg(self.pid(), None).is_ok() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// A root image with the script.
fn root_image(i: &Images) {
    let rc = i.file("rc", RC.as_bytes());
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(&rc, mode).expect("ours");
    let tool = concat!(env!("CARGO_MANIFEST_DIR"), "/../tools/image-busybox");
    let file = format!("{}:/etc/rc", rc.display());
    let out = i.try_run(
        Path::new(tool),
        &["base", "--size", "32M", "--file", &file],
        &[],
    );
    let err = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{err}");
}

/// MD5 of a file in an ext4, without a mount.
fn sum_in(i: &Images, fs: &str, path: &str) -> String {
    let _ = std::fs::remove_file(i.at("dumped"));
    i.uml("debugfs", &["-R", &format!("dump {path} dumped"), fs]);
    let out = i.try_run(Path::new("md5sum"), &["dumped"], &[]);
    let text = String::from_utf8_lossy(&out.stdout).into_owned();
    text.split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned()
}

/// Merges a COW file by ours and theirs, and looks for what the guest wrote.
fn merged_alike(i: &Images, cow: &str, sum: &str) {
    let (ours, theirs) = (format!("{cow}.ours"), format!("{cow}.theirs"));
    i.image(&["merge", cow, &ours]);
    i.uml("uml_moo", &[cow, &theirs]);
    let bytes = fs::read(i.at(&theirs)).expect("there");
    holds(&i.at(&ours), &bytes, cow);
    assert_eq!(sum_in(i, &ours, "/root/blob"), sum, "{cow}");
    assert_eq!(
        image::verify(&i.at(cow)).expect("readable").problems,
        [""; 0]
    );
}

#[test]
fn a_guest_writes_through_our_cow_file_and_is_duplicated_while_frozen() {
    let i = Images::new();
    root_image(&i);
    let base = fs::read(i.at("base")).expect("there");
    i.image(&["create", "cow", "base"]);
    let mut g = Guest::boot(&i, "cow");
    g.wait_for("READY");
    assert_eq!(g.told("BOOTS "), "1");
    let sum = g.told("SUM ")[..32].to_owned();

    // In use: what changes it is refused, and no guest loses its lock by that.
    let by = format!("in use by process {}", g.pid());
    for args in [
        &["merge", "cow", "out"][..],
        &["merge", "cow", "--in-place"],
        &["rebase", "cow", "base"],
        &["create", "cow", "base", "--force"],
    ] {
        let said = i.refused(args, 11);
        assert!(said.contains(&by), "{args:?}: {said}");
    }
    let info = image::info(&i.at("cow")).expect("a COW file");
    assert_eq!(info.in_use.and_then(|u| u.pid), Some(g.pid().as_raw()));
    assert!(info.problem.is_none() && info.cow.expect("a COW file").written_bytes > 1_200_000);

    // Frozen, by its name and by its descriptor alone.
    g.signal(Signal::SIGSTOP);
    i.image(&["duplicate", "cow", "frozen"]);
    let fd = guests_descriptor(g.pid(), &i.at("cow"));
    image::duplicate_file(&fd, &i.at("by-fd")).expect("room");
    drop(fd);
    g.signal(Signal::SIGCONT);
    let bytes = fs::read(i.at("frozen")).expect("there");
    holds(&i.at("by-fd"), &bytes, "by descriptor");
    i.refused(&["merge", "cow", "out"], 11);
    g.end();

    merged_alike(&i, "cow", &sum);
    i.uml("e2fsck", &["-fn", "cow.ours"]);
    // The duplicate goes its own way from the first boot on.
    let mut twin = Guest::boot(&i, "frozen");
    twin.wait_for("READY");
    assert_eq!(twin.told("BOOTS "), "2");
    let twins = twin.told("SUM ")[..32].to_owned();
    twin.end();
    assert_ne!(twins, sum);
    merged_alike(&i, "frozen", &twins);
    merged_alike(&i, "by-fd", &sum);

    // Boots as a base, and as the base of a COW file that was rebased to it.
    i.image(&["rebase", "frozen", "cow.ours"]);
    let mut g = Guest::boot(&i, "frozen,cow.ours");
    g.wait_for("READY");
    assert_eq!(g.told("BOOTS "), "3");
    g.end();
    holds(&i.at("base"), &base, "the base");
}

#[test]
fn a_frozen_guest_on_a_mounted_cowfs_is_duplicated_without_a_copy() {
    let l = Live::new();
    let i = Images::new();
    root_image(&i);
    i.image(&["import", "base", &l.mnt()]);
    let at = |name: &str| l.at(name).display().to_string();
    i.image(&["create", &at("cow"), &at("base")]);
    let mut g = Guest::boot(&i, &at("cow"));
    g.wait_for("READY");
    let sum = g.told("SUM ")[..32].to_owned();
    i.refused(&["rebase", &at("cow"), &at("base")], 11);
    g.signal(Signal::SIGSTOP);
    let d = image::duplicate(&l.at("cow"), &l.at("twin")).expect("room");
    g.signal(Signal::SIGCONT);
    assert!(d.shared, "{d:?}");
    g.end();
    // Both out of the mount, by ours, and by theirs.
    for name in ["cow", "twin"] {
        i.image(&["merge", &at(name), name]);
        i.uml("uml_moo", &[&at(name), "theirs"]);
        holds(&i.at(name), &fs::read(i.at("theirs")).expect("there"), name);
        assert_eq!(sum_in(&i, name, "/root/blob"), sum, "{name}");
    }
    let mut twin = Guest::boot(&i, &at("twin"));
    twin.wait_for("READY");
    assert_eq!(twin.told("BOOTS "), "2");
    twin.end();
    l.check();
}

/// The guest's own descriptor of a file, through /proc.
fn guests_descriptor(pid: Pid, path: &Path) -> fs::File {
    let dir = format!("/proc/{pid}/fd");
    let entry = fs::read_dir(&dir)
        .expect("it runs")
        .map(|e| e.expect("an entry").path())
        .find(|p| fs::read_link(p).is_ok_and(|l| l == path))
        .expect("it has the file open");
    let f = fs::File::open(entry).expect("a file");
    assert!(f.as_raw_fd() > 2);
    f
}

#[test]
fn the_kernels_own_cow_file_is_read_by_ours() {
    let i = Images::new();
    root_image(&i);
    let mut g = Guest::boot(&i, "theirs,base");
    g.wait_for("READY");
    let sum = g.told("SUM ")[..32].to_owned();
    g.end();
    merged_alike(&i, "theirs", &sum);
    // The header is that of ours, but for bytes of the kernel's memory behind the path.
    let theirs = image::Cow::open(&i.at("theirs")).expect("good");
    i.image(&["create", "ours", "base"]);
    let ours = fs::read(i.at("ours")).expect("there");
    assert!(ours[..image::HEADER_LEN] == theirs.header().encode());
    let cow = image::check(&i.at("theirs")).expect("good");
    assert_eq!(
        cow.layout().len,
        fs::metadata(i.at("theirs")).expect("there").len()
    );
    // A base that changed: the kernel refuses what ours refuses.
    let later = std::time::SystemTime::now() + Duration::from_secs(10);
    fs::File::open(i.at("base"))
        .and_then(|f| f.set_modified(later))
        .expect("ours");
    i.refused(&["merge", "theirs", "out"], 1);
    let mut g = Guest::boot(&i, "theirs");
    g.wait_for("mtime mismatch");
    drop(g);
    i.image(&["rebase", "theirs", "base", "--unchecked"]);
    let mut g = Guest::boot(&i, "theirs");
    g.wait_for("READY");
    assert_eq!(g.told("BOOTS "), "2");
    g.end();
}

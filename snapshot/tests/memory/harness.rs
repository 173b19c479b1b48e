//! A target process under SIGSTOP and SIGCONT, and an oracle that reads its memory while it is stopped.

use std::collections::BTreeMap;
use std::io::IoSliceMut;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::unistd::Pid;
use snapshot::memory::Span;

/// What the test owns of the target.
pub struct Target {
    pub child: Option<Child>,
    pub pid: i32,
    pub uffd: Option<OwnedFd>,
    /// Another one, for a second save.
    pub more: Vec<OwnedFd>,
    pub control: std::fs::File,
    pub start: u64,
    _stream: UnixStream,
}

impl Target {
    pub fn start(dir: &Path, args: &str) -> Self {
        let socket = dir.join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let child = Command::new(example("memtarget"))
            .arg(format!("socket={}", socket.display()))
            .args(args.split_whitespace())
            .spawn()
            .expect("the example memtarget, which cargo test builds");
        let (stream, _) = listener.accept().unwrap();
        Self::receive(stream, child.id() as i32, Some(child))
    }

    /// A target whose parent was another process, which has died; its memory is at `start`.
    pub fn orphan(pid: i32, control: std::fs::File, start: u64) -> Self {
        let (stream, _) = UnixStream::pair().unwrap();
        Self {
            child: None,
            pid,
            uffd: None,
            more: vec![],
            control,
            start,
            _stream: stream,
        }
    }

    fn receive(stream: UnixStream, pid: i32, child: Option<Child>) -> Self {
        let mut text = [0; 8];
        let mut iov = [IoSliceMut::new(&mut text)];
        let mut space = nix::cmsg_space!([RawFd; 3]);
        let m = recvmsg::<()>(
            stream.as_raw_fd(),
            &mut iov,
            Some(&mut space),
            MsgFlags::empty(),
        )
        .unwrap();
        let mut fds = Vec::new();
        for c in m.cmsgs().unwrap() {
            if let ControlMessageOwned::ScmRights(f) = c {
                fds = f;
            }
        }
        let mut ready = [0];
        std::io::Read::read_exact(&mut &stream, &mut ready).unwrap();
        let [uffd, control, more] = fds[..] else {
            panic!("three descriptors")
        };
        Self {
            child,
            pid,
            uffd: Some(own(uffd)),
            more: vec![own(more)],
            control: own(control).into(),
            start: u64::from_le_bytes(text),
            _stream: stream,
        }
    }

    pub fn word(&self, i: u64) -> u64 {
        let mut b = [0; 8];
        self.control.read_exact_at(&mut b, i * 8).unwrap();
        u64::from_le_bytes(b)
    }

    pub fn set(&self, i: u64, v: u64) {
        self.control.write_all_at(&v.to_le_bytes(), i * 8).unwrap();
    }

    /// Stops it, at a moment when no call of a storm is under way, and holds storms back.
    pub fn stop(&self) {
        loop {
            kill(Pid::from_raw(self.pid), Signal::SIGSTOP).unwrap();
            if self.child.is_some() {
                use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
                let status =
                    waitpid(Pid::from_raw(self.pid), Some(WaitPidFlag::WUNTRACED)).unwrap();
                assert!(
                    matches!(status, WaitStatus::Stopped(..)),
                    "the target has ended: {status:?}"
                );
            }
            while !self.is_stopped() {
                std::thread::sleep(Duration::from_micros(100));
            }
            if self.word(1) == 0 {
                break;
            }
            self.go();
            std::thread::sleep(Duration::from_micros(500));
        }
        self.set(0, 1);
    }

    pub fn is_stopped(&self) -> bool {
        std::fs::read_dir(format!("/proc/{}/task", self.pid))
            .unwrap()
            .flatten()
            .all(|t| {
                let stat = std::fs::read_to_string(t.path().join("stat")).unwrap_or_default();
                stat.rsplit(") ")
                    .next()
                    .is_some_and(|s| s.starts_with('T') || s.is_empty())
            })
    }

    pub fn go(&self) {
        kill(Pid::from_raw(self.pid), Signal::SIGCONT).unwrap();
    }

    pub fn release_storms(&self) {
        self.set(0, 0);
    }

    pub fn spans(&self) -> Vec<Span> {
        spans(self.pid)
    }

    /// Every page that is there and not zero, by address.
    pub fn read_all(&self) -> BTreeMap<u64, blake3::Hash> {
        let mem = std::fs::File::open(format!("/proc/{}/mem", self.pid)).unwrap();
        let map = std::fs::File::open(format!("/proc/{}/pagemap", self.pid)).unwrap();
        let mut pages = BTreeMap::new();
        let mut page = [0; 4096];
        for s in self.spans() {
            // Huge reservations are looked through by 2 MiB, where nothing is resident.
            let populated = populated(self.pid, &s);
            for block in populated {
                let (from, to) = (block.start.max(s.start), block.end.min(s.end));
                let mut words = vec![0; ((to - from) / 512) as usize];
                map.read_exact_at(&mut words, from / 512).unwrap();
                for (i, w) in words.as_chunks::<8>().0.iter().enumerate() {
                    let w = u64::from_le_bytes(*w);
                    if w >> 62 == 0 || w >> 58 & 1 != 0 || w >> 61 & 1 != 0 {
                        continue;
                    }
                    let at = from + i as u64 * 4096;
                    mem.read_exact_at(&mut page, at).unwrap();
                    if page != [0; 4096] {
                        pages.insert(at, blake3::hash(&page));
                    }
                }
            }
        }
        pages
    }

    /// After the writers have ended: whether each page is as its writer left it.
    pub fn wrong_pages(&mut self, mb: u64) -> Vec<u64> {
        let mem = std::fs::File::open(format!("/proc/{}/mem", self.pid)).unwrap();
        let mut wrong = Vec::new();
        for p in 0..mb * 256 {
            let mut w = [0; 4096];
            mem.read_exact_at(&mut w, self.start + p * 4096).unwrap();
            let seq = u64::from_le_bytes(w[..8].try_into().unwrap());
            let last = u64::from_le_bytes(w[4088..].try_into().unwrap());
            let wanted = self.word(512 + p);
            let fresh = last == (p * 512 + 511) | 1 << 50;
            if seq != wanted || !(if wanted == 1 { fresh } else { last == !seq }) {
                wrong.push(p);
            }
        }
        wrong
    }
}

fn own(fd: RawFd) -> OwnedFd {
    assert!(fd >= 0);
    // A descriptor that recvmsg has just made: duplicated by its name in /proc would reopen it, so it is taken as it is.
    #[allow(unsafe_code)]
    // SAFETY: recvmsg has just made it, and nobody else owns it.
    unsafe {
        OwnedFd::from_raw_fd(fd)
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        match self.child.take() {
            Some(mut c) => {
                let _ = c.kill();
                let _ = c.wait();
            }
            None => drop(kill(Pid::from_raw(self.pid), Signal::SIGKILL)),
        }
    }
}

/// The program of an example.
pub fn example(name: &str) -> std::path::PathBuf {
    let exe = std::env::current_exe().unwrap();
    let deps = exe.parent().unwrap();
    let dir = if deps.ends_with("examples") {
        deps.to_owned()
    } else {
        deps.parent().unwrap().join("examples")
    };
    dir.join(name)
}

/// The private anonymous mappings of a process.
pub fn spans(pid: i32) -> Vec<Span> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let mut out = Vec::new();
    for line in maps.lines() {
        let f: Vec<&str> = line.split_whitespace().collect();
        let name = f.get(5).copied().unwrap_or("");
        if !f[1].ends_with('p') || f[4] != "0" || name.starts_with("[v") {
            continue;
        }
        let (a, b) = f[0].split_once('-').unwrap();
        out.push(u64::from_str_radix(a, 16).unwrap()..u64::from_str_radix(b, 16).unwrap());
    }
    out
}

fn populated(pid: i32, s: &Span) -> Vec<Span> {
    if s.end - s.start < 1 << 36 {
        return vec![s.clone()];
    }
    let map = snapshot::sys::pagemap::Pagemap::open(pid).unwrap();
    let mut out = Vec::new();
    map.scan(s.start, s.end, snapshot::sys::pagemap::PRESENT, 0, |r| {
        out.push(r.start..r.end)
    })
    .unwrap();
    out
}

/// What an image holds: the pages of a space, read as a resume would.
pub fn image(dir: &Path, space: u32, layers: &[&Path]) -> BTreeMap<u64, blake3::Hash> {
    use snapshot::image::{index::Index, pages::PagesReader};
    let (index, _) = Index::open(dir).unwrap();
    let pages = PagesReader::open(dir, layers.iter().copied(), &index).unwrap();
    let mut room = vec![0; 2 << 20];
    for e in index.entries() {
        pages.check(e, &mut room).unwrap();
    }
    let maps = pages.map().unwrap();
    let mut out = BTreeMap::new();
    for block in index.blocks(space).collect::<Vec<_>>() {
        for run in index.runs(space, block) {
            for (i, page) in maps.bytes(&run).unwrap().chunks(4096).enumerate() {
                assert_ne!(page, [0; 4096], "a page of zeroes was saved");
                out.insert(run.address + i as u64 * 4096, blake3::hash(page));
            }
        }
    }
    out
}

/// Tells where two differ; nothing if they do not.
pub fn difference(
    image: &BTreeMap<u64, blake3::Hash>,
    memory: &BTreeMap<u64, blake3::Hash>,
) -> Vec<String> {
    let mut out = Vec::new();
    for (a, h) in memory {
        match image.get(a) {
            None => out.push(format!("{a:#x} is not in the image")),
            Some(i) if i != h => out.push(format!("{a:#x} differs")),
            _ => {}
        }
    }
    out.extend(
        image
            .keys()
            .filter(|a| !memory.contains_key(a))
            .map(|a| format!("{a:#x} was gone")),
    );
    out
}

//! The manifest: everything of a snapshot that is not memory. Numbers are in the units that the kernel gives unless a
//! field says otherwise; addresses are those of the target.

use serde::{Deserialize, Serialize};

/// The version of the format that this program writes; newer ones are refused.
pub const VERSION: u32 = 1;

/// The body of the file `manifest`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// When the point in time was fixed, seconds and nanoseconds of CLOCK_REALTIME, and of CLOCK_MONOTONIC.
    pub taken: Taken,
    /// The machine the target ran on; another one is refused if it could not run it.
    pub host: Host,
    /// The processes, parents before children.
    pub processes: Vec<Process>,
    /// Address spaces; `Process::space` counts here.
    pub spaces: Vec<Space>,
    /// Shared memory objects that are not files of a disk; `space` numbers in the index go on after `spaces`.
    pub shared: Vec<SharedObject>,
    /// Open file descriptions; `Fd::file` counts here. Descriptors that share an offset share a description.
    pub files: Vec<crate::files::OpenFile>,
    /// blake3 of the file `index`, in hexadecimal.
    pub index: String,
    /// Snapshots whose `pages` hold some of the pages; layer n of the index is `layers[n - 1]`.
    pub layers: Vec<Layer>,
}

/// The moment of a snapshot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Taken {
    /// CLOCK_REALTIME, nanoseconds.
    pub realtime_ns: u64,
    /// CLOCK_MONOTONIC, nanoseconds.
    pub monotonic_ns: u64,
    /// CLOCK_BOOTTIME, nanoseconds.
    pub boottime_ns: u64,
}

/// What a machine must have to run the snapshot.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Host {
    /// `uname -r`.
    pub release: String,
    /// The boot's id (`/proc/sys/kernel/random/boot_id`); clocks are compared only within one boot.
    pub boot_id: String,
    /// blake3 of the vdso, hexadecimal: programs hold addresses inside it.
    pub vdso: String,
    /// The processor's feature flags (the line `flags` of `/proc/cpuinfo`), sorted.
    pub cpu_flags: Vec<String>,
    /// XCR0: which parts of the extended state are in use.
    pub xcr0: u64,
}

/// A snapshot that this one builds on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Layer {
    /// Its directory, absolute.
    pub path: std::path::PathBuf,
    /// blake3 of its index, hexadecimal.
    pub index: String,
}

/// One process (a thread group).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Process {
    /// Its number as it sees it itself.
    pub pid: i32,
    /// Its parent's number; a parent outside the tree is not made again.
    pub ppid: i32,
    /// Process group.
    pub pgid: i32,
    /// Session.
    pub sid: i32,
    /// The signal its parent gets when it ends (SIGCHLD, or 0).
    pub exit_signal: i32,
    /// A zombie's exit status as of wait(2); nothing else of it is filled.
    pub zombie: Option<i32>,
    /// Which address space.
    pub space: u32,
    /// The program file's path.
    pub exe: std::path::PathBuf,
    /// Working directory.
    pub cwd: std::path::PathBuf,
    /// Root directory.
    pub root: std::path::PathBuf,
    /// umask.
    pub umask: u32,
    /// Users, groups and capabilities.
    pub credentials: Credentials,
    /// Resource limits, (soft, hard) by number of the resource.
    pub limits: Vec<(u64, u64)>,
    /// personality(2).
    pub personality: u32,
    /// `oom_score_adj`.
    pub oom_score_adj: i32,
    /// prctl values: dumpable, no_new_privs, child subreaper, parent-death signal.
    pub prctl: Prctl,
    /// Signal actions, in the kernel's form; only those that are not the default.
    pub actions: Vec<SignalAction>,
    /// Signals that wait for the process as a whole, as siginfo (128 bytes each, base64).
    pub pending: Vec<String>,
    /// ITIMER_REAL, VIRTUAL, PROF: (interval, time left) in microseconds.
    pub itimers: [(u64, u64); 3],
    /// POSIX timers.
    pub timers: Vec<PosixTimer>,
    /// Open descriptors, by rising number.
    pub fds: Vec<Fd>,
    /// The threads; the first is the leader.
    pub threads: Vec<Thread>,
    /// It was stopped by a signal (job control) when taken.
    pub stopped: bool,
}

/// Users, groups and capabilities of a process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Credentials {
    /// Real, effective, saved, filesystem user.
    pub uid: [u32; 4],
    /// Real, effective, saved, filesystem group.
    pub gid: [u32; 4],
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Capability sets: inheritable, permitted, effective, bounding, ambient.
    pub caps: [u64; 5],
    /// Secure bits.
    pub securebits: u32,
}

/// Values of prctl(2).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prctl {
    /// PR_GET_DUMPABLE.
    pub dumpable: u32,
    /// PR_GET_NO_NEW_PRIVS.
    pub no_new_privs: bool,
    /// PR_GET_CHILD_SUBREAPER.
    pub subreaper: bool,
    /// PR_GET_PDEATHSIG.
    pub pdeathsig: i32,
}

/// One signal's action, as of rt_sigaction(2).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SignalAction {
    /// Its number.
    pub signal: i32,
    /// Handler's address, or 0 (default), 1 (ignore).
    pub handler: u64,
    /// SA_ flags.
    pub flags: u64,
    /// The restorer's address.
    pub restorer: u64,
    /// Signals blocked while it runs.
    pub mask: u64,
}

/// One POSIX timer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PosixTimer {
    /// Its number.
    pub id: i32,
    /// Which clock.
    pub clock: i32,
    /// SIGEV_ kind.
    pub notify: i32,
    /// Signal.
    pub signal: i32,
    /// sigev_value, as a pointer.
    pub value: u64,
    /// Thread it signals, for SIGEV_THREAD_ID.
    pub tid: i32,
    /// Interval, nanoseconds.
    pub interval_ns: u64,
    /// Time left, nanoseconds; 0 is disarmed.
    pub left_ns: u64,
}

/// One open descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fd {
    /// Its number.
    pub fd: i32,
    /// Closed at exec.
    pub cloexec: bool,
    /// Which open file description.
    pub file: u32,
}

/// One thread.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Thread {
    /// Its number as it sees it itself.
    pub tid: i32,
    /// `struct user_regs_struct`, 27 words of 8 bytes.
    pub regs: Vec<u64>,
    /// The extended state as of PTRACE_GETREGSET NT_X86_XSTATE, base64.
    pub xstate: String,
    /// Blocked signals.
    pub sigmask: u64,
    /// Alternate signal stack: address, flags, size.
    pub altstack: (u64, u32, u64),
    /// Robust futex list: head, length.
    pub robust: (u64, u64),
    /// rseq(2): address, size, signature, flags; zero address is none.
    pub rseq: (u64, u32, u32, u32),
    /// Where the kernel writes 0 when the thread ends.
    pub clear_child_tid: u64,
    /// Its name.
    pub comm: String,
    /// Signals that wait for it, as siginfo (128 bytes each, base64).
    pub pending: Vec<String>,
    /// Scheduling policy, nice value, real-time priority.
    pub sched: (i32, i32, i32),
    /// CPUs it may run on: words of a mask; empty for all.
    pub affinity: Vec<u64>,
}

/// An address space.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Space {
    /// Fields of `struct prctl_mm_map`: start_code, end_code, start_data, end_data, start_brk, brk, start_stack,
    /// arg_start, arg_end, env_start, env_end.
    pub layout: [u64; 11],
    /// The auxiliary vector, words.
    pub auxv: Vec<u64>,
    /// Its ranges, by rising address.
    pub ranges: Vec<Range>,
    /// PR_SET_THP_DISABLE was set.
    pub thp_disabled: bool,
}

/// One mapping (a VMA).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Range {
    /// First address.
    pub start: u64,
    /// One past the last.
    pub end: u64,
    /// PROT_ bits.
    pub prot: i32,
    /// MAP_PRIVATE or MAP_SHARED, with MAP_GROWSDOWN, MAP_NORESERVE, MAP_HUGETLB, MAP_LOCKED where they hold.
    pub flags: i32,
    /// What stands behind it.
    pub backing: Backing,
    /// madvise(2) values that hold for it (MADV_DONTFORK, MADV_HUGEPAGE, MADV_WIPEONFORK, ...).
    pub advice: Vec<i32>,
    /// PR_SET_VMA_ANON_NAME.
    pub name: Option<String>,
}

/// What stands behind a mapping.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum Backing {
    /// Private anonymous memory: all of it is in the index.
    Anonymous,
    /// A file on disk. A private mapping's written pages are in the index; the others are the file's.
    File {
        /// Its path in the target's root.
        path: std::path::PathBuf,
        /// Offset, bytes.
        offset: u64,
        /// Device, inode, size, modification time in nanoseconds: it must be the same file at the resume.
        identity: FileIdentity,
        /// The unlinked file was saved in `files/N`.
        saved: Option<u32>,
    },
    /// Shared memory that is an object of the snapshot (memfd, tmpfs, shared anonymous).
    Shared {
        /// Number in `Manifest::shared`.
        object: u32,
        /// Offset, bytes.
        offset: u64,
    },
    /// `[vdso]`.
    Vdso,
    /// `[vvar]` and its kin, by name.
    Vvar(String),
    /// `[vsyscall]`.
    Vsyscall,
}

/// Which file, and that it has not changed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileIdentity {
    /// Device number.
    pub dev: u64,
    /// Inode number.
    pub ino: u64,
    /// Size, bytes.
    pub size: u64,
    /// Modification time, nanoseconds since 1970.
    pub mtime_ns: i64,
}

/// A shared memory object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SharedObject {
    /// Size, bytes.
    pub size: u64,
    /// How it is made again.
    pub kind: SharedKind,
}

/// Kinds of shared memory objects.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub enum SharedKind {
    /// MAP_SHARED | MAP_ANONYMOUS.
    Anonymous,
    /// memfd_create(2): name, seals.
    Memfd(String, u32),
    /// A file on tmpfs that still has a name.
    Tmpfs(std::path::PathBuf),
    /// A file on tmpfs without a name.
    TmpfsUnlinked(std::path::PathBuf),
    /// System V shared memory: id, key, mode.
    SysV(i32, i32, u32),
}

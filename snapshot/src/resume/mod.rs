//! Making processes again from a snapshot: `docs/snapshot.md`, section 5.

pub(crate) mod child;
pub mod copies;
pub(crate) mod drive;
pub(crate) mod files;
pub(crate) mod host;
pub mod image;
pub(crate) mod memory;
pub(crate) mod open;
mod pager;
mod shared;
pub mod source;
pub(crate) mod state;
pub(crate) mod table;
pub mod template;

pub(crate) use drive::restart;
pub use files::text;

use crate::image::manifest::{Manifest, Process};
use crate::sys::scratch::Scratch;
use memory::{Exchange, Fill, Helpers, OwnVdso};
use nix::errno::Errno;
use source::PageSource;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use table::{Script, TableId};

/// Room for the tables; what a snapshot with a hundred thousand ranges needs.
const RESERVE: u64 = 64 << 20;

/// Why nothing was resumed. Whatever had been made is gone again.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The manifest says what cannot be.
    #[error("the snapshot is damaged: {0}; take another one, or run `umlctl verify`")]
    Manifest(&'static str),
    /// The machine is another one.
    #[error("this machine cannot run the snapshot: {0}")]
    Host(String),
    /// The kernel's vdso is another one.
    #[error("the vdso of this kernel is not the snapshot's; resume on the kernel it was taken on")]
    Vdso,
    /// No address is free.
    #[error("no {0} bytes of address space are free in the snapshot's layout")]
    NoPlace(u64),
    /// A file that is mapped is not what it was.
    #[error("{path}: {what}; the snapshot needs the same file", path = path.display())]
    File {
        /// Its path.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The calling process has several threads.
    #[error("resume must be called by a process with a single thread")]
    Threads,
    /// The number is taken.
    #[error("process number {0} is in use; resume in a namespace of its own")]
    PidTaken(i32),
    /// A copy in a namespace of its own could not be made.
    #[error("a copy could not be made: {0}")]
    Copy(String),
    /// A system call of ours.
    #[error("{0} failed")]
    Sys(&'static str, #[source] Errno),
    /// Reading `/proc` failed.
    #[error(transparent)]
    Proc(#[from] crate::proc::Error),
    /// The new process could not be made what the old one was.
    #[error("process {0}: {1}")]
    Child(i32, String),
    /// A call of the new process failed.
    #[error("process {0}")]
    Call(i32, #[source] table::CallFailed),
}

fn sys(what: &'static str) -> impl Fn(Errno) -> Error {
    move |e| Error::Sys(what, e)
}

/// How to resume.
#[derive(Clone, Default)]
pub struct Options<'a> {
    /// The snapshot's directory, for the files that are saved in it.
    pub dir: PathBuf,
    /// Fill all memory before the first instruction.
    pub eager: bool,
    /// Fill memory as it is touched even if there are several threads: for those that are known not to give memory back
    /// while it is filled.
    pub lazy: bool,
    /// The original, or another copy, may run: connections are reset, contended locks are left, shared memory is the
    /// copy's own.
    pub twin: bool,
    /// The caller is the init of a namespace in which the numbers are free.
    pub namespace: bool,
    /// Descriptors of the caller that stand for nothing.
    pub withheld: Vec<i32>,
    /// Where output goes for which the caller has no descriptor.
    pub log: Option<PathBuf>,
    /// Where all private memory is already, for copies that share it.
    pub template: Option<&'a template::Template>,
    /// Called in the new process before the first connection is made again: lets go of what holds the old ones.
    pub before_connections: Option<&'a dyn Fn()>,
}

impl std::fmt::Debug for Options<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options")
            .field("dir", &self.dir)
            .field("eager", &self.eager)
            .field("twin", &self.twin)
            .finish_non_exhaustive()
    }
}

/// A resumed process tree.
#[derive(Debug)]
pub struct Resumed {
    /// The root's number, as the caller sees it.
    pub pid: i32,
    /// The process that fills its memory, if one does.
    pub pager: Option<i32>,
    /// From the start of the work to the first instruction; without a wait for process numbers that are about to be free.
    pub resume: Duration,
}

/// The tables of one process.
#[derive(Debug)]
pub(crate) struct Tables {
    pid: i32,
    leader: TableId,
    threads: Vec<TableId>,
}

/// Everything that is prepared before the first fork.
#[derive(Debug)]
pub(crate) struct Plan<'a> {
    manifest: &'a Manifest,
    script: Script,
    tables: Vec<Tables>,
    scratch: Scratch,
    helpers: Helpers,
    fill: Fill,
    options: &'a Options<'a>,
    /// Where in the vdso a `syscall` instruction is, for each process.
    syscall: u64,
}

impl Plan<'_> {
    fn lazy(&self) -> bool {
        self.fill == Fill::Lazy
    }
}

/// Resumes a snapshot. The calling process must have a single thread, and becomes the parent.
pub fn resume(
    manifest: &Manifest,
    source: &dyn PageSource,
    options: &Options<'_>,
) -> Result<Resumed, Error> {
    host::check_manifest(manifest)?;
    // What may be waited for here is the end of others.
    if !options.namespace {
        drive::numbers_free(manifest)?;
    }
    let start = Instant::now();
    let maps = crate::proc::maps(std::process::id() as i32)?;
    let vdso = OwnVdso::find(&maps);
    let syscall = host::check(&manifest.host, &vdso)?;
    let plan = plan(manifest, source, options, vdso, syscall, &maps)?;
    let root = &manifest.processes[0];
    let made =
        drive::start(&plan, root).and_then(|pid| Ok((pid, drive::release(&plan, source, pid)?)));
    let segments = match made {
        Ok(_) => &plan.helpers.ending_segments,
        Err(_) => &plan.helpers.made_segments,
    };
    for &id in segments {
        let _ = crate::sys::sysv::remove(id);
    }
    let (pid, pager) = made?;
    Ok(Resumed {
        pid,
        pager,
        resume: start.elapsed(),
    })
}

fn plan<'a>(
    manifest: &'a Manifest,
    source: &dyn PageSource,
    options: &'a Options<'a>,
    vdso: OwnVdso,
    syscall: u64,
    maps: &[crate::proc::Map],
) -> Result<Plan<'a>, Error> {
    // Of the changes that several threads make to their mappings the kernel may tell in another order than they
    // happened in; a pager that believes it would fill pages with what does not belong there.
    let threaded = manifest.processes.iter().any(|p| p.threads.len() > 1);
    let fill = if options.eager || (threaded && !options.lazy && options.template.is_none()) {
        Fill::Eager
    } else if options.template.is_some() {
        Fill::Template
    } else {
        Fill::Lazy
    };
    let used = maps.iter().map(|m| (m.start, m.end)).collect();
    let helpers = open::helpers(manifest, source, options.twin)?;
    let mut script = Script::default();
    let with = (&vdso, &helpers, fill);
    let (base, tables) = tables(&mut script, used, (manifest, options), source, with)?;
    let len = script.len();
    if len as u64 > RESERVE {
        return Err(Error::Manifest("there are too many ranges"));
    }
    let scratch = Scratch::new(base, len).map_err(sys("mapping scratch memory"))?;
    script.install(&scratch);
    Ok(Plan {
        manifest,
        script,
        tables,
        scratch,
        helpers,
        fill,
        options,
        syscall,
    })
}

/// The tables of all processes, as for a resume, but nothing is opened and nothing is run; gives how many bytes they need.
pub(crate) fn rehearse(manifest: &Manifest, source: &dyn PageSource) -> Result<usize, Error> {
    host::check_manifest(manifest)?;
    let vdso = OwnVdso::find(&crate::proc::maps(std::process::id() as i32)?);
    let helpers = Helpers::from(1024);
    let options = Options::default();
    let mut script = Script::default();
    for fill in [Fill::Lazy, Fill::Eager] {
        let with = (&vdso, &helpers, fill);
        tables(&mut script, Vec::new(), (manifest, &options), source, with)?;
    }
    Ok(script.len())
}

/// The tables of all processes, and the address that they are to be at: what is `used` here is left free.
fn tables(
    script: &mut Script,
    mut used: Vec<(u64, u64)>,
    (manifest, options): (&Manifest, &Options<'_>),
    source: &dyn PageSource,
    (vdso, helpers, fill): (&OwnVdso, &Helpers, Fill),
) -> Result<(u64, Vec<Tables>), Error> {
    for s in &manifest.spaces {
        used.extend(s.ranges.iter().map(|r| (r.start, r.end)));
    }
    let base = memory::free_place(&mut used, RESERVE)?;
    let aside = memory::free_place(&mut used, 1 << 20)?;
    let own_limits = host::own_limits();
    let mut tables = Vec::new();
    for p in manifest.processes.iter().filter(|p| p.zombie.is_none()) {
        let space = manifest.spaces.get(p.space as usize);
        let x = Exchange {
            number: p.space,
            space: space.ok_or(Error::Manifest("no such address space"))?,
            scratch: (base, RESERVE),
            aside,
            vdso,
            helpers,
            fill,
            template: options.template,
        };
        let limits = (source, &own_limits[..]);
        tables.push(process(script, p, &x, (manifest, options), limits)?);
    }
    Ok((base, tables))
}

/// The tables of one process. The leader's ends when all threads have ended theirs.
fn process(
    script: &mut Script,
    p: &Process,
    x: &Exchange<'_>,
    (manifest, options): (&Manifest, &Options<'_>),
    (source, own_limits): (&dyn PageSource, &[(u64, u64)]),
) -> Result<Tables, Error> {
    let leader = script.table();
    child::leave_rseq(script, leader);
    memory::exchange(script, leader, x, p, source)?;
    files::locks(script, leader, &manifest.files, p, options.twin);
    let mut threads = Vec::new();
    for t in &p.threads[1..] {
        let table = script.table();
        child::thread(script, leader, table, t.tid);
        state::thread(script, table, p, t)?;
        threads.push(table);
    }
    state::limits(script, leader, p, own_limits);
    state::process(script, leader, p)?;
    state::thread(script, leader, p, &p.threads[0])?;
    for &t in &threads {
        script.wait_for(leader, t);
    }
    state::last(script, leader, p);
    Ok(Tables {
        pid: p.pid,
        leader,
        threads,
    })
}

//! The calls that exchange a process's memory for the snapshot's.

use super::Error;
use super::source::{PageSource, pieces};
use super::table::{Arg, Expect, Script, TableId};
use super::template::Template;
use crate::image::manifest::{Backing, Process, Range, Space};
use crate::proc::{Map, MapKind};
use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// The end of what a process may map (47 bits, less a guard page).
pub const TOP: u64 = 0x7fff_ffff_f000;
/// Below this nothing is put: the kernel may refuse it (`vm.mmap_min_addr`).
const BOTTOM: u64 = 1 << 20;
/// Room that is left around what is mapped, for stacks that grow.
const MARGIN: u64 = 1 << 28;
/// Anonymous memory that a mapping's flags may ask for besides private or shared.
const PASSED: i32 = libc::MAP_GROWSDOWN | libc::MAP_NORESERVE | libc::MAP_HUGETLB | (0x3f << 26);

/// The descriptors that a process is given to map from; all are closed by its table.
#[derive(Debug, Default)]
pub struct Helpers {
    /// Files, by path in the target's root, and whether they are opened for writing.
    pub files: HashMap<(PathBuf, bool), i32>,
    /// Shared objects, by number.
    pub shared: HashMap<u32, i32>,
    /// System V segments, by number of the shared object.
    pub sysv: HashMap<u32, i32>,
    /// Those that were made.
    pub made_segments: Vec<i32>,
    /// Those that go away when nobody has them any more.
    pub ending_segments: Vec<i32>,
    /// The program's file of each process, by its number.
    pub exe: HashMap<i32, i32>,
    /// The files with pages, by layer.
    pub pages: Vec<i32>,
    /// The first of the numbers that are theirs; the last is the highest there is.
    pub first: i32,
    /// Where the process keeps its userfaultfd.
    pub uffd: i32,
    /// They are closed here when this is dropped.
    open: Vec<OwnedFd>,
}

impl Helpers {
    /// None yet; theirs are the numbers from `first`.
    #[must_use]
    pub fn from(first: i32) -> Helpers {
        Helpers {
            first,
            uffd: first - 1,
            ..Helpers::default()
        }
    }

    /// Their numbers.
    pub fn numbers(&self) -> impl Iterator<Item = i32> + '_ {
        use std::os::fd::AsRawFd;
        self.open.iter().map(AsRawFd::as_raw_fd)
    }

    /// Takes a descriptor's number, to close it later.
    pub fn own(&mut self, fd: i32) {
        self.open.push(crate::sys::clone::own(fd));
    }
}

/// Our own vdso and its data pages, which forks have at the same place.
#[derive(Debug)]
pub struct OwnVdso {
    parts: Vec<(String, u64, u64)>,
}

impl OwnVdso {
    /// Finds them.
    #[must_use]
    pub fn find(maps: &[Map]) -> OwnVdso {
        let special = maps.iter().filter_map(|m| match &m.kind {
            MapKind::Special(n) if n.starts_with("[vdso]") || n.starts_with("[vvar") => {
                Some((n.clone(), m.start, m.end))
            }
            _ => None,
        });
        OwnVdso {
            parts: special.collect(),
        }
    }

    /// Where one of them is.
    #[must_use]
    pub fn part(&self, name: &str) -> Option<(u64, u64)> {
        let p = self.parts.iter().find(|p| p.0 == name)?;
        Some((p.1, p.2))
    }
}

/// An address where `len` bytes are free in every one of the layouts, with room around them.
pub fn free_place(used: &mut Vec<(u64, u64)>, len: u64) -> Result<u64, Error> {
    used.sort_unstable();
    let mut at = BOTTOM + MARGIN;
    for &(start, end) in used.iter() {
        if start > at && start - at >= len + MARGIN {
            break;
        }
        at = at.max(end.saturating_add(MARGIN));
    }
    if at.saturating_add(len + MARGIN) > TOP {
        return Err(Error::NoPlace(len));
    }
    used.push((at, at + len));
    Ok(at)
}

/// How anonymous memory is filled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// All of it before the first instruction, by the process itself.
    Eager,
    /// By a pager.
    Lazy,
    /// It is filled, and only moved to its place.
    Template,
}

/// What the exchange needs to know.
#[derive(Debug)]
pub struct Exchange<'a> {
    /// The address space's number.
    pub number: u32,
    /// The address space.
    pub space: &'a Space,
    /// Where the scratch memory is, and its length.
    pub scratch: (u64, u64),
    /// Where vdso and its data can be for a moment.
    pub aside: u64,
    /// Ours.
    pub vdso: &'a OwnVdso,
    /// What it may map from.
    pub helpers: &'a Helpers,
    /// How it is filled.
    pub fill: Fill,
    /// Where it is, if it is there.
    pub template: Option<&'a Template>,
}

impl Exchange<'_> {
    /// Where the memory of a range is, filled.
    fn filled(&self, r: &Range) -> Option<u64> {
        let template = self.template.filter(|_| self.fill == Fill::Template)?;
        template.place(self.number, r)
    }
}

/// The ranges that the pager fills.
#[must_use]
pub fn lazy_ranges(space: &Space) -> Vec<(u64, u64)> {
    let mut out: Vec<(u64, u64)> = Vec::new();
    for r in space.ranges.iter().filter(|r| is_lazy(r)) {
        match out.last_mut() {
            Some(last) if last.1 == r.start => last.1 = r.end,
            _ => out.push((r.start, r.end)),
        }
    }
    out
}

/// Locked memory must be there; huge pages are not filled by 4 KiB; what a fork must find empty must not be filled there.
pub fn is_lazy(r: &Range) -> bool {
    r.backing == Backing::Anonymous
        && r.flags & (libc::MAP_LOCKED | libc::MAP_HUGETLB | libc::MAP_SHARED) == 0
        && !r.advice.contains(&libc::MADV_WIPEONFORK)
}

/// Pages that are touched at once: what the kernel writes when the thread starts, and its stack.
#[must_use]
pub fn hot_pages(p: &Process) -> Vec<u64> {
    let mut hot: Vec<u64> = p
        .threads
        .iter()
        .flat_map(|t| {
            let reg = |i: usize| t.regs.get(i).copied().unwrap_or(0);
            // rsp, fs_base, rip
            [reg(19), reg(21), reg(16), t.rseq.0]
        })
        .filter(|&a| a != 0)
        .map(|a| a & !0xfff)
        .collect();
    hot.sort_unstable();
    hot.dedup();
    hot
}

struct Calls<'a> {
    script: &'a mut Script,
    table: TableId,
}

impl Calls<'_> {
    fn ok(&mut self, what: &'static str, nr: libc::c_long, args: &[Arg]) {
        self.script
            .call(self.table, what, nr, args, Expect::Success);
    }

    fn unmap_between(&mut self, keep: &mut [(u64, u64)]) {
        keep.sort_unstable();
        let mut at = 0;
        for &mut (start, end) in keep {
            self.unmap(at, start);
            at = end;
        }
        self.unmap(at, TOP);
    }

    fn unmap(&mut self, start: u64, end: u64) {
        if start < end {
            self.ok(
                "unmapping",
                libc::SYS_munmap,
                &[start.into(), (end - start).into()],
            );
        }
    }

    fn remap(&mut self, from: u64, to: u64, len: u64) {
        let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
        self.ok(
            "moving the vdso",
            libc::SYS_mremap,
            &[from.into(), len.into(), len.into(), flags.into(), to.into()],
        );
    }

    fn read_pieces(&mut self, x: &Exchange<'_>, source: &dyn PageSource, start: u64, end: u64) {
        for (addr, len, layer, offset) in pieces(source, x.number, start, end) {
            let fd = x.helpers.pages.get(layer as usize).copied().unwrap_or(-1);
            self.script.call(
                self.table,
                "reading pages",
                libc::SYS_pread64,
                &[(fd as u64).into(), addr.into(), len.into(), offset.into()],
                Expect::Exactly(len),
            );
        }
    }
}

/// Adds the exchange to a table; ends with the layout (PR_SET_MM_MAP), and with all helpers closed.
pub fn exchange(
    script: &mut Script,
    table: TableId,
    x: &Exchange<'_>,
    p: &Process,
    source: &dyn PageSource,
) -> Result<(), Error> {
    let mut c = Calls { script, table };
    move_vdso(&mut c, x)?;
    for r in &x.space.ranges {
        map_range(&mut c, x, r, source)?;
    }
    if x.fill == Fill::Lazy {
        register(&mut c, x, p, source);
    }
    for r in &x.space.ranges {
        advise(&mut c, r);
    }
    layout(&mut c, x, p);
    let max = u64::from(u32::MAX);
    c.ok(
        "closing helpers",
        libc::SYS_close_range,
        &[(x.helpers.first as u64).into(), max.into(), 0.into()],
    );
    Ok(())
}

/// Aside first, then to their places: old and new ones may overlap.
fn move_vdso(c: &mut Calls<'_>, x: &Exchange<'_>) -> Result<(), Error> {
    let mut moves = Vec::new();
    for r in &x.space.ranges {
        let name = match &r.backing {
            Backing::Vdso => "[vdso]",
            Backing::Vvar(name) => name.as_str(),
            _ => continue,
        };
        let (start, end) = x.vdso.part(name).ok_or(Error::Vdso)?;
        if end - start != r.end - r.start {
            return Err(Error::Vdso);
        }
        moves.push((start, r.start, end - start));
    }
    let total: u64 = moves.iter().map(|m| m.2).sum();
    let mut at = x.aside;
    for m in &mut moves {
        c.remap(m.0, at, m.2);
        m.0 = at;
        at += m.2;
    }
    let (scratch, len) = x.scratch;
    let mut keep = vec![(scratch, scratch + len), (x.aside, x.aside + total)];
    for r in &x.space.ranges {
        keep.extend(x.filled(r).map(|at| (at, at + (r.end - r.start))));
    }
    c.unmap_between(&mut keep);
    for m in &moves {
        c.remap(m.0, m.1, m.2);
    }
    Ok(())
}

fn map_range(
    c: &mut Calls<'_>,
    x: &Exchange<'_>,
    r: &Range,
    source: &dyn PageSource,
) -> Result<(), Error> {
    let len = r.end - r.start;
    let shared = r.flags & libc::MAP_SHARED != 0;
    if let Backing::Shared { object, offset } = &r.backing
        && let Some(&id) = x.helpers.sysv.get(object)
    {
        return attach(c, r, id, *offset);
    }
    if let Some(at) = x.filled(r) {
        let flags = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
        c.script.call(
            c.table,
            "moving filled memory to its place",
            libc::SYS_mremap,
            &[
                at.into(),
                len.into(),
                len.into(),
                flags.into(),
                r.start.into(),
            ],
            Expect::Exactly(r.start),
        );
        if r.prot != libc::PROT_READ | libc::PROT_WRITE {
            let args = [r.start.into(), len.into(), (r.prot as u64).into()];
            c.ok("protecting a range", libc::SYS_mprotect, &args);
        }
        return Ok(());
    }
    let kind = if shared {
        libc::MAP_SHARED
    } else {
        libc::MAP_PRIVATE
    };
    let flags = kind | libc::MAP_FIXED | (r.flags & PASSED);
    let (fd, offset, flags) = match &r.backing {
        Backing::Anonymous => (-1, 0, flags | libc::MAP_ANONYMOUS),
        Backing::File { path, offset, .. } => {
            let key = (path.clone(), shared && r.prot & libc::PROT_WRITE != 0);
            let fd = x.helpers.files.get(&key).copied();
            (
                fd.ok_or(Error::Manifest("a file is not open"))?,
                *offset,
                flags,
            )
        }
        Backing::Shared { object, offset } => {
            let fd = x.helpers.shared.get(object).copied();
            (
                fd.ok_or(Error::Manifest("no such shared object"))?,
                *offset,
                flags,
            )
        }
        Backing::Vdso | Backing::Vvar(_) | Backing::Vsyscall => return Ok(()),
    };
    // Pages that were written lie over the file's; memory that is not filled by the pager is filled here.
    let fill = match &r.backing {
        Backing::Anonymous => x.fill == Fill::Eager || !is_lazy(r),
        Backing::File { .. } => !shared,
        _ => false,
    };
    let own_pages = fill && !pieces(source, x.number, r.start, r.end).is_empty();
    let prot = if own_pages {
        r.prot | libc::PROT_WRITE
    } else {
        r.prot
    };
    c.script.call(
        c.table,
        "mapping a range",
        libc::SYS_mmap,
        &[
            r.start.into(),
            len.into(),
            (prot as u64).into(),
            (flags as u64).into(),
            (fd as i64 as u64).into(),
            offset.into(),
        ],
        Expect::Exactly(r.start),
    );
    if own_pages {
        c.read_pieces(x, source, r.start, r.end);
        if prot != r.prot {
            c.ok(
                "protecting a range",
                libc::SYS_mprotect,
                &[r.start.into(), len.into(), (r.prot as u64).into()],
            );
        }
    }
    Ok(())
}

/// A System V segment is attached whole.
fn attach(c: &mut Calls<'_>, r: &Range, id: i32, offset: u64) -> Result<(), Error> {
    let size = crate::sys::sysv::segment(id)
        .map_err(super::sys("shmctl"))?
        .size;
    if offset != 0 || size.next_multiple_of(4096) != r.end - r.start {
        return Err(Error::Host(
            "a part of System V shared memory is mapped, which is not resumed".into(),
        ));
    }
    let write = r.prot & libc::PROT_WRITE != 0;
    let flags = if write { 0 } else { libc::SHM_RDONLY };
    c.script.call(
        c.table,
        "attaching System V shared memory",
        libc::SYS_shmat,
        &[(id as u64).into(), r.start.into(), (flags as u64).into()],
        Expect::Exactly(r.start),
    );
    if r.prot & !libc::PROT_WRITE != libc::PROT_READ {
        c.ok(
            "protecting a range",
            libc::SYS_mprotect,
            &[
                r.start.into(),
                (r.end - r.start).into(),
                (r.prot as u64).into(),
            ],
        );
    }
    Ok(())
}

/// Hot pages first, while a read into the memory does not have to be served by anyone.
fn register(c: &mut Calls<'_>, x: &Exchange<'_>, p: &Process, source: &dyn PageSource) {
    for page in hot_pages(p) {
        let writable = libc::PROT_READ | libc::PROT_WRITE;
        let lazy = |r: &&Range| r.start <= page && page < r.end && is_lazy(r);
        let range = x.space.ranges.iter().find(lazy);
        if range.is_some_and(|r| r.prot & writable == writable) {
            c.read_pieces(x, source, page, page + 4096);
        }
    }
    for (start, end) in lazy_ranges(x.space) {
        let arg = crate::sys::fill::register_words(start, end - start);
        let arg = c.script.words(&arg);
        c.ok(
            "registering memory to be filled",
            libc::SYS_ioctl,
            &[
                (x.helpers.uffd as u64).into(),
                crate::sys::fill::REGISTER.into(),
                arg.into(),
            ],
        );
    }
}

fn advise(c: &mut Calls<'_>, r: &Range) {
    let len = r.end - r.start;
    for &advice in &r.advice {
        c.script.call(
            c.table,
            "advising",
            libc::SYS_madvise,
            &[r.start.into(), len.into(), (advice as i64 as u64).into()],
            Expect::Anything,
        );
    }
    if r.flags & libc::MAP_LOCKED != 0 {
        c.ok(
            "locking memory",
            libc::SYS_mlock,
            &[r.start.into(), len.into()],
        );
    }
    if let Some(name) = &r.name {
        let mut name = name.as_bytes().to_vec();
        name.push(0);
        let name = c.script.bytes(&name);
        c.script.call(
            c.table,
            "naming memory",
            libc::SYS_prctl,
            &[
                (libc::PR_SET_VMA as u64).into(),
                (libc::PR_SET_VMA_ANON_NAME as u64).into(),
                r.start.into(),
                len.into(),
                name.into(),
            ],
            Expect::Anything,
        );
    }
}

fn layout(c: &mut Calls<'_>, x: &Exchange<'_>, p: &Process) {
    if x.space.thp_disabled {
        let args = [(libc::PR_SET_THP_DISABLE as u64).into(), 1.into()];
        c.ok("disabling huge pages", libc::SYS_prctl, &args);
    }
    let auxv = c.script.words(&x.space.auxv);
    let exe = x.helpers.exe.get(&p.pid).copied().unwrap_or(-1);
    let bytes = (x.space.auxv.len() * 8) as u64;
    let words: Vec<u64> = x
        .space
        .layout
        .iter()
        .copied()
        .chain([0, bytes | u64::from(exe as u32) << 32])
        .collect();
    let map = c.script.words(&words);
    c.script.relocate(map, 11, auxv.into());
    c.ok(
        "setting the layout",
        libc::SYS_prctl,
        &[
            (libc::PR_SET_MM as u64).into(),
            (libc::PR_SET_MM_MAP as u64).into(),
            map.into(),
            ((words.len() * 8) as u64).into(),
        ],
    );
}

//! The mappings of a machine's processes, as seen in `/proc`.

use super::manifest::Piece;
use super::{Error, PAGE};
use crate::capture::ranges::Objects;
use crate::image::manifest::{Backing, Range};
use crate::proc::{self, Map, MapKind};
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;

/// The file that is the guest's physical memory.
#[derive(Debug)]
pub struct Memory {
    /// Device and inode, as `/proc/PID/maps` has them.
    pub id: (u64, u64),
    /// The number of main's descriptor of it.
    pub fd: i32,
    /// Open for reading.
    pub file: File,
    /// Bytes.
    pub len: u64,
}

impl Memory {
    /// Finds it: the file of which main has most mapped for writing, shared.
    pub fn find(main: i32, maps: &[Map]) -> Result<Self, Error> {
        let mut bytes: HashMap<(u64, u64), u64> = HashMap::new();
        for m in maps.iter().filter(|m| writes_shared(m)) {
            *bytes.entry((m.dev, m.ino)).or_default() += m.end - m.start;
        }
        let foreign = |why: &str| Error::Foreign(main, why.into());
        let id = bytes.into_iter().max_by_key(|b| b.1);
        let (id, _) = id.ok_or_else(|| foreign("it has no shared memory"))?;
        let dir = proc::path(main, "fd");
        let list = std::fs::read_dir(&dir).map_err(|e| Error::Io(dir, "list", e))?;
        for entry in list.flatten() {
            let number = entry.file_name().to_str().and_then(|n| n.parse().ok());
            let same = std::fs::metadata(entry.path())
                .is_ok_and(|s| s.is_file() && s.ino() == id.1 && s.dev() == id.0);
            if let (Some(fd), true) = (number, same) {
                let file =
                    File::open(entry.path()).map_err(|e| Error::Io(entry.path(), "open", e))?;
                let len = file
                    .metadata()
                    .map_err(|e| Error::Io(entry.path(), "look at", e))?
                    .len();
                return Ok(Self { id, fd, file, len });
            }
        }
        Err(foreign("its memory is no open file"))
    }

    /// Whether a program serves it (FUSE), as for a machine that was resumed.
    pub fn is_served(&self) -> bool {
        const FUSE: i64 = 0x6573_5546;
        nix::sys::statfs::fstatfs(&self.file).is_ok_and(|s| s.filesystem_type().0 == FUSE)
    }

    /// Whether a file is it.
    pub fn has(&self, dev: u64, ino: u64) -> bool {
        (dev, ino) == self.id
    }

    /// Whether a mapping is of it, and shared.
    pub fn is(&self, m: &Map) -> bool {
        m.shared && self.has(m.dev, m.ino)
    }
}

fn writes_shared(m: &Map) -> bool {
    m.shared && m.prot & libc::PROT_WRITE != 0 && matches!(m.kind, MapKind::File { .. })
}

/// Main's mappings as the manifest has them. `flags` are the letters of smaps, by first address.
pub fn ranges(
    main: i32,
    maps: &[Map],
    memory: &Memory,
    objects: &mut Objects,
    flags: &HashMap<u64, Vec<String>>,
) -> Result<Vec<Range>, Error> {
    let mut out = Vec::with_capacity(maps.len());
    for m in maps {
        if memory.is(m) {
            out.push(Range {
                start: m.start,
                end: m.end,
                prot: m.prot,
                flags: libc::MAP_SHARED,
                backing: Backing::Shared {
                    object: 0,
                    offset: m.offset,
                },
                advice: Vec::new(),
                name: None,
            });
            continue;
        }
        let range = objects.range(main, m, flags.get(&m.start));
        let mut range = range.map_err(|e| Error::Foreign(main, super::text(&e)))?;
        if matches!(range.backing, Backing::Shared { .. }) {
            let why = format!("it has shared memory at {:#x} beside the guest's", m.start);
            return Err(Error::Foreign(main, why));
        }
        // It is the allocator's own affair how much is promised.
        range.flags &= libc::MAP_PRIVATE | libc::MAP_GROWSDOWN;
        range.advice.clear();
        out.push(range);
    }
    Ok(out)
}

/// Pages of the guest's memory that a piece covers: first, and one past the last.
pub fn pages(p: &Piece) -> (u64, u64) {
    (p.offset / PAGE, (p.offset + p.len).div_ceil(PAGE))
}

//! The manifest of a machine's snapshot: everything that is not memory or disk. The file is a header, a sum and JSON, as
//! `docs/uml.md` has it byte by byte.

use super::Error;
use crate::files::OpenFile;
use crate::image::manifest::{Host, Process, SignalAction, Space, Taken, Thread};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

/// The version of the format that this program writes; newer ones are refused.
pub const VERSION: u32 = 1;
/// The name of the file.
pub const NAME: &str = "machine";
const MAGIC: [u8; 8] = *b"UMLMACH\n";
const HEAD: usize = 56;
/// A manifest is some hundred KB.
const MOST: u64 = 64 << 20;

/// A machine at one point in time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// When, by the machine's clocks.
    pub taken: Taken,
    /// What its clocks were ahead of the host's.
    pub clock: super::clock::Offsets,
    /// The host it ran on.
    pub host: Host,
    /// The guest kernel's program.
    pub kernel: Kernel,
    /// The guest kernel's process.
    pub main: Process,
    /// Its address space. Shared ranges are of the guest's memory, object 0.
    pub space: Space,
    /// Processes that share its memory and its descriptors.
    pub helpers: Vec<Helper>,
    /// Processes of the guest's users.
    pub users: Vec<User>,
    /// What all user processes have in common.
    pub stub: Stub,
    /// Open file descriptions; `Fd::file` counts here.
    pub files: Vec<OpenFile>,
    /// The descriptor that is the guest's memory.
    pub memory_fd: i32,
    /// Bytes of the guest's memory.
    pub memory_len: u64,
    /// Main's own pages, in the order of the file `private`: address and bytes.
    pub private: Vec<(u64, u64)>,
    /// blake3 of `private`, hexadecimal.
    pub private_sum: String,
    /// blake3 of `memory.sums`, hexadecimal.
    pub memory_sums: String,
    /// blake3 of `disk.sums`, hexadecimal; none without a disk.
    pub disk_sums: Option<String>,
}

/// The program that is the guest's kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kernel {
    /// Its path.
    pub path: PathBuf,
    /// blake3 of the file, hexadecimal.
    pub sum: String,
}

/// A process that shares main's memory: it reads and writes the disk, or waits for descriptors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Helper {
    /// Registers and the like.
    pub thread: Thread,
    /// The signal that main gets at its end.
    pub exit_signal: i32,
    /// Signals with main's handler.
    pub caught: u64,
    /// Ignored signals.
    pub ignored: u64,
}

/// A user process: its registers are in the guest kernel's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct User {
    /// Its number in the machine.
    pub pid: i32,
    /// What is mapped of the guest's memory.
    pub pieces: Vec<Piece>,
}

/// A mapping of the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Piece {
    /// Address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// Offset in the memory, bytes.
    pub offset: u64,
    /// PROT_ bits.
    pub prot: i32,
    /// MAP_SHARED; else private: the page of stub code.
    pub shared: bool,
}

/// How user processes take SIGSEGV (`arch/um/os-Linux/skas/process.c:userspace_tramp`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stub {
    /// The action.
    pub segv: SignalAction,
    /// Signal stack: address, flags, bytes.
    pub altstack: (u64, u32, u64),
}

fn sum(head: &[u8], body: &[u8]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&head[..24]);
    hasher.update(body);
    hasher.finalize()
}

/// The bytes of a manifest.
pub fn encode(machine: &Machine) -> serde_json::Result<Vec<u8>> {
    let body = serde_json::to_vec(machine)?;
    let mut bytes = Vec::with_capacity(HEAD + body.len());
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&VERSION.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&(body.len() as u64).to_le_bytes());
    bytes.extend_from_slice(sum(&bytes, &body).as_bytes());
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

/// Writes the manifest into `dir`, and to the disk.
pub fn write(dir: &Path, machine: &Machine) -> Result<(), Error> {
    let path = dir.join(NAME);
    let io = |e| Error::Io(path.clone(), "write", e);
    let bytes = encode(machine).map_err(|e| io(e.into()))?;
    let mut file = File::create(&path).map_err(io)?;
    file.write_all(&bytes).map_err(io)?;
    file.sync_all().map_err(io)
}

/// Reads the manifest in `dir`.
pub fn load(dir: &Path) -> Result<Machine, Error> {
    let path = dir.join(NAME);
    let mut bytes = Vec::new();
    let file = File::open(&path).map_err(|e| Error::Io(path.clone(), "open", e))?;
    file.take(MOST)
        .read_to_end(&mut bytes)
        .map_err(|e| Error::Io(path.clone(), "read", e))?;
    decode(&bytes, &path)
}

/// The reverse; `path` is for messages.
pub fn decode(bytes: &[u8], path: &Path) -> Result<Machine, Error> {
    let bad = |what: &str| Error::Damaged(path.into(), what.into());
    let head = bytes.get(..HEAD).ok_or_else(|| bad("it is cut off"))?;
    if head[..8] != MAGIC {
        return Err(bad("it is not the manifest of a machine"));
    }
    let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap_or_default());
    if word(8) > VERSION {
        return Err(Error::Newer(path.into(), word(8), VERSION));
    }
    let len = u64::from_le_bytes(head[16..24].try_into().unwrap_or_default());
    let body = &bytes[HEAD..];
    if len != body.len() as u64 {
        return Err(bad("it is cut off, or has bytes behind its end"));
    }
    if sum(head, body).as_bytes()[..] != head[24..HEAD] {
        return Err(bad("its sum is wrong: bytes of it were changed"));
    }
    if word(8) != VERSION || word(12) != 0 {
        return Err(bad("its header is wrong"));
    }
    serde_json::from_slice(body).map_err(|e| bad(&format!("its body is not understood: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_manifest_is_refused() {
        let path = Path::new("machine");
        assert!(decode(b"", path).is_err());
        assert!(decode(&[0; 100], path).is_err());
        let mut newer = MAGIC.to_vec();
        newer.extend_from_slice(&2u32.to_le_bytes());
        newer.resize(HEAD, 0);
        assert!(matches!(decode(&newer, path), Err(Error::Newer(_, 2, 1))));
        let mut empty = newer;
        empty[8] = 1;
        assert!(matches!(decode(&empty, path), Err(Error::Damaged(..))));
    }
}

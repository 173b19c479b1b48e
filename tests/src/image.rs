//! Images for tests: disks with random contents, COW files written as the guest kernel writes them, and the model of what
//! a guest sees.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

use crate::Rng;
use crate::live::binary;

/// Bytes of a sector.
pub const SECTOR: usize = 512;

/// A directory that goes away, and the programs run in it.
#[derive(Debug)]
pub struct Images {
    dir: TempDir,
}

impl Images {
    /// An empty directory.
    pub fn new() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("cowfs-image-")
            .tempdir_in("/var/tmp")
            .expect("a directory");
        Self { dir }
    }

    /// A path in it.
    pub fn at(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A file in it.
    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.at(name);
        fs::write(&path, bytes).expect("room");
        path
    }

    /// Runs a program in it, whatever comes of it.
    pub fn try_run(&self, program: &Path, args: &[&str], env: &[(&str, &str)]) -> Output {
        Command::new(program)
            .args(args)
            .envs(env.iter().copied())
            .current_dir(self.dir.path())
            .output()
            .unwrap_or_else(|e| panic!("{}: {e}: run tools/setup test", program.display()))
    }

    /// Runs one of uml-utilities, which must succeed.
    pub fn uml(&self, program: &str, args: &[&str]) {
        let out = self.try_run(Path::new(program), args, &[]);
        let err = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{program} {args:?}: {err}");
    }

    /// Runs `cowfs image`, whatever comes of it.
    pub fn try_image(&self, args: &[&str]) -> Output {
        let all: Vec<&str> = ["image"].iter().chain(args).copied().collect();
        self.try_run(&binary(), &all, &[])
    }

    /// Runs `cowfs image`, which must succeed; its output.
    pub fn image(&self, args: &[&str]) -> String {
        let out = self.try_image(args);
        let err = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{args:?}: {err}");
        String::from_utf8_lossy(&out.stdout).into_owned()
    }

    /// Runs `cowfs image`, which must be refused with this exit code; what it said.
    pub fn refused(&self, args: &[&str], code: i32) -> String {
        let before = self.names();
        let out = self.try_image(args);
        let err = String::from_utf8_lossy(&out.stderr).into_owned();
        assert_eq!(out.status.code(), Some(code), "{args:?}: {err}");
        assert_eq!(self.names(), before, "{args:?} left something: {err}");
        err
    }

    /// Names in it.
    pub fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path()).expect("a directory");
        let mut out: Vec<String> = entries
            .map(|e| e.expect("an entry").file_name().to_string_lossy().into())
            .collect();
        out.sort();
        out
    }
}

impl Default for Images {
    fn default() -> Self {
        Self::new()
    }
}

/// Random contents of so many sectors: about a third is zeros, in runs.
pub fn random_disk(rng: &mut Rng, sectors: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(sectors * SECTOR);
    while out.len() < sectors * SECTOR {
        let n = ((1 + rng.below(40)) as usize * SECTOR).min(sectors * SECTOR - out.len());
        if rng.below(3) == 0 {
            out.resize(out.len() + n, 0);
        } else {
            out.extend((0..n).map(|_| rng.draw() as u8));
        }
    }
    out
}

/// A file with holes where its contents are zeros.
pub fn write_with_holes(path: &Path, bytes: &[u8]) {
    let f = File::create(path).expect("room");
    f.set_len(bytes.len() as u64).expect("room");
    for (i, block) in bytes.chunks(4096).enumerate() {
        if block.iter().any(|b| *b != 0) {
            f.write_all_at(block, i as u64 * 4096).expect("room");
        }
    }
}

/// Where bitmap and data lie, computed apart from the product.
pub fn layout(size: usize) -> (u64, u64) {
    let bitmap = size.div_ceil(SECTOR).div_ceil(8) as u64;
    (8192, (8192 + bitmap).next_multiple_of(4096))
}

/// Writes sectors as the guest kernel does, into the COW file and into the model of the disk.
pub fn write_sectors(cow: &Path, disk: &mut [u8], first: usize, bytes: &[u8]) {
    let (bitmap, data) = layout(disk.len());
    let at = first * SECTOR;
    let f = File::options()
        .read(true)
        .write(true)
        .open(cow)
        .expect("a COW file");
    f.write_all_at(bytes, data + at as u64).expect("room");
    for s in first..first + bytes.len() / SECTOR {
        let (mut byte, place) = ([0], bitmap + s as u64 / 8);
        f.read_exact_at(&mut byte, place).expect("a bitmap");
        byte[0] |= 1 << (s % 8);
        f.write_all_at(&byte, place).expect("room");
    }
    disk[at..at + bytes.len()].copy_from_slice(bytes);
}

/// Writes at random, zeros among it.
pub fn write_at_random(rng: &mut Rng, cow: &Path, disk: &mut [u8]) {
    let sectors = disk.len() / SECTOR;
    for _ in 0..rng.below(60) {
        let first = rng.below(sectors as u64) as usize;
        let n = (1 + rng.below(30) as usize).min(sectors - first);
        let bytes = random_disk(rng, n);
        write_sectors(cow, disk, first, &bytes);
    }
}

/// Asserts that a file holds these bytes, without printing them.
pub fn holds(path: &Path, bytes: &[u8], what: &str) {
    let is = fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert_eq!(is.len(), bytes.len(), "{what}: {}", path.display());
    let differs = is.iter().zip(bytes).position(|(a, b)| a != b);
    assert_eq!(differs, None, "{what}: {}", path.display());
}

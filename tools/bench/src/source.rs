//! The tree that is unpacked: real files of this machine, in one tarball, as a git repository.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::run::{command, timed};

/// Roots that files are taken from, in this order.
const ROOTS: [&str; 5] = [
    "/usr/include",
    "/usr/share",
    "/usr/lib",
    "/usr/src",
    "/etc/alternatives",
];
/// Larger files are left out: the tree stands for a source or package tree.
const LARGEST: u64 = 128 << 10;

/// A tarball and what is in it.
#[derive(Debug)]
pub struct Source {
    /// Tarball
    pub tar: PathBuf,
    /// Regular files, without `.git`
    pub files: usize,
    /// Their bytes
    pub bytes: u64,
    /// Their bytes in whole blocks of 4 KiB
    pub block_bytes: u64,
}

/// Collects `want` files at least (some twice, on a small machine), commits them, and packs all.
pub fn make(work: &Path, want: usize) -> Result<Source> {
    let dir = work.join("source");
    let mut source = Source {
        tar: work.join("tree.tar"),
        files: 0,
        bytes: 0,
        block_bytes: 0,
    };
    for pass in 0..20 {
        for root in ROOTS {
            let to = dir
                .join(format!("pass{pass}"))
                .join(root.trim_start_matches('/'));
            copy(Path::new(root), &to, want, &mut source)?;
        }
        if source.files >= want {
            break;
        }
    }
    let git = |args: &[&str]| {
        let mut c = command("git", &["-c", "init.defaultBranch=main", "-c", "gc.auto=0"]);
        c.args(["-c", "user.name=bench", "-c", "user.email=bench@localhost"]);
        timed(
            c.args(args)
                .current_dir(&dir)
                .env("GIT_CONFIG_NOSYSTEM", "1")
                .taken(),
        )
    };
    if which("git") {
        git(&["init", "-q"])?;
        git(&["add", "-A", "-f"])?;
        git(&["commit", "-q", "-m", "tree"])?;
        git(&["gc", "-q"])?;
    }
    let mut tar = command("tar", &["--sort=name", "-cf"]);
    tar.arg(&source.tar).arg("-C").arg(&dir).arg(".");
    timed(tar)?;
    fs::remove_dir_all(&dir).context("removing the copy of the tree")?;
    Ok(source)
}

/// Is a program there?
pub fn which(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|p| std::env::split_paths(&p).any(|d| d.join(program).is_file()))
}

/// A `Command` made by chained calls on a temporary one.
trait Owned {
    fn taken(&mut self) -> std::process::Command;
}

impl Owned for std::process::Command {
    fn taken(&mut self) -> std::process::Command {
        std::mem::replace(self, std::process::Command::new("true"))
    }
}

fn copy(from: &Path, to: &Path, want: usize, source: &mut Source) -> Result<()> {
    let Ok(entries) = fs::read_dir(from) else {
        return Ok(());
    };
    let mut entries: Vec<(PathBuf, Metadata)> = entries
        .filter_map(Result::ok)
        .filter_map(|e| e.metadata().ok().map(|m| (e.path(), m)))
        .collect();
    entries.sort_by(|a, b| a.0.cmp(&b.0));
    let mut made = false;
    for (path, m) in entries {
        if source.files >= want {
            break;
        }
        let Some(name) = path.file_name() else {
            continue;
        };
        // A repository inside would become a submodule.
        if name.to_string_lossy().starts_with(".git") {
            continue;
        }
        if m.is_dir() {
            copy(&path, &to.join(name), want, source)?;
        } else if m.is_symlink() || (m.is_file() && m.len() <= LARGEST && m.mode() & 0o400 != 0) {
            if !made {
                fs::create_dir_all(to).with_context(|| format!("making {}", to.display()))?;
                made = true;
            }
            copy_one(&path, &to.join(name), &m, source)?;
        }
    }
    Ok(())
}

fn copy_one(from: &Path, to: &Path, m: &Metadata, source: &mut Source) -> Result<()> {
    if m.is_symlink() {
        let target = fs::read_link(from).with_context(|| format!("reading {}", from.display()))?;
        return std::os::unix::fs::symlink(target, to)
            .with_context(|| format!("making {}", to.display()));
    }
    let n = fs::copy(from, to).with_context(|| format!("copying {}", from.display()))?;
    source.files += 1;
    source.bytes += n;
    source.block_bytes += n.next_multiple_of(4096);
    Ok(())
}

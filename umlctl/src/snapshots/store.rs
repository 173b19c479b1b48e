//! Where snapshots of machines are: `snapshots/NAME` in the state root, each a directory as `docs/uml.md` has it, with one
//! more file, `about`: what umlctl itself must know to make a machine of it.

use crate::vm::config::Config;
use crate::vm::home::{Home, read_limited};
use crate::vm::name::Name;
use serde::{Deserialize, Serialize};
use snapshot::uml::image;
use snapshot::uml::manifest::{self, Machine};
use std::fs;
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Version of `about`; a newer one is refused.
pub const VERSION: u32 = 1;
const ABOUT: &str = "about";
/// Names of directories that are no snapshots yet, or no more.
const HIDDEN: &str = ".";

/// What can go wrong with the store.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is one of that name.
    #[error(
        "there is a snapshot {0} already: choose another name, or remove it with `umlctl rm-snapshot {0}`"
    )]
    Exists(String),
    /// There is none.
    #[error("there is no snapshot {0} in {home}; `umlctl snapshots` lists what there is", home = .1.display())]
    None(String, PathBuf),
    /// A file operation failed.
    #[error("cannot {0} {path}", path = .1.display())]
    Io(&'static str, PathBuf, #[source] std::io::Error),
    /// `about` is not what was written.
    #[error("{path} is damaged: {1}; take another snapshot, or restore this one from a copy", path = .0.display())]
    Damaged(PathBuf, String),
    /// `about` is of a newer umlctl.
    #[error("{path} has format {1}, and this umlctl knows formats up to {VERSION}: use a newer one", path = .0.display())]
    Newer(PathBuf, u32),
    /// The snapshot's other files.
    #[error(transparent)]
    Image(#[from] snapshot::uml::Error),
}

fn io<'a>(what: &'static str, path: &'a Path) -> impl Fn(std::io::Error) -> Error + 'a {
    move |e| Error::Io(what, path.into(), e)
}

/// What a snapshot is of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct About {
    /// Of this file.
    pub version: u32,
    /// The machine's configuration, with its name.
    pub vm: Config,
    /// When it was taken: microseconds since 1970.
    pub taken_us: u64,
    /// How it was taken.
    pub figures: Figures,
}

/// What a snapshot has cost; all times in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Figures {
    /// How long the machine stood still.
    pub pause_us: u64,
    /// Of it: until its helpers stood still, too.
    pub stop_us: u64,
    /// Of it: registers and open files.
    pub state_us: u64,
    /// Of it: finding what was written.
    pub mark_us: u64,
    /// Of it: reading that.
    pub copy_us: u64,
    /// How long it stood still some time before, to prepare.
    pub prepare_us: u64,
    /// How long it ran slowed down before it came to rest.
    pub rest_us: u64,
    /// How long its disk stood still after that.
    pub disk_us: u64,
    /// From the request to everything being on disk; none until it is.
    pub durable_us: Option<u64>,
    /// Bytes that were saved while it ran, and while it stood still.
    pub bytes_ahead: u64,
    /// The latter.
    pub bytes_in_stop: u64,
}

/// A snapshot that is there.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Its name.
    pub name: String,
    /// Its directory.
    pub dir: PathBuf,
}

/// All snapshots.
#[derive(Debug, Clone)]
pub struct Store(PathBuf);

/// A directory that becomes a snapshot, or goes away.
#[derive(Debug)]
pub struct Staging {
    /// Where the files are put.
    pub dir: PathBuf,
    /// Where it will be.
    pub to: PathBuf,
    kept: bool,
}

impl Store {
    /// That of a state root.
    #[must_use]
    pub fn of(home: &Home) -> Self {
        Self(home.path().join("snapshots"))
    }

    /// Begins a snapshot. What an earlier one that never ended has left under the same name is removed.
    ///
    /// # Errors
    /// There is one of that name.
    pub fn begin(&self, name: &Name) -> Result<Staging, Error> {
        let to = self.0.join(name.as_str());
        if fs::symlink_metadata(&to).is_ok() {
            return Err(Error::Exists(name.to_string()));
        }
        let mut builder = fs::DirBuilder::new();
        builder.mode(0o700).recursive(true);
        builder.create(&self.0).map_err(io("make", &self.0))?;
        let dir = self.0.join(format!("{HIDDEN}new-{name}"));
        remove_all(&dir)?;
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&dir)
            .map_err(io("make", &dir))?;
        Ok(Staging {
            dir,
            to,
            kept: false,
        })
    }

    /// A snapshot by its name, or by a beginning of it that only it has.
    ///
    /// # Errors
    /// There is none.
    pub fn find(&self, name: &str) -> Result<Snapshot, Error> {
        let all = self.all()?;
        let exact = all.iter().find(|s| s.name == name);
        let mut begins = all.iter().filter(|s| s.name.starts_with(name));
        let only = match (begins.next(), begins.next()) {
            (Some(one), None) if !name.is_empty() => Some(one),
            _ => None,
        };
        exact.or(only).cloned().ok_or_else(|| self.missing(name))
    }

    /// That there is no such snapshot.
    #[must_use]
    pub fn missing(&self, name: &str) -> Error {
        Error::None(name.into(), self.0.clone())
    }

    /// All of them, by name.
    ///
    /// # Errors
    /// The directory cannot be read. That there is none is no error.
    pub fn all(&self) -> Result<Vec<Snapshot>, Error> {
        let list = match fs::read_dir(&self.0) {
            Ok(list) => list,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(io("list", &self.0)(e)),
        };
        let mut all: Vec<Snapshot> = list
            .flatten()
            .filter_map(|e| {
                let name = e.file_name().into_string().ok()?;
                let good = name.parse::<Name>().is_ok();
                good.then(|| Snapshot {
                    name,
                    dir: e.path(),
                })
            })
            .collect();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    /// Removes one. Machines that were made of it go on: they have its files open.
    ///
    /// # Errors
    /// The file system's.
    pub fn remove(&self, snapshot: &Snapshot) -> Result<(), Error> {
        // In one step it is no snapshot any more.
        let dir = self.0.join(format!("{HIDDEN}old-{}", snapshot.name));
        remove_all(&dir)?;
        fs::rename(&snapshot.dir, &dir).map_err(io("remove", &snapshot.dir))?;
        remove_all(&dir)
    }
}

impl Staging {
    /// Makes it a snapshot: when this returns it is there, whole.
    ///
    /// # Errors
    /// The file system's; then there is none.
    pub fn publish(mut self, machine: &Machine, about: &About) -> Result<(), Error> {
        write_about(&self.dir, about)?;
        snapshot::uml::capture::publish(&self.dir, &self.to, machine)?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.kept {
            // The next one of this name tries again.
            let _ = remove_all(&self.dir);
        }
    }
}

fn remove_all(dir: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(io("remove", dir)(e)),
        _ => Ok(()),
    }
}

/// A line with blake3 of the rest, hexadecimal; the rest is JSON.
fn write_about(dir: &Path, about: &About) -> Result<(), Error> {
    let path = dir.join(ABOUT);
    let body = serde_json::to_string_pretty(about).map_err(|e| io("write", &path)(e.into()))?;
    let text = format!(
        "{}\n{body}\n",
        snapshot::uml::image::sum(format!("{body}\n").as_bytes())
    );
    let mut file = fs::File::create(&path).map_err(io("write", &path))?;
    file.write_all(text.as_bytes())
        .map_err(io("write", &path))?;
    file.sync_all().map_err(io("write", &path))
}

impl Snapshot {
    /// What it is of.
    ///
    /// # Errors
    /// The file is damaged, or of a newer umlctl.
    pub fn about(&self) -> Result<About, Error> {
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let path = self.dir.join(ABOUT);
        let damaged = |what: &str| Error::Damaged(path.clone(), what.into());
        let text = read_limited(&path)
            .and_then(|b| String::from_utf8(b).map_err(std::io::Error::other))
            .map_err(io("read", &path))?;
        let (sum, body) = text
            .split_once('\n')
            .ok_or_else(|| damaged("it is cut off"))?;
        if image::sum(body.as_bytes()) != sum {
            return Err(damaged("its sum is wrong: bytes of it were changed"));
        }
        let Version { version } =
            serde_json::from_str(body).map_err(|e| damaged(&e.to_string()))?;
        if version > VERSION {
            return Err(Error::Newer(path, version));
        }
        serde_json::from_str(body).map_err(|e| damaged(&e.to_string()))
    }

    /// The machine.
    ///
    /// # Errors
    /// The manifest is damaged, or of a newer umlctl.
    pub fn machine(&self) -> Result<Machine, Error> {
        Ok(manifest::load(&self.dir)?)
    }

    /// Bytes that it takes on the disk.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let list = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        list.filter_map(|e| e.metadata().ok())
            .map(|m| m.blocks() * 512)
            .sum()
    }

    /// Checks every byte.
    ///
    /// # Errors
    /// What is damaged first.
    pub fn verify(&self) -> Result<(), Error> {
        self.about()?;
        let machine = self.machine()?;
        let (file, path) = image::open(&self.dir, image::PRIVATE)?;
        drop(file);
        if image::sum_of(&path)? != machine.private_sum {
            return Err(Error::Damaged(path, "its sum is wrong".into()));
        }
        check(
            &self.dir,
            image::MEMORY,
            image::MEMORY_SUMS,
            &machine.memory_sums,
        )?;
        if let Some(sums) = &machine.disk_sums {
            check(&self.dir, image::DISK, image::DISK_SUMS, sums)?;
        }
        Ok(())
    }
}

/// Checks a file of a snapshot against its sums.
pub(super) fn check(dir: &Path, name: &str, sums: &str, sum: &str) -> Result<(), Error> {
    let (file, path) = image::open(dir, name)?;
    let len = file.metadata().map_err(io("look at", &path))?.len();
    Ok(image::Sums::load(&dir.join(sums), sum, &path, len)?.check(&file, &path)?)
}

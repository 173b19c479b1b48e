//! The roots: Debian, made once by debootstrap from the release alone, then upgraded by apt, a few packages at a time, from
//! its security and stable updates. Each is kept as a directory, so that a later run needs no network.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use serde::{Deserialize, Serialize};

use crate::peers::{remove_dir, unmount_by_force};
use crate::run::{command, output, timed};

/// Release that the roots are of.
const SUITE: &str = "bookworm";

/// What the first root has beside the minimal base: servers and interpreters, as a root of an application does.
const FIRST: [&str; 9] = [
    "ca-certificates",
    "curl",
    "nginx-light",
    "postgresql-15",
    "redis-server",
    "php8.2-cli",
    "python3-django",
    "ruby3.1",
    "perl",
];

/// One upgrade.
#[derive(Debug)]
struct Step {
    /// Its name in the report
    title: &'static str,
    /// Packages that are brought up to date; empty for all that are left
    packages: &'static [&'static str],
    /// Installed if there is nothing newer, which depends on the day: the roots have to differ by an upgrade
    instead: &'static str,
}

/// From each root to the next.
const STEPS: [Step; 9] = [
    Step {
        title: "openssl",
        packages: &["openssl", "libssl3", "ca-certificates"],
        instead: "git",
    },
    Step {
        title: "nginx",
        packages: &["nginx-light", "nginx-common", "nginx"],
        instead: "nginx-extras",
    },
    Step {
        title: "python",
        packages: &[
            "python3.11",
            "python3.11-minimal",
            "libpython3.11-stdlib",
            "libpython3.11-minimal",
        ],
        instead: "python3-pip",
    },
    Step {
        title: "redis",
        packages: &["redis-server", "redis-tools"],
        instead: "memcached",
    },
    Step {
        title: "postgresql",
        packages: &["postgresql-15", "postgresql-client-15", "libpq5"],
        instead: "sqlite3",
    },
    Step {
        title: "php",
        packages: &[
            "php8.2-cli",
            "php8.2-common",
            "php8.2-opcache",
            "php8.2-readline",
        ],
        instead: "php8.2-fpm",
    },
    Step {
        title: "django",
        packages: &["python3-django"],
        instead: "python3-flask",
    },
    Step {
        title: "perl",
        packages: &["perl", "perl-base", "perl-modules-5.36", "libperl5.36"],
        instead: "libwww-perl",
    },
    Step {
        title: "all others",
        packages: &[],
        instead: "haproxy",
    },
];

/// How many roots there can be.
pub const MOST: usize = STEPS.len() + 1;

/// One root.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Root {
    /// What was upgraded, for people
    pub title: String,
    /// Packages that differ from the root before: name, old and new version
    pub packages: Vec<String>,
    /// Directory
    #[serde(skip)]
    pub dir: PathBuf,
}

/// The first `count` roots; those that the cache does not have are made. The smallest `count` is 1, the largest [`MOST`].
///
/// # Errors
/// If debootstrap or apt fails, or an upgrade changes nothing.
pub fn make(cache: &Path, count: usize) -> Result<Vec<Root>> {
    std::fs::create_dir_all(cache).with_context(|| format!("making {}", cache.display()))?;
    let mut roots: Vec<Root> = Vec::new();
    for n in 1..=count {
        let dir = cache.join(name(n));
        let note = cache.join(format!("{}.json", name(n)));
        // The note is written last: a root without one is not whole.
        let mut root = match std::fs::read_to_string(&note) {
            Ok(text) => serde_json::from_str(&text)
                .with_context(|| format!("{}: remove it", note.display()))?,
            Err(_) => {
                eprintln!("bench: making root {n} of {count}");
                let root = make_one(&dir, roots.last(), n)?;
                let text = serde_json::to_string_pretty(&root).context("writing about a root")?;
                std::fs::write(&note, text)
                    .with_context(|| format!("writing {}", note.display()))?;
                root
            }
        };
        root.dir = dir;
        roots.push(root);
    }
    Ok(roots)
}

/// Name of a version, and of a root's directory.
pub fn name(n: usize) -> String {
    format!("v{n:02}")
}

fn make_one(dir: &Path, last: Option<&Root>, n: usize) -> Result<Root> {
    remove_dir(dir);
    let partial = Partial(dir.with_extension("partial"));
    remove_dir(&partial.0);
    let tree = &partial.0;
    let sources = Sources::find()?;
    let Some(last) = last else {
        first(tree, &sources)?;
        partial.keep(dir)?;
        return Ok(Root {
            title: format!("{SUITE}: {}", FIRST.join(", ")),
            packages: Vec::new(),
            dir: dir.into(),
        });
    };
    let step = STEPS.get(n - 2).context("there are no more upgrades")?;
    let mut cp = command("cp", &["-a", "--"]);
    cp.arg(&last.dir).arg(tree);
    timed(cp)?;
    let before = installed(tree)?;
    let chroot = Chroot::enter(tree)?;
    if n == 2 {
        sources.add_updates(tree)?;
        chroot.apt(&["update"])?;
    }
    if step.packages.is_empty() {
        chroot.apt(&["upgrade"])?;
    } else {
        chroot.apt(&[&["install", "--only-upgrade"], step.packages].concat())?;
    }
    let mut changed = changes(&before, &installed(tree)?);
    let mut title = step.title.to_owned();
    if changed.is_empty() {
        title = format!(
            "{} is there (nothing newer of {title})",
            step.instead.to_owned()
        );
        chroot.apt(&["install", step.instead])?;
        changed = changes(&before, &installed(tree)?);
    }
    chroot.apt(&["clean"])?;
    drop(chroot);
    if changed.is_empty() {
        bail!("the upgrade of {} changed no package", step.title);
    }
    partial.keep(dir)?;
    Ok(Root {
        title,
        packages: changed,
        dir: dir.into(),
    })
}

fn first(tree: &Path, sources: &Sources) -> Result<()> {
    let mut c = command("debootstrap", &["--variant=minbase", SUITE]);
    c.arg(tree).arg(&sources.mirror);
    timed(c).context("is debootstrap there, and its mirror reachable?")?;
    let write = |path: &str, text: &str| {
        let path = tree.join(path);
        std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
    };
    write(
        "etc/apt/sources.list",
        &format!("deb {} {SUITE} main\n", sources.mirror),
    )?;
    // Nothing is started in it.
    write("usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n")?;
    timed({
        let mut c = command("chmod", &["755"]);
        c.arg(tree.join("usr/sbin/policy-rc.d"));
        c
    })?;
    for f in ["resolv.conf", "hosts"] {
        let _ = std::fs::copy(Path::new("/etc").join(f), tree.join("etc").join(f));
    }
    write("etc/apt/apt.conf.d/99host", &sources.proxy)?;
    let chroot = Chroot::enter(tree)?;
    chroot.apt(&["update"])?;
    chroot.apt(&[&["install"], FIRST.as_slice()].concat())?;
    chroot.apt(&["clean"])
}

/// Packages and their versions.
fn installed(tree: &Path) -> Result<BTreeMap<String, String>> {
    let mut c = command("chroot", &[tree]);
    c.args(["dpkg-query", "-W", "-f", "${Package} ${Version}\n"]);
    let text = output(c)?.1;
    Ok(text
        .lines()
        .filter_map(|l| l.split_once(' '))
        .map(|(p, v)| (p.to_owned(), v.to_owned()))
        .collect())
}

fn changes(old: &BTreeMap<String, String>, new: &BTreeMap<String, String>) -> Vec<String> {
    let names: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let version = |of: &BTreeMap<String, String>, name: &String| {
        of.get(name).map_or("-", String::as_str).to_owned()
    };
    names
        .into_iter()
        .filter(|n| old.get(*n) != new.get(*n))
        .map(|n| format!("{n} {} {}", version(old, n), version(new, n)))
        .collect()
}

/// Where packages come from: where this machine's own do.
#[derive(Debug)]
struct Sources {
    mirror: String,
    security: Option<String>,
    proxy: String,
}

impl Sources {
    fn find() -> Result<Self> {
        let sh = |script: &str| -> Result<String> {
            let mut c = Command::new("sh");
            c.args(["-c", script]).env("LC_ALL", "C");
            Ok(output(c)?.1)
        };
        let all = sh(
            r"sed -n 's/^URIs: *//p; s/^deb \(\[[^]]*\] \)\?\([^ ]*\) .*/\2/p' /etc/apt/sources.list /etc/apt/sources.list.d/* 2>/dev/null || true",
        )?;
        let ending = |end: &str| {
            all.lines()
                .map(|l| l.trim_end_matches('/'))
                .find(|l| l.ends_with(end))
                .map(str::to_owned)
        };
        Ok(Self {
            mirror: ending("/debian")
                .context("no Debian mirror in /etc/apt/sources.list or sources.list.d")?,
            security: ending("/debian-security"),
            proxy: sh("apt-config dump | grep -E '^Acquire::(http|https)::?Proxy' || true")?,
        })
    }

    fn add_updates(&self, tree: &Path) -> Result<()> {
        let mut text = format!(
            "deb {0} {SUITE} main\ndeb {0} {SUITE}-updates main\n",
            self.mirror
        );
        if let Some(s) = &self.security {
            text += &format!("deb {s} {SUITE}-security main\n");
        }
        std::fs::write(tree.join("etc/apt/sources.list"), text).context("writing sources.list")
    }
}

/// A root that programs can run in; what is mounted in it is unmounted when it is dropped.
#[derive(Debug)]
struct Chroot<'a>(&'a Path);

impl<'a> Chroot<'a> {
    fn enter(tree: &'a Path) -> Result<Self> {
        mount(
            Some("proc"),
            &tree.join("proc"),
            Some("proc"),
            MsFlags::empty(),
            None::<&str>,
        )
        .context("mounting /proc in the root")?;
        Ok(Self(tree))
    }

    fn apt(&self, args: &[&str]) -> Result<()> {
        let mut c = command("chroot", &[self.0]);
        c.args(["apt-get", "-qq", "-y", "--no-install-recommends"])
            .args(["-o", "Dpkg::Options::=--force-confold"])
            .args(args)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .env_remove("TMPDIR");
        timed(c).map(drop)
    }
}

impl Drop for Chroot<'_> {
    fn drop(&mut self) {
        unmount_by_force(&self.0.join("proc"));
    }
}

/// A root that is being made: gone when it is dropped before it is whole.
#[derive(Debug)]
struct Partial(PathBuf);

impl Partial {
    fn keep(&self, dir: &Path) -> Result<()> {
        std::fs::rename(&self.0, dir).with_context(|| format!("making {}", dir.display()))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if self.0.exists() {
            // debootstrap mounts /proc, and leaves it when it is killed.
            unmount_by_force(&self.0.join("proc"));
            remove_dir(&self.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{BTreeMap, changes};

    #[test]
    fn changed_packages() {
        let of = |list: &[(&str, &str)]| -> BTreeMap<String, String> {
            list.iter()
                .map(|(p, v)| ((*p).into(), (*v).into()))
                .collect()
        };
        let old = of(&[("a", "1"), ("b", "1"), ("c", "1")]);
        let new = of(&[("a", "1"), ("b", "2"), ("d", "1")]);
        assert_eq!(changes(&old, &new), ["b 1 2", "c 1 -", "d - 1"]);
    }
}

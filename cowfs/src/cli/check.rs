//! `check`: trees, contents, and repairs of both.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};

use super::args::Cli;
use super::history::remote;
use super::locate::Target;
use super::output::{self, bar, size};
use crate::control::Failure;
use crate::errors::in_full;
use crate::history::TransferError;
use crate::history::remote::{Remote, is_url};
use crate::history::repair::{Elsewhere, Mended, is_needed, repair};
use crate::service::Service;
use crate::store::packs::records::Name;
use crate::store::packs::{DataReport, RepairReport};
use crate::store::{Store, StoreError};

/// What a check shall do.
pub(super) struct Check<'a> {
    /// The store's directory.
    pub store: &'a Path,
    /// Read contents as well.
    pub data: bool,
    pub repair: bool,
    pub from: Option<&'a str>,
}

/// What a check of the contents found, and a repair did.
#[derive(Default)]
pub(super) struct Found {
    mended: Option<Mended>,
    data: Option<DataReport>,
    repair: Option<RepairReport>,
    kept_in: Option<String>,
}

impl Found {
    /// True when no contents are damaged (any more).
    pub fn is_clean(&self) -> bool {
        let mut data = self.data.iter();
        data.all(|d| d.damage.is_empty() && d.other.is_empty())
    }

    /// Adds what there is to a report.
    pub fn json(&self, to: &mut serde_json::Map<String, Value>) {
        if let Some(m) = &self.mended {
            let mended = json!({
                "pages": m.pages, "index": m.index, "unknown_bytes": m.unknown_bytes,
                "named_bytes": m.named_bytes, "refused": m.refused, "kept_in": self.kept_in,
            });
            to.insert("trees_repair".into(), mended);
        }
        let Some(data) = &self.data else { return };
        let damage = data.damage.iter();
        let mut v = json!({
            "good_bytes": data.good_bytes,
            "unsummed_bytes": data.unsummed_bytes,
            "damaged": damage.map(|d| json!({
                "tree": d.tree, "path": d.path, "offset_bytes": d.offset,
            })).collect::<Vec<_>>(),
            "other": data.other,
        });
        if let (Some(r), Some(o)) = (&self.repair, v.as_object_mut()) {
            let repair = json!({
                "repaired": r.repaired, "missing": r.missing, "kept_in": self.kept_in,
            });
            o.insert("repair".into(), repair);
        }
        to.insert("contents".into(), v);
    }

    pub fn print(&self) {
        if let Some(m) = &self.mended {
            if m.index {
                eprintln!(
                    "the index of packed contents was made anew; {} have lost their names with it",
                    size(m.unknown_bytes)
                );
            }
            if m.named_bytes > 0 {
                eprintln!("{} of contents have their names again", size(m.named_bytes));
            }
            eprintln!("{} tree pages were repaired", m.pages);
            for r in &m.refused {
                eprintln!("not repaired: {r}");
            }
        }
        if let Some(data) = &self.data {
            for d in &data.damage {
                println!("{d}");
            }
            for o in &data.other {
                println!("{o}");
            }
            eprintln!(
                "{} of contents have their sums, {} have none",
                size(data.good_bytes),
                size(data.unsummed_bytes)
            );
        }
        if let Some(r) = &self.repair {
            eprintln!("{} ranges were repaired", r.repaired);
            for m in &r.missing {
                eprintln!("nobody asked has chunk {m}");
            }
        }
        if let Some(k) = &self.kept_in {
            eprintln!("what was damaged is kept in {k}");
        }
    }
}

/// Takes copies of what a repair replaces.
struct Kept {
    dir: PathBuf,
    any: bool,
}

impl Kept {
    fn new(store: &Path) -> Self {
        let name = crate::names::timestamp(crate::store::now_us());
        let repair = store.join("repair");
        // Of two repairs in one second each has a directory of its own.
        let mut dir = repair.join(&name);
        for n in 2.. {
            if !dir.exists() {
                break;
            }
            dir = repair.join(format!("{name}-{n}"));
        }
        Self { dir, any: false }
    }

    fn keep(&mut self, name: &str, bytes: &[u8]) -> Result<(), StoreError> {
        let write = || {
            std::fs::create_dir_all(&self.dir)?;
            let mut f = File::create(self.dir.join(name))?;
            f.write_all(bytes)?;
            f.sync_all()?;
            if !self.any {
                let up = [Some(self.dir.as_path()), self.dir.parent()];
                let up = up.into_iter().flatten().chain(self.dir.ancestors().nth(2));
                for dir in up {
                    File::open(dir)?.sync_all()?;
                }
            }
            Ok(())
        };
        write().map_err(StoreError::io("repair", "keeping a copy"))?;
        self.any = true;
        Ok(())
    }
}

pub(super) fn run(cli: &Cli, o: &Check<'_>) -> Result<u8, Failure> {
    if Target::of(o.store)?.client()?.is_some() {
        return Err(Failure {
            code: 11,
            message: "the store is mounted; unmount it to check it".into(),
        });
    }
    let store = Store::open(o.store)?;
    let mut report = trees(cli, &store)?;
    let mut found = Found::default();
    let mut kept = Kept::new(o.store);
    let other = o.elsewhere()?;
    if o.repair && is_needed(&store)? {
        let from = other.as_ref().map(|(e, _)| e);
        let mut keep = |name: &str, bytes: &[u8]| kept.keep(name, bytes);
        found.mended = Some(repair(&store, from, &mut keep)?);
        store.commit()?;
        // What counts is what is there now.
        report = trees(cli, &store)?;
    }
    // Without the index nobody can tell what contents are right, which the report says.
    if o.data && !report.no_index {
        let mut data = contents(cli, &store)?;
        if o.repair && !data.damage.is_empty() {
            let from = other.as_ref().map(|(e, _)| e);
            let mut fetch = |name: &Name| match from {
                Some(e) => e.chunk(name).map_err(|e| match e {
                    TransferError::Store(e) => e,
                    TransferError::Remote(e) => StoreError::Refused(in_full(&e)),
                    e => StoreError::Refused(e.to_string()),
                }),
                None => Ok(None),
            };
            let mut keep = |name: &str, bytes: &[u8]| kept.keep(name, bytes);
            found.repair = Some(store.repair(&data, &mut fetch, &mut keep)?);
            store.commit()?;
            data = contents(cli, &store)?;
        }
        found.data = Some(data);
    }
    if let Some((_, Some(service))) = &other {
        service.finish()?;
    }
    found.kept_in = kept.any.then(|| kept.dir.display().to_string());
    output::check(cli, &report, &found);
    Ok(u8::from(!report.problems.is_empty() || !found.is_clean()))
}

/// Does something long, and shows how far it is.
fn shown<T>(
    cli: &Cli,
    template: &str,
    work: impl FnOnce(&mut dyn FnMut(u64, u64)) -> Result<T, StoreError>,
) -> Result<T, Failure> {
    let bar = bar(cli, template);
    let done = work(&mut |done, all| {
        bar.set_length(all);
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    Ok(done)
}

fn trees(cli: &Cli, store: &Store) -> Result<crate::store::CheckReport, Failure> {
    let template = "checking {wide_bar} {pos}/{len} trees";
    shown(cli, template, |progress| store.check(progress))
}

fn contents(cli: &Cli, store: &Store) -> Result<DataReport, Failure> {
    let template = "reading {wide_bar} {bytes}/{total_bytes}";
    shown(cli, template, |progress| store.check_data(progress))
}

/// Who may have what is damaged here, and what serves it.
type Other = (Elsewhere, Option<Arc<Service>>);

impl Check<'_> {
    /// Where to look for what is damaged here; a store in service has to be ended.
    fn elsewhere(&self) -> Result<Option<Other>, Failure> {
        Ok(match self.from {
            None => None,
            Some(u) if is_url(u) => {
                let at = Remote::open(u).map_err(remote)?;
                Some((Elsewhere::Objects(Box::new(at)), None))
            }
            Some(p) => {
                let service = Service::open(&Target::of(Path::new(p))?.store)?;
                Some((Elsewhere::Store(Arc::clone(service.store())), Some(service)))
            }
        })
    }
}

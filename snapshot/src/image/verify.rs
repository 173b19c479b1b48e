//! Reading all of a snapshot's memory and checking every sum.

use std::path::Path;

use super::Error;
use super::index::Index;
use super::manifest::Manifest;
use super::pack;
use super::pages::PagesReader;
use super::pageset::BLOCK;

/// What a check has read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Verified {
    /// Entries of the index.
    pub entries: u64,
    /// Pages, those of the layers too.
    pub pages: u64,
}

/// Checks that the index of `dir` is the manifest's, that those of its layers are the ones they were, every page, and the
/// contents of files that are saved with it.
/// Needs 2 MiB of memory besides the index.
pub fn verify(dir: &Path, manifest: &Manifest) -> Result<Verified, Error> {
    crate::files::check_contents(&manifest.files, dir)
        .map_err(|(path, what)| Error::Damaged { path, what })?;
    if manifest.layers.is_empty() && pack::is_packed(dir) {
        let (index, sum) = Index::open(dir)?;
        same(dir, sum, &manifest.index)?;
        let (entries, pages) = pack::check(dir, &index)?;
        return Ok(Verified { entries, pages });
    }
    let (index, pages) = open(dir, manifest)?;
    let mut room = vec![0; BLOCK as usize];
    let mut done = Verified::default();
    for e in index.entries() {
        pages.check(e, &mut room)?;
        done.entries += 1;
        done.pages += e.pages.count() as u64;
    }
    Ok(done)
}

/// Opens the memory of a snapshot: the index and the files, with their sizes and the indexes' sums checked, but not the
/// pages. What is packed is unpacked first.
pub fn open(dir: &Path, manifest: &Manifest) -> Result<(Index, PagesReader), Error> {
    let (index, sum) = Index::open(dir)?;
    same(dir, sum, &manifest.index)?;
    for layer in &manifest.layers {
        let (_, sum) = Index::open(&layer.path)?;
        same(&layer.path, sum, &layer.index)?;
    }
    pack::ensure_unpacked(dir)?;
    for layer in &manifest.layers {
        pack::ensure_unpacked(&layer.path)?;
    }
    let pages = PagesReader::open(
        dir,
        manifest.layers.iter().map(|l| l.path.as_path()),
        &index,
    )?;
    Ok((index, pages))
}

fn same(dir: &Path, found: blake3::Hash, wanted: &str) -> Result<(), Error> {
    if found.to_hex().as_str() == wanted {
        return Ok(());
    }
    let what = format!("its sum is {found}, the manifest says {wanted}");
    Err(Error::Damaged {
        path: dir.join("index"),
        what,
    })
}

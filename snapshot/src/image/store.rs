//! The file `manifest`: header, sum, JSON. Written last, by rename; without it a directory is no snapshot.

use super::Error;
use super::manifest::{Manifest, VERSION};
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

/// The name of the file.
pub const NAME: &str = "manifest";
const MAGIC: [u8; 8] = *b"UMLSNAP\n";
const HEAD: usize = 56;
/// A manifest is tens of KB, with a thousand threads some MB.
const MOST: u64 = 256 << 20;

/// The bytes of a manifest.
pub fn encode(manifest: &Manifest) -> serde_json::Result<Vec<u8>> {
    let body = serde_json::to_vec(manifest)?;
    let mut head = Vec::with_capacity(HEAD + body.len());
    head.extend_from_slice(&MAGIC);
    head.extend_from_slice(&VERSION.to_le_bytes());
    head.extend_from_slice(&[0; 4]);
    head.extend_from_slice(&(body.len() as u64).to_le_bytes());
    head.extend_from_slice(sum(&head, &body).as_bytes());
    head.extend_from_slice(&body);
    Ok(head)
}

fn sum(head: &[u8], body: &[u8]) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&head[..24]);
    hasher.update(body);
    hasher.finalize()
}

/// What is wrong with the bytes of a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wrong {
    /// A newer version made it.
    Newer(u32),
    /// Something does not fit.
    Damaged(String),
}

impl From<&str> for Wrong {
    fn from(what: &str) -> Self {
        Self::Damaged(what.to_owned())
    }
}

/// The reverse; what is wrong with the bytes is the error.
pub fn decode(bytes: &[u8]) -> Result<Manifest, Wrong> {
    let head = bytes.get(..HEAD).ok_or("it is cut off")?;
    if head[..8] != MAGIC {
        return Err("it is not the manifest of a snapshot".into());
    }
    let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap_or_default());
    if word(8) > VERSION {
        return Err(Wrong::Newer(word(8)));
    }
    let len = u64::from_le_bytes(head[16..24].try_into().unwrap_or_default());
    let body = &bytes[HEAD..];
    if len != body.len() as u64 {
        return Err("it is cut off, or has bytes behind its end".into());
    }
    if sum(head, body).as_bytes()[..] != head[24..HEAD] {
        return Err("its sum is wrong: bytes of it were changed".into());
    }
    if word(8) != VERSION || word(12) != 0 {
        return Err("its header is wrong".into());
    }
    serde_json::from_slice(body)
        .map_err(|e| Wrong::Damaged(format!("its body is not understood: {e}")))
}

/// Writes the manifest of the snapshot in `dir`, as the last thing. With `durable`, it and the directory reach the disk
/// before this returns.
pub fn publish(dir: &Path, manifest: &Manifest, durable: bool) -> Result<(), Error> {
    let (new, path) = (dir.join("manifest.new"), dir.join(NAME));
    let io = |path: &Path| Error::io(path.to_path_buf(), "write it");
    let bytes = encode(manifest)
        .map_err(std::io::Error::other)
        .map_err(io(&path))?;
    let mut file = File::create(&new).map_err(io(&new))?;
    file.write_all(&bytes).map_err(io(&new))?;
    if durable {
        file.sync_all().map_err(io(&new))?;
    }
    crate::fault::point("publish.rename");
    std::fs::rename(&new, &path).map_err(io(&path))?;
    if durable {
        let sync = |d: &Path| File::open(d).and_then(|f| f.sync_all()).map_err(io(d));
        sync(dir)?;
        if let Some(parent) = dir.parent().filter(|p| !p.as_os_str().is_empty()) {
            sync(parent)?;
        }
    }
    Ok(())
}

/// Reads the manifest of the snapshot in `dir`.
pub fn load(dir: &Path) -> Result<Manifest, Error> {
    let path = dir.join(NAME);
    let mut bytes = Vec::new();
    let file = File::open(&path).map_err(|e| Error::io(&path, "open it")(e))?;
    file.take(MOST)
        .read_to_end(&mut bytes)
        .map_err(|e| Error::io(&path, "read it")(e))?;
    decode(&bytes).map_err(|wrong| match wrong {
        Wrong::Newer(found) => Error::Newer {
            path,
            found,
            known: VERSION,
        },
        Wrong::Damaged(what) => Error::Damaged { path, what },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::manifest::{Host, Taken};

    fn sample() -> Manifest {
        Manifest {
            taken: Taken::default(),
            host: Host {
                release: "6".into(),
                ..Host::default()
            },
            processes: Vec::new(),
            spaces: Vec::new(),
            shared: Vec::new(),
            files: Vec::new(),
            index: String::new(),
            layers: Vec::new(),
        }
    }

    #[test]
    fn there_and_back() {
        let dir = tempfile::tempdir().unwrap();
        publish(dir.path(), &sample(), true).unwrap();
        assert_eq!(load(dir.path()).unwrap(), sample());
        assert!(!dir.path().join("manifest.new").exists());
    }

    #[test]
    fn every_changed_or_missing_byte_is_seen() {
        let good = encode(&sample()).unwrap();
        for len in 0..good.len() {
            assert!(decode(&good[..len]).is_err());
        }
        for i in 0..good.len() {
            let mut bad = good.clone();
            bad[i] ^= 1;
            assert!(decode(&bad).is_err(), "byte {i}");
        }
        let mut newer = good;
        newer[8] = 2;
        assert_eq!(decode(&newer).unwrap_err(), Wrong::Newer(2));
    }
}

//! Checkpoints in a store of objects, by which many machines share them.
//!
//! | object | what |
//! |---|---|
//! | `cowfs-1/frames/ID` | a frame of chunks; ID is the BLAKE3 of it |
//! | `cowfs-1/index/ID` | which chunks are in which frames; ID is the BLAKE3 of it |
//! | `cowfs-1/checkpoints/TIME-STORE-NUMBER-NAME` | a stream without its chunks, compressed by zstd; NAME in hexadecimal |
//!
//! An index is the magic `CWIDX\0\0\1`, then for each frame its ID, a number u32 and so many names of chunks. Frames are
//! written first, then the index, then the checkpoint, so whoever sees one can have all of it; what a broken send leaves is
//! used by the next one. All are checked against their names when they are read.

use std::collections::{HashMap, HashSet};
use std::io::{Read, Write};
use std::path::PathBuf;
use std::sync::Arc;

use object_store::aws::{AmazonS3, AmazonS3Builder};
use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt};

use super::repair::Inodes;
use super::stream::{self, Begin, Item, Record, StreamError};
use crate::store::Source;
use crate::store::packs::frame;
use crate::store::packs::records::{Name, hex};

const ROOT: &str = "cowfs-1";
const INDEX_MAGIC: &[u8; 8] = b"CWIDX\0\0\x01";
/// Bytes of an object at most.
const OBJECT_MAX: u64 = 1 << 30;
/// Frames on their way at a time.
const AT_ONCE: usize = 8;
/// Bytes of frames passed on before the items that use them.
const PASSED: usize = 8 << 20;

/// What can go wrong with a store of objects.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// The URL cannot be used.
    #[error("{url}: {why}")]
    Url {
        /// As given.
        url: String,
        /// What is wrong with it.
        why: String,
    },
    /// A request failed.
    #[error("object {key}: {why}")]
    Request {
        /// Name of the object.
        key: String,
        /// What the server or the host says.
        why: String,
    },
    /// An object does not hold what its name says.
    #[error("object {0} is damaged; remove it and send again")]
    Damaged(String),
    /// There is no such checkpoint.
    #[error("{0}")]
    NotFound(String),
    /// The stream's.
    #[error(transparent)]
    Stream(#[from] StreamError),
}

/// Where objects are.
#[derive(Debug)]
enum Place {
    /// A directory.
    Dir(PathBuf),
    /// A bucket, and what all names in it begin with.
    Bucket {
        store: Arc<AmazonS3>,
        prefix: String,
        runtime: tokio::runtime::Runtime,
    },
}

/// A store of objects.
#[derive(Debug)]
pub struct Remote {
    place: Place,
    /// Frame of each chunk, of all indexes.
    frames: HashMap<Name, Name>,
}

/// True if text is a URL, not a file's name.
pub fn is_url(text: &str) -> bool {
    text.contains("://")
}

fn request(key: &str) -> impl Fn(&dyn std::fmt::Display) -> RemoteError {
    let key = key.to_owned();
    move |e| RemoteError::Request {
        key: key.clone(),
        why: e.to_string(),
    }
}

impl Remote {
    /// The store at a URL: `file:///DIRECTORY` or `s3://BUCKET/PREFIX`. The latter takes its keys, region and endpoint from
    /// the variables `AWS_...` of the environment. Reads the indexes.
    ///
    /// # Errors
    /// A URL of another kind; the server's.
    pub fn open(url: &str) -> Result<Self, RemoteError> {
        let bad = |why: String| RemoteError::Url {
            url: url.to_owned(),
            why,
        };
        let place = if let Some(dir) = url.strip_prefix("file://") {
            if !dir.starts_with('/') {
                return Err(bad("write file:///DIRECTORY, with an absolute path".into()));
            }
            Place::Dir(PathBuf::from(dir))
        } else if let Some(rest) = url.strip_prefix("s3://") {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            let store = AmazonS3Builder::from_env()
                .with_bucket_name(bucket)
                .build()
                .map_err(|e| bad(e.to_string()))?;
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .map_err(|e| bad(e.to_string()))?;
            Place::Bucket {
                store: Arc::new(store),
                prefix: prefix.trim_matches('/').to_owned(),
                runtime,
            }
        } else {
            return Err(bad(
                "there are file:///DIRECTORY and s3://BUCKET/PREFIX".into()
            ));
        };
        let mut remote = Self {
            place,
            frames: HashMap::new(),
        };
        for id in remote.list("index")? {
            let key = format!("index/{id}");
            let bytes = remote.get(&key)?;
            if blake3::hash(&bytes).to_hex().as_str() != id {
                return Err(RemoteError::Damaged(key));
            }
            read_index(&bytes, &mut remote.frames).ok_or(RemoteError::Damaged(key))?;
        }
        Ok(remote)
    }

    /// Names of the chunks that are there.
    pub fn chunks(&self) -> impl Iterator<Item = &Name> {
        self.frames.keys()
    }

    fn key(prefix: &str, key: &str) -> Key {
        let parts = [prefix, ROOT, key];
        Key::from(
            parts
                .iter()
                .filter(|p| !p.is_empty())
                .copied()
                .collect::<Vec<_>>()
                .join("/"),
        )
    }

    /// Last parts of the names of all objects in a directory, sorted.
    fn list(&self, dir: &str) -> Result<Vec<String>, RemoteError> {
        let err = request(dir);
        let mut names: Vec<String> = match &self.place {
            Place::Dir(root) => match std::fs::read_dir(root.join(ROOT).join(dir)) {
                Ok(entries) => entries
                    .filter_map(|e| e.ok()?.file_name().into_string().ok())
                    .filter(|n| !n.ends_with(".part"))
                    .collect(),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
                Err(e) => return Err(err(&e)),
            },
            Place::Bucket {
                store,
                prefix,
                runtime,
            } => {
                let at = Self::key(prefix, dir);
                let found = runtime
                    .block_on(store.list_with_delimiter(Some(&at)))
                    .map_err(|e| err(&e))?;
                let names = found.objects.iter();
                names
                    .filter_map(|o| o.location.filename().map(str::to_owned))
                    .collect()
            }
        };
        names.sort_unstable();
        Ok(names)
    }

    fn get(&self, key: &str) -> Result<Vec<u8>, RemoteError> {
        let err = request(key);
        match &self.place {
            Place::Dir(root) => {
                let path = root.join(ROOT).join(key);
                let file = std::fs::File::open(path).map_err(|e| err(&e))?;
                let mut out = Vec::new();
                file.take(OBJECT_MAX)
                    .read_to_end(&mut out)
                    .map_err(|e| err(&e))?;
                Ok(out)
            }
            Place::Bucket {
                store,
                prefix,
                runtime,
            } => {
                let at = Self::key(prefix, key);
                let got = runtime.block_on(async {
                    let r = store.get(&at).await?;
                    if r.meta.size > OBJECT_MAX {
                        return Ok(None);
                    }
                    r.bytes().await.map(Some)
                });
                match got.map_err(|e: object_store::Error| err(&e))? {
                    Some(b) => Ok(b.to_vec()),
                    None => Err(RemoteError::Damaged(key.to_owned())),
                }
            }
        }
    }

    /// Writes some objects.
    fn put_all(&self, objects: Vec<(String, Vec<u8>)>) -> Result<(), RemoteError> {
        match &self.place {
            Place::Dir(root) => {
                for (key, bytes) in objects {
                    let path = root.join(ROOT).join(&key);
                    write_whole(&path, &bytes).map_err(|e| request(&key)(&e))?;
                }
                Ok(())
            }
            Place::Bucket {
                store,
                prefix,
                runtime,
            } => runtime.block_on(async {
                let mut all = tokio::task::JoinSet::new();
                for (key, bytes) in objects {
                    let (store, at) = (Arc::clone(store), Self::key(prefix, &key));
                    all.spawn(async move {
                        let put = store.put(&at, bytes.into()).await;
                        put.map(drop).map_err(|e| request(&key)(&e))
                    });
                }
                while let Some(done) = all.join_next().await {
                    done.map_err(|e| request("frames")(&e))??;
                }
                Ok(())
            }),
        }
    }

    /// A frame, checked.
    fn frame(&self, id: &Name) -> Result<(Vec<u8>, frame::Frame), RemoteError> {
        let key = format!("frames/{}", hex(id));
        let bytes = self.get(&key)?;
        if blake3::hash(&bytes).as_bytes() != id {
            return Err(RemoteError::Damaged(key));
        }
        let frame = frame::open(&bytes).map_err(|_| RemoteError::Damaged(key))?;
        Ok((bytes, frame))
    }

    /// A chunk by its name.
    ///
    /// # Errors
    /// The server's; damaged.
    pub fn chunk(&self, name: &Name) -> Result<Option<Vec<u8>>, RemoteError> {
        let Some(id) = self.frames.get(name) else {
            return Ok(None);
        };
        Ok(self.frame(id)?.1.chunk(name).map(<[u8]>::to_vec))
    }

    /// Puts a stream there, by `spool`, a file that is read and written. Returns the bytes written.
    ///
    /// # Errors
    /// The stream's; the server's.
    pub fn upload(&self, from: impl Read, spool: std::fs::File) -> Result<u64, RemoteError> {
        let mut stream = stream::Reader::new(from)?;
        let io = |doing| move |source| StreamError::Io { doing, source };
        let packed = zstd::Encoder::new(spool, 9).map_err(io("compressing"))?;
        let mut manifest = stream::Writer::of_version(packed, stream.version)?;
        let mut index: Vec<u8> = Vec::new();
        let mut waiting: Vec<(String, Vec<u8>)> = Vec::new();
        let mut bytes = 0;
        let mut about: Option<Box<Begin>> = None;
        loop {
            match stream.read()? {
                Record::Chunks(frame) => {
                    let id = *blake3::hash(&frame).as_bytes();
                    let opened =
                        frame::open(&frame).map_err(|e| StreamError::Damaged(e.to_owned()))?;
                    index.extend_from_slice(&id);
                    let count = u32::try_from(opened.chunks.len()).unwrap_or(0);
                    index.extend_from_slice(&count.to_le_bytes());
                    for c in &opened.chunks {
                        index.extend_from_slice(&c.name);
                    }
                    bytes += frame.len() as u64;
                    waiting.push((format!("frames/{}", hex(&id)), frame));
                    if waiting.len() >= AT_ONCE {
                        self.put_all(std::mem::take(&mut waiting))?;
                    }
                }
                Record::End(items, chunks) => {
                    manifest.write(&Record::End(items, chunks))?;
                    break;
                }
                record => {
                    if let Record::Begin(b) = &record {
                        about = Some(b.clone());
                    }
                    manifest.write(&record)?;
                }
            }
        }
        self.put_all(waiting)?;
        if !index.is_empty() {
            let mut whole = INDEX_MAGIC.to_vec();
            whole.append(&mut index);
            bytes += whole.len() as u64;
            let id = blake3::hash(&whole).to_hex();
            self.put_all(vec![(format!("index/{id}"), whole)])?;
        }
        let Some(about) = about else {
            return Err(StreamError::Damaged("it does not say what it is about".into()).into());
        };
        let body = spooled(manifest)?;
        bytes += body.len() as u64;
        let name: String = about.name.bytes().map(|b| format!("{b:02x}")).collect();
        let key = format!(
            "checkpoints/{:020}-{}-{}-{name}",
            about.created_us.max(0),
            about.source.store,
            about.source.id
        );
        self.put_all(vec![(key, body)])?;
        Ok(bytes)
    }

    /// Gets the stream of a checkpoint (the last one, if there is no name) with the chunks that are not in `have`.
    ///
    /// # Errors
    /// Not found; damaged; the server's; the other end's.
    pub fn download(
        &self,
        name: Option<&str>,
        have: HashSet<Name>,
        to: impl Write,
    ) -> Result<(), RemoteError> {
        let all = self.list("checkpoints")?;
        let want = name.map(|n| n.bytes().map(|b| format!("{b:02x}")).collect::<String>());
        let mut all = all.iter().rev();
        let found = all.find(|k| match &want {
            Some(w) => k.rsplit('-').next() == Some(w),
            None => true,
        });
        let Some(found) = found else {
            return Err(RemoteError::NotFound(match name {
                Some(n) => format!("there is no checkpoint {n} at this URL"),
                None => "there is no checkpoint at this URL".into(),
            }));
        };
        self.pass_on(&format!("checkpoints/{found}"), None, have, to)
    }

    /// The object of a checkpoint, if there is one.
    ///
    /// # Errors
    /// The server's.
    pub(super) fn find(&self, source: &Source) -> Result<Option<String>, RemoteError> {
        let all = self.list("checkpoints")?;
        let found = all.into_iter().find(|k| {
            let mut parts = k.split('-').skip(1);
            parts.next() == Some(&source.store)
                && parts.next().and_then(|n| n.parse().ok()) == Some(source.id)
        });
        Ok(found.map(|k| format!("checkpoints/{k}")))
    }

    /// Gets a stream with the chunks that are not in `have`; of some inodes, or of all.
    ///
    /// # Errors
    /// As [`Remote::download`].
    pub(super) fn pass_on(
        &self,
        key: &str,
        only: Option<&Inodes>,
        have: HashSet<Name>,
        to: impl Write,
    ) -> Result<(), RemoteError> {
        let body = self.get(key)?;
        let damaged = |_| RemoteError::Damaged(key.to_owned());
        let manifest = zstd::Decoder::new(&body[..]).map_err(damaged)?;
        let mut manifest = stream::Reader::new(manifest)?;
        let mut out = stream::Writer::of_version(to, manifest.version)?;
        // Chunks that the other side has, or was passed.
        let mut have = have;
        let mut reached = (0, 0);
        let mut count = 0;
        // What was said of chunks of the base that nothing has used yet.
        let mut bases: HashMap<Name, Item> = HashMap::new();
        loop {
            match manifest.read()? {
                Record::Chunks(_) => {
                    return Err(StreamError::Damaged("chunks where none should be".into()).into());
                }
                Record::Items(items, at) => {
                    let mut batch = Vec::new();
                    let mut passed = 0;
                    for item in items {
                        if let Item::Base(_, _, _, name) = &item {
                            bases.insert(*name, item);
                            continue;
                        }
                        if only.is_some_and(|only| !only.has(item.ino())) {
                            continue;
                        }
                        if let Item::Map(_, _, list) = &item {
                            for (_, name) in list {
                                if have.contains(name) {
                                    continue;
                                }
                                match bases.remove(name) {
                                    Some(base) => {
                                        have.insert(*name);
                                        count += 1;
                                        batch.push(base);
                                    }
                                    None => passed += self.pass(name, &mut have, &mut out)?,
                                }
                            }
                        }
                        count += 1;
                        batch.push(item);
                        if passed > PASSED {
                            // Not further than before: to begin anew from there does no harm.
                            let some = std::mem::take(&mut batch);
                            out.write(&Record::Items(some, reached))?;
                            passed = 0;
                        }
                    }
                    reached = at;
                    if !batch.is_empty() {
                        out.write(&Record::Items(batch, at))?;
                    }
                }
                Record::End(_, chunks) => {
                    out.write(&Record::End(count, chunks))?;
                    return Ok(());
                }
                record @ Record::Begin(_) => out.write(&record)?,
            }
        }
    }

    fn pass(
        &self,
        name: &Name,
        have: &mut HashSet<Name>,
        out: &mut stream::Writer<impl Write>,
    ) -> Result<usize, RemoteError> {
        let Some(id) = self.frames.get(name) else {
            return Err(RemoteError::NotFound(format!(
                "chunk {} is not at this URL; send the checkpoint again",
                hex(name)
            )));
        };
        let (bytes, frame) = self.frame(id)?;
        have.extend(frame.chunks.iter().map(|c| c.name));
        let len = bytes.len();
        out.write(&Record::Chunks(bytes))?;
        Ok(len)
    }
}

/// What was written to a spool.
fn spooled(
    manifest: stream::Writer<zstd::Encoder<'_, std::fs::File>>,
) -> Result<Vec<u8>, StreamError> {
    let io = |source| StreamError::Io {
        doing: "spooling",
        source,
    };
    let mut file = manifest.into_inner().finish().map_err(io)?;
    let mut body = Vec::new();
    std::io::Seek::rewind(&mut file).map_err(io)?;
    file.take(OBJECT_MAX).read_to_end(&mut body).map_err(io)?;
    Ok(body)
}

fn read_index(bytes: &[u8], frames: &mut HashMap<Name, Name>) -> Option<()> {
    let mut rest = bytes.strip_prefix(INDEX_MAGIC)?;
    while !rest.is_empty() {
        let (id, after) = rest.split_first_chunk::<32>()?;
        let (count, mut after) = after.split_first_chunk::<4>()?;
        for _ in 0..u32::from_le_bytes(*count) {
            let (name, behind) = after.split_first_chunk::<32>()?;
            frames.insert(*name, *id);
            after = behind;
        }
        rest = after;
    }
    Some(())
}

/// Writes a file that is there only when it is whole.
fn write_whole(path: &std::path::Path, bytes: &[u8]) -> std::io::Result<()> {
    let dir = path.parent().unwrap_or(path);
    std::fs::create_dir_all(dir)?;
    let part = path.with_extension("part");
    let mut f = std::fs::File::create(&part)?;
    f.write_all(bytes)?;
    f.sync_all()?;
    std::fs::rename(&part, path)?;
    std::fs::File::open(dir)?.sync_all()
}

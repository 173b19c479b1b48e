//! Files and directories as a stream: what `umlctl cp` sends, in either direction.
//!
//! A stream is one entry; a directory's entries lie between it and its end, so every name is a single component.
//!
//! ```text
//!  u8  type: 'f' file, 'd' directory, 'l' symbolic link, 'e' end of a directory
//!  u32 mode
//!  u64 modification time, seconds since 1970
//!  u16 length of the name, name
//!  of a file: u64 size, contents      of a link: u16 length of the target, target
//! ```
//! All numbers are little-endian. The receiving end trusts nothing: a name that is no name is refused, and nothing is
//! written through a symbolic link that came in the stream.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

/// O_NOFOLLOW | O_NONBLOCK on x86-64: a link or FIFO that is in the way is not opened, or at least does not hold us up.
const NOFOLLOW: i32 = 0o400_000 | 0o4_000;
/// Directories in directories.
const DEEPEST: usize = 1024;

fn bad(why: impl Into<String>) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, why.into())
}

fn with(path: &Path) -> impl FnOnce(io::Error) -> io::Error + '_ {
    move |e| io::Error::new(e.kind(), format!("{}: {e}", path.display()))
}

/// Sends `path`. The name in the stream is the path's last component. What is neither file, directory nor link is left out;
/// each of these is told to `skipped`.
///
/// # Errors
/// The file system's, or the stream's.
pub fn send(path: &Path, to: &mut impl Write, skipped: &mut dyn FnMut(&Path)) -> io::Result<()> {
    // The path itself may be a link to what is meant.
    let meta = fs::metadata(path).map_err(with(path))?;
    let real = fs::canonicalize(path).map_err(with(path))?;
    let name = path.file_name().or(real.file_name());
    let name = name.map_or(&b"root"[..], OsStrExt::as_bytes);
    if !meta.is_dir() && !meta.is_file() {
        return Err(bad(format!(
            "{}: neither a file nor a directory",
            path.display()
        )));
    }
    entry(&real, name, &meta, to, skipped)
}

fn entry(
    path: &Path,
    name: &[u8],
    meta: &fs::Metadata,
    to: &mut impl Write,
    skipped: &mut dyn FnMut(&Path),
) -> io::Result<()> {
    let kind = match meta.file_type() {
        t if t.is_dir() => b'd',
        t if t.is_file() => b'f',
        t if t.is_symlink() => b'l',
        _ => {
            skipped(path);
            return Ok(());
        }
    };
    let mut head = vec![kind];
    head.extend(meta.mode().to_le_bytes());
    head.extend(u64::try_from(meta.mtime()).unwrap_or(0).to_le_bytes());
    head.extend(
        u16::try_from(name.len())
            .map_err(|_| bad("a name is too long"))?
            .to_le_bytes(),
    );
    head.extend(name);
    match kind {
        b'f' => {
            let file = File::options()
                .read(true)
                .custom_flags(NOFOLLOW)
                .open(path)
                .map_err(with(path))?;
            // It may grow or shrink meanwhile: as many bytes as were said are sent.
            let size = file.metadata()?.len();
            head.extend(size.to_le_bytes());
            to.write_all(&head)?;
            let sent = io::copy(&mut (&file).take(size), to).map_err(with(path))?;
            io::copy(&mut io::repeat(0).take(size - sent), to)?;
        }
        b'l' => {
            let target = fs::read_link(path)
                .map_err(with(path))?
                .into_os_string()
                .into_vec();
            head.extend(
                u16::try_from(target.len())
                    .map_err(|_| bad("a link is too long"))?
                    .to_le_bytes(),
            );
            head.extend(target);
            to.write_all(&head)?;
        }
        _ => {
            to.write_all(&head)?;
            let mut names: Vec<_> = fs::read_dir(path)
                .map_err(with(path))?
                .map(|e| e.map(|e| e.file_name()))
                .collect::<Result<_, _>>()
                .map_err(with(path))?;
            names.sort();
            for name in names {
                let path = path.join(&name);
                match fs::symlink_metadata(&path) {
                    Ok(meta) => entry(&path, name.as_bytes(), &meta, to, skipped)?,
                    // Removed meanwhile.
                    Err(e) if e.kind() == ErrorKind::NotFound => {}
                    Err(e) => return Err(with(&path)(e)),
                }
            }
            to.write_all(b"e")?;
        }
    }
    Ok(())
}

fn number<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn text(from: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; u16::from_le_bytes(number(from)?).into()];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Receives one file or directory. If `to` is a directory it is put in there under its own name, else `to` is its name.
/// `mode_mask` says which bits of the modes count. Returns where it is now.
///
/// # Errors
/// The file system's or the stream's, or the stream is none.
pub fn receive(to: &Path, from: &mut impl Read, mode_mask: u32) -> io::Result<PathBuf> {
    let kind = number::<1>(from)?[0];
    if kind == b'e' {
        return Err(bad("the stream begins with the end of a directory"));
    }
    let into = |name: &[u8]| -> io::Result<PathBuf> {
        if fs::metadata(to).is_ok_and(|m| m.is_dir()) {
            return Ok(to.join(component(name)?));
        }
        if to.as_os_str().as_bytes().ends_with(b"/") {
            return Err(bad(format!("{} is no directory", to.display())));
        }
        Ok(to.to_owned())
    };
    let mut place = PathBuf::new();
    one(kind, from, mode_mask, 0, &mut |name| {
        place = into(name)?;
        Ok(place.clone())
    })?;
    Ok(place)
}

/// A name that is a single component.
fn component(name: &[u8]) -> io::Result<&Path> {
    if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') || name.contains(&0)
    {
        return Err(bad(format!(
            "the stream has a name that is none: {:?}",
            String::from_utf8_lossy(name)
        )));
    }
    Ok(Path::new(std::ffi::OsStr::from_bytes(name)))
}

fn one(
    kind: u8,
    from: &mut impl Read,
    mask: u32,
    depth: usize,
    place: &mut dyn FnMut(&[u8]) -> io::Result<PathBuf>,
) -> io::Result<()> {
    let mode = u32::from_le_bytes(number(from)?) & mask & 0o7777;
    let mtime = UNIX_EPOCH.checked_add(Duration::from_secs(u64::from_le_bytes(number(from)?)));
    let name = text(from)?;
    let path = place(&name)?;
    let there = fs::symlink_metadata(&path);
    match kind {
        b'f' => {
            let size = u64::from_le_bytes(number(from)?);
            let mut file = File::options()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .custom_flags(NOFOLLOW)
                .open(&path)
                .map_err(with(&path))?;
            if !file.metadata()?.is_file() {
                return Err(bad(format!(
                    "{} is there already and is no file",
                    path.display()
                )));
            }
            let got = io::copy(&mut from.take(size), &mut file).map_err(with(&path))?;
            if got < size {
                return Err(io::Error::new(
                    ErrorKind::UnexpectedEof,
                    "the stream ends in a file",
                ));
            }
            file.set_permissions(fs::Permissions::from_mode(mode))
                .map_err(with(&path))?;
            if let Some(t) = mtime {
                let _ = file.set_modified(t);
            }
        }
        b'l' => {
            let target = std::ffi::OsString::from_vec(text(from)?);
            if there.is_ok_and(|m| !m.is_dir()) {
                fs::remove_file(&path).map_err(with(&path))?;
            }
            std::os::unix::fs::symlink(target, &path).map_err(with(&path))?;
        }
        b'd' => {
            if depth >= DEEPEST {
                return Err(bad("the directories in the stream are nested too deep"));
            }
            match there {
                Ok(m) if m.is_dir() => {}
                Ok(_) => {
                    return Err(bad(format!(
                        "{} is there already and is no directory",
                        path.display()
                    )));
                }
                Err(_) => fs::create_dir(&path).map_err(with(&path))?,
            }
            loop {
                match number::<1>(from)?[0] {
                    b'e' => break,
                    kind => one(kind, from, mask, depth + 1, &mut |n| {
                        Ok(path.join(component(n)?))
                    })?,
                }
            }
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).map_err(with(&path))?;
            if let (Some(t), Ok(dir)) = (mtime, File::open(&path)) {
                let _ = dir.set_modified(t);
            }
        }
        other => {
            return Err(bad(format!(
                "the stream has an entry of unknown type {other}"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory of the test's own, removed in the end.
    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("archive-{}-{name}", std::process::id()));
            let _ = fs::remove_dir_all(&dir);
            fs::create_dir(&dir).unwrap();
            Self(dir)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn head(kind: u8, name: &[u8]) -> Vec<u8> {
        let mut bytes = vec![kind];
        bytes.extend(0o755u32.to_le_bytes());
        bytes.extend(0u64.to_le_bytes());
        bytes.extend(u16::try_from(name.len()).unwrap().to_le_bytes());
        bytes.extend(name);
        bytes
    }

    fn file(name: &[u8], contents: &[u8]) -> Vec<u8> {
        let mut bytes = head(b'f', name);
        bytes.extend((contents.len() as u64).to_le_bytes());
        bytes.extend(contents);
        bytes
    }

    fn link(name: &[u8], target: &[u8]) -> Vec<u8> {
        let mut bytes = head(b'l', name);
        bytes.extend(u16::try_from(target.len()).unwrap().to_le_bytes());
        bytes.extend(target);
        bytes
    }

    #[test]
    fn nothing_outside_is_written() {
        let dir = Dir::new("hostile");
        let outside = dir.0.join("outside");
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("file"), "untouched").unwrap();
        let target = outside.as_os_str().as_bytes();
        let in_dir =
            |entries: &[Vec<u8>]| [head(b'd', b"d"), entries.concat(), b"e".to_vec()].concat();
        let far = [target, b"/file"].concat();
        let streams = [
            in_dir(&[file(b"..", b"x")]),
            in_dir(&[file(b"../outside/file", b"x")]),
            in_dir(&[file(b"", b"x")]),
            in_dir(&[head(b'd', b".."), file(b"file", b"x"), b"e".to_vec()]),
            in_dir(&[
                link(b"l", target),
                head(b'd', b"l"),
                file(b"file", b"x"),
                b"e".to_vec(),
            ]),
            in_dir(&[link(b"l", &far), file(b"l", b"x")]),
            file(b"../outside/file", b"x"),
            in_dir(&[vec![b'?'], head(b'f', b"x")]),
            b"e".to_vec(),
            (0..DEEPEST + 2).flat_map(|_| head(b'd', b"d")).collect(),
        ];
        for (i, stream) in streams.iter().enumerate() {
            let to = dir.0.join(i.to_string());
            fs::create_dir(&to).unwrap();
            assert!(receive(&to, &mut &stream[..], 0o777).is_err(), "stream {i}");
            assert_eq!(
                fs::read_to_string(outside.join("file")).unwrap(),
                "untouched"
            );
            assert_eq!(fs::read_dir(&outside).unwrap().count(), 1, "stream {i}");
        }
    }

    #[test]
    fn cut_anywhere() {
        let dir = Dir::new("cut");
        let source = dir.0.join("source");
        fs::create_dir_all(source.join("a")).unwrap();
        fs::write(source.join("a/f"), "contents").unwrap();
        std::os::unix::fs::symlink("t", source.join("l")).unwrap();
        let mut stream = Vec::new();
        send(&source, &mut stream, &mut |_| panic!("nothing is left out")).unwrap();
        for n in 0..stream.len() {
            let to = dir.0.join("to");
            let _ = fs::remove_dir_all(&to);
            assert!(
                receive(&to, &mut &stream[..n], 0o777).is_err(),
                "cut to {n}"
            );
        }
        let to = dir.0.join("whole");
        receive(&to, &mut &stream[..], 0o777).unwrap();
        assert_eq!(fs::read_to_string(to.join("a/f")).unwrap(), "contents");
        assert_eq!(fs::read_link(to.join("l")).unwrap(), Path::new("t"));
    }
}

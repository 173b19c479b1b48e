//! Trees: bringing one to the state of another, what one takes on disk, and whether two are the same.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::run::{command, output};

/// Names, types, modes, owners, sizes, numbers of links, times, targets, contents and extended attributes. Sizes and links of
/// directories are left out: every filesystem has its own idea of them.
const HASH: &str = r"{
    find . -xdev \( -type d -printf '%P d %m %U %G %T@\n' -o -printf '%P %y %m %U %G %s %n %T@ %l\n' \) | LC_ALL=C sort
    find . -xdev -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum
    getfattr -R -h -d -m - -e hex . 2>/dev/null | LC_ALL=C sort
} | sha256sum | cut -d' ' -f1";

/// What was copied by [`sync`].
#[derive(Debug, Clone, Copy, Default)]
pub struct Copied {
    /// How long it took
    pub took: Duration,
    /// Files that were written
    pub files: f64,
    /// Their bytes
    pub bytes: f64,
}

/// Makes `to` as `from`, as a user would: rsync with links, ACLs and attributes, and deletions.
///
/// # Errors
/// If rsync is not there or fails.
pub fn sync(from: &Path, to: &Path) -> Result<Copied> {
    let mut c = command("rsync", &["-aHAX", "--numeric-ids", "--delete", "--stats"]);
    // With a slash behind both it is about what is inside.
    c.arg(from.join("")).arg(to.join(""));
    let (took, text) = output(c)?;
    Ok(Copied {
        took,
        files: number(&text, "Number of regular files transferred:")?,
        bytes: number(&text, "Total transferred file size:")?,
    })
}

/// A number of rsync's statistics.
fn number(text: &str, label: &str) -> Result<f64> {
    let line = text.lines().find_map(|l| l.strip_prefix(label));
    let line = line.with_context(|| format!("rsync does not say: {label}"))?;
    let digits: String = line
        .trim()
        .chars()
        .take_while(|c| c.is_ascii_digit() || *c == ',')
        .filter(char::is_ascii_digit)
        .collect();
    digits.parse().with_context(|| format!("{label} {line}"))
}

/// Bytes that are allocated for a file or a directory and all below it.
///
/// # Errors
/// If du(1) fails.
pub fn allocated(path: &Path) -> Result<f64> {
    let mut c = command("du", &["-sx", "-B1"]);
    c.arg(path);
    let text = output(c)?.1;
    let n = text.split_whitespace().next().unwrap_or("");
    n.parse().with_context(|| format!("what du says: {text}"))
}

/// A hash of a whole tree.
///
/// # Errors
/// If it cannot be read.
pub fn hash(dir: &Path) -> Result<String> {
    let mut c = Command::new("bash");
    c.args(["-c", &format!("set -e -o pipefail; {HASH}")])
        .current_dir(dir);
    let text = output(c)?.1;
    match text.trim() {
        h if h.len() == 64 => Ok(h.to_owned()),
        h => bail!("no hash of {}: {h}", dir.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::{hash, number};

    #[test]
    fn statistics() {
        let text =
            "Number of regular files transferred: 1,234\nTotal transferred file size: 56 bytes\n";
        let n = |l: &str| number(text, l).unwrap();
        assert_eq!(n("Number of regular files transferred:"), 1234.0);
        assert_eq!(n("Total transferred file size:"), 56.0);
        assert!(number(text, "Literal data:").is_err());
    }

    #[test]
    fn a_hash_sees_contents_and_modes() {
        use std::os::unix::fs::PermissionsExt;
        let dir = std::env::temp_dir().join(format!("bench-hash.{}", std::process::id()));
        std::fs::create_dir(&dir).unwrap();
        let file = dir.join("f");
        std::fs::write(&file, "a").unwrap();
        let mtime = std::fs::metadata(&file).unwrap().modified().unwrap();
        let first = hash(&dir).unwrap();
        assert_eq!(first, hash(&dir).unwrap());
        std::fs::write(&file, "b").unwrap();
        let f = std::fs::File::options().write(true).open(&file).unwrap();
        f.set_modified(mtime).unwrap();
        let second = hash(&dir).unwrap();
        assert_ne!(first, second);
        f.set_permissions(std::fs::Permissions::from_mode(0o600))
            .unwrap();
        assert_ne!(second, hash(&dir).unwrap());
        std::fs::remove_dir_all(&dir).unwrap();
    }
}

//! The arguments that the guest's kernel is started with.

use super::config::{Config, Net};
use super::{Error, home::Vm};
use std::path::{Path, PathBuf};

/// The guest's own addresses: the same in all VMs, so that a snapshot can go on in any network namespace.
pub const GUEST_MAC: &str = "02:00:00:5a:00:02";

/// Where, in the VM's mount namespace, its memory and its kernel's files are. Short and the same for all, as a socket's path
/// may have 107 bytes, and as a snapshot has it in its memory.
pub const PRIVATE: &str = "/run/umlctl/vm";

/// As many bytes as the guest's kernel takes (COMMAND_LINE_SIZE), less what it adds.
const LONGEST: usize = 4096 - 256;

/// Arguments that umlctl sets and that cannot be given a second time.
const OURS: [(&str, &str); 13] = [
    ("umid", "it is the VM's name"),
    ("uml_dir", "it is in the VM's own file system"),
    ("mem", "use --mem"),
    ("ubd0", "use --image"),
    ("ubda", "use --image"),
    ("con", "descriptors 0 and 1 are the console"),
    ("con0", "descriptors 0 and 1 are the console"),
    ("ssl", "descriptor 4 is the agent's"),
    ("ssl0", "descriptor 4 is the agent's"),
    ("ssl1", "descriptor 2 is the kernel's log"),
    ("vec0", "use --net"),
    ("initrd", "it brings the agent"),
    ("rdinit", "it is the agent"),
];

/// Checks that a path can stand on the command line. The kernel splits it at blanks, `ubd` at commas and colons, and nothing
/// can be quoted.
///
/// # Errors
/// It cannot.
pub fn check_path(path: &Path) -> Result<&str, Error> {
    path.to_str()
        .filter(|p| {
            p.chars().all(|c| {
                !c.is_whitespace() && !c.is_control() && !matches!(c, ',' | ':' | '"' | '\'' | '\\')
            })
        })
        .ok_or_else(|| Error::Path(path.to_owned()))
}

/// Splits what `--append` was given, and checks it.
///
/// # Errors
/// It contains what umlctl itself sets.
pub fn split_append(given: &[String]) -> Result<Vec<String>, Error> {
    let words: Vec<String> = given
        .iter()
        .flat_map(|a| a.split_whitespace())
        .map(str::to_owned)
        .collect();
    for word in &words {
        let key = word.split('=').next().unwrap_or_default();
        if let Some((_, instead)) = OURS.iter().find(|(k, _)| *k == key) {
            return Err(Error::Append(word.clone(), instead));
        }
    }
    Ok(words)
}

/// Whether `words` has a value for `key`.
fn has(words: &[String], key: &str) -> bool {
    words.iter().any(|w| w.split('=').next() == Some(key))
}

/// All arguments, the program's own name first.
///
/// # Errors
/// A path cannot be given, or it is too much.
pub fn arguments(config: &Config, vm: &Vm) -> Result<Vec<String>, Error> {
    let (disk, initrd): (PathBuf, PathBuf) = (vm.disk(), vm.initrd());
    let mut args = vec![
        "linux.uml".to_owned(),
        format!("umid={}", config.name),
        format!("uml_dir={PRIVATE}/"),
        format!("mem={}K", config.mem_bytes >> 10),
        // The console; all others lead nowhere.
        "con=null".to_owned(),
        "con0=fd:0,fd:1".to_owned(),
        // ttyS0 is the agent's, ttyS1 the kernel's log. The last console= is what /dev/console is.
        "ssl=null".to_owned(),
        "ssl0=fd:4,fd:4".to_owned(),
        "ssl1=null,fd:2".to_owned(),
        "console=ttyS1".to_owned(),
        "console=tty0".to_owned(),
        format!("ubd0={},{}", check_path(&disk)?, check_path(&config.image)?),
        format!("initrd={}", check_path(&initrd)?),
        "rdinit=/agent".to_owned(),
    ];
    if !has(&config.append, "root") {
        args.push("root=/dev/ubda".to_owned());
        args.push("rw".to_owned());
    }
    if config.net == Net::Nat {
        args.push(format!("vec0:transport=fd,fd=3,vec=0,mac={GUEST_MAC}"));
    } else {
        args.push("umlctl.net=off".to_owned());
    }
    if !config.raid6 {
        args.push("initcall_blacklist=raid6_select_algo".to_owned());
    }
    args.extend(config.append.iter().cloned());
    let length = args.iter().map(|a| a.len() + 1).sum();
    if length > LONGEST {
        return Err(Error::CommandLine(length, LONGEST));
    }
    Ok(args)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        assert!(check_path(Path::new("/var/lib/umlctl/vms/a/disk.cow")).is_ok());
        for bad in ["/a b", "/a,b", "/a:b", "/a\nb", "/a\"b"] {
            assert!(check_path(Path::new(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn appended() {
        let words = split_append(&["quiet init=/x".to_owned(), " y ".to_owned()]).unwrap();
        assert_eq!(words, ["quiet", "init=/x", "y"]);
        for bad in ["mem=1G", "quiet umid=x", "rdinit=/sh"] {
            assert!(split_append(&[bad.to_owned()]).is_err(), "{bad}");
        }
    }
}

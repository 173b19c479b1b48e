//! Mount options as behind `-o`.

use crate::control::Failure;
use crate::fuse::MountOptions;
use crate::mount::Atime;

/// What the kernel may keep of written data unless told otherwise, MiB: the price of a checkpoint grows with it.
const WRITEBACK_MIB: u32 = 256;

/// Reads mount options as behind `-o`.
pub(super) fn parse_options(list: &[String], o: &mut MountOptions) -> Result<Atime, Failure> {
    let mut atime = Atime::Relative;
    for opt in list {
        match opt.split_once('=') {
            None => match opt.as_str() {
                "ro" => o.read_only = true,
                "rw" | "suid" | "dev" | "exec" | "defaults" => {}
                "noatime" => {
                    o.noatime = true;
                    atime = Atime::None;
                }
                "relatime" => atime = Atime::Relative,
                "strictatime" => atime = Atime::Strict,
                "nosuid" => o.nosuid = true,
                "nodev" => o.nodev = true,
                "noexec" => o.noexec = true,
                "writeback" => o.writeback_mib = WRITEBACK_MIB,
                _ => return Err(unknown_option(opt)),
            },
            Some(("threads", n)) => {
                o.threads = n
                    .parse()
                    .ok()
                    .filter(|n| (1..=64).contains(n))
                    .ok_or_else(|| unknown_option(opt))?;
            }
            Some(("writeback", n)) => {
                o.writeback_mib = n
                    .parse()
                    .ok()
                    .filter(|n| *n > 0)
                    .ok_or_else(|| unknown_option(opt))?;
            }
            Some(("readahead_kb", n)) => {
                o.readahead_kb = n.parse().map_err(|_| unknown_option(opt))?;
            }
            Some(("spin_us", n)) => o.spin_us = n.parse().map_err(|_| unknown_option(opt))?,
            Some(_) => return Err(unknown_option(opt)),
        }
    }
    Ok(atime)
}

/// Takes `pack=AGE` out of mount options: the age in microseconds, and the others.
pub(super) fn take_pack(list: &[String]) -> Result<(Option<i64>, Vec<String>), Failure> {
    let mut age = None;
    let mut rest = Vec::new();
    for opt in list {
        match opt.strip_prefix("pack=") {
            None => rest.push(opt.clone()),
            Some(t) => {
                let us = crate::history::prune::duration(t).ok().filter(|us| *us > 0);
                age = Some(us.ok_or_else(|| unknown_option(opt))?);
            }
        }
    }
    Ok((age, rest))
}

fn unknown_option(opt: &str) -> Failure {
    Failure {
        code: 2,
        message: format!(
            "mount option {opt:?} is not known; there are ro, noatime, relatime, strictatime, nosuid, nodev, noexec, writeback[=MIB], threads=1..64, readahead_kb=N, spin_us=N, pack=AGE"
        ),
    }
}

//! `/proc/PID/status` (proc_pid_status(5)).

use super::Error;
use std::collections::HashMap;

/// The fields of `status` that are needed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// Thread group.
    pub tgid: i32,
    /// The process that traces it; 0 for none.
    pub tracer: i32,
    /// Real, effective, saved, filesystem user.
    pub uid: [u32; 4],
    /// The same for groups.
    pub gid: [u32; 4],
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// Its numbers, from ours to the innermost pid namespace.
    pub ns_pid: Vec<i32>,
    /// Capability sets: inheritable, permitted, effective, bounding, ambient.
    pub caps: [u64; 5],
    /// no_new_privs.
    pub no_new_privs: bool,
    /// 0 none, 1 strict, 2 filter.
    pub seccomp: u32,
    /// umask.
    pub umask: u32,
    /// Signals with a handler, ignored ones.
    pub caught: u64,
    /// Ignored signals.
    pub ignored: u64,
    /// Blocked signals.
    pub blocked: u64,
    /// Threads.
    pub threads: u32,
    /// CPU features that are on for the thread, such as `shstk`.
    pub features: String,
    /// PR_SET_THP_DISABLE is not set.
    pub thp_enabled: bool,
}

/// Reads `/proc/PID/status`.
pub fn status(pid: i32) -> Result<Status, Error> {
    Ok(parse(&super::read(pid, "status")?))
}

/// Parses the text of `status`. What is not there or not understood is zero.
#[must_use]
pub fn parse(text: &str) -> Status {
    let fields: HashMap<&str, &str> = text
        .lines()
        .filter_map(|l| l.split_once(':'))
        .map(|(k, v)| (k, v.trim()))
        .collect();
    let get = |k: &str| fields.get(k).copied().unwrap_or_default();
    let num = |k: &str| get(k).parse().unwrap_or_default();
    let hex = |k: &str| u64::from_str_radix(get(k), 16).unwrap_or_default();
    let list = |k: &str| {
        get(k)
            .split_ascii_whitespace()
            .filter_map(|w| w.parse().ok())
            .collect::<Vec<u32>>()
    };
    let four = |k: &str| <[u32; 4]>::try_from(list(k)).unwrap_or_default();
    Status {
        tgid: num("Tgid"),
        tracer: num("TracerPid"),
        uid: four("Uid"),
        gid: four("Gid"),
        groups: list("Groups"),
        ns_pid: list("NSpid").into_iter().map(u32::cast_signed).collect(),
        caps: [
            hex("CapInh"),
            hex("CapPrm"),
            hex("CapEff"),
            hex("CapBnd"),
            hex("CapAmb"),
        ],
        no_new_privs: get("NoNewPrivs") == "1",
        seccomp: get("Seccomp").parse().unwrap_or_default(),
        umask: u32::from_str_radix(get("Umask"), 8).unwrap_or(0o022),
        caught: hex("SigCgt"),
        ignored: hex("SigIgn"),
        blocked: hex("SigBlk"),
        threads: get("Threads").parse().unwrap_or_default(),
        features: get("x86_Thread_features").to_owned(),
        thp_enabled: get("THP_enabled") != "0",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_status() {
        let s = status(std::process::id().cast_signed()).unwrap();
        assert_eq!(s.tgid, std::process::id().cast_signed());
        assert_eq!(s.ns_pid[0], s.tgid);
        assert!(s.threads > 0);
        let s = parse("Uid:\t1\t2\t3\t4\nGroups:\t5 6 \nSigCgt:\t00000000000000f0\nUmask:\t0077\n");
        assert_eq!(
            (s.uid, s.groups, s.caught, s.umask),
            ([1, 2, 3, 4], vec![5, 6], 0xf0, 0o077)
        );
    }
}

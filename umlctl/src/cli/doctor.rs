//! `umlctl doctor`: what this machine has of what is needed.

use anyhow::Result;
use std::path::Path;

struct Check {
    name: &'static str,
    ok: bool,
    without: &'static str,
}

fn checks() -> Vec<Check> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let caps = status
        .lines()
        .find_map(|l| l.strip_prefix("CapEff:"))
        .and_then(|h| u64::from_str_radix(h.trim(), 16).ok())
        .unwrap_or_default();
    let cap = |n: u32| caps >> n & 1 == 1;
    let file = |p: &str| Path::new(p).exists();
    let all_guardians = std::fs::read_dir(snapshot::target::journal::DIRECTORY)
        .map(|d| {
            d.flatten().all(|e| {
                snapshot::target::journal::Journal::look(&e.path()).is_ok_and(|r| !r.active)
            })
        })
        .unwrap_or(true);
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut parts = release
        .split(['.', '-'])
        .filter_map(|p| p.parse::<u32>().ok());
    let version = (
        parts.next().unwrap_or_default(),
        parts.next().unwrap_or_default(),
    );
    vec![
        Check {
            name: "Linux 6.7 or newer (PAGEMAP_SCAN)",
            ok: version >= (6, 7),
            without: "only --stop-and-copy",
        },
        Check {
            name: "/dev/userfaultfd",
            ok: file("/dev/userfaultfd"),
            without: "unprivileged processes only by --stop-and-copy",
        },
        Check {
            name: "CAP_SYS_PTRACE",
            ok: cap(19),
            without: "processes of others cannot be captured",
        },
        Check {
            name: "CAP_SYS_ADMIN",
            ok: cap(21),
            without: "no new pid namespaces (--count, or a number that is taken)",
        },
        Check {
            name: "CAP_CHECKPOINT_RESTORE",
            ok: cap(40) || cap(21),
            without: "process numbers cannot be chosen",
        },
        Check {
            name: "CAP_NET_ADMIN",
            ok: cap(12),
            without: "open TCP connections cannot be captured",
        },
        Check {
            name: "CAP_SYS_RESOURCE",
            ok: cap(24),
            without: "limits above one's own cannot be given back",
        },
        Check {
            name: "time namespaces",
            ok: file("/proc/self/ns/time"),
            without: "no resume after a reboot",
        },
        Check {
            name: "linux.uml (package user-mode-linux)",
            ok: std::env::var_os("UMLCTL_LINUX")
                .map_or_else(|| in_path("linux.uml"), |p| Path::new(&p).is_file()),
            without: "no VMs, unless `umlctl run` is given one by --kernel",
        },
        Check {
            name: "root, pid, mount and network namespaces",
            ok: nix::unistd::geteuid().is_root()
                && cap(21)
                && ["pid", "mnt", "net"]
                    .iter()
                    .all(|n| file(&format!("/proc/self/ns/{n}"))),
            without: "no VMs",
        },
        Check {
            name: "tmpfs for the memory of VMs",
            ok: std::fs::read_to_string("/proc/filesystems").is_ok_and(|f| {
                f.lines()
                    .any(|l| l.trim_start_matches("nodev").trim() == "tmpfs")
            }),
            without: "no VMs",
        },
        Check {
            name: "/dev/net/tun",
            ok: std::fs::File::open("/dev/net/tun").is_ok(),
            without: "VMs only with --net none",
        },
        Check {
            name: "ip (package iproute2)",
            ok: in_path("ip"),
            without: "VMs only with --net none",
        },
        Check {
            name: "nft (package nftables), and nf_tables in the kernel",
            ok: rules_can_be_read(),
            without: "VMs only with --net none",
        },
        Check {
            name: "no process waits for `umlctl rescue`",
            ok: all_guardians,
            without: "run `umlctl rescue`",
        },
    ]
}

fn in_path(program: &str) -> bool {
    super::vm::run::search(program).is_some()
}

/// Asks nft for something that needs the kernel, and changes nothing.
fn rules_can_be_read() -> bool {
    std::process::Command::new("nft")
        .args(["list", "tables"])
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status()
        .is_ok_and(|s| s.success())
}

/// Prints the checks; fails only if nothing would work.
pub fn run(json: bool) -> Result<u8> {
    let checks = checks();
    if json {
        let list: Vec<_> = checks
            .iter()
            .map(|c| serde_json::json!({ "name": c.name, "ok": c.ok, "without": c.without }))
            .collect();
        println!("{}", serde_json::json!({ "checks": list }));
    } else {
        for c in &checks {
            let (mark, note) = if c.ok {
                ("ok     ", String::new())
            } else {
                ("MISSING", format!(": {}", c.without))
            };
            println!("{mark}  {}{note}", c.name);
        }
    }
    Ok(u8::from(!checks.iter().any(|c| c.ok)))
}

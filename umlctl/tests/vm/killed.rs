//! Whatever process of a VM is killed, nothing of the guest runs on as a process of the host.

use crate::common::{Home, all_in, namespace_of, until};
use std::path::PathBuf;

/// The host processes of a VM, and what they are.
struct Processes {
    namespace: PathBuf,
    supervisor: i32,
    keeper: i32,
    main: i32,
    io: i32,
    user: i32,
}

fn field(pid: i32, name: &str) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix(name));
    line.unwrap_or_default()
        .trim_start_matches(':')
        .trim()
        .to_owned()
}

fn processes(home: &Home) -> Processes {
    let info = home.info("v");
    let number = |key: &str| i32::try_from(info[key].as_i64().unwrap()).unwrap();
    let main = number("main");
    let all = namespace_of(main.into());
    let traced: Vec<i32> = all
        .iter()
        .copied()
        .filter(|p| field(*p, "TracerPid") == main.to_string())
        .collect();
    // One that computes: it would be the first to do harm.
    let user = traced
        .iter()
        .copied()
        .find(|p| field(*p, "State").starts_with('R'));
    let keeper = number("keeper");
    let io = all
        .iter()
        .copied()
        .find(|p| *p != main && *p != keeper && !traced.contains(p));
    Processes {
        namespace: std::fs::read_link(format!("/proc/{main}/ns/pid")).unwrap(),
        supervisor: number("supervisor"),
        keeper,
        main,
        io: io.unwrap(),
        user: user.unwrap_or(traced[0]),
    }
}

#[test]
fn nothing_runs_on() {
    let home = Home::new();
    home.boot("v");
    type Pick = fn(&Processes) -> i32;
    let picks: [(&str, Pick, &str, bool); 5] = [
        ("supervisor", |p| p.supervisor, "lost", true),
        ("keeper", |p| p.keeper, "ended", true),
        ("main", |p| p.main, "ended", true),
        // What the guest's kernel makes of these is its own affair, as long as it stays in the namespace.
        ("io", |p| p.io, "", false),
        ("user", |p| p.user, "", false),
    ];
    for (what, pick, state, ends) in picks {
        // Several that compute and make system calls all the time.
        home.sh("v", "for i in 1 2 3; do setsid sh -c 'while :; do :; done' </dev/null >/dev/null 2>&1 & done");
        home.sh("v", "setsid sh -c 'while :; do echo x > /root/file; done' </dev/null >/dev/null 2>&1 & true");
        let p = processes(&home);
        let pid = nix::unistd::Pid::from_raw(pick(&p));
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL).unwrap();
        if ends {
            until(&format!("the end of all after that of {what}"), || {
                all_in(&p.namespace).is_empty()
            });
            until("the state", || home.info("v")["state"] == state);
        } else {
            home.ok(&["kill", "v"]);
            assert!(all_in(&p.namespace).is_empty(), "{what}");
        }
        until("the lock", || {
            home.umlctl(&["run", "v", "--detach"]).status.success()
        });
        home.settle("v");
    }
    let p = processes(&home);
    home.ok(&["rm", "-f", "v"]);
    assert!(all_in(&p.namespace).is_empty());
}

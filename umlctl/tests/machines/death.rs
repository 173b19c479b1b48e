//! Death of anybody at any step, and a full disk: the VM goes on or ends whole, and what was complete stays usable.

use super::common::{Echo, Home, lives, wait};
use std::process::Command;

/// The supervisor dies at a step of a capture: all of the VM dies with it, and there is no snapshot.
#[test]
fn a_supervisor_that_dies_in_a_capture_takes_the_vm_with_it() {
    let points = [
        "uml.attached",
        "uml.copied",
        "uml.stopped",
        "uml.held",
        "uml.read",
        "uml.released",
        "uml.disk",
        "uml.saved",
        "uml.rename",
    ];
    let mut home = Home::new();
    home.boot("a");
    home.run(&["snapshot", "a", "good", "--wait"]);
    home.run(&["rm", "-f", "a"]);
    for point in points {
        home.fault(Some(point));
        let vm = home.json(&["resume", "good", "--name", "b"]);
        home.fault(None);
        let out = home.output(&["snapshot", "b", "s", "--wait"]);
        assert!(!out.status.success(), "{point}");
        for process in ["supervisor", "keeper", "main"] {
            wait(point, || !lives(&vm[process]));
        }
        assert_eq!(home.state("b"), "lost", "{point}");
        home.refused(&["inspect", "s"], 10);
        home.run(&["rm", "-f", "b"]);
    }
    // What an earlier one has left under its name is no matter.
    home.run(&["resume", "good", "--name", "b"]);
    home.run(&["snapshot", "b", "s", "--wait"]);
    home.run(&["verify", "s"]);
    home.check("b");
}

/// The keeper dies at a step of a rebuilding: the command says so, and nothing is left.
#[test]
fn a_keeper_that_dies_in_a_resume_leaves_nothing() {
    let mut home = Home::new();
    home.boot("a");
    home.run(&["snapshot", "a", "good", "--wait"]);
    home.run(&["rm", "-f", "a"]);
    for point in ["uml.prepared", "uml.made", "uml.registers"] {
        home.fault(Some(point));
        let said = home.refused(&["resume", "good", "--name", "b"], 1);
        home.fault(None);
        assert!(said.contains("keeper"), "{point}: {said}");
        home.refused(&["info", "b"], 10);
    }
    home.run(&["resume", "good", "--name", "b"]);
    home.check("b");
}

/// Whoever is killed while a snapshot is taken: the VM goes on or ends whole.
#[test]
fn kill_9_at_any_moment() {
    let home = Home::new();
    home.boot("a");
    home.run(&["snapshot", "a", "good", "--wait"]);
    home.run(&["rm", "-f", "a"]);
    for (round, who) in ["command", "supervisor", "keeper", "main", "user"]
        .iter()
        .cycle()
        .take(10)
        .enumerate()
    {
        let vm = home.json(&["resume", "good", "--name", "b"]);
        let mut command = Command::new(env!("CARGO_BIN_EXE_umlctl"))
            .args(["snapshot", "b", "s", "--wait"])
            .env("UMLCTL_HOME", home.dir.path())
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis((round as u64 * 17) % 80));
        let kill = |pid: i64| {
            let _ = Command::new("kill")
                .args(["-9", &pid.to_string()])
                .stderr(std::process::Stdio::null())
                .status();
        };
        match *who {
            "command" => command.kill().unwrap(),
            "user" => {
                let main = vm["main"].as_i64().unwrap();
                let all = std::fs::read_to_string(format!("/proc/{main}/task/{main}/children"))
                    .unwrap_or_default();
                if let Some(last) = all.split_whitespace().last() {
                    kill(last.parse().unwrap());
                }
            }
            other => kill(vm[other].as_i64().unwrap()),
        }
        command.wait().unwrap();
        if *who == "command" {
            // The supervisor goes on with it, if it was asked by then.
            home.check("b");
        } else if *who != "user" {
            for process in ["supervisor", "keeper", "main"] {
                wait(who, || !lives(&vm[process]));
            }
        }
        home.run(&["rm", "-f", "b"]);
        if home.output(&["inspect", "s"]).status.success() {
            home.run(&["verify", "s"]);
            home.run(&["rm-snapshot", "s"]);
        }
    }
}

/// The guest's own disk is on another file system: what it writes meanwhile must not be lost.
struct Small(std::path::PathBuf);

impl Small {
    fn mount(at: std::path::PathBuf) -> Self {
        std::fs::create_dir_all(&at).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=80m", "tmpfs"])
            .arg(&at)
            .status();
        assert!(mounted.unwrap().success());
        Self(at)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_costs_the_snapshot_and_nothing_else() {
    let home = Home::new();
    let _small = Small::mount(home.dir.path().join("snapshots"));
    home.boot("a");
    let mut echo = Echo::connect(&home, "a");
    home.run(&["snapshot", "a", "s0", "--wait"]);
    let said = (1..20).find_map(|i| {
        let out = home.output(&["snapshot", "a", &format!("s{i}"), "--wait"]);
        let failed = !out.status.success();
        failed.then(|| String::from_utf8_lossy(&out.stderr).into_owned())
    });
    let said = said.expect("it is never full");
    assert!(said.contains("No space left"), "{said}");
    echo.ask();
    let all = home.json(&["snapshots"]);
    for s in all.as_array().unwrap() {
        home.run(&["verify", s["name"].as_str().unwrap()]);
    }
    // With room again it works again.
    for s in all.as_array().unwrap().iter().skip(1) {
        home.run(&["rm-snapshot", s["name"].as_str().unwrap()]);
    }
    home.run(&["snapshot", "a", "again", "--wait"]);
    echo.ask();
    home.check("a");
}

//! Snapshots of real User Mode Linux machines that are busy.

mod common;
mod damage;
mod death;
mod pages;
mod twins;

use common::{Echo, Home};

#[test]
fn a_snapshot_leaves_the_vm_running() {
    let home = Home::new();
    home.boot("a");
    let mut echo = Echo::connect(&home, "a");
    echo.ask();
    for i in 0..20 {
        let name = format!("s{i}");
        let figures = home.json(&["snapshot", "a", &name, "--wait"]);
        assert!(figures["pause_us"].as_u64().unwrap() > 0);
        assert!(figures["durable_us"].as_u64() >= figures["pause_us"].as_u64());
        echo.ask();
        if i > 1 {
            home.run(&["rm-snapshot", &name]);
        }
    }
    let plain = home.json(&["snapshot", "a", "plain", "--wait", "--stop-and-copy"]);
    assert_eq!(plain["bytes_ahead"], 0);
    echo.ask();
    home.check("a");
    let list = home.json(&["snapshots"]);
    let names: Vec<_> = list
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s["name"].clone())
        .collect();
    assert_eq!(names, ["plain", "s0", "s1"]);
    for name in ["plain", "s0"] {
        home.run(&["verify", name]);
        assert_eq!(home.json(&["inspect", name])["memory_bytes"], 128 << 20);
    }
}

#[test]
fn connections_survive_kill_and_resume() {
    let home = Home::new();
    home.boot("a");
    let mut echo = Echo::connect(&home, "a");
    for i in 0..15 {
        echo.ask();
        let name = format!("s{i}");
        let before = home.json(&["info", "a"]);
        home.run(&["snapshot", "a", &name, "--kill"]);
        assert_eq!(home.state("a"), "ended");
        for process in ["supervisor", "keeper", "main"] {
            common::wait(process, || !common::lives(&before[process]));
        }
        let resumed = home.json(&["resume", &name]);
        assert_eq!(resumed["name"], "a");
        assert_eq!(resumed["address"], before["address"]);
        assert!(resumed["resume_us"].as_u64().unwrap() > 0);
        echo.ask();
        home.run(&["rm-snapshot", &name]);
    }
    home.check("a");
}

#[test]
fn names_and_codes() {
    let home = Home::new();
    home.boot("a");
    home.run(&["snapshot", "a", "s", "--wait"]);
    assert!(
        home.refused(&["snapshot", "a", "s"], 1)
            .contains("rm-snapshot")
    );
    assert!(
        home.refused(&["snapshot", "nobody", "t"], 10)
            .contains("nobody")
    );
    assert!(home.refused(&["snapshot", "a", "../t"], 2).contains("name"));
    assert!(
        home.refused(&["resume", "nothing"], 10)
            .contains("umlctl snapshots")
    );
    assert!(
        home.refused(&["rm-snapshot", "nothing"], 10)
            .contains("nothing")
    );
    assert!(home.refused(&["resume", "s"], 11).contains("--name"));
    assert!(
        home.refused(&["resume", "s", "--count", "2"], 1)
            .contains("--name")
    );
    assert!(home.refused(&["fork", "a", "a"], 1).contains("already"));
    home.refused(&["snapshot", "a"], 2);
    home.refused(&["fork"], 2);
    // A VM of that name that is not the one of the snapshot.
    home.boot("b");
    home.run(&["kill", "b"]);
    assert!(
        home.refused(&["resume", "s", "--name", "b"], 1)
            .contains("another")
    );
    // A beginning that is only one's is a name.
    home.run(&["resume", "s", "--name", "c"]);
    home.run(&["kill", "a"]);
    assert!(
        home.refused(&["snapshot", "a", "t"], 1)
            .contains("does not run")
    );
}

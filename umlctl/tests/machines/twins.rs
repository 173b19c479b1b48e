//! Many machines of one snapshot.

use super::common::{Echo, Home, lives};

#[test]
fn twins_run_at_once_and_each_has_its_own() {
    let home = Home::new();
    home.boot("a");
    let mut echo = Echo::connect(&home, "a");
    echo.ask();
    home.sh("a", "echo before >/root/mark; echo before >/tmp/mark");
    let fork = home.json(&["fork", "a", "--count", "3"]);
    assert_eq!(fork["vms"].as_array().unwrap().len(), 3);
    let names = ["a", "a-1", "a-2", "a-3"];
    let mut addresses: Vec<_> = names.iter().map(|n| home.address(n)).collect();
    addresses.sort();
    addresses.dedup();
    assert_eq!(addresses.len(), 4, "each can be reached by itself");
    echo.ask();
    let mut random = Vec::new();
    for name in names {
        Echo::connect(&home, name).ask();
        // On the disk, which is in the guest's memory, and in memory alone.
        assert_eq!(home.sh(name, "cat /root/mark /tmp/mark"), "before\nbefore");
        home.sh(
            name,
            &format!("echo {name} >/root/mark; echo {name} >/tmp/mark; sync"),
        );
        random.push(home.sh(name, "cat /proc/sys/kernel/random/uuid"));
    }
    for name in names {
        assert_eq!(
            home.sh(name, "cat /root/mark /tmp/mark"),
            format!("{name}\n{name}")
        );
        home.check(name);
    }
    random.sort();
    random.dedup();
    assert_eq!(random.len(), 4, "no two draw the same random numbers");
    // The snapshot behind them is gone by now, and no file of it is missed.
    assert!(home.json(&["snapshots"]).as_array().unwrap().is_empty());
    home.run(&["rm", "-f", "a"]);
    for name in &names[1..] {
        home.sh(
            name,
            "echo 3 >/proc/sys/vm/drop_caches; md5sum /bin/busybox >/dev/null",
        );
        home.check(name);
    }
}

#[test]
fn a_snapshot_outlives_its_vm_and_is_resumed_many_times() {
    let home = Home::new();
    home.boot("a");
    home.sh("a", "echo kept >/tmp/mark");
    home.run(&["snapshot", "a", "s", "--wait"]);
    home.run(&["rm", "-f", "a"]);
    for i in 0..3 {
        let vm = home.json(&["resume", "s", "--name", "b"]);
        assert_eq!(home.sh("b", "cat /tmp/mark"), "kept", "time {i}");
        Echo::connect(&home, "b").ask();
        home.check("b");
        home.run(&["rm", "-f", "b"]);
        for process in ["supervisor", "keeper", "main"] {
            assert!(!lives(&vm[process]), "{process}");
        }
    }
}

#[test]
fn a_resumed_vm_is_snapshotted_again() {
    let home = Home::new();
    home.boot("a");
    home.run(&["snapshot", "a", "s0", "--wait"]);
    home.run(&["rm", "-f", "a"]);
    // Each of the next is made of one that was itself resumed, with what that one did in memory and on disk.
    for i in 0..4 {
        let (from, to, name) = (format!("s{i}"), format!("s{}", i + 1), format!("v{i}"));
        home.run(&["resume", &from, "--name", &name]);
        let mut echo = Echo::connect(&home, &name);
        echo.ask();
        home.sh(&name, &format!("echo {i} >>/tmp/log; echo {i} >>/root/log; dd if=/dev/zero of=/tmp/z bs=64k count=100 2>/dev/null"));
        home.run(&["snapshot", &name, &to, "--wait"]);
        home.run(&["verify", &to]);
        echo.ask();
        home.check(&name);
        home.run(&["rm", "-f", &name]);
        home.run(&["rm-snapshot", &from]);
    }
    home.run(&["resume", "s4", "--name", "last"]);
    let logs = home.sh("last", "cat /tmp/log; echo -; cat /root/log");
    assert_eq!(logs, "0\n1\n2\n3\n-\n0\n1\n2\n3");
    home.check("last");
}

#[test]
fn time_goes_on_and_never_back() {
    let home = Home::new();
    home.boot("a");
    let uptime = |name: &str| -> f64 {
        let text = home.sh(name, "cat /proc/uptime");
        text.split_whitespace().next().unwrap().parse().unwrap()
    };
    let before = uptime("a");
    home.run(&["snapshot", "a", "s", "--kill"]);
    std::thread::sleep(std::time::Duration::from_millis(1500));
    home.run(&["resume", "s"]);
    let after = uptime("a");
    assert!(after >= before + 1.5, "time away counts: {before} {after}");
    // The wall clock is the host's, to the second and a little.
    let guest: i64 = home.sh("a", "date +%s").parse().unwrap();
    let host = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    assert!(
        (guest - host.as_secs() as i64).abs() < 60,
        "{guest} {host:?}"
    );
    // Timers ring.
    home.sh("a", "sleep 1; usleep 1000");
}

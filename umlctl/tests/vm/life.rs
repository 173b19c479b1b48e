//! From run to rm.

use crate::common::{Home, network_left};

#[test]
fn from_run_to_rm() {
    let home = Home::new();
    let image = home.image();
    let image = image.to_str().unwrap();
    assert_eq!(
        home.ok(&["run", "one", "--image", image, "--detach"]),
        "one"
    );
    let info = home.info("one");
    assert_eq!(info["state"], "running");
    assert_eq!(info["schema"], 1);
    assert!(info["boot_us"].as_u64().unwrap() > 0);
    assert!(info["main"].as_i64().unwrap() > 0);

    // Main has the descriptors it should have, and of what was there before it none other.
    let fds = format!("/proc/{}/fd", info["main"]);
    let link = |n: u32| {
        std::fs::read_link(format!("{fds}/{n}"))
            .unwrap()
            .display()
            .to_string()
    };
    assert_eq!(link(0), link(1));
    assert!(link(0).starts_with("socket:") && link(4).starts_with("socket:"));
    assert!(link(2).ends_with("kernel.log") && link(3) == "/dev/net/tun");
    let all: Vec<String> = std::fs::read_dir(&fds)
        .unwrap()
        .flatten()
        .filter_map(|e| Some(std::fs::read_link(e.path()).ok()?.display().to_string()))
        .collect();
    let strange = [
        "lock",
        "supervisor.log",
        "control.sock",
        "console.log",
        "ns/",
        "net:[",
    ];
    assert!(
        !all.iter().any(|l| strange.iter().any(|s| l.contains(s))),
        "{all:?}"
    );

    let list = home.ok(&["list"]);
    assert!(list.contains("one") && list.contains("running"), "{list}");
    assert!(list.contains(info["address"].as_str().unwrap()), "{list}");
    assert_eq!(
        home.ok(&["list", "--no-headers", "-o", "name,state"]),
        "one   running".replace("   ", "  ")
    );
    home.fails(&["list", "-o", "colour"], 1);
    let text = home.fails(&["run", "one", "--image", image, "--detach"], 1);
    assert!(text.contains("already"), "{text}");
    home.fails(&["run", "one", "--detach"], 11);
    home.fails(&["rm", "one"], 11);

    // Its disk is what it has when it is started again, and the image stays as it is.
    let before = std::fs::read(image).unwrap();
    home.sh("one", "echo kept > /root/file; sync");
    home.ok(&["kill", "one"]);
    let info = home.info("one");
    assert_eq!(
        (&info["state"], &info["exit_code"]),
        (&"ended".into(), &137.into())
    );
    let text = home.fails(&["exec", "one", "true"], 1);
    assert!(text.contains("does not run"), "{text}");
    home.fails(&["stop", "one"], 1);
    home.ok(&["run", "one", "--detach"]);
    assert_eq!(home.sh("one", "cat /root/file"), "kept");
    assert!(std::fs::read(image).unwrap() == before);

    home.ok(&["stop", "one"]);
    let info = home.info("one");
    assert_eq!(
        (&info["state"], &info["exit_code"]),
        (&"ended".into(), &0.into())
    );
    assert!(network_left(&info), "it keeps its address");
    home.ok(&["rm", "one"]);
    assert!(!home.vm_dir("one").exists());
    assert!(!network_left(&info));
}

#[test]
fn without_agent_and_network() {
    let home = Home::new();
    let image = home.image();
    let image = image.to_str().unwrap();
    // Without the agent's answer there is nobody to be asked, so it is killed.
    home.ok(&[
        "run",
        "a",
        "--image",
        image,
        "--net",
        "none",
        "--detach",
        "--no-wait",
    ]);
    home.ok(&["stop", "a"]);
    assert_eq!(home.info("a")["address"], serde_json::Value::Null);
    home.ok(&["run", "a", "--detach"]);
    home.settle("a");
    assert!(!home.sh("a", "cat /proc/net/dev").contains("vec0"));
    home.ok(&["rm", "-f", "a"]);
    // Arguments for the kernel and its init.
    home.ok(&[
        "run",
        "b",
        "--image",
        image,
        "--mem",
        "96M",
        "--raid6",
        "--append",
        "loglevel=3 my.word=1",
        "--detach",
    ]);
    home.settle("b");
    let line = home.sh("b", "cat /proc/cmdline");
    assert!(
        line.contains("my.word=1") && line.contains("mem=98304K") && !line.contains("blacklist"),
        "{line}"
    );
    home.ok(&["rm", "-f", "b"]);
}

#[test]
fn many_at_once() {
    let home = Home::new();
    let names = ["a", "b", "c", "d"];
    std::thread::scope(|s| {
        for name in names {
            s.spawn(|| home.boot(name));
        }
    });
    let addresses: std::collections::BTreeSet<String> = names
        .iter()
        .map(|n| home.info(n)["address"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(addresses.len(), names.len());
    home.ok(&["rm", "-f", "a", "b", "c", "d"]);
    // A name is claimed once, however many want it at the same moment.
    let image = home.image();
    let image = image.to_str().unwrap();
    let won = std::thread::scope(|s| {
        let run = || {
            home.umlctl(&["run", "x", "--image", image, "--mem", "64M", "--detach"])
                .status
                .success()
        };
        let all: Vec<_> = (0..4).map(|_| s.spawn(run)).collect();
        all.into_iter()
            .map(|t| t.join().unwrap())
            .filter(|w| *w)
            .count()
    });
    assert_eq!(won, 1);
}

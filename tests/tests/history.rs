//! History: packing and reading what is packed, and pruning. How it travels is in `travel.rs`.

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::{Command, Stdio};

use cowfs::store::packs::PackOptions;
use cowfs_tests::Rng;
use cowfs_tests::driver::{Driver, checkpoint};
use cowfs_tests::dump::{check, check_data, dump};
use cowfs_tests::history::{at, blocks, clean, fill, noise, small, text, tree};
use cowfs_tests::live::{Live, binary};

#[test]
fn what_is_packed_reads_maps_runs_and_rolls_back() {
    let l = Live::new();
    let m = l.mnt();
    fill(&l.at(""), 1);
    let first = tree(&l.at(""));
    l.run(&["checkpoint", &m, "one"]);
    for name in ["large", "program", "text", "d/f3"] {
        fs::remove_file(l.at(name)).expect("there");
    }
    fs::write(l.at("d/f4"), "other").expect("room");
    l.run(&["checkpoint", &m, "two"]);
    let second = tree(&l.at(""));
    let stats = |name: &str| {
        let v: serde_json::Value =
            serde_json::from_str(&l.run(&["stats", &m, "--json"])).expect("JSON");
        v["store"][name].as_u64().expect("a number")
    };
    assert_eq!(stats("packed_bytes"), 0);
    l.run(&["pack", &m]);
    let packed = stats("packed_bytes");
    assert!(packed > 3 << 20, "{packed}");
    // What the head holds stays as it is.
    assert!(packed < 5 << 20, "{packed}");
    assert_eq!(tree(&l.at("")), second);
    at(&l, "one", |dir| {
        assert_eq!(tree(dir), first);
        let ran = Command::new(dir.join("program")).status();
        assert!(ran.expect("it starts").success());
    });
    // Packing again finds nothing to do.
    l.run(&["pack", &m]);
    assert_eq!(stats("packed_bytes"), packed);
    l.run(&["rollback", &m, "one"]);
    assert_eq!(tree(&l.at("")), first);
    let ran = Command::new(l.at("program")).status();
    assert!(ran.expect("it starts").success());
    // Written over in part, the rest still comes from the pack.
    let f = fs::File::options()
        .read(true)
        .write(true)
        .open(l.at("large"))
        .expect("there");
    let mut want = fs::read(l.at("large")).expect("there");
    f.write_all_at(b"changed", 1_000_001).expect("room");
    want[1_000_001..1_000_008].copy_from_slice(b"changed");
    drop(f);
    l.run(&["pack", &m, "--checkpoint", "one", "--checkpoint", "two"]);
    l.run(&["gc", &m]);
    assert!(fs::read(l.at("large")).expect("there") == want);
    at(&l, "one", |dir| assert_eq!(tree(dir), first));
    at(&l, "two", |dir| assert_eq!(tree(dir), second));
    l.run(&["unmount", &m]);
    clean(&l.store());
    l.mount(&[]);
    assert!(fs::read(l.at("large")).expect("there") == want);
    at(&l, "two", |dir| assert_eq!(tree(dir), second));
    l.check();
}

#[test]
fn packing_shares_and_deleting_gives_back() {
    let l = Live::new();
    let m = l.mnt();
    let mut rng = Rng(3);
    let mut data = noise(&mut rng, 6 << 20);
    for round in 0..4 {
        // Eight bytes more, so that nothing lies at the same place.
        data.splice(1000 * round..1000 * round, noise(&mut rng, 8));
        fs::write(l.at("file"), &data).expect("room");
        l.run(&["checkpoint", &m, &format!("c{round}")]);
    }
    fs::remove_file(l.at("file")).expect("there");
    l.run(&["pack", &m]);
    let stored = blocks(&l.store().join("packs"));
    assert!(stored < 8 << 20, "four versions take {stored}");
    let left = blocks(&l.store().join("data"));
    assert!(left < 2 << 20, "{left} are left in segments");
    l.run(&["delete", &m, "c0"]);
    l.run(&["delete", &m, "c1"]);
    l.run(&["delete", &m, "c2"]);
    l.run(&["gc", &m, "--wait"]);
    at(&l, "c3", |dir| {
        assert!(fs::read(dir.join("file")).expect("there") == data)
    });
    l.run(&["delete", &m, "c3"]);
    l.run(&["gc", &m, "--wait"]);
    let stored = blocks(&l.store().join("packs"));
    assert!(stored < 1 << 20, "{stored} are left in packs");
    l.check();
}

#[test]
fn packing_leaves_a_small_log_that_grows_again() {
    let l = Live::new();
    let m = l.mnt();
    let log = || -> u64 {
        let of = |n| fs::metadata(l.store().join(n)).map_or(0, |m| m.blocks() * 512);
        of("log.0") + of("log.1")
    };
    let busy = |name: &str| {
        for i in 0..12_000 {
            let long = "x".repeat(150);
            fs::write(l.at(&format!("{name}{i}{long}")), [7; 300]).expect("room");
        }
        fs::File::open(l.at(&format!("{name}0{}", "x".repeat(150))))
            .and_then(|f| f.sync_all())
            .expect("room");
    };
    busy("a");
    let grown = log();
    assert!(grown > 6 << 20, "the log did not grow: {grown}");
    l.run(&["checkpoint", &m, "one", "--wait"]);
    l.run(&["pack", &m]);
    let left = log();
    assert!(left < 5 << 20, "{left} are left of {grown}");
    // What comes after it is in the log, and in a log that has grown anew.
    busy("b");
    let before = tree(&l.at(""));
    l.kill();
    l.clear();
    l.mount(&[]);
    assert_eq!(tree(&l.at("")), before);
    at(&l, "one", |dir| {
        assert_eq!(fs::read_dir(dir).expect("there").count(), 12_000)
    });
    l.check();
}

#[test]
fn packing_can_be_killed_at_any_step() {
    let l = Live::new();
    let m = l.mnt();
    fill(&l.at(""), 2);
    let first = tree(&l.at(""));
    l.run(&["checkpoint", &m, "one", "--wait"]);
    fs::remove_file(l.at("large")).expect("there");
    fs::remove_dir_all(l.at("d")).expect("there");
    l.run(&["checkpoint", &m, "two", "--wait"]);
    let second = tree(&l.at(""));
    l.run(&["unmount", &m]);
    let look = |fault: &str, second: &str| {
        clean(&l.store());
        l.mount(&[]);
        assert_eq!(tree(&l.at("")), second, "{fault}");
        at(&l, "one", |dir| assert_eq!(tree(dir), first, "{fault}"));
        l.run(&["unmount", &m]);
    };
    let points = [
        "pack:frames",
        "pack:synced",
        "pack:chunks",
        "pack:mapped",
        "pack:done",
        "gc:mark",
        "gc:free",
        "gc:index",
        "gc:packs",
    ];
    for fault in points {
        l.mount(&[("COWFS_FAULT", fault)]);
        let out = l.try_run(&["pack", &m], &[]);
        assert!(!out.status.success(), "{fault}: it was not killed");
        l.clear();
        look(fault, &second);
    }
    let mut rng = Rng(11);
    for round in 0..4 {
        // Something new to pack in each round.
        l.mount(&[]);
        let more = noise(&mut rng, 8 << 20);
        fs::write(l.at("more"), &more).expect("room");
        l.run(&["checkpoint", &m, &format!("more{round}"), "--wait"]);
        fs::remove_file(l.at("more")).expect("there");
        let mut child = Command::new(binary())
            .args(["pack", &m])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("it starts");
        std::thread::sleep(std::time::Duration::from_millis(rng.below(800)));
        l.kill();
        child.wait().expect("it ends");
        l.mount(&[]);
        let name = format!("more{round}");
        at(&l, &name, |dir| {
            assert!(fs::read(dir.join("more")).expect("there") == more)
        });
        l.run(&["unmount", &m]);
        clean(&l.store());
    }
    l.mount(&[]);
    l.run(&["pack", &m]);
    let now = tree(&l.at(""));
    l.run(&["unmount", &m]);
    look("none", &now);
}

#[test]
fn prune_keeps_what_the_rules_and_the_heads_need() {
    let l = Live::new();
    let m = l.mnt();
    for i in 0..6 {
        fs::write(l.at("f"), format!("{i}")).expect("room");
        l.run(&["checkpoint", &m, &format!("c{i}")]);
    }
    l.run(&["pin", &m, "c0"]);
    l.run(&["tag", &m, "c1", "keep=yes"]);
    let none = l.try_run(&["prune", &m], &[]);
    assert_eq!(none.status.code(), Some(2));
    assert!(text(&none).contains("--keep-last"), "{}", text(&none));
    let bad = l.try_run(&["prune", &m, "--keep-within", "5x"], &[]);
    assert_eq!(bad.status.code(), Some(2));
    let names = || l.run(&["list", &m, "--no-headers", "-o", "name"]);
    let rules = ["--keep-last", "2", "--keep-tag", "keep"];
    let mut dry = vec!["prune", m.as_str(), "--dry-run"];
    dry.extend(rules);
    assert_eq!(l.run(&dry), "c2\nc3\n");
    assert_eq!(names().lines().count(), 7);
    l.run(&["rollback", &m, "c2"]);
    let mut real = vec!["prune", m.as_str()];
    real.extend(rules);
    assert_eq!(l.run(&real), "c3\n", "the head continues c2");
    l.run(&["gc", &m, "--wait"]);
    let left = names();
    for name in ["c0", "c1", "c2", "c4", "c5", "left-"] {
        assert!(left.contains(name), "{name} is gone: {left}");
    }
    let json: serde_json::Value =
        serde_json::from_str(&l.run(&["prune", &m, "--keep-last", "1", "--dry-run", "--json"]))
            .expect("JSON");
    assert_eq!(json["dry_run"], true);
    assert_eq!(json["plan"][0]["reasons"][0], "pinned");
    l.check();
}

#[test]
fn a_pack_goes_on_beside_writers() {
    let store = small();
    let before = {
        let c = store.catalog().expect("it works");
        c.checkpoint_named("one").expect("there").root
    };
    let want = dump(&store, before);
    std::thread::scope(|s| {
        s.spawn(|| {
            let mut d = Driver::new(&store, "main");
            for i in 0..400u64 {
                let f = d.create(1, &format!("w{i}")).expect("room");
                d.write(f, 0, &vec![i as u8; 9000]).expect("room");
                d.forget_all(&[]);
                if i % 40 == 0 {
                    checkpoint(&store, &format!("c{i}"));
                }
            }
        });
        for _ in 0..10 {
            let options = PackOptions {
                checkpoints: Vec::new(),
                whole: false,
                level: 1,
            };
            store.pack(&options).expect("it can be packed");
            assert!(dump(&store, before) == want);
        }
    });
    store
        .pack(&PackOptions {
            checkpoints: Vec::new(),
            whole: false,
            level: 1,
        })
        .expect("it can be packed");
    check(&store);
    check_data(&store);
}

#[test]
fn old_checkpoints_are_packed_by_themselves() {
    let l = Live::with_options("pack=1s");
    let m = l.mnt();
    fs::write(l.at("f"), noise(&mut Rng(2), 1 << 20)).expect("room");
    let want = fs::read(l.at("f")).expect("there");
    l.run(&["checkpoint", &m, "one"]);
    fs::remove_file(l.at("f")).expect("there");
    let mut packed = 0;
    for _ in 0..1200 {
        let v: serde_json::Value =
            serde_json::from_str(&l.run(&["stats", &m, "--json"])).expect("JSON");
        packed = v["store"]["packed_bytes"].as_u64().expect("a number");
        if packed > 0 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
    assert!(packed >= 1 << 20, "{packed}");
    at(&l, "one", |dir| {
        assert!(fs::read(dir.join("f")).expect("there") == want)
    });
    l.check();
    let bad = l.try_run(
        &[
            "mount",
            "-o",
            "pack=soon",
            &l.store().display().to_string(),
            &m,
        ],
        &[],
    );
    assert_eq!(bad.status.code(), Some(2), "{}", text(&bad));
}

//! A full disk while a difference is received: what it takes from its base needs room for packs.

use std::fs;

use cowfs::history::{SendOptions, TransferError, parse_token, receive, send};
use cowfs::store::{CatalogOp, Store};
use cowfs_tests::Rng;
use cowfs_tests::driver::{Driver, checkpoint};
use cowfs_tests::dump::{check, check_data, dump};
use cowfs_tests::history::{at, clean, cowfs, noise, ok, other, text, tree};
use cowfs_tests::live::Live;
use cowfs_tests::simdisk::SimDisk;

fn root(store: &Store, name: &str) -> u64 {
    let catalog = store.catalog().expect("it works");
    catalog.checkpoint_named(name).expect("there").root
}

fn difference(store: &Store, resume: Option<(u64, u64)>) -> Vec<u8> {
    let options = SendOptions {
        checkpoint: 2,
        base: Some(1),
        resume,
        level: 1,
        have: Default::default(),
    };
    let mut out = Vec::new();
    send(store, options, &mut out).expect("memory");
    out
}

#[test]
fn nothing_half_is_seen_and_it_goes_on_when_there_is_room() {
    let mut rng = Rng(41);
    let disk = SimDisk::default();
    let store = disk.store();
    let mut d = Driver::new(&store, "main");
    for i in 0..12 {
        let f = d.create(1, &format!("f{i}")).expect("room");
        d.write(f, 0, &noise(&mut rng, 900_000)).expect("room");
    }
    d.forget_all(&[]);
    drop(d);
    checkpoint(&store, "one");
    store.commit().expect("room");
    drop(store);
    // The same store elsewhere goes on: every file is written anew, with a little of it changed.
    let ahead = disk.copy();
    let store = ahead.open_store();
    let mut d = Driver::new(&store, "main");
    for i in 0..12 {
        let f = d.walk(&[format!("f{i}")]).expect("there");
        let mut bytes = d.read(f).expect("there");
        for n in 0..5 {
            bytes[n * 170_000] ^= 1;
        }
        d.truncate(f, 0).expect("room");
        d.write(f, 0, &bytes).expect("room");
    }
    d.forget_all(&[]);
    drop(d);
    checkpoint(&store, "two");
    store.commit().expect("room");
    let stream = difference(&store, None);
    assert_eq!(stream[7], 2, "nothing of it is in the base");
    assert!(stream.len() < 6 << 20, "{}", stream.len());
    let (one, two) = (
        dump(&store, root(&store, "one")),
        dump(&store, root(&store, "two")),
    );
    let (mut resumed, mut room) = (0, 0);
    loop {
        let here = disk.copy();
        let to = here.open_store();
        here.set_capacity(Some(here.used_blocks() + room));
        let got = receive(&to, &stream[..], None);
        if got.is_ok() {
            assert!(dump(&to, root(&to, "two")) == two);
            break;
        }
        let e = got.expect_err("no room");
        assert!(matches!(e, TransferError::Full { .. }), "{room}: {e}");
        let says = e.to_string();
        assert!(says.contains("no space left"), "{room}: {says}");
        let names = to.catalog().expect("it works");
        assert_eq!(names.checkpoints.len(), 1, "{room}");
        assert!(dump(&to, root(&to, "one")) == one, "{room}");
        here.set_capacity(None);
        check(&to);
        check_data(&to);
        // Given up: all of its space comes back.
        to.commit().expect("room");
        let left = here.copy();
        let alone = left.open_store();
        let catalog = alone.catalog().expect("it works");
        for name in catalog.hidden.keys().filter(|n| n.starts_with("@receive")) {
            let name = name.clone();
            let op = CatalogOp::Unhide { name };
            alone
                .change(|_| Ok((op, ())), |(), _| ())
                .expect("it is there");
        }
        alone.gc().expect("a collection");
        let packs = left.files().into_iter();
        let packs: Vec<_> = packs.filter(|f| f.0.starts_with("packs/")).collect();
        assert!(packs.is_empty(), "{room}: {packs:?}");
        assert_eq!(alone.stats().expect("it works").pack_stored_bytes, 0);
        // Or gone on with, as the error says.
        let token = says.rsplit_once("--resume ").map(|t| t.1);
        let rest = match token {
            Some(t) => {
                resumed += 1;
                let reached = parse_token(t).expect("a token");
                difference(&store, Some(reached))
            }
            None => stream.clone(),
        };
        assert!(token.is_none() || rest.len() < stream.len(), "{room}");
        receive(&to, &rest[..], None).unwrap_or_else(|e| panic!("{room}: {e}"));
        assert!(dump(&to, root(&to, "two")) == two, "{room}");
        check(&to);
        check_data(&to);
        room += 150;
    }
    assert!(resumed > 2, "{resumed} were gone on with, up to {room}");
}

#[test]
fn a_small_disk_is_full_while_a_difference_comes() {
    let l = Live::small(80);
    let m = l.mnt();
    let mut rng = Rng(42);
    for i in 0..16 {
        fs::write(l.at(&format!("f{i}")), noise(&mut rng, 1_000_000)).expect("room");
    }
    let first = tree(&l.at(""));
    l.run(&["checkpoint", &m, "one", "--wait"]);
    let file = |name: &str| l.beside("files").join(name).display().to_string();
    l.run(&["send", &m, "one", "--to", &file("one")]);
    let twin = other(&l, "t").display().to_string();
    ok(&["receive", &twin, "--from", &file("one")]);
    ok(&["clone", &twin, "one", "work"]);
    let dir = l.beside("work");
    let d = dir.display().to_string();
    ok(&["mount", &twin, &d, "--head", "work"]);
    for i in 0..16 {
        let path = dir.join(format!("f{i}"));
        let mut bytes = fs::read(&path).expect("there");
        for n in 0..5 {
            bytes[n * 190_000] ^= 1;
        }
        fs::write(&path, bytes).expect("room");
    }
    let second = tree(&dir);
    ok(&["checkpoint", &d, "two"]);
    ok(&["send", &d, "two", "--from", "one", "--to", &file("two")]);
    let len = fs::metadata(file("two")).expect("there").len();
    assert!(len < 8 << 20, "{len}");
    // All of the disk but a few MB.
    let filler = l.store().with_file_name("filler");
    let room = |keep: u64| {
        let f = fs::File::create(&filler).expect("room");
        let disk = nix::sys::statvfs::statvfs(l.store().as_path()).expect("a disk");
        let free = disk.blocks_available() * disk.fragment_size();
        let len = i64::try_from(free - (keep << 20)).expect("small");
        let mode = nix::fcntl::FallocateFlags::empty();
        nix::fcntl::fallocate(&f, mode, 0, len).expect("room");
    };
    let full = |token: Option<&str>| -> String {
        let name = match token {
            Some(t) => {
                let rest = file("rest");
                ok(&[
                    "send", &d, "two", "--from", "one", "--resume", t, "--to", &rest,
                ]);
                rest
            }
            None => file("two"),
        };
        let out = cowfs(&["receive", &m, "--from", &name]);
        let says = text(&out);
        assert_eq!(out.status.code(), Some(1), "{says}");
        assert!(says.contains("no space left"), "{says}");
        let names = l.run(&["list", &m, "--no-headers", "-o", "name"]);
        assert_eq!(names, "main\none\n");
        assert_eq!(tree(&l.at("")), first);
        says
    };
    room(1);
    assert!(full(None).contains("nothing of it was kept"));
    room(8);
    let says = full(None);
    let token = says.trim().rsplit(' ').next().expect("a token").to_owned();
    assert!(says.contains("--resume"), "{says}");
    // Still full, when it is gone on with.
    let says = full(Some(&token));
    let token = says.trim().rsplit(' ').next().expect("a token").to_owned();
    fs::remove_file(&filler).expect("ours");
    // What is not mounted is not in the way of another process.
    ok(&[
        "send",
        &d,
        "two",
        "--from",
        "one",
        "--resume",
        &token,
        "--to",
        &file("rest"),
    ]);
    ok(&["receive", &m, "--from", &file("rest")]);
    at(&l, "two", |dir| assert_eq!(tree(dir), second));
    assert_eq!(tree(&l.at("")), first);
    // And it goes as it came.
    l.run(&["delete", &m, "two"]);
    l.run(&["gc", &m, "--wait"]);
    let v = l.run(&["stats", &m, "--json"]);
    let v: serde_json::Value = serde_json::from_str(&v).expect("JSON");
    assert_eq!(v["store"]["pack_stored_bytes"], 0, "{v}");
    ok(&["receive", &m, "--from", &file("two")]);
    at(&l, "two", |dir| assert_eq!(tree(dir), second));
    ok(&["unmount", &d]);
    l.run(&["unmount", &m]);
    clean(&l.store());
}

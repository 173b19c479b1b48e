//! Sending and receiving, damage and repair.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use cowfs::history::stream::{Item, PLAIN, Reader, Record, VERSION, Writer};
use cowfs::history::{SendOptions, receive, send};
use cowfs::store::Store;
use cowfs_tests::Rng;
use cowfs_tests::driver::{Driver, checkpoint};
use cowfs_tests::dump::{check, check_data, dump};
use cowfs_tests::history::{
    at, blocks, clean, cowfs, fill, noise, ok, other, shown, small, text, tree,
};
use cowfs_tests::live::{Live, binary};
use cowfs_tests::simdisk::{self, SimDisk};

#[test]
fn checkpoints_travel_whole_and_as_differences() {
    let l = Live::new();
    let m = l.mnt();
    fill(&l.at(""), 4);
    let first = tree(&l.at(""));
    l.run(&["checkpoint", &m, "one", "--tag", "why=test"]);
    fs::rename(l.at("d"), l.at("moved")).expect("there");
    fs::remove_file(l.at("moved/f7")).expect("there");
    fs::remove_file(l.at("symlink")).expect("there");
    let f = fs::File::options()
        .write(true)
        .open(l.at("large"))
        .expect("there");
    f.write_all_at(&[7; 9000], 1_500_000).expect("room");
    f.set_len(2_900_000).expect("room");
    drop(f);
    fs::write(l.at("new"), noise(&mut Rng(8), 400_000)).expect("room");
    l.run(&["checkpoint", &m, "two"]);
    let second = tree(&l.at(""));
    let (a, b) = (l.beside("files").join("a"), l.beside("files").join("b"));
    let (a, b) = (a.display().to_string(), b.display().to_string());
    l.run(&["send", &m, "one", "--to", &a]);
    // Packed or not, the same is sent.
    l.run(&["pack", &m]);
    l.run(&["send", &m, "two", "--from", "one", "--to", &b]);
    let size = |p: &str| fs::metadata(p).expect("there").len();
    assert!(size(&b) < size(&a) / 3, "{} of {}", size(&b), size(&a));
    let store = other(&l, "t");
    let t = store.display().to_string();
    let early = cowfs(&["receive", &t, "--from", &b]);
    assert_eq!(early.status.code(), Some(1));
    assert!(
        text(&early).contains("receive that first"),
        "{}",
        text(&early)
    );
    assert_eq!(ok(&["receive", &t, "--from", &a]), "one\n");
    assert_eq!(
        ok(&["receive", &t, "--from", &b, "--name", "deux"]),
        "deux\n"
    );
    let again = cowfs(&["receive", &t, "--from", &b]);
    assert!(
        text(&again).contains("here already, as deux"),
        "{}",
        text(&again)
    );
    assert_eq!(shown(&l, &store, "one"), first);
    assert_eq!(shown(&l, &store, "deux"), second);
    let list: serde_json::Value = serde_json::from_str(&ok(&["list", &t, "--json"])).expect("JSON");
    assert_eq!(list["checkpoints"][0]["tags"]["why"], "test");
    clean(&store);
    // A head goes on from what was received; what comes of it goes back as a difference.
    ok(&["clone", &t, "deux", "work"]);
    let dir = l.beside("work");
    let d = dir.display().to_string();
    ok(&["mount", &t, &d, "--head", "work"]);
    fs::write(dir.join("text"), "written there").expect("room");
    fs::remove_file(dir.join("program")).expect("there");
    ok(&["checkpoint", &d, "three"]);
    let third = tree(&dir);
    let pipe = format!(
        "{0} send {d} three --from deux | {0} receive {m}",
        binary().display()
    );
    let out = Command::new("sh")
        .args(["-c", &pipe])
        .output()
        .expect("a shell");
    assert!(out.status.success(), "{}", text(&out));
    ok(&["unmount", &d]);
    at(&l, "three", |dir| assert_eq!(tree(dir), third));
    l.run(&["rollback", &m, "three"]);
    assert_eq!(tree(&l.at("")), third);
    clean(&store);
    l.run(&["unmount", &m]);
    clean(&l.store());
}

/// Replaces files as a package's upgrade does: a new file, with a little of it changed, gets the old one's name.
fn replace(dir: &Path) {
    for (i, e) in fs::read_dir(dir).expect("there").flatten().enumerate() {
        let mut bytes = fs::read(e.path()).expect("there");
        match i % 3 {
            0 => bytes[700_000..700_100].fill(9),
            1 => drop(bytes.splice(300_000..300_000, *b"and a few bytes more")),
            _ => {}
        }
        let new = dir.join("new");
        fs::write(&new, bytes).expect("room");
        fs::rename(new, e.path()).expect("there");
    }
}

#[test]
fn what_replaced_files_have_of_the_base_is_not_sent_again() {
    let l = Live::new();
    let m = l.mnt();
    let mut rng = Rng(14);
    fs::create_dir_all(l.at("d/e")).expect("room");
    for i in 0..12 {
        let len = 1_000_000 + rng.below(500_000) as usize;
        fs::write(l.at(&format!("d/e/f{i}")), noise(&mut rng, len)).expect("room");
    }
    fs::write(l.at("place"), noise(&mut rng, 2 << 20)).expect("room");
    l.run(&["checkpoint", &m, "one"]);
    replace(&l.at("d/e"));
    // Written anew where it is, with as little of it changed.
    let mut bytes = fs::read(l.at("place")).expect("there");
    bytes[1 << 20] ^= 1;
    fs::write(l.at("place"), bytes).expect("room");
    l.run(&["checkpoint", &m, "two"]);
    // And a directory that is replaced whole, with what is in it.
    fs::create_dir(l.at("new")).expect("room");
    for e in fs::read_dir(l.at("d/e")).expect("there").flatten() {
        fs::copy(e.path(), l.at("new").join(e.file_name())).expect("room");
    }
    fs::rename(l.at("d/e"), l.at("d/old")).expect("there");
    fs::rename(l.at("new"), l.at("d/e")).expect("there");
    fs::remove_dir_all(l.at("d/old")).expect("there");
    l.run(&["checkpoint", &m, "three"]);
    let want = tree(&l.at(""));
    let file = |name: &str| l.beside("files").join(name).display().to_string();
    let size = |name: &str| fs::metadata(file(name)).expect("there").len();
    l.run(&["send", &m, "one", "--to", &file("a")]);
    l.run(&["send", &m, "two", "--from", "one", "--to", &file("b")]);
    l.run(&["send", &m, "three", "--from", "two", "--to", &file("c")]);
    // Nine files of which a chunk or two differ, of 128 KiB at most.
    assert!(size("b") < 9 * 2 * (128 << 10), "{}", size("b"));
    assert!(size("c") < 64 << 10, "{}", size("c"));
    let bytes = fs::read(file("b")).expect("there");
    assert_eq!((bytes[7], fs::read(file("a")).expect("there")[7]), (2, 1));
    // Packed or not, on either side.
    l.run(&["pack", &m, "--checkpoint", "one"]);
    l.run(&["send", &m, "two", "--from", "one", "--to", &file("packed")]);
    assert!(size("packed") < 9 * 2 * (128 << 10), "{}", size("packed"));
    for second in ["b", "packed"] {
        let store = other(&l, second);
        let t = store.display().to_string();
        ok(&["receive", &t, "--from", &file("a")]);
        ok(&["receive", &t, "--from", &file(second)]);
        ok(&["receive", &t, "--from", &file("c")]);
        assert_eq!(shown(&l, &store, "three"), want);
        clean(&store);
    }
    // By a store of objects that has nothing of the base.
    let url = format!("file://{}", l.beside("objects").display());
    l.run(&["send", &m, "two", "--from", "one", "--to", &url]);
    let store = other(&l, "u");
    let u = store.display().to_string();
    ok(&["receive", &u, "--from", &file("a")]);
    ok(&["receive", &u, "--from", &url]);
    clean(&store);
    // A base that is not what it was: a clear error, and nothing is seen of it.
    let store = other(&l, "bad");
    let t = store.display().to_string();
    ok(&["receive", &t, "--from", &file("a")]);
    damage(&store.join("packs"));
    let out = cowfs(&["receive", &t, "--from", &file("b")]);
    assert_eq!(out.status.code(), Some(1));
    let says = text(&out);
    assert!(says.contains("checkpoint one"), "{says}");
    assert!(says.contains("send without --from"), "{says}");
    let names = ok(&["list", &t, "--no-headers", "-o", "name"]);
    assert_eq!(names, "main\none\n");
    l.check();
}

/// A file that was copied to another name, and removed, is another file. Its bytes are those of the base all the same.
#[test]
fn copies_of_files_that_went_away_are_not_sent() {
    let l = Live::new();
    let m = l.mnt();
    let mut rng = Rng(15);
    let names = ["a", "b", "c"];
    for (i, name) in names.iter().enumerate() {
        fs::write(l.at(name), noise(&mut rng, 1_000_000 + i)).expect("room");
    }
    fs::write(l.at("kept"), noise(&mut rng, 1_000_000)).expect("room");
    l.run(&["checkpoint", &m, "one"]);
    fs::create_dir(l.at("d")).expect("room");
    for name in names {
        fs::copy(l.at(name), l.at(&format!("d/{name}-2"))).expect("room");
        fs::remove_file(l.at(name)).expect("there");
    }
    // As long as one that went away, and another.
    fs::write(l.at("d/new"), noise(&mut rng, 1_000_001)).expect("room");
    l.run(&["checkpoint", &m, "two"]);
    let want = tree(&l.at(""));
    let file = |name: &str| l.beside("files").join(name).display().to_string();
    let size = |name: &str| fs::metadata(file(name)).expect("there").len();
    l.run(&["send", &m, "one", "--to", &file("one")]);
    for packed in [false, true] {
        if packed {
            l.run(&["pack", &m]);
        }
        l.run(&["send", &m, "two", "--from", "one", "--to", &file("two")]);
        assert!(size("two") > 1_000_000, "{}", size("two"));
        assert!(size("two") < 1_100_000, "{}", size("two"));
        let store = other(&l, if packed { "p" } else { "u" });
        let t = store.display().to_string();
        ok(&["receive", &t, "--from", &file("one")]);
        ok(&["receive", &t, "--from", &file("two")]);
        assert_eq!(shown(&l, &store, "two"), want);
        clean(&store);
    }
    l.check();
}

/// A stream may name any place of its base.
#[test]
fn chunks_of_a_base_that_are_not_there_are_refused() {
    let from = small();
    let mut d = Driver::new(&from, "main");
    let f = d.create(1, "another").expect("room");
    d.write(f, 0, &noise(&mut Rng(3), 50_000)).expect("room");
    d.forget_all(&[]);
    checkpoint(&from, "two");
    let options = |base| SendOptions {
        checkpoint: 2,
        base,
        resume: None,
        level: 1,
        have: Default::default(),
    };
    let mut difference = Vec::new();
    send(&from, options(Some(1)), &mut difference).expect("it is sent");
    let mut whole = Vec::new();
    send(&from, options(None), &mut whole).expect("it is sent");
    let change =
        |stream: &[u8], item: &Item| twisted(stream, VERSION, &|items| items.push(item.clone()));
    let some = |ino, at, len| Item::Base(ino, at, len, [7; 32]);
    for (n, item) in [
        some(3, 0, 5),
        some(3, 1 << 40, 1 << 20),
        some(3, u64::MAX, 9),
        some(u64::MAX, 0, 9),
        some(0, 0, 9),
        some(1, 0, 1),
    ]
    .iter()
    .enumerate()
    {
        let to = simdisk::store();
        receive(&to, &stream_of(&from)[..], None).expect("the base");
        let e = receive(&to, &change(&difference, item)[..], None)
            .expect_err("no such bytes")
            .to_string();
        assert!(e.contains("from checkpoint one"), "{n}: {e}");
        let e = receive(&to, &change(&whole, item)[..], None)
            .expect_err("no base")
            .to_string();
        assert!(e.contains("base"), "{n}: {e}");
        assert_eq!(to.catalog().expect("it works").checkpoints.len(), 1, "{n}");
        to.gc().expect("a collection");
        check(&to);
    }
    let to = simdisk::store();
    receive(&to, &stream_of(&from)[..], None).expect("the base");
    receive(&to, &difference[..], None).expect("unchanged");
    check(&to);
}

#[test]
fn a_broken_stream_is_resumed_and_never_seen_in_part() {
    let l = Live::new();
    let m = l.mnt();
    fill(&l.at(""), 5);
    fs::write(l.at("zz"), noise(&mut Rng(6), 30 << 20)).expect("room");
    let want = tree(&l.at(""));
    l.run(&["checkpoint", &m, "one"]);
    let whole = l.beside("files").join("whole");
    let w = whole.display().to_string();
    l.run(&["send", &m, "one", "--to", &w]);
    let bytes = fs::read(&whole).expect("there");
    let store = other(&l, "t");
    let t = store.display().to_string();
    let cut = l.beside("files").join("cut");
    fs::write(&cut, &bytes[..bytes.len() * 9 / 10]).expect("room");
    let broken = cowfs(&["receive", &t, "--from", &cut.display().to_string()]);
    assert_eq!(broken.status.code(), Some(1));
    let says = text(&broken);
    assert_eq!(ok(&["list", &t, "--no-headers", "-o", "name"]), "main\n");
    clean(&store);
    let token = says.trim().rsplit(' ').next().expect("a token").to_owned();
    assert!(says.contains("--resume"), "{says}");
    let wrong = cowfs(&["send", &m, "one", "--resume", "nonsense"]);
    assert!(text(&wrong).contains("no token"), "{}", text(&wrong));
    let rest = l.beside("files").join("rest");
    let r = rest.display().to_string();
    l.run(&["send", &m, "one", "--resume", &token, "--to", &r]);
    let rest_len = fs::metadata(&rest).expect("there").len();
    assert!(
        rest_len < bytes.len() as u64 / 2,
        "{rest_len} of {}",
        bytes.len()
    );
    ok(&["receive", &t, "--from", &r]);
    assert_eq!(shown(&l, &store, "one"), want);
    clean(&store);
    // Without the first part the rest is refused.
    let store = other(&l, "u");
    let u = store.display().to_string();
    let alone = cowfs(&["receive", &u, "--from", &r]);
    assert!(
        text(&alone).contains("without --resume"),
        "{}",
        text(&alone)
    );
    clean(&store);
}

/// A stream with other items, of a version, whose sums are right.
fn twisted(stream: &[u8], version: u8, twist: &dyn Fn(&mut Vec<Item>)) -> Vec<u8> {
    let mut out = Vec::new();
    let mut r = Reader::new(stream).expect("a stream");
    let mut w = Writer::of_version(&mut out, version).expect("memory");
    let mut count = 0;
    loop {
        match r.read().expect("whole") {
            Record::Items(mut items, at) => {
                twist(&mut items);
                count += items.len() as u64;
                w.write(&Record::Items(items, at)).expect("memory");
            }
            Record::End(_, chunks) => {
                w.write(&Record::End(count, chunks)).expect("memory");
                return out;
            }
            record => w.write(&record).expect("memory"),
        }
    }
}

fn stream_of(store: &Store) -> Vec<u8> {
    let mut out = Vec::new();
    let options = SendOptions {
        checkpoint: 1,
        base: None,
        resume: None,
        level: 1,
        have: Default::default(),
    };
    send(store, options, &mut out).expect("it is sent");
    out
}

#[test]
fn damaged_and_hostile_streams_leave_nothing() {
    let from = small();
    let stream = stream_of(&from);
    let to = simdisk::store();
    let mut rng = Rng(4);
    for i in 0..300 {
        let mut bad = stream.clone();
        match i % 3 {
            0 => bad.truncate(rng.below(bad.len() as u64) as usize),
            1 => {
                let at = rng.below(bad.len() as u64) as usize;
                bad[at] ^= 1 << rng.below(8);
            }
            _ => {
                let at = rng.below(bad.len() as u64) as usize;
                let n = (rng.below(200) as usize).min(bad.len() - at);
                bad.drain(at..at + n.max(1).min(bad.len() - at));
            }
        }
        let e = receive(&to, &bad[..], None)
            .expect_err("it is damaged")
            .to_string();
        assert!(e.len() > 10, "an error that says nothing: {e}");
        assert!(to.catalog().expect("it works").checkpoints.is_empty());
    }
    check(&to);
    let got = receive(&to, &stream[..], None).expect("whole");
    assert_eq!(got.name, "one");
    let root = |s: &Store| {
        s.catalog()
            .expect("it works")
            .checkpoint_named("one")
            .expect("there")
            .root
    };
    assert!(dump(&to, root(&to)) == dump(&from, root(&from)));
    check(&to);
    check_data(&to);
    to.gc().expect("a collection");
    assert!(dump(&to, root(&to)) == dump(&from, root(&from)));
}

/// Sums that are right do not make records right.
#[test]
fn a_stream_whose_records_contradict_each_other_is_refused() {
    let stream = stream_of(&small());
    let change = |f: &dyn Fn(&mut Vec<Item>)| twisted(&stream, PLAIN, f);
    type Twist<'a> = &'a dyn Fn(&mut Vec<Item>);
    let bad: [Twist<'_>; 7] = [
        &|i| i.push(Item::Map(3, 1 << 40, vec![(5, [1; 32])])),
        &|i| i.push(Item::Put(vec![0; 9], vec![0; 96])),
        &|i| i.push(Item::Put(vec![1; 4], vec![])),
        &|i| i.push(Item::PutName(1, b"a/b".to_vec(), vec![0; 9])),
        &|i| i.push(Item::PutName(1, b"lost".to_vec(), vec![9; 9])),
        &|i| i.push(Item::Unmap(2, u64::MAX - 5, 9)),
        &|i| i.retain(|i| !matches!(i, Item::Map(..))),
    ];
    for (n, f) in bad.iter().enumerate() {
        let to = simdisk::store();
        let e = receive(&to, &change(*f)[..], None)
            .expect_err("nonsense")
            .to_string();
        assert!(e.contains("stream"), "{n}: {e}");
        assert!(
            to.catalog().expect("it works").checkpoints.is_empty(),
            "{n}"
        );
        to.gc().expect("a collection");
        check(&to);
    }
    let to = simdisk::store();
    receive(&to, &change(&|_| ())[..], None).expect("unchanged");
}

#[test]
fn a_power_cut_while_receiving_leaves_all_or_nothing() {
    let from = small();
    let stream = stream_of(&from);
    let want = dump(
        &from,
        from.catalog()
            .expect("it works")
            .checkpoint_named("one")
            .expect("there")
            .root,
    );
    let mut rng = Rng(21);
    let mut whole = 0;
    for operations in 0..60 {
        let disk = SimDisk::default();
        let store = disk.store();
        disk.cut_after(operations);
        let done = receive(&store, &stream[..], None).is_ok();
        drop(store);
        disk.crash(&mut rng);
        let store = disk.open_store();
        check(&store);
        check_data(&store);
        match store.catalog().expect("it works").checkpoint_named("one") {
            Some(c) => {
                assert!(dump(&store, c.root) == want);
                whole += 1;
            }
            None => assert!(!done, "it was received and is gone"),
        }
        if !done && store.catalog().expect("it works").checkpoints.is_empty() {
            receive(&store, &stream[..], None).expect("it is sent again");
            check(&store);
        }
    }
    assert!(whole > 0, "no receive came to its end");
}

#[test]
fn objects_are_shared_and_not_sent_twice() {
    let l = Live::new();
    let m = l.mnt();
    fill(&l.at(""), 9);
    let first = tree(&l.at(""));
    l.run(&["checkpoint", &m, "one"]);
    fs::write(l.at("new"), noise(&mut Rng(5), 100_000)).expect("room");
    let second = tree(&l.at(""));
    l.run(&["checkpoint", &m, "two"]);
    let bucket = l.beside("bucket");
    let url = format!("file://{}", bucket.display());
    l.run(&["send", &m, "one", "--to", &url]);
    let frames = bucket.join("cowfs-1/frames");
    let before = blocks(&frames);
    // Whole, and yet only what is new goes there.
    l.run(&["send", &m, "two", "--to", &url]);
    let more = blocks(&frames) - before;
    assert!(
        more < 200_000 && before > 3_000_000,
        "{more} more than {before}"
    );
    let store = other(&l, "t");
    let t = store.display().to_string();
    assert_eq!(
        ok(&["receive", &t, "--from", &url, "--checkpoint", "one"]),
        "one\n"
    );
    assert_eq!(ok(&["receive", &t, "--from", &url]), "two\n");
    assert_eq!(shown(&l, &store, "one"), first);
    assert_eq!(shown(&l, &store, "two"), second);
    clean(&store);
    let none = cowfs(&["receive", &t, "--from", &url, "--checkpoint", "three"]);
    assert!(
        text(&none).contains("no checkpoint three"),
        "{}",
        text(&none)
    );
    let odd = cowfs(&["receive", &t, "--from", "ftp://x/y"]);
    assert!(text(&odd).contains("s3://"), "{}", text(&odd));
    // A frame that was damaged there is not believed.
    let store = other(&l, "u");
    let frame = fs::read_dir(&frames)
        .expect("there")
        .flatten()
        .next()
        .expect("one")
        .path();
    let mut bytes = fs::read(&frame).expect("there");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&frame, bytes).expect("room");
    let u = store.display().to_string();
    let bad = cowfs(&["receive", &u, "--from", &url, "--checkpoint", "one"]);
    assert!(text(&bad).contains("is damaged"), "{}", text(&bad));
    assert_eq!(ok(&["list", &u, "--no-headers", "-o", "name"]), "main\n");
    clean(&store);
}

/// Flips a bit in every 64 KiB of what is written of every file in a directory.
fn damage(dir: &Path) {
    for e in fs::read_dir(dir).expect("there").flatten() {
        let f = fs::File::options()
            .read(true)
            .write(true)
            .open(e.path())
            .expect("ours");
        let len = f.metadata().expect("there").len();
        for at in (0..len).step_by(64 << 10) {
            let mut piece = [0; 9000];
            let n = f.read_at(&mut piece, at + 5000).expect("there");
            if let Some(i) = piece[..n].iter().position(|b| *b != 0) {
                let at = at + 5000 + i as u64;
                f.write_all_at(&[piece[i] ^ 0x10], at).expect("room");
            }
        }
    }
}

#[test]
fn damage_is_named_and_repaired_from_elsewhere() {
    let l = Live::new();
    let m = l.mnt();
    let mut rng = Rng(13);
    fs::create_dir(l.at("dir")).expect("room");
    fs::write(l.at("dir/old"), noise(&mut rng, 2 << 20)).expect("room");
    fs::write(l.at("kept"), noise(&mut rng, 2 << 20)).expect("room");
    let first = tree(&l.at(""));
    l.run(&["checkpoint", &m, "one"]);
    fs::remove_file(l.at("dir/old")).expect("there");
    l.run(&["checkpoint", &m, "two"]);
    l.run(&["pack", &m]);
    let url = format!("file://{}", l.beside("bucket").display());
    l.run(&["send", &m, "one", "--to", &url]);
    let twin = other(&l, "t");
    let t = twin.display().to_string();
    ok(&["receive", &t, "--from", &url]);
    l.run(&["unmount", &m]);
    let store = l.store();
    let s = store.display().to_string();
    for from in [url.as_str(), t.as_str()] {
        damage(&store.join("packs"));
        damage(&store.join("data"));
        let found = cowfs(&["check", "--data", &s]);
        assert_eq!(found.status.code(), Some(1));
        let says = String::from_utf8_lossy(&found.stdout).into_owned();
        assert!(says.contains("checkpoint one: /dir/old"), "{says}");
        assert!(says.contains("checkpoint two: /kept"), "{says}");
        assert!(says.contains("head main: /kept"), "{says}");
        // Reading gives an error, not other bytes.
        l.mount(&[]);
        at(&l, "one", |dir| {
            let e = fs::read(dir.join("dir/old")).expect_err("damaged");
            assert_eq!(e.raw_os_error(), Some(nix::errno::Errno::EIO as i32));
        });
        l.run(&["unmount", &m]);
        // Nobody has it: nothing is made worse.
        let alone = cowfs(&["check", "--data", "--repair", &s]);
        assert_eq!(alone.status.code(), Some(1));
        assert!(
            text(&alone).contains("nobody asked has chunk"),
            "{}",
            text(&alone)
        );
        ok(&["check", "--data", "--repair", "--from", from, &s]);
        let kept = fs::read_dir(store.join("repair")).expect("copies").count();
        assert!(kept > 0);
        clean(&store);
        assert_eq!(shown(&l, &store, "one"), first);
    }
    l.mount(&[]);
    l.run(&["pack", &m]);
    l.run(&["gc", &m]);
    at(&l, "one", |dir| assert_eq!(tree(dir), first));
    l.check();
}

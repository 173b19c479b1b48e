//! Single failures of the disk at the places where they matter.

use std::sync::Arc;

use cowfs::fs::{Extent, Inode, Kv, ROOT_INO, data, dir, inode, key};
use cowfs::fuse::Op;
use cowfs::store::disk::Disk;
use cowfs::store::log::Log;
use cowfs::store::segments::Segments;
use cowfs::store::superblock::Superblock;
use cowfs::store::{CatalogOp, Store};
use cowfs_tests::Rng;
use cowfs_tests::driver::{Driver, checkpoint};
use cowfs_tests::dump::{check, dump, head_root};
use cowfs_tests::simdisk::{SimDisk, What};

fn new_store() -> (SimDisk, Arc<Store>) {
    let disk = SimDisk::default();
    let store = disk.store();
    (disk, store)
}

/// The power goes, with every choice of what the disk had done by then.
fn cuts(disk: &SimDisk, f: impl Fn(&SimDisk)) {
    for seed in 0..8 {
        let copy = disk.copy_unsynced();
        copy.crash(&mut Rng(seed));
        f(&copy);
    }
}

#[test]
fn a_write_during_a_sync_is_not_forgotten() {
    let disk = SimDisk::default();
    let segments = Arc::new(Segments::new(Arc::new(disk.clone()), 1));
    let place = segments.allocate(8192, true).expect("room");
    let other = Arc::clone(&segments);
    disk.in_next_write("data/", move || other.sync().expect("a sync"));
    segments.write(place, &[7; 8192]).expect("room");
    segments.sync().expect("a sync");
    cuts(&disk, |d| {
        let again = Segments::new(Arc::new(d.clone()), 2);
        let mut buf = [0; 8192];
        again.read_unpacked(place, &mut buf).expect("it is there");
        assert!(buf == [7; 8192]);
    });
}

#[test]
fn data_of_a_failed_sync_is_written_again() {
    for variant in 0..12 {
        let errno = [libc::EIO, libc::ENOSPC][variant % 2];
        let (disk, store) = new_store();
        for _ in 0..variant {
            disk.sync_dir("")
                .expect("only to vary what a failed sync leaves");
        }
        let mut d = Driver::new(&store, "main");
        let f = d.create(1, "a").expect("room");
        d.write(f, 0, &[7; 900_000]).expect("room");
        disk.fail_next("data/", What::Sync, errno);
        // A full disk makes an fsync commit, but a sync that fails is not a full disk.
        assert!(store.sync().is_err(), "the caller is told");
        assert!(disk.has_failed());
        store.sync().expect("the disk works again");
        let want = dump(&store, head_root(&store, "main"));
        cuts(&disk, |copy| {
            let store = copy.open_store();
            assert!(dump(&store, head_root(&store, "main")) == want);
        });
    }
}

#[test]
fn a_batch_that_changes_nothing_keeps_its_root() {
    let (_, store) = new_store();
    checkpoint(&store, "a");
    store
        .change(
            |c| {
                let op = CatalogOp::Clone {
                    from: 1,
                    id: c.next_head,
                    name: "other".into(),
                    created_us: 0,
                };
                Ok((op, ()))
            },
            |(), _| (),
        )
        .expect("a clone");
    Driver::new(&store, "main").create(1, "x").expect("room");
    store.commit().expect("a commit");
    let mut txn = store.begin("main").expect("a batch");
    assert!(!txn.del(b"not there").expect("a lookup"));
    txn.commit();
    // The old root's place is free with the next commit, and then the other head's.
    store.commit().expect("a commit");
    let mut other = Driver::new(&store, "other");
    for i in 0..200 {
        other.create(1, &format!("{i}")).expect("room");
    }
    store.commit().expect("a commit");
    check(&store);
    assert_eq!(dump(&store, head_root(&store, "main")).len(), 2);
}

#[test]
fn a_log_that_cannot_shrink_goes_on() {
    let disk = SimDisk::default();
    let mut log = Log::open(&disk, 0, 0, [0; 16]).expect("a log");
    let big = vec![1; 33 << 20];
    for i in 0..2 {
        log.append(i, i, &[&big]).expect("room");
    }
    log.switch().expect("it works");
    assert_eq!((log.active(), log.used()), (1, 0));
    log.append(2, 2, &[b"x"]).expect("room");
    disk.fail_next("log.0", What::Shape, libc::EIO);
    log.switch().expect("only the space is kept");
    assert_eq!((log.active(), log.used()), (0, 0));
    log.append(3, 3, &[b"y"]).expect("room");
    assert!(disk.has_failed());
    assert!(
        disk.open("log.0", false)
            .expect("it is there")
            .len()
            .expect("a length")
            > 64 << 20
    );
}

#[test]
fn a_chunk_in_doubt_does_not_hide_later_ones() {
    for variant in 0..8 {
        let (disk, store) = new_store();
        for _ in 0..variant {
            disk.sync_dir("")
                .expect("only to vary what a failed sync leaves");
        }
        let mut d = Driver::new(&store, "main");
        d.create(1, "first").expect("room");
        disk.fail_next("log.", What::Sync, libc::EIO);
        assert!(store.sync().is_err());
        // More than the log has room for, so that the chunk is not written over, but taken along by a commit; which fails.
        let mut txn = store.begin("main").expect("a batch");
        for ino in 100..4000u64 {
            txn.put(&key::inode(ino), &[7; 1000]).expect("room");
        }
        for ino in 100..4000u64 {
            txn.del(&key::inode(ino)).expect("room");
        }
        txn.commit();
        disk.set_capacity(Some(disk.used_blocks()));
        disk.fail_next("meta", What::Sync, libc::EIO);
        assert!(store.sync().is_err());
        assert!(disk.has_failed());
        disk.set_capacity(None);
        d.create(1, "last").expect("room");
        store.sync().expect("the disk works again");
        let want = dump(&store, head_root(&store, "main"));
        cuts(&disk, |copy| {
            let store = copy.open_store();
            assert!(dump(&store, head_root(&store, "main")) == want);
        });
    }
}

#[test]
fn a_long_orphan_key_does_not_stop_a_mount() {
    let (_, store) = new_store();
    let mut d = Driver::new(&store, "main");
    d.create(1, "kept").expect("room");
    let ino = {
        let mut t = store.read_head("main").expect("a head");
        cowfs::fs::dir::lookup(&mut t, 1, b"kept")
            .expect("a name")
            .expect("there")
            .ino
    };
    let mut txn = store.begin("main").expect("a batch");
    let mut long = cowfs::fs::key::orphan(99).to_vec();
    long.push(1);
    txn.put(&long, &[]).expect("room");
    txn.put(&cowfs::fs::key::orphan(ino), &[]).expect("room");
    txn.commit();
    let mut d = Driver::new(&store, "main");
    d.walk(&["kept".into()])
        .expect("a file that has a name stays");
    let report = store.check(&mut |_, _| ()).expect("a check");
    assert_eq!(report.problems.len(), 1, "{:?}", report.problems);
}

#[test]
fn a_superblock_in_doubt_keeps_both_commits() {
    let (disk, store) = new_store();
    let mut d = Driver::new(&store, "main");
    for round in 0..6 {
        for i in 0..30 {
            let f = d.create(1, &format!("{round} {i}")).expect("room");
            d.write(f, 0, &vec![round; 5000]).expect("room");
        }
        store.commit().expect("a commit");
        for i in 0..30 {
            let name = format!("{round} {i}");
            if i % 3 == 0 {
                let op = Op::Unlink {
                    name: name.as_bytes(),
                };
                d.ask(1, op).expect("it is there");
            }
        }
        d.forget_all(&[]);
        disk.fail_next("cowfs.store", What::Sync, libc::EIO);
        assert!(store.commit().is_err());
        // What is written now must not be where either commit has something; nor the pages of a third that fails.
        for i in 0..30 {
            let f = d.create(1, &format!("{round} later {i}")).expect("room");
            d.write(f, 0, &vec![9; 5000]).expect("room");
        }
        store.sync().expect("a flush");
        let want = dump(&store, head_root(&store, "main"));
        let is_want = |copy: &SimDisk| {
            let store = copy.open_store();
            check(&store);
            assert!(dump(&store, head_root(&store, "main")) == want);
        };
        cuts(&disk, is_want);
        disk.fail_next("meta", What::Sync, libc::EIO);
        assert!(store.commit().is_err());
        cuts(&disk, is_want);
        disk.fail_next("cowfs.store", What::Write, libc::EIO);
        assert!(store.commit().is_err());
        cuts(&disk, is_want);
        assert!(disk.has_failed());
        store.commit().expect("the disk works again");
        cuts(&disk, is_want);
        store.gc().expect("a collection");
        check(&store);
        cuts(&disk, is_want);
    }
}

#[test]
fn a_batch_may_be_larger_than_the_reserve() {
    let (_, store) = new_store();
    let mut txn = store.begin("main").expect("a batch");
    for ino in 100..40_000u64 {
        txn.put(&key::inode(ino), &[1; 200]).expect("room");
    }
    drop(txn);
    assert_eq!(dump(&store, head_root(&store, "main")).len(), 1);
    check(&store);
}

#[test]
fn a_batch_that_finds_no_space_leaves_no_trace() {
    let (disk, store) = new_store();
    let mut txn = store.begin("main").expect("a batch");
    for ino in 100..20_000u64 {
        txn.put(&key::orphan(ino), &[]).expect("room");
    }
    txn.commit();
    store.commit().expect("a commit");
    disk.set_capacity(Some(disk.used_blocks()));
    let mut txn = store.begin("main").expect("there is a reserve");
    // Deletions merge pages; to take them back they are split again.
    for ino in 100..10_000u64 {
        txn.del(&key::orphan(ino)).expect("room");
    }
    for ino in 100..200_000u64 {
        if txn.put(&key::inode(ino), &[1; 300]).is_err() {
            break;
        }
    }
    drop(txn);
    let mut t = store.read_head("main").expect("the store goes on");
    assert_eq!(
        data::orphans(&mut t, 100_000).expect("a list").len(),
        19_900
    );
}

#[test]
fn a_full_disk_still_syncs_and_opens_again() {
    for cut in [false, true] {
        let (disk, store) = new_store();
        let mut d = Driver::new(&store, "main");
        disk.set_capacity(Some(disk.used_blocks() + 900));
        let mut n = 0;
        // Until not even a name fits; most flushes go to the log, which may not grow.
        while d.create(1, &format!("{n} {}", "x".repeat(200))).is_ok() {
            n += 1;
            if n % 500 == 0 {
                store.flush_all().expect("the log, or else a commit");
            }
        }
        assert!(n > 1000, "{n}");
        store.sync().expect("a sync on a full disk");
        let want = dump(&store, head_root(&store, "main"));
        let again = |disk: &SimDisk| {
            let store = disk.open_store();
            check(&store);
            assert!(dump(&store, head_root(&store, "main")) == want);
        };
        if cut {
            cuts(&disk, |copy| {
                copy.set_capacity(Some(copy.used_blocks()));
                again(copy);
            });
        } else {
            for i in 0..n {
                let name = format!("{i} {}", "x".repeat(200));
                let op = Op::Unlink {
                    name: name.as_bytes(),
                };
                d.ask(1, op).expect("removing needs no space");
            }
            store.sync().expect("a sync");
            d.create(1, "room again").expect("room");
        }
    }
}

#[test]
fn records_wait_for_the_disk() {
    let (disk, store) = new_store();
    // More than may wait in memory, and nobody flushes in the background.
    for _ in 0..15 {
        let mut txn = store.begin("main").expect("no ENOSPC on an empty disk");
        for ino in 100..10_000u64 {
            txn.put(&key::inode(ino), &[7; 1000]).expect("room");
        }
        txn.commit();
    }
    let stats = store.stats().expect("numbers");
    assert!(stats.durable_records > 0);
    // While the disk fails, what waits is bounded.
    let big = |ino: u64| -> Result<(), i32> {
        let mut txn = store.begin("main").map_err(|e| e.errno())?;
        for i in 0..10_000 {
            txn.put(&key::inode(ino + i), &[8; 1000]).expect("room");
        }
        txn.commit();
        Ok(())
    };
    disk.fail_one_in(Some(1), 1);
    let mut done = 0;
    while done < 100 && big(100).is_ok() {
        done += 1;
        assert!(store.flush_all().is_err());
    }
    assert!(done < 30, "{done} batches of 10 MB wait");
    disk.fail_one_in(None, 1);
    big(100).expect("the disk works again");
    store.sync().expect("a sync");
}

#[test]
fn a_pinned_head_stays_readable() {
    let (_, store) = new_store();
    let mut d = Driver::new(&store, "main");
    for i in 0..50 {
        let f = d.create(1, &format!("{i}")).expect("room");
        d.write(f, 0, &vec![i; 9000]).expect("room");
    }
    let root = store.pin_head("main").expect("a head");
    let want = dump(&store, root);
    for round in 0..3 {
        for i in 0..50 {
            let f = d.walk(&[format!("{i}")]).expect("there");
            d.write(f, 0, &vec![100 + round; 9000]).expect("room");
        }
        store.commit().expect("a commit");
        store.gc().expect("a collection");
        assert!(dump(&store, root) == want);
    }
    store.unpin_root(root);
    store.gc().expect("a collection");
    check(&store);
}

#[test]
fn opening_again_leaks_nothing() {
    let (disk, store) = new_store();
    let mut d = Driver::new(&store, "main");
    for i in 0..300 {
        d.create(1, &format!("{i}")).expect("room");
    }
    checkpoint(&store, "a");
    for i in 0..300 {
        d.create(1, &format!("more {i}")).expect("room");
    }
    store.commit().expect("a commit");
    let before = store.stats().expect("numbers");
    assert!(before.garbage_pages > 0);
    drop((d, store));
    let mut free = Vec::new();
    for _ in 0..5 {
        let store = disk.open_store();
        store.commit().expect("a commit");
        let now = store.stats().expect("numbers");
        assert!(now.garbage_pages >= before.garbage_pages, "forgotten");
        free.push(now.meta_free_pages);
    }
    assert!(free.iter().all(|f| *f == free[0]), "{free:?}");
}

#[test]
fn a_hostile_superblock_is_refused() {
    let sb = Superblock {
        uuid: [1; 16],
        hash_key: [2; 16],
        commit: 7,
        generation: 9,
        last_seq: 3,
        log: 1,
        next_segment: 2,
        meta_pages: 1024,
        runs: vec![(5, 1), (9, 2)],
        blob_len: 128 + 5000,
        catalog_len: 5000,
        chain: [3; 16],
        blob_sum: [4; 32],
    };
    assert_eq!(
        Superblock::decode(&sb.encode()).expect("fine").as_ref(),
        Some(&sb)
    );
    let mut torn = sb.encode();
    torn[4000] = 1;
    assert_eq!(
        Superblock::decode(&torn).expect("fine"),
        None,
        "all of the slot counts"
    );
    let bad: [fn(&mut Superblock); 8] = [
        |s| s.blob_len += 1,
        |s| (s.catalog_len, s.blob_len) = (1 << 40, (1 << 40) + 128),
        |s| (s.meta_pages, s.blob_len) = (1 << 40, 5000 + (1 << 37)),
        |s| s.runs = vec![(5, 1)],
        |s| s.runs = vec![(1020, 9)],
        |s| s.runs = vec![(u64::MAX, 2)],
        |s| s.runs = vec![(0, 3)],
        |s| s.runs = vec![(1, u64::MAX / 2), (2, u64::MAX / 2 + 9)],
    ];
    for (i, f) in bad.iter().enumerate() {
        let mut sb = sb.clone();
        f(&mut sb);
        assert!(Superblock::decode(&sb.encode()).is_err(), "{i}");
    }
}

/// What the check says after one change of a small tree.
fn problems(f: impl FnOnce(&mut dyn Kv, u64, u64)) -> Vec<String> {
    let (_, store) = new_store();
    let mut d = Driver::new(&store, "main");
    let op = Op::Mkdir {
        name: b"dir",
        mode: 0o755,
        umask: 0,
    };
    d.make(1, op).expect("room");
    let file = d.create(1, "file").expect("room");
    d.write(file, 0, &[1; 9000]).expect("room");
    let ino = |name: &[u8]| {
        let mut t = store.read_head("main").expect("a head");
        let found = dir::lookup(&mut t, ROOT_INO, name).expect("it works");
        found.expect("there").ino
    };
    let (dir, file) = (ino(b"dir"), ino(b"file"));
    check(&store);
    let mut txn = store.begin("main").expect("a batch");
    f(&mut txn, dir, file);
    txn.commit();
    store.check(&mut |_, _| ()).expect("a check").problems
}

fn one(problems: &[String], what: &str) {
    assert!(
        problems.iter().any(|p| p.contains(what)),
        "{what}: {problems:?}"
    );
}

#[test]
fn the_check_sees_what_is_wrong() {
    let p = problems(|t, _, file| {
        t.put(&key::orphan(file), &[]).expect("room");
    });
    one(&p, "listed as having none");
    // The type in the entry, with the entry before the inode and behind it.
    let p = problems(|t, dir_ino, file| {
        let target = |ino, dtype| dir::Target { ino, dtype };
        dir::set(t, ROOT_INO, b"file", target(file, 10)).expect("room");
        let mut d = inode::load(t, dir_ino).expect("there");
        d.parent = 77;
        inode::save(t, dir_ino, &d).expect("room");
    });
    one(&p, "another type");
    one(&p, "its record says 77");
    // Two directories that hold each other.
    let p = problems(|t, dir_ino, _| {
        let now = inode::load(t, dir_ino).expect("there");
        let other = t.alloc_ino();
        dir::unset(t, ROOT_INO, b"dir").expect("there");
        let target = |ino| dir::Target { ino, dtype: 4 };
        dir::set(t, dir_ino, b"a", target(other)).expect("room");
        dir::set(t, other, b"b", target(dir_ino)).expect("room");
        let make = |parent| Inode {
            nlink: 3,
            parent,
            ..now
        };
        inode::save(t, dir_ino, &make(other)).expect("room");
        inode::save(t, other, &make(dir_ino)).expect("room");
    });
    one(&p, "no way leads to it");
    // One place twice, without the flag.
    let p = problems(|t, _, file| {
        let m = data::list(t, file, 0, u64::MAX, 9).expect("a list")[0];
        let mut i = inode::load(t, file).expect("there");
        let e = Extent {
            off: m.extent.off + 4096,
            len: 100,
            ..m.extent
        };
        data::map(t, file, &mut i, 100_000, e).expect("room");
        inode::save(t, file, &i).expect("room");
    });
    one(&p, "both have the bytes");
    assert_eq!(p.len(), 1, "{p:?}");
}

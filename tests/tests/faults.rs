//! Single failures of the disk at the places where they matter.

use std::sync::Arc;

use cowfs::fs::Kv;
use cowfs::store::Store;
use cowfs::store::disk::Disk;
use cowfs::store::log::Log;
use cowfs::store::segments::Segments;
use cowfs_tests::Rng;
use cowfs_tests::driver::Driver;
use cowfs_tests::dump::{check, dump, head_root};
use cowfs_tests::simdisk::{SimDisk, What};

fn new_store() -> (SimDisk, Arc<Store>) {
    let disk = SimDisk::default();
    Store::init_on(Arc::new(disk.clone())).expect("a new store");
    let store = open(&disk);
    (disk, store)
}

fn open(disk: &SimDisk) -> Arc<Store> {
    Store::open_on(Arc::new(disk.clone()), None).expect("it opens")
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
        again.read(place, &mut buf).expect("it is there");
        assert!(buf == [7; 8192]);
    });
}

#[test]
fn data_of_a_failed_sync_is_written_again() {
    for errno in [libc::EIO, libc::ENOSPC] {
        let (disk, store) = new_store();
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
            let store = open(copy);
            assert!(dump(&store, head_root(&store, "main")) == want);
        });
    }
}

#[test]
fn a_batch_that_changes_nothing_keeps_its_root() {
    let (_, store) = new_store();
    store.commit().expect("a commit");
    let mut txn = store.begin("main").expect("a batch");
    assert!(!txn.del(b"not there").expect("a lookup"));
    txn.commit();
    // The old root's place is free with the next commit, and used by the one after.
    store.commit().expect("a commit");
    let mut d = Driver::new(&store, "main");
    for i in 0..200 {
        d.create(1, &format!("{i}")).expect("room");
    }
    store.commit().expect("a commit");
    check(&store);
    assert_eq!(dump(&store, head_root(&store, "main")).len(), 201);
}

#[test]
fn a_log_that_cannot_shrink_goes_on() {
    let disk = SimDisk::default();
    let mut log = Log::open(&disk, 0, [0; 16]).expect("a log");
    let big = vec![1; 33 << 20];
    for i in 0..2 {
        log.append(i, i, &[&big]).expect("room");
    }
    log.switch();
    assert_eq!((log.active(), log.used()), (1, 0));
    log.append(2, 2, &[b"x"]).expect("room");
    disk.fail_next("log.0", What::Shape, libc::EIO);
    log.switch();
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

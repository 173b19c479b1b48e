//! Many threads on one store in a real directory: files written, renamed, synced and removed, checkpoints, commits and
//! collections, all at once; then it is opened again and looked through.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use cowfs::fuse::Op;
use cowfs::store::{CatalogOp, Store};
use cowfs_tests::Rng;
use cowfs_tests::driver::{Driver, checkpoint};
use cowfs_tests::dump::{Dump, Shown, check, dump, head_root};

/// Seconds of work.
const SECONDS: u64 = 6;

fn dir_op(name: &str) -> Op<'_> {
    Op::Mkdir {
        name: name.as_bytes(),
        mode: 0o755,
        umask: 0,
    }
}

/// Works in a directory of its own; returns what it must show at the end, which is durable by then.
fn worker(mut d: Driver, store: &Store, n: u64, stop: &AtomicBool) -> BTreeMap<String, Vec<u8>> {
    let mut rng = Rng(n);
    let home = d.make(1, dir_op(&format!("w{n}"))).expect("room");
    let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut made = 0;
    while !stop.load(Ordering::Relaxed) {
        let pick = {
            let i = rng.below(files.len() as u64);
            let i = usize::try_from(i).expect("few");
            files.keys().nth(i).cloned()
        };
        match (rng.below(12), pick) {
            (0..=2, _) | (_, None) if files.len() < 60 => {
                made += 1;
                let name = format!("f{made}");
                d.create(home, &name).expect("room");
                files.insert(name, Vec::new());
            }
            (3..=7, Some(name)) => {
                let node = d.walk(&[format!("w{n}"), name.clone()]).expect("there");
                let len = [10, 300, 5000, 66_000][usize::try_from(rng.below(4)).expect("few")];
                let bytes = files.get_mut(&name).expect("there");
                let end = bytes.len().min(200_000);
                let off = usize::try_from(rng.below(end as u64 + 1)).expect("small");
                let data = vec![u8::try_from(rng.below(256)).expect("a byte"); len];
                d.write(node, off as u64, &data).expect("room");
                if bytes.len() < off + len {
                    bytes.resize(off + len, 0);
                }
                bytes[off..off + len].copy_from_slice(&data);
            }
            (8, Some(name)) => {
                made += 1;
                let to = format!("r{made}");
                let op = Op::Rename {
                    name: name.as_bytes(),
                    new_parent: home,
                    new_name: to.as_bytes(),
                    flags: 0,
                };
                d.ask(home, op).expect("a rename");
                let bytes = files.remove(&name).expect("there");
                files.insert(to, bytes);
            }
            (9, Some(name)) => {
                let op = Op::Unlink {
                    name: name.as_bytes(),
                };
                d.ask(home, op).expect("it is there");
                files.remove(&name);
            }
            (10, Some(name)) => {
                let node = d.walk(&[format!("w{n}"), name.clone()]).expect("there");
                assert!(
                    d.read(node).expect("it can be read") == files[&name],
                    "{name}"
                );
            }
            _ => store.sync().expect("a sync"),
        }
        d.forget_all(&[home]);
    }
    store.sync().expect("a sync");
    files
}

fn shown(dump: &Dump, n: u64) -> BTreeMap<String, Vec<u8>> {
    let prefix = format!("/w{n}/");
    dump.iter()
        .filter_map(|(p, s)| match s {
            Shown::File(bytes, ..) => Some((p.strip_prefix(&prefix)?.to_owned(), bytes.clone())),
            _ => None,
        })
        .collect()
}

#[test]
fn many_threads_on_one_store() {
    let tmp = tempfile::tempdir().expect("a directory");
    let path = tmp.path().join("store");
    Store::init(&path).expect("a new store");
    let store = Store::open(&path).expect("it opens");
    let background = store.start_background().expect("a thread");
    let first = Driver::new(&store, "main");
    let stop = AtomicBool::new(false);
    let (mut slowest, mut checkpoints) = (Duration::ZERO, 0u32);
    let files = std::thread::scope(|s| {
        let workers: Vec<_> = (0..4)
            .map(|n| {
                let (d, store, stop) = (first.beside(), &store, &stop);
                s.spawn(move || worker(d, store, n, stop))
            })
            .collect();
        s.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                store.gc().expect("a collection");
                store.commit().expect("a commit");
                store.want_gc();
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(SECONDS)
            && !workers.iter().any(|w| w.is_finished())
        {
            checkpoints += 1;
            let name = format!("c{checkpoints}");
            let before = Instant::now();
            checkpoint(&store, &name);
            slowest = slowest.max(before.elapsed());
            if checkpoints > 20 {
                let old = format!("c{}", checkpoints - 20);
                store
                    .change(
                        |c| {
                            let id = c.checkpoint_named(&old).expect("there").id;
                            Ok((CatalogOp::Delete { id }, ()))
                        },
                        |(), _| (),
                    )
                    .expect("a deletion");
            }
            if checkpoints % 8 == 0 {
                let root = store.pin_head("main").expect("a head");
                let a = dump(&store, root);
                assert!(dump(&store, root) == a, "a pinned tree changed");
                store.unpin_root(root);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        stop.store(true, Ordering::Relaxed);
        workers
            .into_iter()
            .map(|w| w.join().expect("a worker"))
            .collect::<Vec<_>>()
    });
    eprintln!("{checkpoints} checkpoints, the slowest took {slowest:?}");
    store.stop_background();
    background.join().expect("the background thread");
    drop(first);
    // No commit: what was synced must be in the log.
    let root = head_root(&store, "main");
    let want = dump(&store, root);
    for (n, files) in (0..).zip(&files) {
        assert!(shown(&want, n) == *files, "directory {n} before closing");
    }
    // A collection may still hold the store for a moment.
    let weak = Arc::downgrade(&store);
    drop(store);
    for _ in 0..500 {
        if weak.strong_count() == 0 {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let store = Store::open(&path).expect("it opens again");
    check(&store);
    let got = dump(&store, head_root(&store, "main"));
    assert!(got == want, "the head after opening again");
    store.gc().expect("a collection");
    check(&store);
    assert!(dump(&store, head_root(&store, "main")) == want);
}

/// A checkpoint costs the same however many there are and however much a commit beside it has to write.
#[test]
fn checkpoints_stay_cheap() {
    let store = cowfs_tests::simdisk::store();
    let mut n = 0;
    let mut checkpoint = || {
        n += 1;
        let before = Instant::now();
        store
            .change(
                |c| {
                    let name = format!("c{n}");
                    assert!(!c.is_taken(&name));
                    let op = CatalogOp::Checkpoint {
                        head: "main".into(),
                        id: c.next_checkpoint,
                        name,
                        tags: BTreeMap::new(),
                        created_us: 0,
                    };
                    Ok((op, ()))
                },
                |(), _| (),
            )
            .expect("a checkpoint");
        before.elapsed()
    };
    for _ in 0..20_000 {
        checkpoint();
    }
    let mut txn = store.begin("main").expect("a batch");
    for ino in 100..60_000u64 {
        use cowfs::fs::{Kv, key};
        txn.put(&key::inode(ino), &[1; 500]).expect("room");
    }
    txn.commit();
    let mut took = std::thread::scope(|s| {
        let commit = s.spawn(|| store.commit().expect("a commit"));
        let mut took = Vec::new();
        while !commit.is_finished() || took.len() < 100 {
            took.push(checkpoint());
            std::thread::sleep(Duration::from_micros(200));
        }
        took
    });
    took.sort_unstable();
    let (median, worst) = (took[took.len() / 2], took[took.len() - 1]);
    eprintln!(
        "{} checkpoints during a commit: median {median:?}, slowest {worst:?}",
        took.len()
    );
    assert!(median < Duration::from_millis(1), "{median:?}");
}

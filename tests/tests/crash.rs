//! Power cuts at random points: what comes back is a prefix of what happened, no shorter than the last sync, every
//! checkpoint that was waited for is intact, and the store is clean. `COWFS_CRASH_POINTS` sets how many.
//! The same with a disk that fails now and then or is full for a while, and work that goes on all the same.

use std::collections::BTreeMap;
use std::sync::Arc;

use cowfs::fuse::Op as Fuse;
use cowfs::mount::Undo;
use cowfs::store::packs::PackOptions;
use cowfs::store::{CatalogOp, Store};
use cowfs_tests::Rng;
use cowfs_tests::driver::Driver;
use cowfs_tests::dump::{Dump, check, check_data, dump, head_root};
use cowfs_tests::simdisk::SimDisk;

struct Run {
    disk: SimDisk,
    rng: Rng,
    /// What the head showed after each operation since the last one known to be durable.
    history: Vec<Dump>,
    /// Checkpoints that may be there, with what they show; true if they must be.
    checkpoints: BTreeMap<String, (Dump, bool)>,
    names: u32,
    /// The disk fails now and then, and is full now and then.
    faults: bool,
}

fn paths(d: &Dump) -> Vec<String> {
    d.keys().filter(|k| !k.is_empty()).cloned().collect()
}

fn split(path: &str) -> Vec<String> {
    path.split('/')
        .filter(|s| !s.is_empty())
        .map(str::to_owned)
        .collect()
}

impl Run {
    /// One operation that changes the head; false if the disk gave up.
    fn change(&mut self, d: &mut Driver, now: &Dump) -> bool {
        let all = paths(now);
        let some = |rng: &mut Rng| all.get(rng.below(all.len() as u64) as usize).cloned();
        let kind = self.rng.below(10);
        self.names += 1;
        let fresh = format!("f{}", self.names);
        let done = match kind {
            0 | 1 => d.create(1, &fresh).map(drop),
            2 => {
                let op = Fuse::Mkdir {
                    name: fresh.as_bytes(),
                    mode: 0o755,
                    umask: 0,
                };
                d.make(1, op).map(drop)
            }
            3 => match some(&mut self.rng) {
                Some(p) => match d.walk(&split(&p)) {
                    Ok(_) => {
                        let parts = split(&p);
                        let (last, up) = parts.split_last().expect("a name");
                        d.walk(up).and_then(|up| {
                            d.ask(
                                up,
                                Fuse::Unlink {
                                    name: last.as_bytes(),
                                },
                            )
                            .map(drop)
                        })
                    }
                    Err(e) => Err(e),
                },
                None => Ok(()),
            },
            4 => match some(&mut self.rng) {
                Some(p) => {
                    let parts = split(&p);
                    let (last, up) = parts.split_last().expect("a name");
                    d.walk(up).and_then(|up| {
                        let op = Fuse::Rename {
                            name: last.as_bytes(),
                            new_parent: 1,
                            new_name: fresh.as_bytes(),
                            flags: 0,
                        };
                        d.ask(up, op).map(drop)
                    })
                }
                None => Ok(()),
            },
            _ => match some(&mut self.rng) {
                Some(p) => d.walk(&split(&p)).and_then(|n| {
                    let len = [10, 500, 4096, 9000, 70_000][self.rng.below(5) as usize];
                    let off = [0, 0, 100, 4096, 5000][self.rng.below(5) as usize];
                    let byte = self.rng.draw() as u8;
                    d.write(n, off, &vec![byte; len])
                }),
                None => Ok(()),
            },
        };
        !matches!(done, Err(libc::EIO | libc::ENOSPC))
    }

    /// Works until the power goes (or for a while), then checks what is left.
    fn round(&mut self) {
        let store =
            Store::open_on(Arc::new(self.disk.clone()), None).expect("it opens after a power cut");
        check(&store);
        check_data(&store);
        let root = head_root(&store, "main");
        let now = dump(&store, root);
        let catalog = store.catalog().expect("a catalog");
        for (name, (want, must)) in &self.checkpoints {
            match catalog.checkpoint_named(name) {
                Some(c) => assert!(
                    dump(&store, c.root) == *want,
                    "checkpoint {name} is not what it was"
                ),
                None => assert!(!must, "checkpoint {name} is gone"),
            }
        }
        assert!(
            self.history.contains(&now),
            "the head is none of the {} states since the last sync: {:?}\nlast: {:?}",
            self.history.len(),
            paths(&now),
            self.history.last().map(paths)
        );
        self.checkpoints
            .retain(|n, _| catalog.checkpoint_named(n).is_some());
        for c in self.checkpoints.values_mut() {
            c.1 = true;
        }
        // Reopening has committed what was replayed, or found nothing to replay: it is durable.
        self.history = vec![now.clone()];
        if self.faults {
            self.disk.set_capacity(None);
            if self.rng.below(2) == 0 {
                let room = self.rng.below(600);
                self.disk.set_capacity(Some(self.disk.used_blocks() + room));
            }
            let one_in = 3 + self.rng.below(60);
            let seed = self.rng.draw();
            self.disk
                .fail_one_in((self.rng.below(4) > 0).then_some(one_in), seed);
            if self.rng.below(2) == 0 {
                self.disk.cut_after(self.rng.below(200));
            }
        } else {
            self.disk.cut_after(self.rng.below(60));
        }
        self.work(&store, now);
        drop(store);
        self.disk.crash(&mut self.rng);
    }

    fn work(&mut self, store: &Arc<Store>, mut now: Dump) {
        let Some(mut d) = Driver::try_new(store, "main") else {
            return;
        };
        for _ in 0..self.rng.below(60) {
            if self.faults && self.rng.below(30) == 0 {
                self.disk.set_capacity(None);
            }
            let ok = match self.rng.below(24) {
                0 | 1 => match store.sync() {
                    Ok(()) => {
                        self.history = vec![now.clone()];
                        for c in self.checkpoints.values_mut() {
                            c.1 = true;
                        }
                        true
                    }
                    Err(_) => false,
                },
                2 => match store.commit() {
                    Ok(()) => {
                        self.history = vec![now.clone()];
                        for c in self.checkpoints.values_mut() {
                            c.1 = true;
                        }
                        true
                    }
                    Err(_) => false,
                },
                3 if self.rng.below(2) == 0 => store.gc().is_ok(),
                3 => {
                    let checkpoints: Vec<u64> = match store.catalog() {
                        Ok(c) if self.rng.below(2) == 0 => {
                            c.checkpoints.values().map(|c| c.id).collect()
                        }
                        _ => Vec::new(),
                    };
                    let level = 1;
                    let whole = !checkpoints.is_empty();
                    let options = PackOptions {
                        checkpoints,
                        whole,
                        level,
                    };
                    store.pack(&options).is_ok()
                }
                4 => {
                    self.names += 1;
                    let name = format!("c{}", self.names);
                    let label = name.clone();
                    let done = store.change(
                        |c| {
                            let op = CatalogOp::Checkpoint {
                                head: "main".into(),
                                id: c.next_checkpoint,
                                name: label,
                                tags: BTreeMap::new(),
                                created_us: 0,
                            };
                            Ok((op, ()))
                        },
                        |(), _| (),
                    );
                    if done.is_ok() {
                        self.checkpoints.insert(name, (now.clone(), false));
                    }
                    done.is_ok()
                }
                5 => {
                    let all: Vec<String> = self.checkpoints.keys().cloned().collect();
                    if all.is_empty() {
                        continue;
                    }
                    let name = &all[self.rng.below(all.len() as u64) as usize];
                    let id = store
                        .catalog()
                        .ok()
                        .and_then(|c| c.checkpoint_named(name).map(|k| k.id));
                    let Some(id) = id else { continue };
                    let done = d.fs.rollback(id, &Undo::Discard, std::time::Instant::now());
                    if done.is_ok() {
                        now = self.checkpoints[name].0.clone();
                        self.history.push(now.clone());
                    }
                    done.is_ok()
                }
                _ => {
                    let ok = self.change(&mut d, &now);
                    // Even one that failed may have done a part that counts (a write in two steps).
                    d.forget_all(&[]);
                    if store.catalog().is_ok() {
                        let root = head_root(store, "main");
                        if let Ok(seen) =
                            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                                dump(store, root)
                            }))
                        {
                            now = seen;
                            self.history.push(now.clone());
                        }
                    }
                    ok
                }
            };
            if !ok && (!self.faults || store.catalog().is_err()) {
                return;
            }
        }
    }
}

fn points() -> u64 {
    std::env::var("COWFS_CRASH_POINTS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(600)
}

#[test]
fn a_power_cut_leaves_a_prefix() {
    cut_power(false);
}

#[test]
fn a_failing_disk_leaves_a_prefix() {
    cut_power(true);
}

fn cut_power(faults: bool) {
    let all = points();
    let mut done = 0;
    let mut seed = std::env::var("COWFS_SEED")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(1u64);
    while done < all {
        let disk = SimDisk::default();
        Store::init_on(Arc::new(disk.clone())).expect("a new store");
        let mut run = Run {
            disk,
            rng: Rng(seed),
            history: vec![Dump::new()],
            checkpoints: BTreeMap::new(),
            names: 0,
            faults,
        };
        {
            let store = run.disk.open_store();
            run.history = vec![dump(&store, head_root(&store, "main"))];
        }
        eprintln!("seed {seed}");
        for _ in 0..25.min(all - done) {
            run.round();
            done += 1;
        }
        seed += 1;
    }
    eprintln!("{done} power cuts");
}

/// Every bit of a small store flipped in turn (a sample of them): opening and checking give errors or a right store,
/// and never panic or hang.
#[test]
fn a_damaged_store_is_named_not_believed() {
    let disk = SimDisk::default();
    {
        let store = disk.store();
        let mut d = Driver::new(&store, "main");
        for i in 0..300 {
            let f = d.create(1, &format!("file {i}")).expect("room");
            d.write(f, 0, &vec![7; 3000]).expect("room");
        }
        store.commit().expect("a commit");
        d.create(1, "in the log").expect("room");
        store.flush_all().expect("a flush");
    }
    let mut rng = Rng(9);
    let files: Vec<_> = disk
        .files()
        .into_iter()
        .filter(|f| f.1 > 0 && !f.0.starts_with("data"))
        .collect();
    let mut refused = 0;
    for i in 0..400 {
        let copy = disk.copy();
        let (name, len) = &files[i % files.len()];
        let span = if name == "meta" { 80 << 10 } else { 8192 }.min(*len);
        copy.flip(name, rng.below(span), 1 << rng.below(8));
        if i % 7 == 0 {
            copy.truncate(name, rng.below(*len));
        }
        match Store::open_on(Arc::new(copy.clone()), None) {
            Ok(store) => {
                if store
                    .check(&mut |_, _| ())
                    .map_or(true, |r| !r.problems.is_empty())
                {
                    refused += 1;
                }
            }
            Err(e) => {
                assert!(e.to_string().len() > 10, "an error that says nothing: {e}");
                refused += 1;
            }
        }
    }
    assert!(refused > 20, "only {refused} of 400 damages were noticed");
}

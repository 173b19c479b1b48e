//! Damaged pages of trees, and their repair from another store or a store of objects, on a simulated disk. By the command
//! and on real mounts it is in `mend.rs`.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use cowfs::history::remote::Remote;
use cowfs::history::repair::{Elsewhere, Mended, repair};
use cowfs::history::{SendOptions, receive, send};
use cowfs::store::packs::PackOptions;
use cowfs::store::{CatalogOp, Store};
use cowfs::tree::PAGE_SIZE;
use cowfs_tests::Rng;
use cowfs_tests::driver::{Driver, checkpoint};
use cowfs_tests::dump::{Dump, check, check_data, dump};
use cowfs_tests::history::noise;
use cowfs_tests::pages::{PagesOf, of_sim, own, shared, trees};
use cowfs_tests::simdisk::{self, SimDisk};
use tempfile::TempDir;

/// When what only checkpoints hold is put into packs, and the rest gets sums.
#[derive(Clone, Copy, PartialEq)]
enum Packed {
    Never,
    /// Before it is sent, so that the others have it in the same chunks.
    Before,
    /// Afterwards: chunks differ where checkpoints share parts of extents.
    After,
}

/// A store with checkpoints, two heads and packed contents, and others that have its checkpoints.
struct World {
    disk: SimDisk,
    pages: PagesOf,
    /// What each head and checkpoint shows.
    want: BTreeMap<String, Dump>,
    twin: Arc<Store>,
    objects: TempDir,
}

fn options(checkpoint: u64, base: Option<u64>) -> SendOptions {
    SendOptions {
        checkpoint,
        base,
        resume: None,
        level: 1,
        have: Default::default(),
    }
}

fn pack(store: &Store) {
    let options = PackOptions {
        checkpoints: Vec::new(),
        whole: false,
        level: 1,
    };
    store.pack(&options).expect("it can be packed");
}

impl World {
    fn new(packed: Packed) -> Self {
        Self::with(packed, 0)
    }

    /// With so many empty files more.
    fn with(packed: Packed, empty: usize) -> Self {
        let disk = SimDisk::default();
        let store = disk.store();
        let mut rng = Rng(77);
        let mut d = Driver::new(&store, "main");
        let long = "a name that is long, so that a page has few of them";
        for i in 0..150 {
            let f = d.create(1, &format!("{long} {i}")).expect("room");
            let len = [0, 90, 4000, 9000, 30_000][i % 5] + rng.below(50) as usize;
            d.write(f, 0, &noise(&mut rng, len)).expect("room");
        }
        for i in 0..empty {
            d.create(1, &format!("{long}, empty, {i}")).expect("room");
            d.forget_all(&[]);
        }
        let f = d.create(1, "large").expect("room");
        d.write(f, 0, &noise(&mut rng, 700_000)).expect("room");
        d.write(f, 2_000_000, &noise(&mut rng, 70_000))
            .expect("room");
        for n in 1..=4 {
            checkpoint(&store, &format!("c{n}"));
            for _ in 0..3 {
                let i = rng.below(150);
                let f = d.walk(&[format!("{long} {i}")]).expect("there");
                d.write(f, 100, &noise(&mut rng, 3000)).expect("room");
                let f = d
                    .create(1, &format!("new {n} {}", rng.draw()))
                    .expect("room");
                d.write(f, 0, &noise(&mut rng, 2000)).expect("room");
            }
        }
        d.forget_all(&[]);
        drop(d);
        let clone = CatalogOp::Clone {
            from: 2,
            id: 2,
            name: "work".into(),
            created_us: 0,
        };
        store.change(|_| Ok((clone, ())), |(), _| ()).expect("room");
        if packed == Packed::Before {
            pack(&store);
        }
        let twin = simdisk::store();
        let objects = TempDir::new().expect("room");
        let url = format!("file://{}", objects.path().display());
        for n in 1..=4 {
            let mut stream = Vec::new();
            send(&store, options(n, None), &mut stream).expect("it is sent");
            receive(&twin, &stream[..], None).expect("it is received");
            let mut stream = Vec::new();
            // The second and the fourth as differences.
            let base = (n % 2 == 0).then_some(n - 1);
            send(&store, options(n, base), &mut stream).expect("it is sent");
            let spool = tempfile::tempfile().expect("room");
            let to = Remote::open(&url).expect("a directory");
            to.upload(&stream[..], spool).expect("room");
        }
        if packed != Packed::Never {
            pack(&store);
            store.gc().expect("a collection");
        }
        store.commit().expect("room");
        let want = trees(&store)
            .into_iter()
            .map(|(n, root)| (n, dump(&store, root)))
            .collect();
        let pages = of_sim(&store, &disk);
        drop(store);
        Self {
            disk,
            pages,
            want,
            twin,
            objects,
        }
    }

    fn twin(&self) -> Elsewhere {
        Elsewhere::Store(Arc::clone(&self.twin))
    }

    fn objects(&self) -> Elsewhere {
        let url = format!("file://{}", self.objects.path().display());
        Elsewhere::Objects(Box::new(Remote::open(&url).expect("a directory")))
    }

    fn damaged(&self, pages: &[u64], rng: &mut Rng) -> SimDisk {
        let disk = self.disk.copy();
        for id in pages {
            let at = id * PAGE_SIZE as u64 + rng.below(PAGE_SIZE as u64);
            assert!(disk.flip("meta", at, 1 << rng.below(8)));
        }
        disk
    }

    /// Heads and checkpoints that are what they were, all others being named as damaged.
    fn whole(&self, store: &Arc<Store>) -> BTreeSet<String> {
        let report = store.check(&mut |_, _| ()).expect("it works");
        let mut named: Vec<String> = report.problems.clone();
        if !report.no_index {
            let data = store.check_data(&mut |_, _| ()).expect("an index");
            named.extend(data.damage.iter().map(ToString::to_string));
        }
        let mut whole = BTreeSet::new();
        for (name, root) in trees(store) {
            let of_it = format!("{name}: ");
            if report.no_index || named.iter().any(|p| p.starts_with(&of_it)) {
                continue;
            }
            assert!(dump(store, root) == self.want[&name], "{name} changed");
            whole.insert(name);
        }
        whole
    }
}

fn mend(store: &Store, from: Option<&Elsewhere>, kept: &mut usize) -> Mended {
    let mut keep = |name: &str, bytes: &[u8]| {
        assert!(
            name.starts_with("meta@") && bytes.len() == PAGE_SIZE,
            "{name}"
        );
        *kept += 1;
        Ok(())
    };
    repair(store, from, &mut keep).expect("the disk works")
}

/// All are what they were, also after a collection and opening again; another repair finds nothing to do.
fn all_whole(w: &World, disk: &SimDisk, store: Arc<Store>, from: &Elsewhere) {
    check(&store);
    check_data(&store);
    assert_eq!(w.whole(&store).len(), w.want.len());
    let mut kept = 0;
    let again = mend(&store, Some(from), &mut kept);
    assert_eq!((again.pages, again.index, kept), (0, false, 0));
    assert!(again.refused.is_empty(), "{:?}", again.refused);
    store.gc().expect("a collection");
    pack(&store);
    store.gc().expect("a collection");
    store.commit().expect("room");
    drop(store);
    let store = disk.open_store();
    check(&store);
    check_data(&store);
    assert_eq!(w.whole(&store).len(), w.want.len());
    // Heads go on from what was repaired, and checkpoints stay what they are.
    let mut d = Driver::new(&store, "main");
    for i in 0..60 {
        let f = d.create(1, &format!("later {i}")).expect("room");
        d.write(f, 0, &[i as u8; 5000]).expect("room");
    }
    let large = d.walk(&["large".into()]).expect("there");
    d.write(large, 300_000, &[9; 9000]).expect("room");
    d.forget_all(&[]);
    drop(d);
    store.commit().expect("room");
    store.gc().expect("a collection");
    check(&store);
    for (name, root) in trees(&store) {
        if name != "head main" {
            assert!(dump(&store, root) == w.want[&name], "{name} changed");
        }
    }
}

#[test]
fn pages_come_back_from_a_store_and_from_objects() {
    for packed in [Packed::Never, Packed::Before, Packed::After] {
        let w = World::new(packed);
        let mut rng = Rng(5);
        let everywhere = ["checkpoint c1", "checkpoint c4", "head main", "head work"];
        let cases = [
            own(&w.pages, "checkpoint c1"),
            own(&w.pages, "checkpoint c3"),
            shared(&w.pages, &everywhere),
            shared(&w.pages, &["checkpoint c2", "head work"]),
            w.pages["checkpoint c1"].clone(),
            w.pages["checkpoint c2"].clone(),
        ];
        for (n, case) in cases.iter().enumerate() {
            assert!(!case.is_empty(), "{n}");
            let leaves: Vec<u64> = case.iter().filter(|p| p.1).map(|p| p.0).collect();
            let inner: Vec<u64> = case.iter().filter(|p| !p.1).map(|p| p.0).collect();
            let one = leaves[rng.below(leaves.len() as u64) as usize];
            let all: Vec<u64> = case.iter().map(|p| p.0).collect();
            for pages in [vec![one], leaves, inner, all] {
                if pages.is_empty() {
                    continue;
                }
                for from in [w.twin(), w.objects()] {
                    let disk = w.damaged(&pages, &mut rng);
                    let store = disk.open_store();
                    let before = w.whole(&store);
                    assert!(before.len() < w.want.len(), "{n}: nothing is damaged");
                    let mut kept = 0;
                    let alone = mend(&store, None, &mut kept);
                    assert_eq!((alone.pages, kept), (0, 0), "{n}");
                    assert_eq!(w.whole(&store), before, "{n}");
                    assert!(alone.refused[0].contains("--from"), "{:?}", alone.refused);
                    let done = mend(&store, Some(&from), &mut kept);
                    assert!(done.refused.is_empty(), "{n}: {:?}", done.refused);
                    assert_eq!(done.pages as usize, kept, "{n}");
                    assert!(kept > 0 && kept <= pages.len(), "{n}: {kept}");
                    all_whole(&w, &disk, store, &from);
                }
            }
        }
    }
}

/// A tree of three levels: what is below an inner page comes back as well.
#[test]
fn inner_pages_come_back_with_all_below_them() {
    let w = World::with(Packed::Before, 6000);
    let mut rng = Rng(12);
    let inner: Vec<u64> = w.pages["checkpoint c2"]
        .iter()
        .filter(|p| !p.1)
        .map(|p| p.0)
        .collect();
    assert!(inner.len() > 4, "{} inner pages", inner.len());
    let middle = inner[1 + rng.below(inner.len() as u64 - 1) as usize];
    for pages in [vec![middle], vec![inner[0]], inner.clone()] {
        for from in [w.twin(), w.objects()] {
            let disk = w.damaged(&pages, &mut rng);
            let store = disk.open_store();
            let mut kept = 0;
            let done = mend(&store, Some(&from), &mut kept);
            assert!(done.refused.is_empty(), "{:?}", done.refused);
            assert!(kept > 0);
            all_whole(&w, &disk, store, &from);
        }
    }
}

#[test]
fn the_index_is_made_anew() {
    let w = World::new(Packed::After);
    let index = w.pages["hidden @packs"].clone();
    assert!(index.len() > 3, "{index:?}");
    let mut rng = Rng(6);
    let mut cases: Vec<Vec<u64>> = index.iter().map(|p| vec![p.0]).collect();
    cases.push(index.iter().filter(|p| p.1).map(|p| p.0).collect());
    let mut lost = 0;
    for pages in &cases {
        for from in [w.twin(), w.objects()] {
            let disk = w.damaged(pages, &mut rng);
            let store = disk.open_store();
            let report = store.check(&mut |_, _| ()).expect("it works");
            assert!(report.no_index && w.whole(&store).is_empty());
            // Alone: what heads hold is in segments, and what is in packs is known again or named as damaged.
            let mut kept = 0;
            let alone = mend(&store, None, &mut kept);
            assert!(alone.index && kept > 0);
            let report = store.check(&mut |_, _| ()).expect("it works");
            assert!(report.problems.is_empty(), "{:?}", report.problems);
            let whole = w.whole(&store);
            assert!(whole.contains("head main"), "{whole:?}");
            if whole.len() < w.want.len() {
                lost += 1;
                let mut nothing = 0;
                let done = mend(&store, Some(&from), &mut nothing);
                assert!(done.named_bytes > 0 && done.refused.is_empty(), "{done:?}");
            }
            all_whole(&w, &disk, store, &from);
        }
    }
    assert!(lost > 0, "no page had the name of anything");
}

/// Contents that are here do not come again: the objects have lost all of theirs. (A part of a chunk, of which a later
/// checkpoint has the rest at another place, has no name by which it could be found. So it is the first one.)
#[test]
fn contents_that_are_here_do_not_come_again() {
    let w = World::new(Packed::Before);
    std::fs::remove_dir_all(w.objects.path().join("cowfs-1/frames")).expect("there");
    let mut rng = Rng(10);
    let pages: Vec<u64> = w.pages["checkpoint c1"].iter().map(|p| p.0).collect();
    let disk = w.damaged(&pages, &mut rng);
    let store = disk.open_store();
    let done = mend(&store, Some(&w.objects()), &mut 0);
    assert!(done.refused.is_empty(), "{:?}", done.refused);
    all_whole(&w, &disk, store, &w.objects());
}

/// What only a head has nobody else can give: it is named, and left.
#[test]
fn what_only_a_head_has_is_named_and_left() {
    let w = World::new(Packed::After);
    let mut rng = Rng(7);
    let mine = own(&w.pages, "head main");
    let leaf = mine.iter().find(|p| p.1).expect("it was changed").0;
    let disk = w.damaged(&[leaf], &mut rng);
    let store = disk.open_store();
    let before = w.whole(&store);
    assert_eq!(before.len(), w.want.len() - 1);
    let report = store.check(&mut |_, _| ()).expect("it works");
    let says = report.problems.join("\n");
    assert!(says.contains("head main: page"), "{says}");
    assert!(
        says.contains(&format!("page {leaf} ")) && says.contains('/'),
        "{says}"
    );
    let mut kept = 0;
    let done = mend(&store, Some(&w.twin()), &mut kept);
    assert_eq!((done.pages, kept), (0, 0));
    assert!(
        done.refused[0].contains("in no checkpoint"),
        "{:?}",
        done.refused
    );
    assert_eq!(w.whole(&store), before);
}

/// What came of a stream that was cut off is no use when its tree is damaged: it goes, and is received anew.
#[test]
fn a_receive_that_is_damaged_is_given_up() {
    let w = World::new(Packed::Never);
    let mut stream = Vec::new();
    send(&w.twin, options(1, None), &mut stream).expect("it is sent");
    let disk = SimDisk::default();
    let store = disk.store();
    receive(&store, &stream[..stream.len() - 9], None).expect_err("cut off");
    store.commit().expect("room");
    let pages = of_sim(&store, &disk);
    let (name, list) = pages
        .iter()
        .find(|p| p.0.contains("@receive"))
        .expect("kept");
    drop(store);
    assert!(disk.flip("meta", list[0].0 * PAGE_SIZE as u64 + 77, 4));
    let store = disk.open_store();
    let report = store.check(&mut |_, _| ()).expect("it works");
    let says = report.problems.join("\n");
    assert!(says.contains("@receive"), "{name}: {says}");
    let mut kept = 0;
    let done = mend(&store, None, &mut kept);
    assert!(kept == 1 && done.refused.is_empty(), "{done:?}");
    check(&store);
    receive(&store, &stream[..], None).expect("whole");
    assert!(dump(&store, trees(&store)[1].1) == w.want["checkpoint c1"]);
    check(&store);
    check_data(&store);
}

/// A store that has other things under the same identity does not make anything worse.
#[test]
fn what_does_not_fit_is_refused() {
    let w = World::new(Packed::After);
    let mut rng = Rng(8);
    let pages: Vec<u64> = own(&w.pages, "checkpoint c1").iter().map(|p| p.0).collect();
    let disk = w.damaged(&pages, &mut rng);
    let store = disk.open_store();
    let before = w.whole(&store);
    // Another store has nothing of this name; a store whose own checkpoint is damaged cannot send it.
    let none = Elsewhere::Store(simdisk::store());
    let mut kept = 0;
    let done = mend(&store, Some(&none), &mut kept);
    assert!(
        done.refused[0].contains("it is not there"),
        "{:?}",
        done.refused
    );
    let bad = Elsewhere::Store(w.damaged(&pages, &mut rng).open_store());
    let done = mend(&store, Some(&bad), &mut kept);
    assert!(
        done.refused[0].contains("checkpoint c1"),
        "{:?}",
        done.refused
    );
    assert_eq!((done.pages, kept), (0, 0));
    assert_eq!(w.whole(&store), before);
    let catalog = store.catalog().expect("it works");
    let hidden: Vec<_> = catalog.hidden.keys().collect();
    assert_eq!(hidden, ["@packs"]);
}

#[test]
fn random_damage_is_repaired_or_named() {
    let w = World::new(Packed::After);
    let all: BTreeSet<u64> = w.pages.values().flatten().map(|p| p.0).collect();
    let all: Vec<u64> = all.into_iter().collect();
    let mut whole = 0;
    let rounds = std::env::var("COWFS_REPAIR_ROUNDS").ok();
    let rounds: u64 = rounds.map_or(100, |n| n.parse().expect("a number"));
    for seed in 1..=rounds {
        println!("seed {seed}");
        let mut rng = Rng(seed);
        let n = 1 + rng.below(1 + seed % 25);
        let pages: BTreeSet<u64> = (0..n)
            .map(|_| all[rng.below(all.len() as u64) as usize])
            .collect();
        let pages: Vec<u64> = pages.into_iter().collect();
        let disk = w.damaged(&pages, &mut rng);
        let from = match seed % 3 {
            0 => w.objects(),
            _ => w.twin(),
        };
        let store = disk.open_store();
        let before = w.whole(&store);
        mend(&store, Some(&from), &mut 0);
        let after = w.whole(&store);
        assert!(
            before.is_subset(&after),
            "seed {seed}: {before:?} {after:?}"
        );
        for name in w.want.keys().filter(|n| n.starts_with("checkpoint")) {
            assert!(after.contains(name), "seed {seed}: {name}");
        }
        whole += usize::from(after.len() == w.want.len());
        drop(store);
        let store = disk.open_store();
        assert_eq!(w.whole(&store), after, "seed {seed}");
        let again = mend(&store, Some(&from), &mut 0);
        assert_eq!((again.pages, again.index), (0, false), "seed {seed}");
    }
    assert!(whole > 0, "heads were damaged in every round");
}

/// The power goes at any operation of a repair: nothing that was whole is less so, and the next one comes to its end.
#[test]
fn a_power_cut_in_a_repair_makes_nothing_worse() {
    let w = World::new(Packed::After);
    let mut rng = Rng(9);
    let mut pages: Vec<u64> = Vec::new();
    for tree in ["checkpoint c1", "checkpoint c3", "hidden @packs"] {
        let list = own(&w.pages, tree);
        pages.push(list[rng.below(list.len() as u64) as usize].0);
    }
    let damaged = w.damaged(&pages, &mut rng);
    let before = w.whole(&damaged.copy().open_store());
    let (mut cut, mut n, mut cuts) = (true, 0, 0);
    while cut {
        let disk = damaged.copy();
        let store = disk.open_store();
        disk.cut_after(n);
        let mut keep = |_: &str, _: &[u8]| Ok(());
        cut = repair(&store, Some(&w.twin()), &mut keep).is_err();
        drop(store);
        disk.crash(&mut rng);
        let store = disk.open_store();
        let after = w.whole(&store);
        assert!(before.is_subset(&after), "{n}: {before:?} {after:?}");
        let done = mend(&store, Some(&w.twin()), &mut 0);
        assert!(done.refused.is_empty(), "{n}: {:?}", done.refused);
        check(&store);
        check_data(&store);
        assert_eq!(w.whole(&store).len(), w.want.len(), "{n}");
        n += 1;
        cuts += 1;
    }
    println!("{cuts} cuts in {n} operations");
    assert!(cuts > 20, "{cuts} cuts");
}

//! Damaged pages of trees, found and repaired by the command; what is in them is compared on real mounts.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use cowfs::tree::PAGE_SIZE;
use cowfs_tests::Rng;
use cowfs_tests::history::{at, clean, cowfs, fill, noise, ok, other, shown, text, tree};
use cowfs_tests::live::{Live, binary};
use cowfs_tests::pages::{PagesOf, of_dir, own, shared};

const NAMES: [&str; 3] = ["one", "two", "three"];

/// A store with three checkpoints that share most of what they have, and others that have them.
struct World {
    live: Live,
    store: String,
    /// What the checkpoints and the head show.
    want: Vec<String>,
    head: String,
    list: String,
    twin: String,
    url: String,
    pages: PagesOf,
}

impl World {
    fn new() -> Self {
        let l = Live::new();
        let m = l.mnt();
        let mut rng = Rng(31);
        fill(&l.at(""), 3);
        fs::create_dir(l.at("many")).expect("room");
        for i in 0..200 {
            let name = format!("many/a file with a name that is long enough for few in a page {i}");
            fs::write(l.at(&name), noise(&mut rng, 500)).expect("room");
        }
        // So that access times are what they will be, and no page changes for them.
        tree(&l.at(""));
        l.run(&["unmount", &m]);
        l.mount(&[]);
        let twin = other(&l, "t").display().to_string();
        let url = format!("file://{}", l.beside("bucket").display());
        let (mut want, mut before): (Vec<String>, Option<&str>) = (Vec::new(), None);
        for name in NAMES {
            want.push(tree(&l.at("")));
            l.run(&["checkpoint", &m, name, "--tag", &format!("is={name}")]);
            let file = l.beside("files").join(name).display().to_string();
            l.run(&["send", &m, name, "--to", &file]);
            ok(&["receive", &twin, "--from", &file]);
            let mut send = vec!["send", m.as_str(), name, "--to", url.as_str()];
            send.extend(before.into_iter().flat_map(|b| ["--from", b]));
            l.run(&send);
            before = Some(name);
            fs::write(l.at(&format!("d/{name}")), noise(&mut rng, 50_000)).expect("room");
            fs::remove_file(l.at(&format!("d/f{}", want.len()))).expect("there");
            let large = fs::File::options().write(true).open(l.at("large"));
            let large = large.expect("there");
            let piece = noise(&mut rng, 5000);
            large
                .write_all_at(&piece, 1_000_000 * want.len() as u64 - 77)
                .expect("room");
        }
        fs::remove_file(l.at("program")).expect("there");
        l.run(&["pin", &m, "two"]);
        l.run(&["clone", &m, "two", "work"]);
        l.run(&["pack", &m]);
        l.run(&["gc", &m]);
        let head = tree(&l.at(""));
        l.run(&["unmount", &m]);
        let store = l.store().display().to_string();
        let pages = of_dir(&l.store());
        let list = ok(&["list", &store, "--json"]);
        Self {
            live: l,
            store,
            want,
            head,
            list,
            twin,
            url,
            pages,
        }
    }

    fn damage(&self, pages: &[u64], rng: &mut Rng) {
        let meta = self.live.store().join("meta");
        let meta = fs::File::options().read(true).write(true).open(meta);
        let meta = meta.expect("there");
        for id in pages {
            let at = id * PAGE_SIZE as u64 + rng.below(PAGE_SIZE as u64);
            let mut byte = [0];
            meta.read_exact_at(&mut byte, at).expect("there");
            byte[0] ^= 1 << rng.below(8);
            meta.write_all_at(&byte, at).expect("ours");
        }
    }

    fn kept(&self) -> usize {
        let dir = self.live.store().join("repair");
        fs::read_dir(dir).map_or(0, Iterator::count)
    }

    /// Everything is what it was, and a second repair finds nothing to do.
    fn is_whole(&self, from: &str, what: &str) {
        clean(Path::new(&self.store));
        let kept = self.kept();
        let s = &self.store;
        let again = ok(&["check", "--data", "--repair", "--from", from, s, "--json"]);
        let again: serde_json::Value = serde_json::from_str(&again).expect("JSON");
        assert_eq!(again["clean"], true, "{what}: {again}");
        assert!(again["trees_repair"].is_null(), "{what}: {again}");
        assert!(again["contents"]["repair"].is_null(), "{what}: {again}");
        assert_eq!(self.kept(), kept, "{what}");
        for (name, want) in NAMES.iter().zip(&self.want) {
            let now = shown(&self.live, Path::new(s), name);
            assert!(now == *want, "{what}: {name}");
        }
        // Names, numbers, tags and pins as well.
        assert_eq!(ok(&["list", s, "--json"]), self.list, "{what}");
        self.live.mount(&[]);
        assert!(tree(&self.live.at("")) == self.head, "{what}: the head");
        self.live.run(&["unmount", &self.live.mnt()]);
    }
}

fn ids(pages: &[(u64, bool)], leaves: bool) -> Vec<u64> {
    let kind = pages.iter().filter(|p| p.1 == leaves);
    kind.map(|p| p.0).collect()
}

#[test]
fn trees_are_repaired_by_the_command() {
    let mut w = World::new();
    let mut rng = Rng(32);
    for from in [w.twin.clone(), w.url.clone()] {
        for case in 0..5 {
            // What was repaired may be elsewhere now.
            w.pages = of_dir(Path::new(&w.store));
            let p = &w.pages;
            let mut pages = match case {
                0 => ids(&own(p, "checkpoint one"), true),
                1 => ids(&shared(p, &["checkpoint two", "checkpoint three"]), true),
                2 => ids(&p["hidden @packs"], true),
                // With the live head's: what it shares with a checkpoint.
                3 => ids(&shared(p, &["checkpoint three", "head main"]), true),
                // The root: below it nothing is shared with others any more.
                _ => ids(&own(p, "checkpoint one"), false),
            };
            let some = rng.below(pages.len() as u64) as usize;
            pages.swap(0, some);
            pages.truncate(if case == 2 { 1 } else { 3 });
            let what = format!("{from}, case {case}, pages {pages:?}");
            println!("{what}");
            w.damage(&pages, &mut rng);
            let s = w.store.as_str();
            let found = cowfs(&["check", s]);
            let says = text(&found);
            assert_eq!(found.status.code(), Some(1), "{what}: {says}");
            let one = "checkpoint one: page";
            let named = [
                one,
                "checkpoint three: page",
                "@packs",
                "head main: page",
                one,
            ];
            assert!(says.contains(named[case]), "{what}: {says}");
            assert!(says.contains("--repair --from"), "{what}: {says}");
            let kept = w.kept();
            let alone = cowfs(&["check", "--repair", s]);
            assert!(text(&alone).contains("--from"), "{what}: {}", text(&alone));
            if case != 2 {
                assert_eq!(alone.status.code(), Some(1), "{what}");
                assert_eq!(w.kept(), kept, "{what}");
            }
            ok(&["check", "--repair", "--from", &from, s]);
            assert!(w.kept() > kept, "{what}");
            w.is_whole(&from, &what);
        }
    }
    // And life goes on.
    w.live.mount(&[]);
    let m = w.live.mnt();
    w.live.run(&["gc", &m]);
    w.live.run(&["rollback", &m, "one"]);
    assert!(tree(&w.live.at("")) == w.want[0]);
    fs::remove_file(w.live.at("large")).expect("there");
    fs::write(w.live.at("d/later"), noise(&mut rng, 2 << 20)).expect("room");
    w.live.run(&["checkpoint", &m, "four"]);
    w.live.run(&["pack", &m]);
    w.live.run(&["gc", &m]);
    for (name, want) in NAMES.iter().zip(&w.want) {
        at(&w.live, name, |dir| assert!(tree(dir) == *want, "{name}"));
    }
    w.live.run(&["unmount", &m]);
    clean(Path::new(&w.store));
}

/// What only the head has cannot be had again: it is named by its path, what is left of it can be read, and a rollback goes on
/// from what is whole.
#[test]
fn what_a_head_has_lost_is_named_and_it_can_be_rolled_back() {
    let w = World::new();
    let mut rng = Rng(33);
    let mine = own(&w.pages, "head main");
    // The one with the youngest inodes; what names them is in others.
    let leaves = ids(&mine, true);
    w.damage(&leaves[leaves.len() - 1..], &mut rng);
    let s = w.store.as_str();
    let found = cowfs(&["check", "--repair", "--from", &w.twin, s]);
    assert_eq!(found.status.code(), Some(1));
    let says = text(&found);
    assert!(
        says.contains("head main: page") && says.contains("in no checkpoint"),
        "{says}"
    );
    assert!(says.contains("/d/three"), "{says}");
    assert!(!says.contains("checkpoint three: page"), "{says}");
    for (name, want) in NAMES.iter().zip(&w.want) {
        assert!(shown(&w.live, Path::new(s), name) == *want, "{name}");
    }
    ok(&["rollback", s, "three", "--discard"]);
    clean(Path::new(s));
    w.live.mount(&[]);
    assert!(tree(&w.live.at("")) == w.want[2]);
    w.live.check();
}

/// The command dies at any step of a repair: the next one does what is left.
#[test]
fn a_repair_can_be_killed_at_any_step() {
    let w = World::new();
    let mut rng = Rng(34);
    let s = w.store.as_str();
    let faults = [
        "repair:index",
        "repair:got",
        "repair:made",
        "repair:page",
        "repair:page@2",
        "repair:done",
        "pack:synced",
        "pack:mapped",
        "commit:pages",
        "commit:superblock",
        "commit:superblock@2",
        "commit:written@2",
        "flush:chunk",
    ];
    for fault in faults {
        let p = of_dir(Path::new(s));
        let mut pages = ids(&own(&p, "checkpoint one"), true);
        pages.truncate(3);
        let index = ids(&p["hidden @packs"], true);
        pages.push(index[rng.below(index.len() as u64) as usize]);
        w.damage(&pages, &mut rng);
        let from = if rng.below(2) == 0 { &w.twin } else { &w.url };
        let what = format!("{fault}, from {from}, pages {pages:?}");
        println!("{what}");
        let out = Command::new(binary())
            .args(["check", "--data", "--repair", "--from", from, s])
            .env("COWFS_FAULT", fault)
            .output()
            .expect("it starts");
        assert!(text(&out).contains("aborting"), "{what}: {}", text(&out));
        // Checkpoints that were whole are.
        let left = text(&cowfs(&["check", s]));
        assert!(!left.contains("checkpoint three: "), "{what}: {left}");
        // A copy is there of whatever was replaced.
        ok(&["check", "--data", "--repair", "--from", from, s]);
        assert!(w.kept() > 0, "{what}");
        w.is_whole(from, &what);
    }
}

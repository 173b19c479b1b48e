//! Tests against `BTreeMap`, with a store that watches over generations.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::ControlFlow;
use std::sync::Arc;

use proptest::prelude::*;

use super::*;

type Model = BTreeMap<Vec<u8>, Vec<u8>>;

#[derive(Debug, PartialEq)]
enum Error {
    Tree(TreeError),
    Injected,
}

impl From<TreeError> for Error {
    fn from(e: TreeError) -> Error {
        Error::Tree(e)
    }
}

#[derive(Default)]
struct Mem {
    pages: HashMap<PageId, Arc<Page>>,
    /// Pages of the newest tree.
    live: HashSet<PageId>,
    /// Pages taken for writing in this operation.
    touched: HashSet<PageId>,
    /// Bytes of the pages of past generations.
    frozen: HashMap<PageId, Vec<u8>>,
    next: PageId,
    generation: u64,
    /// Whether `is_owned` tells.
    tells: bool,
    /// Calls that may still succeed.
    budget: Option<u32>,
    reads: usize,
}

impl Mem {
    fn new(tells: bool) -> Mem {
        Mem {
            tells,
            generation: 1,
            ..Mem::default()
        }
    }

    fn pay(&mut self) -> Result<(), Error> {
        match &mut self.budget {
            Some(0) => Err(Error::Injected),
            Some(n) => {
                *n -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }

    fn freeze(&mut self) {
        for (id, page) in &self.pages {
            if page.birth() == self.generation {
                self.frozen.insert(*id, page.as_bytes().to_vec());
            }
        }
        self.generation += 1;
    }

    fn check_frozen(&self) {
        for (id, bytes) in &self.frozen {
            assert_eq!(
                &self.pages[id].as_bytes()[..],
                &bytes[..],
                "frozen page changed"
            );
        }
    }

    fn put(&mut self, page: Page) -> PageId {
        self.next += 1;
        self.pages.insert(self.next, Arc::new(page));
        self.next
    }
}

impl Pages for Mem {
    type Error = Error;

    fn read(&mut self, id: PageId) -> Result<Arc<Page>, Error> {
        self.pay()?;
        self.reads += 1;
        let page = self.pages.get(&id).cloned();
        page.ok_or(Error::Tree(corrupt(id, "no such page")))
    }

    fn modify(&mut self, id: PageId) -> Result<(PageId, &mut Page), Error> {
        if !self.touched.contains(&id) {
            self.pay()?;
        }
        let Some(page) = self.pages.get(&id) else {
            return Err(Error::Tree(corrupt(id, "no such page")));
        };
        assert_eq!(Arc::strong_count(page), 1, "page is held while modified");
        let mut to = id;
        if page.birth() != self.generation {
            let mut copy = Page::clone(page);
            copy.set_birth(self.generation);
            self.release(id);
            to = self.put(copy);
            self.live.insert(to);
        }
        self.touched.insert(to);
        let page = self.pages.get_mut(&to).unwrap();
        Ok((to, Arc::get_mut(page).unwrap()))
    }

    fn alloc(&mut self) -> Result<(PageId, &mut Page), Error> {
        self.pay()?;
        let mut page = Page::empty_leaf();
        page.set_birth(self.generation);
        let id = self.put(page);
        self.live.insert(id);
        self.touched.insert(id);
        Ok((id, Arc::get_mut(self.pages.get_mut(&id).unwrap()).unwrap()))
    }

    fn release(&mut self, id: PageId) {
        assert!(self.live.remove(&id), "page {id} released twice");
        if !self.frozen.contains_key(&id) {
            self.pages.remove(&id);
        }
    }

    fn is_owned(&self, page: &Page) -> bool {
        self.tells && page.birth() == self.generation
    }
}

fn contents(mem: &mut Mem, root: PageId) -> Model {
    let mut all = Model::new();
    scan(mem, root, &[], None, &mut |k, v| {
        if let Some((last, _)) = all.last_key_value() {
            assert!(last.as_slice() < k);
        }
        all.insert(k.to_vec(), v.to_vec());
        ControlFlow::Continue(())
    })
    .unwrap();
    all
}

fn reachable(mem: &mut Mem, root: PageId) -> HashSet<PageId> {
    let mut ids = HashSet::new();
    mark(
        mem,
        root,
        &mut |id, _| {
            assert!(ids.insert(id));
            Visit::Descend
        },
        None,
    )
    .unwrap();
    ids
}

fn check_tree(mem: &mut Mem, root: PageId, model: &Model) -> Stats {
    let stats = verify(mem, root).unwrap();
    assert_eq!(stats.entries, model.len() as u64);
    let ids = reachable(mem, root);
    assert_eq!(stats.pages, ids.len() as u64);
    for id in ids {
        Page::from_bytes(Box::new(*mem.pages[&id].as_bytes())).unwrap();
    }
    assert!(contents(mem, root) == *model);
    stats
}

fn check_diff(mem: &mut Mem, a: PageId, b: PageId, x: &Model, y: &Model) {
    let mut got = Vec::new();
    diff(mem, a, b, &mut |k, v, w| {
        got.push((k.to_vec(), v.map(<[u8]>::to_vec), w.map(<[u8]>::to_vec)));
        ControlFlow::Continue(())
    })
    .unwrap();
    let keys: BTreeSet<_> = x.keys().chain(y.keys()).collect();
    let want: Vec<_> = keys
        .into_iter()
        .filter(|k| x.get(*k) != y.get(*k))
        .map(|k| (k.clone(), x.get(k).cloned(), y.get(k).cloned()))
        .collect();
    assert!(got == want);
}

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// Sizes of entries; `n` chooses the key.
fn make_key(shape: u8, n: u64) -> Vec<u8> {
    let mut rng = Rng(n);
    match shape {
        // Inode number, kind, offset.
        0 => [
            &(n / 50).to_be_bytes()[..],
            &[5],
            &(n % 50 * 4096).to_be_bytes(),
        ]
        .concat(),
        // Long, with a long common prefix.
        1 => {
            let mut key = vec![7; MAX_KEY - 2];
            key.extend((n as u16).to_be_bytes());
            key
        }
        // Any length, few byte values, zeros at ends.
        2 => {
            let len = match rng.below(3) {
                0 => rng.below(4),
                1 => rng.below(20),
                _ => rng.below(MAX_KEY as u64 + 1),
            };
            (0..len)
                .map(|_| [0, 0, 1, 255][rng.below(4) as usize])
                .collect()
        }
        // Random and long.
        3 => (0..MAX_KEY - rng.below(2) as usize)
            .map(|_| rng.next() as u8)
            .collect(),
        _ => n.to_be_bytes()[4..].to_vec(),
    }
}

fn make_value(shape: u8, n: u64) -> Vec<u8> {
    let mut rng = Rng(n ^ 77);
    let len = match shape % 4 {
        0 => rng.below(100),
        1 => MAX_VALUE as u64 - rng.below(2),
        2 => [0, 1, 500, 1024][rng.below(4) as usize],
        _ => rng.below(MAX_VALUE as u64 + 1),
    };
    vec![n as u8; len as usize]
}

struct World {
    mem: Mem,
    root: PageId,
    model: Model,
    old: Vec<(PageId, Model)>,
}

impl World {
    fn new(tells: bool) -> World {
        World {
            mem: Mem::new(tells),
            root: 0,
            model: Model::new(),
            old: Vec::new(),
        }
    }

    fn insert(&mut self, key: &[u8], value: &[u8]) {
        self.mem.touched.clear();
        let (root, old) = insert(&mut self.mem, self.root, key, value).unwrap();
        self.root = root;
        assert_eq!(old, self.model.insert(key.to_vec(), value.to_vec()));
    }

    fn remove(&mut self, key: &[u8]) {
        self.mem.touched.clear();
        let (root, old) = remove(&mut self.mem, self.root, key).unwrap();
        self.root = root;
        assert_eq!(old, self.model.remove(key));
    }

    fn snapshot(&mut self) {
        self.mem.freeze();
        self.old.push((self.root, self.model.clone()));
    }

    fn check(&mut self) -> Stats {
        let stats = check_tree(&mut self.mem, self.root, &self.model);
        assert_eq!(reachable(&mut self.mem, self.root), self.mem.live);
        stats
    }

    fn check_all(&mut self) {
        self.check();
        self.mem.check_frozen();
        for (root, model) in self.old.clone() {
            check_tree(&mut self.mem, root, &model);
            check_diff(&mut self.mem, root, self.root, &model, &self.model);
            check_diff(&mut self.mem, self.root, root, &self.model, &model);
        }
    }

    fn check_points(&mut self, shape: u8, n: u64) {
        let (key, other) = (make_key(shape, n), make_key(shape, n / 2));
        let got = get(&mut self.mem, self.root, &key, <[u8]>::to_vec).unwrap();
        assert_eq!(got.as_ref(), self.model.get(&key));
        let got = last_before(&mut self.mem, self.root, &other, &key).unwrap();
        let want = (other < key).then(|| self.model.range(other.clone()..key.clone()).next_back());
        let want = want.flatten().map(|(k, v)| (k.clone(), v.clone()));
        assert_eq!(got, want);
        let mut got = Model::new();
        let to = (!n.is_multiple_of(3)).then_some(key.as_slice());
        scan(&mut self.mem, self.root, &other, to, &mut |k, v| {
            got.insert(k.to_vec(), v.to_vec());
            ControlFlow::Continue(())
        })
        .unwrap();
        let above = self.model.range(other..);
        let want: Model = above
            .filter(|(k, _)| to.is_none_or(|to| k.as_slice() < to))
            .map(|(k, v)| (k.clone(), v.clone()))
            .collect();
        assert!(got == want);
    }

    /// Tries a change with ever more calls allowed until it succeeds.
    fn change_failing(&mut self, removal: bool, key: &[u8], value: &[u8]) {
        self.root = own_root(&mut self.mem, self.root).unwrap();
        for budget in 0.. {
            self.mem.touched.clear();
            self.mem.budget = Some(budget);
            let result = if removal {
                remove(&mut self.mem, self.root, key)
            } else {
                insert(&mut self.mem, self.root, key, value)
            };
            self.mem.budget = None;
            match result {
                Ok((root, _)) => {
                    self.root = root;
                    break;
                }
                Err(e) => {
                    assert_eq!(e, Error::Injected);
                    self.check();
                }
            }
        }
        if removal {
            self.model.remove(key);
        } else {
            self.model.insert(key.to_vec(), value.to_vec());
        }
        self.check();
    }
}

#[derive(Debug, Clone)]
enum Op {
    Insert(u64, u64),
    Run(u64, u8),
    Remove(u64),
    RemoveRun(u64, u8),
    Snapshot,
    Points(u64),
    Failing(bool, u64, u64),
}

fn ops(keys: u64) -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        30 => (0..keys, any::<u64>()).prop_map(|(k, v)| Op::Insert(k, v)),
        5 => (0..keys, any::<u8>()).prop_map(|(k, n)| Op::Run(k, n)),
        20 => (0..keys).prop_map(Op::Remove),
        5 => (0..keys, any::<u8>()).prop_map(|(k, n)| Op::RemoveRun(k, n)),
        2 => Just(Op::Snapshot),
        10 => (0..keys).prop_map(Op::Points),
        1 => (any::<bool>(), 0..keys, any::<u64>()).prop_map(|(r, k, v)| Op::Failing(r, k, v)),
    ];
    prop::collection::vec(op, 1..200)
}

fn run(shape: u8, values: u8, tells: bool, ops: Vec<Op>) {
    let mut w = World::new(tells);
    for op in ops {
        match op {
            Op::Insert(k, v) => w.insert(&make_key(shape, k), &make_value(values, v)),
            Op::Run(k, n) => {
                for k in k..k + u64::from(n) {
                    w.insert(&make_key(shape, k), &make_value(values, k));
                }
            }
            Op::Remove(k) => w.remove(&make_key(shape, k)),
            Op::RemoveRun(k, n) => {
                for k in k..k + u64::from(n) {
                    w.remove(&make_key(shape, k));
                }
            }
            Op::Snapshot => w.snapshot(),
            Op::Points(k) => w.check_points(shape, k),
            Op::Failing(r, k, v) => {
                w.change_failing(r, &make_key(shape, k), &make_value(values, v));
            }
        }
    }
    w.check_all();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: if cfg!(debug_assertions) { 150 } else { 600 }, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn like_btreemap(shape in 0..5u8, values in 0..4u8, tells: bool, ops in ops(2000)) {
        run(shape, values, tells, ops);
    }

    #[test]
    fn like_btreemap_dense(shape in 0..5u8, values in 0..4u8, tells: bool, ops in ops(150)) {
        run(shape, values, tells, ops);
    }

    #[test]
    fn hostile_bytes(seed: u64) {
        hostile_random(seed);
    }

    #[test]
    fn hostile_flips(seed: u64) {
        flip(seed);
    }
}

#[test]
fn failing_everywhere() {
    for (shape, values) in [(0, 1), (1, 3), (2, 2), (3, 0), (3, 3)] {
        let mut w = World::new(shape % 2 == 0);
        let mut rng = Rng(u64::from(shape));
        let count = if cfg!(debug_assertions) { 100 } else { 300 };
        for k in 0..count {
            let k = (k * 37) % 300;
            w.change_failing(false, &make_key(shape, k), &make_value(values, rng.next()));
            if k % 29 == 0 {
                w.mem.freeze();
            }
        }
        for k in 0..300 {
            w.change_failing(true, &make_key(shape, k * 7 % 300), &[]);
            if k % 29 == 0 {
                w.mem.freeze();
            }
        }
        assert_eq!(w.root, 0);
    }
}

#[test]
fn large_random() {
    let count = if cfg!(debug_assertions) {
        30_000
    } else {
        1_000_000
    };
    for shape in [0, 4] {
        let mut w = World::new(true);
        let mut rng = Rng(5);
        for i in 0..count {
            let k = rng.below(count / 4);
            // Grows at first, then shrinks.
            if rng.below(count) > i {
                w.insert(&make_key(shape, k), &make_value(0, i));
            } else {
                w.remove(&make_key(shape, k));
            }
            if i % (count / 10) == 0 {
                w.snapshot();
            }
        }
        w.check_all();
        let keys: Vec<_> = w.model.keys().cloned().collect();
        for key in keys {
            w.remove(&key);
        }
        assert_eq!(w.root, 0);
        assert!(w.mem.live.is_empty());
        w.check_all();
    }
}

/// Bytes of entries per byte of leaves, roughly.
fn fill(stats: Stats, entry: usize) -> f64 {
    (stats.entries as usize * entry) as f64 / (stats.pages as usize * PAGE_SIZE) as f64
}

#[test]
fn ascending_fills() {
    let mut w = World::new(true);
    for k in 0..20_000u64 {
        w.insert(&make_key(0, k), &[1; 25]);
    }
    let stats = w.check();
    assert!(fill(stats, 52) > 0.9, "sequential: {}", fill(stats, 52));

    // Many runs at once.
    let mut w = World::new(true);
    for k in 0..400u64 {
        for run in 0..100u64 {
            let key = [
                &(run * 7919 % 100).to_be_bytes()[..],
                &[5],
                &k.to_be_bytes(),
            ]
            .concat();
            w.insert(&key, &[1; 25]);
        }
    }
    let stats = w.check();
    assert!(fill(stats, 52) > 0.75, "parallel: {}", fill(stats, 52));

    // Random removal must not leave a tree of nearly empty pages.
    let keys: Vec<_> = w.model.keys().cloned().collect();
    let mut rng = Rng(1);
    for key in keys {
        if rng.below(10) > 0 {
            w.remove(&key);
        }
    }
    let stats = w.check();
    assert!(fill(stats, 52) > 0.25, "after removal: {}", fill(stats, 52));
}

#[test]
fn diff_cost_follows_changes() {
    let mut w = World::new(true);
    for k in 0..200_000u64 {
        w.insert(&make_key(0, k), &[1; 25]);
    }
    w.snapshot();
    // One change.
    w.insert(&make_key(0, 77_777), &[2; 25]);
    let (root, model) = w.old[0].clone();
    w.mem.reads = 0;
    check_diff(&mut w.mem, root, w.root, &model, &w.model);
    assert!(w.mem.reads <= 8, "{}", w.mem.reads);
    // Other split points, pages gone, and another height.
    let height = verify(&mut w.mem, w.root).unwrap().height;
    for k in 0..3000u64 {
        let key = [&make_key(0, 100_000)[..], &[9; 200], &k.to_be_bytes()].concat();
        w.insert(&key, &[3; 900]);
    }
    for k in 30_000..31_000u64 {
        w.remove(&make_key(0, k));
    }
    let after = verify(&mut w.mem, w.root).unwrap();
    let before = reachable(&mut w.mem, root);
    let now = reachable(&mut w.mem, w.root);
    let changed = before.symmetric_difference(&now).count();
    for (x, y) in [(root, w.root), (w.root, root)] {
        w.mem.reads = 0;
        diff(&mut w.mem, x, y, &mut |_, _, _| ControlFlow::Continue(())).unwrap();
        assert!(w.mem.reads <= changed + 20, "{} {changed}", w.mem.reads);
    }
    assert!(after.height > height, "{} {height}", after.height);
    w.check_all();
}

#[test]
fn mark_skips_and_does_not_read_leaves() {
    let mut w = World::new(true);
    for k in 0..50_000u64 {
        w.insert(&make_key(0, k), &[1; 25]);
    }
    w.mem.reads = 0;
    let mut inner = 0;
    let mut visit = |_, leaf: bool| {
        inner += usize::from(!leaf);
        Visit::Descend
    };
    mark(&mut w.mem, w.root, &mut visit, None).unwrap();
    assert_eq!(w.mem.reads, inner);
    let mut entries = 0;
    let mut count = |_: &[u8], _: &[u8]| entries += 1;
    mark(
        &mut w.mem,
        w.root,
        &mut |_, _| Visit::Descend,
        Some(&mut count),
    )
    .unwrap();
    assert_eq!(entries, 50_000);
    w.mem.reads = 0;
    mark(&mut w.mem, w.root, &mut |_, _| Visit::Skip, None).unwrap();
    assert_eq!(w.mem.reads, 1);
}

#[test]
fn limits_and_sums() {
    let mut mem = Mem::new(true);
    let e = insert(&mut mem, 0, &[0; MAX_KEY + 1], &[]).unwrap_err();
    assert_eq!(e, Error::Tree(TreeError::KeyTooLong(289)));
    let e = insert(&mut mem, 0, &[], &[0; MAX_VALUE + 1]).unwrap_err();
    assert_eq!(e, Error::Tree(TreeError::ValueTooLong(1025)));
    let mut page = Page::empty_leaf();
    for i in 0..3 {
        assert!(page.insert_at(i, &[i as u8; MAX_KEY], &[0; MAX_VALUE]));
    }
    page.seal(9);
    assert!(page.verify_sum(9) && !page.verify_sum(10));
    for i in [0, 16, 300, 4079, 4080, 4095] {
        let mut bytes = Box::new(*page.as_bytes());
        bytes[i] ^= 1;
        if let Ok(page) = Page::from_bytes(bytes) {
            assert!(!page.verify_sum(9));
        }
    }
    // An empty leaf as root.
    let root = mem.put(Page::empty_leaf());
    mem.live.insert(root);
    assert_eq!(contents(&mut mem, root), Model::new());
    assert_eq!(verify(&mut mem, root).unwrap().entries, 0);
    assert_eq!(last_before(&mut mem, root, b"", b"z").unwrap(), None);
    let (root, _) = insert(&mut mem, root, b"a", b"b").unwrap();
    assert_eq!(contents(&mut mem, root).len(), 1);
}

/// All operations on a tree of whatever pages. They may fail, but must come to an end.
fn exercise(mem: &mut Mem, roots: &[PageId], rng: &mut Rng) {
    for &root in roots {
        let _ = verify(mem, root);
        let _ = diff(
            mem,
            root,
            roots[0],
            &mut |_, _, _| ControlFlow::Continue(()),
        );
        let _ = scan(mem, root, &[], None, &mut |_, _| ControlFlow::Continue(()));
        let mut none = |_: &[u8], _: &[u8]| ();
        let _ = mark(mem, root, &mut |_, _| Visit::Descend, None);
        let _ = mark(mem, root, &mut |_, _| Visit::Descend, Some(&mut none));
        for _ in 0..20 {
            let (shape, k) = (rng.below(5) as u8, rng.below(100));
            let key = make_key(shape, k);
            let _ = get(mem, root, &key, |_| ());
            let _ = last_before(mem, root, &[], &key);
        }
    }
    let mut root = roots[0];
    for _ in 0..200 {
        // Release is not checked: a page may well be in the tree twice.
        mem.live.extend(mem.pages.keys());
        let key = make_key(rng.below(5) as u8, rng.below(100));
        let key = match rng.below(2) {
            0 => key,
            _ => {
                let mut some = Vec::new();
                let _ = scan(mem, root, &key, None, &mut |k, _| {
                    some = k.to_vec();
                    ControlFlow::Break(())
                });
                some
            }
        };
        let value = make_value(3, rng.next());
        let done = match rng.below(2) {
            0 => insert(mem, root, &key, &value),
            _ => remove(mem, root, &key),
        };
        if let Ok((new, _)) = done {
            root = new;
        }
    }
}

/// Pages that are sound in themselves, with children chosen at random: cycles, wrong levels,
/// shared pages, wrong bounds.
fn hostile_random(seed: u64) {
    let mut rng = Rng(seed);
    let mut mem = Mem::new(rng.below(2) == 0);
    let count = 2 + rng.below(30);
    for id in 1..=count {
        let level = match rng.below(4) {
            0 => rng.below(u64::from(MAX_LEVEL) + 1) as u8,
            _ => (id.min(13) - 1) as u8,
        };
        let mut page = Page::empty(level);
        if level > 0 {
            let child = 1 + rng.below(count);
            let item: (&[u8], &[u8]) = (&[], &child.to_le_bytes());
            page = Page::build(level, &[item]).unwrap();
        }
        let most = [4, 200][rng.below(2) as usize];
        for _ in 0..rng.below(most) {
            let key = make_key(rng.below(5) as u8, rng.below(100));
            let (at, found) = page.search(&key);
            let child = match rng.below(3) {
                0 => 1 + rng.below(count + 1),
                _ => 1 + (id + count - 2) % count,
            };
            let value = match level {
                0 => make_value(0, rng.next()),
                _ => child.to_le_bytes().to_vec(),
            };
            if !found && !key.is_empty() {
                page.insert_at(at, &key, &value);
            }
        }
        page.set_birth(rng.below(2));
        let bytes = Box::new(*page.as_bytes());
        mem.put(Page::from_bytes(bytes).unwrap());
    }
    let roots: Vec<_> = (1..=count).rev().collect();
    exercise(&mut mem, &roots, &mut rng);
}

/// Sound pages with some bits changed; those that `from_bytes` lets through are used.
fn flip(seed: u64) {
    let mut rng = Rng(seed);
    let mut w = World::new(true);
    let shape = rng.below(5) as u8;
    for k in 0..rng.below(400) + 50 {
        w.insert(
            &make_key(shape, k % 100 * 3),
            &make_value((seed % 4) as u8, k),
        );
    }
    let ids: Vec<_> = w.mem.live.iter().copied().collect();
    for id in ids {
        for _ in 0..30 {
            let mut bytes = Box::new(*w.mem.pages[&id].as_bytes());
            for _ in 0..rng.below(3) + 1 {
                // Mostly in the header and the slots.
                let at = match rng.below(3) {
                    0 => 4 + rng.below(12),
                    1 => rng.below(400),
                    _ => rng.below(PAGE_SIZE as u64),
                };
                bytes[at as usize] ^= 1 << rng.below(8);
            }
            if let Ok(page) = Page::from_bytes(bytes) {
                w.mem.pages.insert(id, Arc::new(page));
            }
        }
    }
    exercise(&mut w.mem, &[w.root], &mut rng);
    // And noise behind a good header.
    for _ in 0..20 {
        let mut bytes = Box::new([0u8; PAGE_SIZE]);
        let level = rng.below(14) as u8;
        for b in &mut bytes[..] {
            *b = rng.next() as u8;
        }
        let mut good = *Page::empty(level).as_bytes();
        good[6] = rng.below(3) as u8;
        bytes[..24].copy_from_slice(&good[..24]);
        if rng.below(2) == 0 {
            bytes[8..10].copy_from_slice(&(rng.below(4097) as u16).to_le_bytes());
        }
        let _ = Page::from_bytes(bytes);
    }
}

/// Pages used twice must not make walks exponential.
#[test]
fn hostile_fan() {
    let mut mem = Mem::new(true);
    let mut child = mem.put(Page::empty_leaf());
    let mut root = child;
    for level in 1..=MAX_LEVEL {
        let keys: Vec<[u8; 1]> = (0..100).map(|i| [i]).collect();
        let id = child.to_le_bytes();
        let items: Vec<(&[u8], &[u8])> = keys.iter().map(|k| (&k[..], &id[..])).collect();
        root = mem.put(Page::build(level, &items).unwrap());
        child = root;
    }
    assert!(verify(&mut mem, root).is_err());
    assert!(
        scan(
            &mut mem,
            root,
            &[],
            None,
            &mut |_, _| ControlFlow::Continue(())
        )
        .is_err()
    );
    assert!(mark(&mut mem, root, &mut |_, _| Visit::Descend, None).is_err());
    assert!(diff(&mut mem, root, 1, &mut |_, _, _| ControlFlow::Continue(())).is_err());
    assert!(last_before(&mut mem, root, &[], &[50]).is_err());
    assert!(mem.reads < 200, "{}", mem.reads);
}

//! Random operations against a reference model, with checkpoints, rollbacks, clones, deletions, garbage collection and
//! remounts in between. `COWFS_MODEL_CASES` sets how many sequences (of up to 120 operations) are tried.

use std::collections::BTreeMap;
use std::sync::Arc;

use cowfs::control::{Answer, Request};
use cowfs::fuse::Op as Fuse;
use cowfs::mount::Undo;
use cowfs::store::packs::PackOptions;
use cowfs::store::{CatalogOp, Store};
use cowfs_tests::driver::Driver;
use cowfs_tests::dump::{Dump, Shown, check, check_data, dump, head_root};
use cowfs_tests::simdisk::SimDisk;
use proptest::prelude::*;

#[derive(Debug, Clone)]
enum Op {
    Create(u8, u8),
    Mkdir(u8, u8),
    Symlink(u8, u8, u16),
    Unlink(u8),
    Rmdir(u8),
    Rename(u8, u8, u8, u8),
    Link(u8, u8, u8),
    Write(u8, u32, u32, u8),
    Append(u8, u16, u8),
    Truncate(u8, u32),
    Punch(u8, u32, u32),
    Collapse(u8, u8, u8),
    Insert(u8, u8, u8),
    Copy(u8, u32, u8, u32, u32),
    Setxattr(u8, u16),
    Hold(u8),
    WriteHeld(u8, u16, u8),
    ReadHeld(u8),
    LetGo(u8),
    Checkpoint,
    Rollback(u8, bool),
    CloneHead(u8),
    Delete(u8),
    Gc,
    Pack(u8),
    Commit,
    Flush,
    Remount,
}

fn any_op() -> impl Strategy<Value = Op> {
    let b = any::<u8>;
    let off = || prop_oneof![0..20_000u32, (0..10u32).prop_map(|n| n * 4096)];
    let len = || prop_oneof![1..300u32, 1..20_000u32, (1..5u32).prop_map(|n| n * 4096)];
    prop_oneof![
        6 => (b(), b()).prop_map(|(d, n)| Op::Create(d, n)),
        3 => (b(), b()).prop_map(|(d, n)| Op::Mkdir(d, n)),
        1 => (b(), b(), 1..3000u16).prop_map(|(d, n, l)| Op::Symlink(d, n, l)),
        3 => b().prop_map(Op::Unlink),
        1 => b().prop_map(Op::Rmdir),
        3 => (b(), b(), b(), 0..3u8).prop_map(|(s, d, n, f)| Op::Rename(s, d, n, f)),
        2 => (b(), b(), b()).prop_map(|(s, d, n)| Op::Link(s, d, n)),
        10 => (b(), off(), len(), b()).prop_map(|(f, o, l, v)| Op::Write(f, o, l, v)),
        6 => (b(), 1..6000u16, b()).prop_map(|(f, l, v)| Op::Append(f, l, v)),
        2 => (b(), off()).prop_map(|(f, s)| Op::Truncate(f, s)),
        1 => (b(), off(), len()).prop_map(|(f, o, l)| Op::Punch(f, o, l)),
        1 => (b(), 0..4u8, 1..3u8).prop_map(|(f, o, l)| Op::Collapse(f, o, l)),
        1 => (b(), 0..4u8, 1..3u8).prop_map(|(f, o, l)| Op::Insert(f, o, l)),
        2 => (b(), off(), b(), off(), len()).prop_map(|(a, o, c, p, l)| Op::Copy(a, o, c, p, l)),
        1 => (b(), 0..3000u16).prop_map(|(f, l)| Op::Setxattr(f, l)),
        2 => b().prop_map(Op::Hold),
        2 => (b(), 0..9000u16, b()).prop_map(|(h, o, v)| Op::WriteHeld(h, o, v)),
        2 => b().prop_map(Op::ReadHeld),
        1 => b().prop_map(Op::LetGo),
        2 => Just(Op::Checkpoint),
        2 => (b(), any::<bool>()).prop_map(|(c, d)| Op::Rollback(c, d)),
        1 => b().prop_map(Op::CloneHead),
        1 => b().prop_map(Op::Delete),
        1 => Just(Op::Gc),
        2 => b().prop_map(Op::Pack),
        1 => Just(Op::Commit),
        1 => Just(Op::Flush),
        1 => Just(Op::Remount),
    ]
}

#[derive(Debug, Clone)]
enum Kind {
    Dir(BTreeMap<String, usize>),
    File(Vec<u8>, Option<Vec<u8>>),
    Link(Vec<u8>),
}

/// The reference: nodes by number; 0 is the root. Nodes without a name stay for those who hold them.
#[derive(Debug, Clone)]
struct Model {
    nodes: BTreeMap<usize, Kind>,
    next: usize,
}

impl Model {
    fn new() -> Self {
        Self {
            nodes: BTreeMap::from([(0, Kind::Dir(BTreeMap::new()))]),
            next: 1,
        }
    }

    /// All paths, parents first.
    fn paths(&self) -> Vec<(Vec<String>, usize)> {
        let mut out = vec![(vec![], 0)];
        let mut i = 0;
        while i < out.len() {
            let (path, n) = out[i].clone();
            if let Kind::Dir(d) = &self.nodes[&n] {
                for (name, c) in d {
                    let mut p = path.clone();
                    p.push(name.clone());
                    out.push((p, *c));
                }
            }
            i += 1;
        }
        out
    }

    fn pick(&self, k: u8, want: impl Fn(&Kind) -> bool) -> Option<(Vec<String>, usize)> {
        let all: Vec<_> = self
            .paths()
            .into_iter()
            .filter(|(_, n)| want(&self.nodes[n]))
            .collect();
        (!all.is_empty()).then(|| all[usize::from(k) % all.len()].clone())
    }

    fn dir(&self, k: u8) -> (Vec<String>, usize) {
        self.pick(k, |n| matches!(n, Kind::Dir(_)))
            .expect("the root")
    }

    fn file(&self, k: u8) -> Option<(Vec<String>, usize)> {
        self.pick(k, |n| matches!(n, Kind::File(..)))
    }

    fn entries(&mut self, n: usize) -> &mut BTreeMap<String, usize> {
        match self.nodes.get_mut(&n) {
            Some(Kind::Dir(d)) => d,
            _ => panic!("not a directory"),
        }
    }

    fn bytes(&mut self, n: usize) -> &mut Vec<u8> {
        match self.nodes.get_mut(&n) {
            Some(Kind::File(b, _)) => b,
            _ => panic!("not a file"),
        }
    }

    fn add(&mut self, dir: usize, name: &str, kind: Kind) -> usize {
        let n = self.next;
        self.next += 1;
        self.nodes.insert(n, kind);
        self.entries(dir).insert(name.to_owned(), n);
        n
    }

    fn write(&mut self, n: usize, off: usize, data: &[u8]) {
        let b = self.bytes(n);
        if b.len() < off + data.len() {
            b.resize(off + data.len(), 0);
        }
        b[off..off + data.len()].copy_from_slice(data);
    }

    fn below(&self, n: usize, ancestor: usize) -> bool {
        let mut todo = vec![ancestor];
        while let Some(x) = todo.pop() {
            if x == n {
                return true;
            }
            if let Some(Kind::Dir(d)) = self.nodes.get(&x) {
                todo.extend(d.values());
            }
        }
        false
    }

    fn dump(&self) -> Dump {
        let paths = self.paths();
        let links = |n: usize| {
            let count = paths.iter().filter(|(_, m)| *m == n).count();
            u32::try_from(count).expect("few")
        };
        paths
            .iter()
            .map(|(p, n)| {
                let shown = match &self.nodes[n] {
                    Kind::Dir(d) => {
                        let sub = d.values().filter(|c| matches!(self.nodes[c], Kind::Dir(_)));
                        Shown::Dir(2 + u32::try_from(sub.count()).expect("few"))
                    }
                    Kind::File(b, x) => Shown::File(b.clone(), links(*n), x.clone()),
                    Kind::Link(t) => Shown::Link(t.clone()),
                };
                let path: String = p.iter().map(|s| format!("/{s}")).collect();
                (path, shown)
            })
            .collect()
    }
}

/// A node that is kept open: its node id, its number in the model, and its contents if it was left behind by a rollback.
struct Held {
    nodeid: u64,
    node: usize,
    old: Option<Vec<u8>>,
}

struct World {
    disk: SimDisk,
    store: Arc<Store>,
    drv: Driver,
    model: Model,
    checkpoints: Vec<(String, Model)>,
    clones: Vec<(String, Model)>,
    held: Vec<Held>,
    names: u32,
}

const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", "long name with Ünïcödé in it"];

fn name(k: u8) -> &'static str {
    NAMES[usize::from(k) % NAMES.len()]
}

fn pattern(v: u8, len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| v.wrapping_add(u8::try_from(i % 251).unwrap_or(0)))
        .collect()
}

impl World {
    fn new() -> Self {
        let disk = SimDisk::default();
        let store = disk.store();
        let drv = Driver::new(&store, "main");
        Self {
            disk,
            store,
            drv,
            model: Model::new(),
            checkpoints: Vec::new(),
            clones: Vec::new(),
            held: Vec::new(),
            names: 0,
        }
    }

    fn fresh(&mut self, what: &str) -> String {
        self.names += 1;
        format!("{what}{}", self.names)
    }

    fn change(&self, f: impl FnOnce(&cowfs::store::Catalog) -> CatalogOp) {
        self.store
            .change(|c| Ok((f(c), ())), |(), _| ())
            .expect("a catalog change");
    }

    fn drop_name(&mut self, dir: usize, name: &str) {
        self.model.entries(dir).remove(name);
    }

    #[allow(clippy::too_many_lines, reason = "one arm an operation")]
    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Create(d, n) | Op::Mkdir(d, n) => {
                let (path, dir) = self.model.dir(d);
                if path.len() > 4 {
                    return;
                }
                let at = self.drv.walk(&path).expect("a path of the model");
                let is_dir = matches!(op, Op::Mkdir(..));
                let got = if is_dir {
                    let bytes = name(n).as_bytes();
                    self.drv.make(
                        at,
                        Fuse::Mkdir {
                            name: bytes,
                            mode: 0o755,
                            umask: 0,
                        },
                    )
                } else {
                    self.drv.create(at, name(n))
                };
                if self.model.entries(dir).contains_key(name(n)) {
                    assert_eq!(got, Err(libc::EEXIST));
                } else {
                    got.expect("a new name");
                    let kind = if is_dir {
                        Kind::Dir(BTreeMap::new())
                    } else {
                        Kind::File(vec![], None)
                    };
                    self.model.add(dir, name(n), kind);
                }
            }
            Op::Symlink(d, n, len) => {
                let (path, dir) = self.model.dir(d);
                let at = self.drv.walk(&path).expect("a path of the model");
                let target = vec![b'x'; usize::from(len)];
                let op = Fuse::Symlink {
                    name: name(n).as_bytes(),
                    target: &target,
                };
                let got = self.drv.make(at, op);
                if self.model.entries(dir).contains_key(name(n)) {
                    assert_eq!(got, Err(libc::EEXIST));
                } else {
                    got.expect("a new name");
                    self.model.add(dir, name(n), Kind::Link(target));
                }
            }
            Op::Unlink(k) => {
                let Some((path, _)) = self.model.pick(k, |n| !matches!(n, Kind::Dir(_))) else {
                    return;
                };
                let (last, up) = path.split_last().expect("not the root");
                let at = self.drv.walk(up).expect("a path of the model");
                let seen = self.drv.walk(&path).expect("a path of the model");
                assert_ne!(seen, 0);
                self.drv
                    .ask(
                        at,
                        Fuse::Unlink {
                            name: last.as_bytes(),
                        },
                    )
                    .expect("it is there");
                let dir = self.node_of(up);
                self.drop_name(dir, last);
            }
            Op::Rmdir(k) => {
                let (path, n) = self.model.dir(k);
                let Some((last, up)) = path.split_last() else {
                    return;
                };
                let at = self.drv.walk(up).expect("a path of the model");
                let got = self
                    .drv
                    .ask(
                        at,
                        Fuse::Rmdir {
                            name: last.as_bytes(),
                        },
                    )
                    .map(drop);
                if self.model.entries(n).is_empty() {
                    got.expect("it is empty");
                    let dir = self.node_of(up);
                    self.drop_name(dir, last);
                } else {
                    assert_eq!(got, Err(libc::ENOTEMPTY));
                }
            }
            Op::Rename(s, d, n, flags) => self.rename(s, d, n, u32::from(flags)),
            Op::Link(s, d, n) => {
                let Some((from, node)) = self.model.file(s) else {
                    return;
                };
                let (path, dir) = self.model.dir(d);
                let old = self.drv.walk(&from).expect("a path of the model");
                let at = self.drv.walk(&path).expect("a path of the model");
                let got = self.drv.make(
                    at,
                    Fuse::Link {
                        node: old,
                        new_name: name(n).as_bytes(),
                    },
                );
                if self.model.entries(dir).contains_key(name(n)) {
                    assert_eq!(got, Err(libc::EEXIST));
                } else {
                    got.expect("a new name");
                    self.model.entries(dir).insert(name(n).to_owned(), node);
                }
            }
            Op::Write(f, off, len, v) => {
                let Some((path, node)) = self.model.file(f) else {
                    return;
                };
                let at = self.drv.walk(&path).expect("a path of the model");
                let data = pattern(v, len as usize);
                self.drv.write(at, u64::from(off), &data).expect("room");
                self.model.write(node, off as usize, &data);
            }
            Op::Append(f, len, v) => {
                let Some((path, node)) = self.model.file(f) else {
                    return;
                };
                let at = self.drv.walk(&path).expect("a path of the model");
                let end = self.model.bytes(node).len();
                if end > 200_000 {
                    return;
                }
                let data = pattern(v, usize::from(len));
                self.drv.write(at, end as u64, &data).expect("room");
                self.model.write(node, end, &data);
            }
            Op::Truncate(f, size) => {
                let Some((path, node)) = self.model.file(f) else {
                    return;
                };
                let at = self.drv.walk(&path).expect("a path of the model");
                self.drv.truncate(at, u64::from(size)).expect("it works");
                self.model.bytes(node).resize(size as usize, 0);
            }
            Op::Punch(f, off, len) => {
                let Some((path, node)) = self.model.file(f) else {
                    return;
                };
                let at = self.drv.walk(&path).expect("a path of the model");
                let op = Fuse::Fallocate {
                    offset: u64::from(off),
                    length: u64::from(len),
                    mode: 3,
                };
                self.drv.ask(at, op).expect("it works");
                let b = self.model.bytes(node);
                let end = (off as usize + len as usize).min(b.len());
                if (off as usize) < end {
                    b[off as usize..end].fill(0);
                }
            }
            Op::Collapse(f, off, len) | Op::Insert(f, off, len) => {
                let Some((path, node)) = self.model.file(f) else {
                    return;
                };
                let at = self.drv.walk(&path).expect("a path of the model");
                let (off, len) = (usize::from(off) * 4096, usize::from(len) * 4096);
                let collapse = matches!(op, Op::Collapse(..));
                let mode = if collapse { 8 } else { 32 };
                let op = Fuse::Fallocate {
                    offset: off as u64,
                    length: len as u64,
                    mode,
                };
                let got = self.drv.ask(at, op).map(drop);
                let b = self.model.bytes(node);
                if collapse && off + len < b.len() {
                    got.expect("it works");
                    b.drain(off..off + len);
                } else if !collapse && off < b.len() {
                    got.expect("it works");
                    b.splice(off..off, std::iter::repeat_n(0, len));
                } else {
                    assert_eq!(got, Err(libc::EINVAL));
                }
            }
            Op::Copy(a, o, c, p, len) => {
                let (Some((pa, na)), Some((pc, nc))) = (self.model.file(a), self.model.file(c))
                else {
                    return;
                };
                let from = self.drv.walk(&pa).expect("a path of the model");
                let to = self.drv.walk(&pc).expect("a path of the model");
                let src = self.model.bytes(na).clone();
                let n = (len as usize).min(src.len().saturating_sub(o as usize));
                let op = Fuse::CopyFileRange {
                    offset_in: u64::from(o),
                    node_out: to,
                    offset_out: u64::from(p),
                    len: u64::from(len),
                };
                let got = self.drv.ask(from, op).map(drop);
                let (o, p) = (o as usize, p as usize);
                if n > 0 && na == nc && o < p + n && p < o + n {
                    assert_eq!(got, Err(libc::EINVAL));
                    return;
                }
                got.expect("it works");
                if n > 0 {
                    self.model.write(nc, p, &src[o..o + n]);
                }
            }
            Op::Setxattr(f, len) => {
                let Some((path, node)) = self.model.file(f) else {
                    return;
                };
                let at = self.drv.walk(&path).expect("a path of the model");
                let value = pattern(3, usize::from(len));
                let op = Fuse::Setxattr {
                    name: b"user.x",
                    value: &value,
                    flags: 0,
                    extra_flags: 0,
                };
                self.drv.ask(at, op).expect("it works");
                if let Some(Kind::File(_, x)) = self.model.nodes.get_mut(&node) {
                    *x = Some(value);
                }
            }
            Op::Hold(f) => {
                let Some((path, node)) = self.model.file(f) else {
                    return;
                };
                if self.held.len() < 4 {
                    let nodeid = self.drv.walk(&path).expect("a path of the model");
                    self.held.push(Held {
                        nodeid,
                        node,
                        old: None,
                    });
                }
            }
            Op::WriteHeld(h, off, v) => {
                let Some(i) = self.held_index(h) else { return };
                let data = pattern(v, 100);
                let got = self.drv.write(self.held[i].nodeid, u64::from(off), &data);
                if self.held[i].old.is_some() {
                    assert_eq!(got, Err(libc::ESTALE), "a write to what was rolled back");
                } else {
                    got.expect("room");
                    let node = self.held[i].node;
                    self.model.write(node, usize::from(off), &data);
                }
            }
            Op::ReadHeld(h) => {
                let Some(i) = self.held_index(h) else { return };
                let got = self.drv.read(self.held[i].nodeid).expect("it can be read");
                let want = match &self.held[i].old {
                    Some(b) => b.clone(),
                    None => {
                        let node = self.held[i].node;
                        self.model.bytes(node).clone()
                    }
                };
                assert!(got == want, "an open file has other contents");
            }
            Op::LetGo(h) => {
                if let Some(i) = self.held_index(h) {
                    self.held.remove(i);
                }
            }
            Op::Checkpoint => {
                let name = self.fresh("c");
                let label = name.clone();
                self.change(|c| CatalogOp::Checkpoint {
                    head: "main".into(),
                    id: c.next_checkpoint,
                    name: label,
                    tags: BTreeMap::new(),
                    created_us: 0,
                });
                self.checkpoints.push((name, self.model.clone()));
            }
            Op::Rollback(k, keep) => {
                if self.checkpoints.is_empty() {
                    return;
                }
                let (to, model) = self.checkpoints[usize::from(k) % self.checkpoints.len()].clone();
                let id = self
                    .store
                    .catalog()
                    .expect("a catalog")
                    .checkpoint_named(&to)
                    .expect("it is there")
                    .id;
                let undo = if keep {
                    let left = self.fresh("left");
                    self.checkpoints.push((left.clone(), self.model.clone()));
                    Undo::Keep(left)
                } else {
                    Undo::Discard
                };
                for i in 0..self.held.len() {
                    if self.held[i].old.is_none() {
                        let node = self.held[i].node;
                        self.held[i].old = Some(self.model.bytes(node).clone());
                    }
                }
                self.drv
                    .fs
                    .rollback(id, &undo, std::time::Instant::now())
                    .expect("a rollback");
                self.model = model;
            }
            Op::CloneHead(k) => {
                if self.checkpoints.is_empty() || self.clones.len() > 3 {
                    return;
                }
                let (from, model) =
                    self.checkpoints[usize::from(k) % self.checkpoints.len()].clone();
                let name = self.fresh("head");
                let label = name.clone();
                self.change(|c| CatalogOp::Clone {
                    from: c.checkpoint_named(&from).expect("it is there").id,
                    id: c.next_head,
                    name: label,
                    created_us: 0,
                });
                // A first change, so that the clone goes its own way.
                let mut d = Driver::new(&self.store, &name);
                let mut model = model;
                if d.create(1, "only in the clone").is_ok() {
                    model.add(0, "only in the clone", Kind::File(vec![], None));
                }
                d.forget_all(&[]);
                self.clones.push((name, model));
            }
            Op::Delete(k) => {
                if self.checkpoints.is_empty() {
                    return;
                }
                let i = usize::from(k) % self.checkpoints.len();
                let (name, _) = self.checkpoints.remove(i);
                self.change(|c| CatalogOp::Delete {
                    id: c.checkpoint_named(&name).expect("it is there").id,
                });
            }
            Op::Gc => {
                self.store.gc().expect("a collection");
            }
            Op::Pack(k) => {
                let all: Vec<u64> = {
                    let c = self.store.catalog().expect("a catalog");
                    c.checkpoints.values().map(|c| c.id).collect()
                };
                // One checkpoint with all that it holds, or what only checkpoints hold.
                let one = all.get(usize::from(k) % (all.len() + 1)).copied();
                let options = PackOptions {
                    whole: one.is_some(),
                    checkpoints: one.into_iter().collect(),
                    level: 1,
                };
                self.store.pack(&options).expect("it can be packed");
            }
            Op::Commit => self.store.commit().expect("a commit"),
            Op::Flush => self.store.flush_all().expect("a flush"),
            Op::Remount => {
                self.held.clear();
                self.drv.forget_all(&[]);
                self.drv.fs.close();
                self.store.flush_all().expect("a flush");
                self.reopen();
            }
        }
    }

    fn reopen(&mut self) {
        self.store = Store::open_on(Arc::new(self.disk.clone()), None).expect("it opens again");
        self.drv = Driver::new(&self.store, "main");
    }

    fn held_index(&self, h: u8) -> Option<usize> {
        (!self.held.is_empty()).then(|| usize::from(h) % self.held.len())
    }

    fn node_of(&mut self, path: &[String]) -> usize {
        let mut at = 0;
        for n in path {
            at = self.model.entries(at)[n];
        }
        at
    }

    fn rename(&mut self, s: u8, d: u8, n: u8, flags: u32) {
        let Some((from, node)) = self.model.pick(s, |_| true) else {
            return;
        };
        let Some((last, up)) = from.split_last() else {
            return;
        };
        let (to_path, to) = self.model.dir(d);
        let parent = self.drv.walk(up).expect("a path of the model");
        let new_parent = self.drv.walk(&to_path).expect("a path of the model");
        let up_node = self.node_of(up);
        let there = self.model.entries(to).get(name(n)).copied();
        // The kernel knows the victim, as it looked it up.
        let mut victim = to_path.clone();
        victim.push(name(n).into());
        let _ = self.drv.walk(&victim);
        let op = Fuse::Rename {
            name: last.as_bytes(),
            new_parent,
            new_name: name(n).as_bytes(),
            flags,
        };
        let got = self.drv.ask(parent, op).map(drop);
        let is_dir = |m: &Model, n: usize| matches!(m.nodes[&n], Kind::Dir(_));
        let loops = |m: &Model| is_dir(m, node) && m.below(to, node);
        let moved_dir = is_dir(&self.model, node);
        match (flags, there) {
            (1, Some(_)) => assert_eq!(got, Err(libc::EEXIST)),
            (2, None) => assert_eq!(got, Err(libc::ENOENT)),
            (2, Some(t)) => {
                if t == node {
                    got.expect("nothing to do");
                    return;
                }
                let other_loops = is_dir(&self.model, t) && self.model.below(up_node, t);
                if loops(&self.model) || other_loops {
                    assert_eq!(got, Err(libc::EINVAL));
                    return;
                }
                got.expect("an exchange");
                self.model.entries(up_node).insert(last.clone(), t);
                self.model.entries(to).insert(name(n).into(), node);
            }
            (_, Some(t)) if t == node => got.expect("nothing to do"),
            _ if loops(&self.model) => assert!(got.is_err(), "into itself"),
            (_, Some(t)) if moved_dir && !is_dir(&self.model, t) => {
                assert_eq!(got, Err(libc::ENOTDIR));
            }
            (_, Some(t)) if !moved_dir && is_dir(&self.model, t) => {
                assert_eq!(got, Err(libc::EISDIR));
            }
            (_, Some(t)) if moved_dir && !self.model.entries(t).is_empty() => {
                assert_eq!(got, Err(libc::ENOTEMPTY));
            }
            _ => {
                got.expect("a rename");
                self.model.entries(up_node).remove(last);
                self.model.entries(to).insert(name(n).into(), node);
            }
        }
    }

    fn after(&mut self) {
        let keep: Vec<u64> = self.held.iter().map(|h| h.nodeid).collect();
        self.drv.forget_all(&keep);
    }

    fn compare(&self) {
        let got = dump(&self.store, head_root(&self.store, "main"));
        same(&got, &self.model.dump(), "the head");
    }

    fn compare_all(&self) {
        self.compare();
        let catalog = self.store.catalog().expect("a catalog");
        assert_eq!(catalog.checkpoints.len(), self.checkpoints.len());
        for (name, model) in &self.checkpoints {
            let root = catalog.checkpoint_named(name).expect("it is there").root;
            same(&dump(&self.store, root), &model.dump(), name);
        }
        for (name, model) in &self.clones {
            same(
                &dump(&self.store, head_root(&self.store, name)),
                &model.dump(),
                name,
            );
        }
        check(&self.store);
    }
}

fn same(got: &Dump, want: &Dump, what: &str) {
    if got == want {
        return;
    }
    for (p, w) in want {
        match got.get(p) {
            None => panic!("{what}: {p} is missing"),
            Some(g) if g != w => {
                if let (Shown::File(a, la, xa), Shown::File(b, lb, xb)) = (g, w) {
                    let at = a.iter().zip(b).position(|(x, y)| x != y);
                    panic!(
                        "{what}: {p}: {} bytes, want {}, first difference at {at:?}; links {la}, want {lb}; attribute same: {}",
                        a.len(),
                        b.len(),
                        xa == xb
                    );
                }
                panic!("{what}: {p} is {g:?}, want {w:?}");
            }
            _ => {}
        }
    }
    panic!(
        "{what}: there is more than there should be: {:?}",
        got.keys().collect::<Vec<_>>()
    );
}

fn run(ops: &[Op]) {
    let mut w = World::new();
    for (i, op) in ops.iter().enumerate() {
        w.apply(op);
        w.after();
        if i % 8 == 7 {
            w.compare();
        }
    }
    w.compare_all();
    w.store.gc().expect("a collection");
    w.compare_all();
    // Everything let go, everything durable, opened anew: still the same.
    w.apply(&Op::Remount);
    w.compare_all();
    check_data(&w.store);
}

fn cases() -> u32 {
    std::env::var("COWFS_MODEL_CASES")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(300)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: cases(), max_shrink_iters: 4000, ..ProptestConfig::default() })]
    #[test]
    fn like_the_model(ops in prop::collection::vec(any_op(), 1..120)) {
        run(&ops);
    }
}

#[test]
fn requests_survive_json() {
    let r = Request::Delete { name: "x".into() };
    let line = serde_json::to_string(&r).expect("it can be written");
    assert!(matches!(serde_json::from_str(&line), Ok(Request::Delete { name }) if name == "x"));
    assert!(serde_json::from_str::<Answer>("{\"answer\":\"done\"}").is_ok());
}

//! Manifests that someone has tampered with give errors: no panic, no huge allocation, no hang.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::{Value, json};
use snapshot::files::{self, Connections, Context, OpenFile};
use snapshot::image::manifest::Fd;

pub(crate) const TESTS: &[(&str, fn())] = &[
    ("hostile::restore", restore),
    ("hostile::install", install),
    ("hostile::unknown_fields", unknown_fields),
    ("hostile::contents", contents),
];

fn file(flags: i32, kind: &Value) -> Value {
    json!({"flags": flags, "offset": 0, "owner": null, "locks": [], "kind": kind})
}

fn unix(role: &Value, queue: &Value) -> Value {
    json!({"Unix": {"kind": 1, "name": null, "file": null, "role": role, "queue": queue, "shutdown": 0, "options": []}})
}

fn pipe(size: i32, content: &Value) -> Value {
    json!({"Pipe": {"pipe": 0, "path": null, "size": size, "content": content}})
}

fn epoll(fd: i64, file: u32) -> Value {
    json!({"Epoll": {"watches": [{"fd": fd, "file": file, "events": 1, "data": 0}]}})
}

fn inet(family: i32, options: &Value) -> Value {
    json!({"Inet": {"family": family, "kind": 1, "local": null, "remote": null, "backlog": null, "queue": [],
        "options": options}})
}

fn tcp(change: impl Fn(&mut Value)) -> Value {
    let mut tcp = json!({"family": 2, "local": "127.0.0.1:1", "remote": "127.0.0.1:2", "state": 1, "receive_seq": 0,
        "send_seq": 0, "incoming": "", "outgoing": "", "unsent": 0, "mss": 1000, "agreed": 7, "scales": [1, 1],
        "timestamp": 0, "window": [0, 0, 0, 0, 0], "options": []});
    change(&mut tcp);
    json!({"Tcp": tcp})
}

/// Lists of files, each wrong in one way.
fn table() -> Vec<Vec<Value>> {
    let one = |kind: Value| vec![file(2, &kind)];
    let none = json!([]);
    let path = |path: &str| json!({"Path": {"path": path, "ino": 1, "rdev": null}});
    let regular =
        |size: u64| json!({"Regular": {"path": "/etc/passwd", "dev": 1, "ino": 1, "size": size}});
    let timer = |clock: i32| {
        json!({"Timerfd": {"clock": clock, "settime": 0, "ticks": 0, "left_ns": u64::MAX,
        "interval_ns": u64::MAX, "due_ns": null}})
    };
    let saved = |saved: u32| json!({"Unlinked": {"dir": "/tmp", "saved": saved, "size": u64::MAX, "sum": "", "mode": 0, "owner": [0, 0]}});
    let memfd = |name: &str| json!({"Memfd": {"name": name, "seals": -1, "saved": 0, "size": 1, "sum": ""}});
    let watch = |wd: i32| json!({"wd": wd, "mask": 1, "path": "/", "ino": 2});
    let inotify = |watches: Value| json!({"Inotify": {"watches": watches}});
    vec![
        one(unix(&json!({"Pair": {"peer": 7}}), &none)),
        one(unix(&json!({"Pair": {"peer": 0}}), &none)),
        vec![
            file(2, &unix(&json!({"Pair": {"peer": 1}}), &none)),
            file(2, &json!({"SharedMemory": {"object": 0}})),
        ],
        one(unix(&json!("Unconnected"), &json!(["eA=="]))),
        one(pipe(-1, &none)),
        one(pipe(i32::MAX, &none)),
        one(pipe(4096, &json!(["x".repeat(1 << 16)]))),
        one(json!({"Pipe": {"pipe": 0, "path": "/etc/passwd", "size": 4096, "content": null}})),
        one(epoll(3, 9)),
        one(epoll(-1, 0)),
        one(epoll(i64::from(i32::MAX), 0)),
        one(epoll(50, 0)),
        vec![file(2, &epoll(50, 1)), file(2, &epoll(50, 0))],
        one(json!({"Eventfd": {"count": u64::MAX, "semaphore": false}})),
        one(timer(99)),
        one(json!({"Netlink": {"kind": 3, "protocol": 12, "port": 0, "groups": 0, "options": []}})),
        one(inet(17, &none)),
        one(inet(2, &json!([{"level": 1, "name": 26, "value": "AAAA"}]))),
        one(inet(2, &json!([{"level": 1, "name": 2, "value": ""}]))),
        one(tcp(|tcp| tcp["family"] = json!(1))),
        one(tcp(|tcp| tcp["window"] = json!([u32::MAX, 1, 1, 1, 5]))),
        one(tcp(|tcp| tcp["remote"] = json!("255.255.255.255:0"))),
        one(tcp(|tcp| tcp["local"] = json!("192.0.2.1:1"))),
        one(path("/proc/self/nothing")),
        one(path("/../../etc")),
        one(path("relative")),
        one(regular(0)),
        one(saved(0)),
        one(memfd("a\0b")),
        one(memfd("name")),
        one(inotify(json!([watch(0)]))),
        one(inotify(json!([watch(-1)]))),
        one(inotify(json!([watch(1), watch(2)]))),
        one(json!({"SharedMemory": {"object": u32::MAX}})),
        one(json!({"Slave": {"number": 3}})),
        one(
            json!({"Master": {"number": 0, "termios": "AAAA", "size": [0, 0, 0, 0], "locked": false, "packet": false,
            "session": 0, "foreground": 0}}),
        ),
        vec![
            json!({"flags": 0, "offset": u64::MAX, "owner": null, "locks": [],
            "kind": {"Path": {"path": "/", "ino": null, "rdev": null}}}),
        ],
        vec![json!({"flags": 0, "offset": 0, "owner": null,
            "locks": [{"kind": "Other", "exclusive": true, "start": 0, "len": 0}],
            "kind": {"Path": {"path": "/dev/null", "ino": null, "rdev": null}}})],
        vec![json!({"flags": 0, "offset": 0, "owner": null,
            "locks": [{"kind": "Ofd", "exclusive": true, "start": -5, "len": i64::MAX}],
            "kind": {"Path": {"path": "/dev/null", "ino": null, "rdev": null}}})],
    ]
}

fn restored(files: &[OpenFile], dir: &Path) -> Result<Vec<OwnedFd>, files::Error> {
    let root = std::fs::File::open("/").unwrap();
    let shared = |_| Err(std::io::Error::other("none in this test"));
    let ctx = Context {
        root: root.as_fd(),
        external: std::collections::BTreeMap::new(),
        log: None,
        shared: &shared,
        connections: Connections::Repair,
        before_connections: None,
        contended_locks: false,
    };
    files::restore(files, dir, &ctx)
}

fn restore() {
    let dir = tempfile::tempdir().unwrap();
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    for list in table() {
        let files: Vec<OpenFile> = match serde_json::from_value(json!(list)) {
            Ok(files) => files,
            Err(error) => panic!("{list:?}: {error}"),
        };
        let before = open();
        let result = restored(&files, dir.path());
        assert!(result.is_err(), "{list:?} was taken");
        assert_eq!(open(), before, "{list:?} left descriptors open");
    }
}

fn install() {
    let files: Vec<OpenFile> =
        serde_json::from_value(json!([file(0, &json!({"SharedMemory": {"object": 0}}))])).unwrap();
    let fd = |fd, file| Fd {
        fd,
        cloexec: false,
        file,
    };
    for table in [
        vec![fd(-1, 0)],
        vec![fd(5, 0), fd(5, 0)],
        vec![fd(5, 1)],
        vec![fd(i32::MAX, 0)],
        vec![fd(1 << 30, 0)],
    ] {
        let descriptions = vec![std::fs::File::open("/").unwrap().into()];
        assert!(
            files::install(&table, &files, descriptions, Vec::new(), (1, false)).is_err(),
            "{table:?} was taken"
        );
    }
}

fn unknown_fields() {
    let mut value = file(0, &json!({"SharedMemory": {"object": 0}}));
    assert!(serde_json::from_value::<OpenFile>(value.clone()).is_ok());
    value["more"] = json!(1);
    assert!(serde_json::from_value::<OpenFile>(value).is_err());
}

/// A byte of a saved content that was changed is seen before anybody gets the file, and by the check of the whole.
fn contents() {
    for (name, at) in [("unlinked", 10 << 20), ("unlinked", 1 << 20), ("memfd", 3)] {
        let dir = tempfile::tempdir().unwrap();
        let mut target = crate::Target::start("target", name, dir.path());
        let (files, _) = target.captured();
        target.kill();
        files::check_contents(&files, dir.path()).unwrap();
        let path = dir.path().join("files/0");
        let content = std::fs::File::options()
            .read(true)
            .write(true)
            .open(path)
            .unwrap();
        let mut byte = [0];
        content.read_exact_at(&mut byte, at).unwrap();
        content.write_all_at(&[byte[0] ^ 1], at).unwrap();
        let (path, what) = files::check_contents(&files, dir.path()).unwrap_err();
        assert!(path.ends_with("files/0") && what.contains("sum"), "{what}");
        let kept: Vec<OpenFile> = files
            .into_iter()
            .filter(|f| matches!(f.kind, files::Kind::Unlinked(_) | files::Kind::Memfd(_)))
            .collect();
        let error = restored(&kept, dir.path()).unwrap_err();
        assert!(error.to_string().contains("sum"), "{name}: {error}");
    }
}

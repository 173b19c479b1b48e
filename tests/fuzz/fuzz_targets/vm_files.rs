//! A VM's files: its configuration and state, and `about` of a snapshot; names and sizes as users write them. Asserted: never
//! a panic or much memory, what is accepted comes back the same, and a name is a single component of a path.
#![no_main]

use cowfs_fuzz::snap::Dir;
use cowfs_fuzz::{Bytes, json, sample};
use libfuzzer_sys::fuzz_target;
use umlctl::snapshots::store::Snapshot;
use umlctl::vm::config::{Config, memory};
use umlctl::vm::name::Name;
use umlctl::vm::state::State;

fn one(dir: &Dir, bytes: &[u8]) {
    let path = dir.path().join("file");
    dir.put("file", bytes);
    if let Ok(config) = Config::load(&path) {
        config.save(&path).expect("room");
        assert_eq!(Config::load(&path).ok(), Some(config));
    }
    dir.put("file", bytes);
    if let Ok(state) = State::load(&path) {
        state.save(&path).expect("room");
        assert_eq!(State::load(&path).ok(), Some(state));
    }
    let mut about = snapshot::uml::image::sum(bytes).into_bytes();
    about.push(b'\n');
    about.extend(bytes);
    dir.put("about", &about);
    let snapshot = Snapshot {
        name: "s".into(),
        dir: dir.path().into(),
    };
    let _ = snapshot.about();
}

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    if let Ok(name) = text.parse::<Name>() {
        let mut parts = std::path::Path::new(name.as_str()).components();
        assert!(matches!(
            parts.next(),
            Some(std::path::Component::Normal(_))
        ));
        assert!(parts.next().is_none() && name.as_str().len() <= 63);
    }
    if let Ok(bytes) = memory(&text) {
        assert!(bytes.is_multiple_of(4096));
    }
    let dir = Dir::new("files");
    one(&dir, data);
    let mut b = Bytes(data);
    let mut value = match b.u8() & 3 {
        0 => sample::about(),
        1 => sample::about()["vm"].clone(),
        _ => serde_json::to_value(State::new(umlctl::vm::state::Phase::Running)).expect("JSON"),
    };
    json::edit(&mut value, &mut b);
    one(&dir, value.to_string().as_bytes());
});

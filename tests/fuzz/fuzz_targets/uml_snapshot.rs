//! A machine's snapshot in its directory. The sums of its manifest and of `about` fit, the others if the input says so.
//! Asserted: reading and verifying give errors at most, never a panic, an endless loop or a huge buffer; what was not
//! damaged is verified, and what was is not.
#![no_main]

use std::fs::File;

use cowfs_fuzz::snap::{Dir, sealed};
use cowfs_fuzz::{Bytes, json, sample};
use libfuzzer_sys::fuzz_target;
use snapshot::uml::image::{self, Sums};
use umlctl::snapshots::store::Snapshot;

/// A file with its sums; gives the sum of these.
fn summed(dir: &Dir, name: &str, sums: &str, bytes: &[u8]) -> String {
    dir.put(name, bytes);
    let path = dir.path().join(name);
    let file = File::open(&path).expect("it was just written");
    let all = Sums::of(&file, &path).expect("it can be read");
    all.write(&dir.path().join(sums)).expect("room")
}

fuzz_target!(|data: &[u8]| {
    let mut b = Bytes(data);
    let dir = Dir::new("machine");
    let flags = b.u8();
    let memory = b.long().repeat(1 + usize::from(b.u8() & 63));
    let mut machine = sample::machine(1 << 20);
    machine.memory_sums = summed(&dir, image::MEMORY, image::MEMORY_SUMS, &memory);
    if flags & 1 != 0 {
        let disk = b.long();
        machine.disk_sums = Some(summed(&dir, image::DISK, image::DISK_SUMS, disk));
    }
    let private = b.short();
    dir.put(image::PRIVATE, private);
    machine.private_sum = image::sum(private);
    let mut value = serde_json::to_value(&machine).expect("JSON");
    let mut about = cowfs_fuzz::sample::about();
    let mut damaged = None;
    match flags >> 1 & 7 {
        0 => {}
        1 => {
            json::edit(&mut value, &mut b);
            damaged = Some(false);
        }
        2 => {
            json::edit(&mut about, &mut b);
            damaged = Some(false);
        }
        3 => {
            dir.put(image::MEMORY_SUMS, b.long());
            damaged = Some(false);
        }
        4 => {
            // Sums that are those of the manifest, and of something else.
            let sums = b.long();
            dir.put(image::MEMORY_SUMS, sums);
            value["memory_sums"] = image::sum(sums).into();
            damaged = Some(false);
        }
        n => {
            let name = [image::MEMORY, image::PRIVATE, image::MEMORY_SUMS][usize::from(n - 5)];
            let mut bytes = std::fs::read(dir.path().join(name)).expect("it is there");
            let at = usize::from(b.u16());
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 | b.u8();
                damaged = Some(true);
            }
            dir.put(name, &bytes);
        }
    }
    dir.put(
        "machine",
        &sealed(b"UMLMACH\n", value.to_string().as_bytes()),
    );
    let body = format!("{about}\n");
    dir.put(
        "about",
        format!("{}\n{body}", image::sum(body.as_bytes())).as_bytes(),
    );
    let snapshot = Snapshot {
        name: "s".into(),
        dir: dir.path().into(),
    };
    match (snapshot.verify(), damaged) {
        (Err(e), None) => panic!("nothing was damaged: {e}"),
        (Ok(()), Some(true)) => panic!("damage is not seen"),
        _ => {}
    }
    if flags & 0x80 != 0 {
        dir.put("machine", b.long());
        dir.put("about", b.long());
        let _ = snapshot.verify();
        let _ = snapshot.about();
    }
});

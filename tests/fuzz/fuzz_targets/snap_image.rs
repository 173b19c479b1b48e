//! A snapshot's directory, with a layer below it: index, pages, content of a file, manifest. All sums but those of pages
//! fit. Asserted: loading, opening, verifying, packing and unpacking give errors at most, never a panic, an endless loop or
//! a huge buffer; what is verified stays so when it is packed and unpacked.
#![no_main]

use std::fs::{self, File};
use std::path::Path;

use cowfs_fuzz::snap::{self, Dir};
use cowfs_fuzz::{Bytes, sample};
use libfuzzer_sys::fuzz_target;
use snapshot::image::index::Index;
use snapshot::image::manifest::Layer;
use snapshot::image::pageset::BLOCK;
use snapshot::image::{pack, store, verified, verify};
use snapshot::resume::image::Snapshot;
use snapshot::resume::source::{PageSource, Plain};

const FILL: u8 = 0x5a;

/// Index and pages; gives the index's sum.
fn memory(dir: &Path, b: &mut Bytes<'_>) -> String {
    let entries: Vec<u8> = (0..b.u8() & 7).flat_map(|_| snap::entry(b, FILL)).collect();
    let index = snap::index(&entries);
    fs::write(dir.join("index"), &index).expect("room");
    let mut pages = vec![FILL; BLOCK as usize * usize::from(b.u8() & 3)];
    if let Some(byte) = pages.get_mut(usize::from(b.u16()) * 97) {
        *byte ^= b.u8();
    }
    fs::write(dir.join("pages"), &pages).expect("room");
    if b.u8() & 7 == 7 {
        let file = File::options().write(true).open(dir.join("pages"));
        let _ = file.expect("pages").set_len(b.u64() >> (b.u8() & 63));
    }
    blake3::hash(&index).to_hex().to_string()
}

/// Pages of a block come by rising number, none twice.
fn in_order(source: &dyn PageSource) {
    for space in 0..4 {
        for block in source.blocks(space) {
            let runs = source.runs(space, block);
            assert!(runs.is_sorted_by(|a, b| a.first + a.count <= b.first));
            assert!(runs.iter().all(|r| r.first + r.count <= 512));
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let mut b = Bytes(data);
    let dir = Dir::new("image");
    let (at, layer) = (dir.path().join("own"), dir.path().join("layer"));
    fs::create_dir_all(at.join("files")).expect("room");
    fs::create_dir_all(&layer).expect("room");
    let mut m = sample::manifest();
    let flags = b.u8();
    if flags & 1 != 0 {
        let index = memory(&layer, &mut b);
        let path = layer.clone();
        m.layers.push(Layer { path, index });
    }
    m.index = memory(&at, &mut b);
    m.files.truncate(1);
    if flags & 2 != 0 {
        let content = b.short();
        fs::write(at.join("files/0"), content).expect("room");
        let size = content.len() as u64 ^ u64::from(b.u8() & 1);
        m.files
            .push(sample::memfd(size, &String::from_utf8_lossy(b.short())));
    }
    store::publish(&at, &m, false).expect("room");
    let m = store::load(&at).expect("what was written is read");
    let good = verify::verify(&at, &m);
    if let Ok((index, _)) = Index::open(&at) {
        snap::sound(&index);
        if let Ok(done) = &good {
            assert_eq!(done.entries, index.entries().len() as u64);
        }
    }
    let records = dir.path().join("records");
    for again in [true, false] {
        // Files are not looked at there.
        let opened = verified::open(&records, &at, &m, again);
        assert!(opened.is_ok() || good.is_err());
    }
    if let Ok((index, pages)) = verify::open(&at, &m)
        && let Ok(mapped) = pages.map()
    {
        for e in index.entries() {
            for run in index.runs(e.space, e.block) {
                let bytes = mapped.bytes(&run).expect("the file is long enough");
                assert_eq!(bytes.len() as u64, run.len);
            }
        }
    }
    if let Ok(source) = Snapshot::open(&at, &m) {
        in_order(&source);
    }
    if m.layers.is_empty()
        && let Ok(source) = Plain::open(&at)
    {
        let _ = source.blocks(0).iter().map(|b| source.runs(0, *b)).count();
    }
    if pack::pack(&at, &m, 1).is_err() {
        return;
    }
    if let Ok(good) = &good {
        let now = verify::verify(&at, &m).expect("it was before it was packed");
        assert_eq!(now, *good);
    }
    if flags & 4 != 0 {
        let path = at.join(pack::NAME);
        // With layers, the verification has unpacked it.
        let Ok(mut bytes) = fs::read(&path) else {
            return;
        };
        while let Some(by) = b.next() {
            let n = usize::from(b.u16()) % bytes.len();
            bytes[n] ^= by;
        }
        fs::write(&path, &bytes).expect("room");
        let _ = verify::verify(&at, &m);
        let _ = verify::open(&at, &m);
    } else if let Ok(good) = good {
        verify::open(&at, &m).expect("it can be unpacked");
        assert_eq!(verify::verify(&at, &m).ok(), Some(good));
    }
});

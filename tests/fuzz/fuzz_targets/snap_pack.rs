//! Packed pages: a file as it is, and frames behind a right header. Asserted: never a panic, an endless loop or a huge
//! buffer, and what the check accepts can be unpacked.
#![no_main]

use std::path::Path;

use cowfs_fuzz::snap::Dir;
use libfuzzer_sys::fuzz_target;
use snapshot::image::index::{Entry, Index};
use snapshot::image::pack;
use snapshot::image::pages::sum;
use snapshot::image::pageset::{BLOCK, PageSet};

fn index() -> Index {
    let block = vec![0x5a; BLOCK as usize];
    let entry = |block_number, slot, pages: PageSet| Entry {
        space: 0,
        layer: 0,
        block: block_number,
        slot,
        pages,
        sum: sum(&pages, &block),
    };
    Index::new(vec![
        entry(1, 1, PageSet::of(3..5)),
        entry(2, 0, PageSet::of(511..512)),
    ])
}

fn one(dir: &Path, index: &Index) {
    let checked = pack::check(dir, index);
    let unpacked = pack::unpack(dir, index);
    assert_eq!(checked.is_ok(), unpacked.is_ok());
    if let Ok(found) = checked {
        assert_eq!(found, (2, 3));
        let len = std::fs::metadata(dir.join("pages")).map(|m| m.len()).ok();
        assert_eq!(len, Some(2 * BLOCK));
    }
    let _ = std::fs::remove_file(dir.join("pages"));
}

fuzz_target!(|data: &[u8]| {
    let dir = Dir::new("pack");
    let index = index();
    dir.put(pack::NAME, data);
    one(dir.path(), &index);
    let mut file = b"UMLPACK\n\x01\0\0\0\x02\0\0\0".to_vec();
    let mut rest = data;
    // Frames behind their lengths in two bytes.
    while let Some(([a, b], after)) = rest.split_first_chunk() {
        let len = usize::from(u16::from_le_bytes([*a, *b])).min(after.len());
        file.extend((len as u64).to_le_bytes());
        file.extend(&after[..len]);
        rest = &after[len..];
    }
    dir.put(pack::NAME, &file);
    one(dir.path(), &index);
});

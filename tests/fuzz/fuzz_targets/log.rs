//! Log payloads and chunks. Asserted: records and changes are parts of the payload and get shorter with each step, replay
//! ends, and it never accepts a chunk whose checksum is wrong.
#![no_main]

use cowfs::store::disk::Disk;
use cowfs::store::log::{self, Record};
use cowfs_fuzz::store::seal_chunks;
use cowfs_tests::simdisk::SimDisk;
use libfuzzer_sys::fuzz_target;

fn records(mut payload: &[u8]) {
    let mut left = payload.len();
    while let Ok(Some(record)) = log::next_record(&mut payload) {
        assert!(payload.len() < left);
        left = payload.len();
        if let Record::Batch { mut changes, .. } = record {
            while let Ok(Some((key, _))) = log::next_change(&mut changes) {
                assert!(!key.is_empty() && key.len() <= cowfs::tree::MAX_KEY);
            }
        }
    }
}

fuzz_target!(|data: &[u8]| {
    records(data);
    let disk = SimDisk::default();
    let (first, second) = data.split_at(data.len() / 2);
    for (name, bytes) in log::FILES.iter().zip([first, second]) {
        let file = disk.open(name, true).expect("a new file");
        file.write_at(bytes, 0).expect("room");
    }
    for sealed in [false, true] {
        if sealed {
            let chain = seal_chunks(disk.open("log.0", false).expect("there").as_ref(), [0; 16]);
            seal_chunks(disk.open("log.1", false).expect("there").as_ref(), chain);
        }
        let mut seen = 0;
        let end = log::replay(&disk, 0, [0; 16], 0, &mut |_, payload| {
            seen += 1;
            records(payload);
            Ok(())
        });
        assert!(end.is_ok_and(|e| e.chunks == seen));
    }
});

//! Superblock slots, as they are and with a right checksum. Asserted: never a panic, and what is accepted encodes to
//! bytes that decode to the same.
#![no_main]

use cowfs::store::disk::Disk;
use cowfs::store::superblock::{FILE, SLOT_BYTES, Superblock};
use cowfs_fuzz::store::seal_slot;
use cowfs_tests::simdisk::SimDisk;
use libfuzzer_sys::fuzz_target;

fn decode(slot: &[u8]) {
    if let Ok(Some(sb)) = Superblock::decode(slot) {
        let again = Superblock::decode(&sb.encode());
        assert_eq!(again.ok().flatten(), Some(sb));
    }
}

fuzz_target!(|data: &[u8]| {
    decode(data);
    let mut slot = data.to_vec();
    slot.resize(SLOT_BYTES, 0);
    seal_slot(&mut slot);
    decode(&slot);
    let disk = SimDisk::default();
    let file = disk.open(FILE, true).expect("a new file");
    file.write_at(&slot, 0).expect("room");
    file.write_at(data, SLOT_BYTES as u64).expect("room");
    let _ = Superblock::load(file.as_ref());
});

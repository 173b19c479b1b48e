//! Images on a mounted cowfs: a duplicate is made by sharing, whatever is in it.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use cowfs::image::{self, DuplicateOptions};
use cowfs_tests::Rng;
use cowfs_tests::image::{holds, random_disk, write_at_random, write_sectors};
use cowfs_tests::live::Live;

/// What the store takes of its disk.
fn blocks(dir: &Path) -> u64 {
    fs::read_dir(dir)
        .expect("a directory")
        .map(|e| {
            let path = e.expect("an entry").path();
            let meta = fs::symlink_metadata(&path).expect("there");
            meta.blocks() * 512 + if meta.is_dir() { blocks(&path) } else { 0 }
        })
        .sum()
}

#[test]
fn a_duplicate_shares_and_goes_its_own_way() {
    let l = Live::new();
    let mut rng = Rng(11);
    let mut disk = random_disk(&mut rng, 128 << 11);
    fs::write(l.at("base"), &disk).expect("room");
    image::create(&l.at("cow"), &l.at("base")).expect("a base");
    // Much in it: 48 MiB.
    let much = random_disk(&mut rng, 96 << 10);
    write_sectors(&l.at("cow"), &mut disk, 1000, &much);
    write_at_random(&mut rng, &l.at("cow"), &mut disk);
    l.run(&["checkpoint", &l.mnt(), "before", "--wait"]);
    let before = blocks(&l.store());
    let mut copies = Vec::new();
    for n in 0..20 {
        let to = l.at(&format!("copy{n}"));
        let d = image::duplicate(&l.at("cow"), &to).expect("room");
        assert!(d.shared && d.copied_bytes == 0, "{d:?}");
        copies.push(to);
    }
    l.run(&["checkpoint", &l.mnt(), "after", "--wait"]);
    let grown = blocks(&l.store()).saturating_sub(before);
    assert!(grown < 24 << 20, "20 copies of 48 MiB took {grown} bytes");
    // Each its own.
    let mut mine = disk.clone();
    write_sectors(&copies[0], &mut mine, 5000, &[1; 8192]);
    let mut first = disk.clone();
    write_sectors(&l.at("cow"), &mut first, 5000, &[2; 4096]);
    for (cow, what) in [
        (&copies[0], &mine),
        (&l.at("cow"), &first),
        (&copies[1], &disk),
    ] {
        let out = l.at("merged");
        image::merge(cow, &out, true).expect("they belong together");
        holds(&out, what, &cow.display().to_string());
    }
    l.check();
}

#[test]
fn a_duplicate_of_a_file_without_a_name() {
    let l = Live::new();
    let mut rng = Rng(12);
    let mut disk = random_disk(&mut rng, 4096);
    fs::write(l.at("base"), &disk).expect("room");
    image::create(&l.at("cow"), &l.at("base")).expect("a base");
    write_at_random(&mut rng, &l.at("cow"), &mut disk);
    let file = File::options()
        .read(true)
        .write(true)
        .open(l.at("cow"))
        .expect("there");
    fs::remove_file(l.at("cow")).expect("there");
    let options = DuplicateOptions {
        sync: false,
        ..DuplicateOptions::default()
    };
    let d = image::duplicate_file_with(&file, &l.at("again"), options).expect("room");
    assert!(d.shared, "{d:?}");
    image::merge(&l.at("again"), &l.at("merged"), false).expect("whole");
    holds(&l.at("merged"), &disk, "without a name");
    // From one filesystem to another.
    let out = l.beside("out");
    let d = image::duplicate_file_with(&file, &out.join("copy"), options).expect("room");
    assert!(!d.shared && d.copied_bytes > 0, "{d:?}");
    image::merge(&out.join("copy"), &out.join("merged"), false).expect("whole");
    holds(&out.join("merged"), &disk, "copied");
    drop(file);
    l.check();
}

#[test]
fn a_checkpoint_holds_base_and_cow_file_together() {
    let l = Live::new();
    let mut rng = Rng(13);
    let mut disk = random_disk(&mut rng, 4096);
    fs::write(l.at("base"), &disk).expect("room");
    image::create(&l.at("cow"), &l.at("base")).expect("a base");
    write_at_random(&mut rng, &l.at("cow"), &mut disk);
    l.run(&["checkpoint", &l.mnt(), "one"]);
    let mut later = disk.clone();
    write_sectors(&l.at("cow"), &mut later, 0, &[4; 4096]);
    image::merge_in_place(&l.at("cow")).expect("they belong together");
    holds(&l.at("base"), &later, "merged");
    image::check(&l.at("cow")).expect_err("the base is another");
    l.run(&["rollback", &l.mnt(), "one"]);
    // Size and time of the base are again those in the header.
    image::merge(&l.at("cow"), &l.at("merged"), false).expect("they belong together");
    holds(&l.at("merged"), &disk, "after the rollback");
    l.check();
}

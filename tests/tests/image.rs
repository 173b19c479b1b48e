//! Images: ours against those of uml-utilities, byte for byte and both ways.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::time::{Duration, SystemTime};

use cowfs::image;
use cowfs_tests::Rng;
use cowfs_tests::image::{
    Images, SECTOR, holds, random_disk, write_at_random, write_sectors, write_with_holes,
};
use cowfs_tests::live::binary;
use serde_json::Value;

/// Disks of a random size: the last bitmap byte whole or not, and bitmaps beyond one block.
fn sectors(rng: &mut Rng, seed: u64) -> usize {
    match seed % 3 {
        0 => 1 + rng.below(100) as usize,
        1 => 8 * (1 + rng.below(400) as usize),
        _ => 8 * 4096 + rng.below(9000) as usize,
    }
}

#[test]
fn a_new_cow_file_is_that_of_uml_mkcow() {
    let i = Images::new();
    fs::create_dir(i.at("deep")).expect("room");
    symlink("deep", i.at("link")).expect("room");
    for seed in 0..12 {
        let mut rng = Rng(seed);
        let n = sectors(&mut rng, seed);
        let base = i.at("deep/base");
        File::create(&base)
            .and_then(|f| f.set_len((n * SECTOR) as u64))
            .expect("room");
        for name in ["deep/base", "link/base", "./link/../deep/base"] {
            // Its -f leaves the length of what was there.
            let _ = fs::remove_file(i.at("theirs"));
            i.uml("uml_mkcow", &["theirs", name]);
            i.image(&["create", "ours", name, "--force"]);
            let theirs = fs::read(i.at("theirs")).expect("theirs");
            holds(&i.at("ours"), &theirs, &format!("seed {seed}, {name}"));
        }
    }
    // And it takes less room than theirs or the same.
    let blocks = |name| fs::metadata(i.at(name)).expect("there").blocks();
    assert!(blocks("ours") <= blocks("theirs"));
}

#[test]
fn a_merge_is_that_of_uml_moo_both_ways() {
    for seed in 0..12 {
        let i = Images::new();
        let mut rng = Rng(1000 + seed);
        let n = sectors(&mut rng, seed);
        let mut disk = random_disk(&mut rng, n);
        write_with_holes(&i.at("base"), &disk);
        // One made by either, read by the other.
        match seed % 2 {
            0 => i.uml("uml_mkcow", &["cow", "base"]),
            _ => drop(i.image(&["create", "cow", "base"])),
        }
        write_at_random(&mut rng, &i.at("cow"), &mut disk);
        i.uml("uml_moo", &["cow", "theirs"]);
        i.image(&["merge", "cow", "ours"]);
        i.image(&["export", "cow", "plain"]);
        let out = i.try_image(&["export", "cow", "-"]);
        assert!(out.stdout == disk, "seed {seed}: standard output differs");
        for name in ["theirs", "ours", "plain"] {
            holds(&i.at(name), &disk, &format!("seed {seed}"));
        }
        i.image(&["verify", "cow"]);
    }
}

#[test]
fn a_merge_in_place_is_that_of_uml_moo_d() {
    for seed in 0..6 {
        let i = Images::new();
        let mut rng = Rng(2000 + seed);
        let n = sectors(&mut rng, seed);
        let mut disk = random_disk(&mut rng, n);
        let base = i.at("base");
        write_with_holes(&base, &disk);
        fs::set_permissions(&base, PermissionsExt::from_mode(0o440)).expect("ours");
        i.image(&["create", "cow", "base"]);
        i.image(&["create", "other", "base"]);
        write_at_random(&mut rng, &i.at("cow"), &mut disk);
        let before = fs::metadata(&base).expect("there");
        // Theirs works on a copy that has the base's name meanwhile, as it cannot have -b beside -d.
        fs::rename(&base, i.at("keep")).expect("room");
        fs::copy(i.at("keep"), &base).expect("room");
        let made = before.modified().expect("a time");
        File::open(&base)
            .and_then(|f| f.set_modified(made))
            .expect("ours");
        i.uml("uml_moo", &["-d", "cow"]);
        fs::rename(&base, i.at("theirs")).expect("room");
        fs::rename(i.at("keep"), &base).expect("room");
        i.image(&["merge", "cow", "--in-place"]);
        holds(&base, &disk, &format!("seed {seed}, ours"));
        holds(&i.at("theirs"), &disk, &format!("seed {seed}, theirs"));
        let after = fs::metadata(&base).expect("there");
        assert_eq!(after.mode(), before.mode());
        // Also within the second in which the base was made.
        assert!(after.mtime() > before.mtime());
        for stale in ["cow", "other"] {
            let said = i.refused(&["merge", stale, "out"], 1);
            assert!(
                said.contains("has changed since") && said.contains("base"),
                "{said}"
            );
        }
    }
}

#[test]
fn a_rebase_changes_nothing_that_a_guest_sees() {
    for seed in 0..9 {
        let i = Images::new();
        let mut rng = Rng(3000 + seed);
        let n = sectors(&mut rng, seed);
        let mut disk = random_disk(&mut rng, n);
        let mut other = disk.clone();
        write_with_holes(&i.at("base"), &disk);
        i.image(&["create", "cow", "base"]);
        write_at_random(&mut rng, &i.at("cow"), &mut disk);
        for _ in 0..rng.below(20) {
            let first = rng.below(n as u64) as usize;
            other[first * SECTOR..][..SECTOR].fill(rng.draw() as u8);
        }
        write_with_holes(&i.at("other"), &other);
        i.image(&["rebase", "cow", "other"]);
        i.uml("uml_moo", &["cow", "merged"]);
        holds(&i.at("merged"), &disk, &format!("seed {seed}"));
        let differing = disk
            .chunks(SECTOR)
            .zip(other.chunks(SECTOR))
            .filter(|(a, b)| a != b)
            .count();
        let sectors = |name: &str| {
            let info = image::info(&i.at(name)).expect("a COW file");
            info.cow.expect("a COW file").written_sectors
        };
        assert_eq!(sectors("cow"), differing as u64, "seed {seed}");
        // On what it was merged into it is empty.
        i.image(&["rebase", "cow", "merged"]);
        assert_eq!(sectors("cow"), 0);
        i.image(&["merge", "cow", "again"]);
        holds(&i.at("again"), &disk, &format!("seed {seed}, again"));
    }
}

#[test]
fn a_base_that_moved_is_told_without_a_check() {
    let i = Images::new();
    let mut rng = Rng(1);
    let mut disk = random_disk(&mut rng, 300);
    write_with_holes(&i.at("base"), &disk);
    i.image(&["create", "cow", "base"]);
    write_sectors(&i.at("cow"), &mut disk, 7, &[9; 1024]);
    fs::rename(i.at("base"), i.at("moved")).expect("room");
    let said = i.refused(&["merge", "cow", "out"], 1);
    assert!(
        said.contains("cannot be opened") && said.contains("--unchecked"),
        "{said}"
    );
    let later = SystemTime::now() + Duration::from_secs(100);
    File::open(i.at("moved"))
        .and_then(|f| f.set_modified(later))
        .expect("ours");
    i.image(&["rebase", "cow", "moved", "--unchecked"]);
    i.image(&["merge", "cow", "out"]);
    i.uml("uml_moo", &["cow", "theirs"]);
    holds(&i.at("out"), &disk, "ours");
    holds(&i.at("theirs"), &disk, "theirs");
}

#[test]
fn an_import_is_sparse_and_its_digest_is_kept() {
    let i = Images::new();
    fs::create_dir(i.at("bases")).expect("room");
    let mut bytes = vec![0; 8 << 20];
    bytes[5 << 20..][..3000].fill(7);
    bytes.truncate((8 << 20) - 100);
    let source = i.file("source.img", &bytes);
    let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1_500_000_000);
    File::open(&source)
        .and_then(|f| f.set_modified(old))
        .expect("ours");
    let said = i.image(&["import", "source.img", "bases", "--name", "b"]);
    let path = i.at("bases/b");
    assert_eq!(
        said.trim(),
        path.canonicalize().expect("there").display().to_string()
    );
    bytes.resize(8 << 20, 0);
    holds(&path, &bytes, "the import");
    let meta = fs::metadata(&path).expect("there");
    assert!(meta.blocks() * 512 <= 64 << 10, "{} blocks", meta.blocks());
    assert_eq!((meta.mode() & 0o777, meta.mtime()), (0o444, 1_500_000_000));
    i.image(&["verify", "bases/b"]);
    i.image(&["create", "cow", "bases/b"]);
    // What the header cannot tell.
    let writer = File::options().write(true).open(&path).expect("root may");
    writer.write_all_at(b"x", 4 << 20).expect("room");
    writer.set_modified(old).expect("ours");
    drop(writer);
    image::check(&i.at("cow")).expect("size and time are the same");
    for of in ["bases/b", "cow"] {
        let out = i.try_image(&["verify", of]);
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        assert_eq!(out.status.code(), Some(1));
        assert!(
            said.contains("not those of its digest") && said.contains("b.b3"),
            "{said}"
        );
    }
}

#[test]
fn lists_and_answers_for_scripts() {
    let i = Images::new();
    fs::create_dir(i.at("d")).expect("room");
    let base = i.file("d/base", &vec![1; 1 << 20]);
    i.file("d/notes.txt", b"no disk");
    assert_eq!(i.image(&["create", "d/cow", "d/base"]), "d/cow\n");
    fs::copy(i.at("d/cow"), i.at("d/short")).expect("room");
    File::options()
        .write(true)
        .open(i.at("d/short"))
        .and_then(|f| f.set_len(8200))
        .expect("ours");
    let table = i.image(&["list", "d"]);
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 4, "{table}");
    let at = lines[0].find("STATE").expect("a column");
    let states: Vec<&str> = lines[1..].iter().map(|l| &l[at..]).collect();
    assert_eq!(states, ["ok", "ok", "broken"], "{table}");
    let names = i.image(&["list", "d", "--no-headers", "-o", "name,kind"]);
    assert_eq!(names, "base   base\ncow    cow\nshort  cow\n");
    let json: Value = serde_json::from_str(&i.image(&["list", "d", "--json"])).expect("JSON");
    assert_eq!(
        (&json["schema"], &json["images"][2]["kind"]),
        (&1.into(), &"cow".into())
    );
    assert!(
        json["images"][2]["problem"]
            .as_str()
            .expect("text")
            .contains("cut short")
    );
    let json: Value = serde_json::from_str(&i.image(&["info", "d/cow", "--json"])).expect("JSON");
    assert_eq!(json["size_bytes"], 1 << 20);
    assert_eq!(json["cow"]["base"], base.display().to_string());
    assert_eq!(json["problem"], Value::Null);
    let json: Value =
        serde_json::from_str(&i.image(&["duplicate", "d/cow", "d/two", "--json"])).expect("JSON");
    assert!(
        json["elapsed_us"].is_u64() && json["path"] == "d/two",
        "{json}"
    );
    let said = i.refused(&["create", "d/cow", "d/base", "--json"], 1);
    let json: Value = serde_json::from_str(&said).expect("JSON");
    assert!(json["error"].as_str().expect("text").contains("--force"));
    i.refused(&["merge", "d/cow"], 2);
    fs::create_dir(i.at("man")).expect("room");
    let out = i.try_run(&binary(), &["man", "man"], &[]);
    assert!(out.status.success());
    let page = fs::read_to_string(i.at("man/cowfs-image-rebase.1")).expect("a page");
    assert!(page.contains("unchecked"));
    i.refused(&["import", "d/base", ".", "--name", "a/b"], 2);
}

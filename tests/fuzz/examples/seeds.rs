//! Writes a small corpus to begin with: one directory a target. Usage: seeds DIRECTORY

use std::fs;
use std::path::{Path, PathBuf};

use cowfs::fs::{Inode, key};
use cowfs::store::disk::Disk;
use cowfs::store::log::Record;
use cowfs::store::{Catalog, CatalogOp, log, superblock};
use cowfs_fuzz::{put_record, seeds, store};
use cowfs_tests::simdisk::SimDisk;

fn inode(kind: u32, nlink: u32, size: u64, flags: u32) -> Vec<u8> {
    let inode = Inode {
        mode: kind | 0o755,
        nlink,
        size,
        flags,
        parent: 1,
        mapped: if kind == libc::S_IFREG { 4096 } else { 0 },
        ..Inode::default()
    };
    inode.encode().to_vec()
}

/// A root with a directory, a file with an extent and an attribute, a symlink and an orphan.
fn records() -> Vec<u8> {
    let mut out = vec![11];
    let extent = [
        &[1u8, 0, 0, 0][..],
        &[0; 8],
        &4096u32.to_le_bytes(),
        &[0; 9],
    ]
    .concat();
    put_record(
        &mut out,
        1,
        key::INODE,
        &[],
        &inode(libc::S_IFDIR, 3, 4096, 0),
    );
    put_record(&mut out, 1, 0x84, b"a", &[2, 0, 0, 0, 0, 0, 0, 0, 8]);
    put_record(&mut out, 1, 0x84, b"d", &[3, 0, 0, 0, 0, 0, 0, 0, 4]);
    put_record(
        &mut out,
        2,
        key::INODE,
        &[],
        &inode(libc::S_IFREG, 1, 9000, 2),
    );
    put_record(&mut out, 2, key::XATTR, b"user.x\0\0\0", b"value");
    put_record(&mut out, 2, key::EXTENT, &[0; 8], &extent);
    put_record(
        &mut out,
        3,
        key::INODE,
        &[],
        &inode(libc::S_IFDIR, 2, 4096, 0),
    );
    put_record(
        &mut out,
        3,
        key::DIRENT,
        &[0, 0, 0, 0, 0, 0, 1, 0, b'l'],
        &[4, 0, 0, 0, 0, 0, 0, 0, 10],
    );
    put_record(&mut out, 4, key::INODE, &[], &inode(libc::S_IFLNK, 0, 1, 0));
    put_record(&mut out, 4, key::SYMLINK, &[0], b"a");
    put_record(&mut out, 0, key::ORPHAN, &4u64.to_be_bytes(), &[]);
    out
}

/// Two leaves below a root, and operations on them.
fn tree() -> Vec<u8> {
    let mut out = vec![3];
    out.extend([1, 1, 9, 2, 0, 2, 1, b'm', 3]);
    for keys in [["a", "c", "f"], ["m", "ma", "z"]] {
        out.extend([0, 1, 9, 3]);
        for k in keys {
            out.push(k.len() as u8);
            out.extend(k.bytes());
            out.extend([2, b'v', b'v']);
        }
    }
    out.push(0);
    for kind in [2, 3, 0, 1, 0, 1, 1] {
        out.extend([kind, 1, b'm']);
        if kind == 0 {
            out.extend([200, 3]);
        }
    }
    // Each entry goes, by its number.
    out.extend((0..6).flat_map(|i| [i << 2 | 1, 0]));
    out
}

fn request(out: &mut Vec<u8>, opcode: u8, ino: u8, body: &[u8]) {
    out.extend([opcode, ino, 0]);
    out.extend_from_slice(&(body.len() as u16).to_le_bytes());
    out.extend_from_slice(body);
}

/// Bodies of requests by opcode: little-endian numbers, then names.
fn bodies() -> Vec<(u8, u8, Vec<u8>)> {
    let n = |words: &[u32], names: &[u8]| {
        let mut b: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        b.extend_from_slice(names);
        b
    };
    let mut setattr = vec![0; 22];
    (setattr[0], setattr[4], setattr[17]) = (0xfff, 5000, 0o640);
    vec![
        (1, 1, b"file 3\0".to_vec()),
        (3, 5, vec![0; 16]),
        (4, 5, n(&setattr, b"")),
        (5, 5, vec![]),
        (6, 1, b"new link\0target\0".to_vec()),
        (8, 1, n(&[0o100_644, 0, 0o22, 0], b"made\0")),
        (9, 1, n(&[0o755, 0], b"made dir\0")),
        (35, 1, n(&[1, 0o644, 0, 0], b"created\0")),
        (16, 5, n(&[0, 0, 0, 0, 6, 0, 0, 0, 0, 0], b"hello!")),
        (15, 5, n(&[0, 0, 0, 0, 4096, 0, 0, 0, 0, 0], b"")),
        (12, 1, n(&[1, 0], b"file 5\0renamed\0")),
        (45, 1, n(&[1, 0, 2, 0], b"file 6\0file 7\0")),
        (13, 1, n(&[5, 0x100], b"hard link\0")),
        (21, 5, n(&[3, 0, 0, 0], b"user.y\0abc")),
        (22, 5, n(&[100, 0], b"user.x\0")),
        (23, 5, n(&[100, 0], b"")),
        (24, 5, b"user.x\0".to_vec()),
        (28, 1, n(&[0, 0, 0, 0, 4096, 0, 0, 0, 0, 0], b"")),
        (44, 1, n(&[0, 0, 0, 0, 4096, 0, 0, 0, 0, 0], b"")),
        (43, 5, n(&[0, 0, 0, 0, 4096, 0, 3, 0], b"")),
        (46, 5, n(&[0, 0, 0, 0, 3, 0], b"")),
        (
            47,
            7,
            n(&[0, 0, 0, 0, 5, 0x100, 0, 0, 8192, 0, 900, 0, 0, 0], b""),
        ),
        (51, 1, n(&[1, 0o644, 0, 0], b"\0")),
        (17, 1, vec![]),
        (20, 5, vec![0; 16]),
        (50, 1, vec![0; 8]),
        (52, 5, vec![0; 24]),
        (10, 1, b"file 9\0".to_vec()),
        (11, 1, b"made dir\0".to_vec()),
        (2, 5, vec![1, 0, 0, 0, 0, 0, 0, 0]),
        (42, 5, n(&[1, 0, 5, 0x100, 1, 0], b"")),
        (26, 1, n(&[7, 45, 0, 0, 0], b"")),
    ]
}

fn message(opcode: u8, body: &[u8]) -> Vec<u8> {
    let mut m = (40 + body.len() as u32).to_le_bytes().to_vec();
    m.extend_from_slice(&u32::from(opcode).to_le_bytes());
    m.resize(40, 0);
    m.extend_from_slice(body);
    m
}

fn catalog() -> Vec<u8> {
    let mut out = Catalog::new(1, 2, 0).encode();
    let (head, name) = ("main".to_owned(), "n".to_owned());
    let ops = [
        CatalogOp::Checkpoint {
            head: head.clone(),
            id: 1,
            name: name.clone(),
            tags: [(name.clone(), name.clone())].into(),
            created_us: 1,
        },
        CatalogOp::Clone {
            from: 1,
            id: 2,
            name: name.clone(),
            created_us: 2,
        },
        CatalogOp::Rollback {
            head: head.clone(),
            to: 1,
            left: Some((2, "l".into())),
            created_us: 3,
        },
        CatalogOp::Tag {
            id: 1,
            set: [(name.clone(), name.clone())].into(),
            remove: vec![name.clone()],
        },
        CatalogOp::Pin { id: 1, on: true },
        CatalogOp::Rename {
            id: 1,
            name: "m".into(),
        },
        CatalogOp::RenameHead {
            head: head.clone(),
            name: "h".into(),
        },
        CatalogOp::Delete { id: 1 },
        CatalogOp::DeleteHead { head: name },
    ];
    for op in ops {
        out.push(b'\n');
        out.extend(serde_json::to_vec(&op).expect("JSON"));
    }
    out
}

fn acl(tags: &[(u16, u16)]) -> Vec<u8> {
    let mut v = 2u32.to_le_bytes().to_vec();
    for (tag, perm) in tags {
        v.extend([tag.to_le_bytes(), perm.to_le_bytes()].concat());
        v.extend(5u32.to_le_bytes());
    }
    v
}

/// The largest numbers where there is one more to come, and two extents that overlap.
fn edges(put: &dyn Fn(&str, &str, &[u8]), disk: &SimDisk) {
    let mut json = Catalog::new(1, 2, 0).encode();
    let max = r#"{"op":"checkpoint","head":"main","id":18446744073709551615,"name":"x","tags":{},"created_us":1}"#;
    json.push(b'\n');
    json.extend(max.bytes());
    put("catalog", "last-id", &json);

    let place = |name: &str| {
        let files = disk.files();
        let at = files.iter().filter(|f| f.1 > 0).position(|f| f.0 == name);
        u8::try_from(at.expect("a file of the store")).expect("few files")
    };
    let patch = |out: &mut Vec<u8>, name: &str, at: u64, bytes: &[u8]| {
        out.push(place(name));
        out.extend(&at.to_le_bytes()[..3]);
        out.push(bytes.len() as u8);
        out.extend(bytes);
    };
    let sb_file = disk.open(superblock::FILE, false).expect("it is there");
    let sb = superblock::Superblock::load(sb_file.as_ref()).expect("a superblock");
    // Number, generation and first key of each file's first batch; before its changes stand number, generation and head.
    for file in log::FILES {
        let mut bytes = vec![0; 1 << 16];
        let log = disk.open(file, false).expect("it is there");
        log.read_at(&mut bytes, 64).expect("it can be read");
        let mut rest = &bytes[..];
        while let Ok(Some(record)) = log::next_record(&mut rest) {
            let Record::Batch { changes, .. } = record else {
                continue;
            };
            let at = 64 + (1 << 16) - rest.len() as u64 - changes.len() as u64;
            for (what, at) in [
                ("number", at - 20),
                ("generation", at - 12),
                ("inode", at + 4),
            ] {
                let mut out = vec![2];
                patch(&mut out, file, at, &[0xff; 8]);
                put("store", &format!("{file}-last-{what}"), &out);
            }
            break;
        }
    }
    // A map with one page free, and one taken behind its end.
    let mut out = vec![4];
    let slot = sb.commit % 2 * superblock::SLOT_BYTES as u64;
    patch(
        &mut out,
        superblock::FILE,
        slot + 80,
        &(sb.meta_pages - 1).to_le_bytes(),
    );
    let map = sb.runs[0].0 * 4096 + sb.catalog_len;
    let mut bits = vec![0xff; (sb.meta_pages / 8) as usize];
    bits[0] = 0xfe;
    for (i, piece) in bits.chunks(200).enumerate() {
        patch(&mut out, "meta", map + 200 * i as u64, piece);
    }
    put("store", "map-beyond-end", &out);
    // No page is taken, so that changes overwrite what they come from.
    let mut out = vec![4];
    for i in 0..(sb.meta_pages / 8).div_ceil(200) {
        patch(&mut out, "meta", map + 200 * i, &[0; 200]);
    }
    put("store", "all-free", &out);
    // Pages that say they are of the generation to come.
    let mut out = vec![1];
    for page in 1..60 {
        let birth = (sb.generation + 1).to_le_bytes();
        patch(&mut out, "meta", page * 4096 + 16, &birth);
    }
    put("store", "born-later", &out);

    let extent = |at: u8| [&[1u8, 0, 0, 0][..], &[0; 8], &[at, 0, 0, 0], &[0; 9]].concat();
    let mut out = vec![2];
    put_record(
        &mut out,
        8,
        key::EXTENT,
        &[0, 0, 0, 0, 0, 0, 0, 1],
        &extent(40),
    );
    put_record(
        &mut out,
        8,
        key::EXTENT,
        &[0, 0, 0, 0, 0, 0, 0, 9],
        &extent(20),
    );
    put("store_records", "overlap", &out);

    let mut body = vec![0; 56];
    (body[16], body[21]) = (7, 1);
    body[32..40].fill(0xff);
    body[41] = 1;
    let mut out = Vec::new();
    request(&mut out, 47, 7, &body);
    put("mount", "copy-to-the-end", &out);
}

fn main() {
    let root = PathBuf::from(std::env::args().nth(1).expect("a directory"));
    let put = |target: &str, name: &str, bytes: &[u8]| {
        let dir = root.join(target);
        fs::create_dir_all(&dir).expect("a directory");
        fs::write(dir.join(format!("seed-{name}")), bytes).expect("room");
    };
    let disk = store::disk();
    let read = |name: &str, len: usize| {
        let mut b = vec![0; len];
        let file = disk.open(name, false).expect("a file of the store");
        file.read_at(&mut b, 0).expect("it can be read");
        b
    };
    let slots = read(superblock::FILE, 2 * superblock::SLOT_BYTES);
    put("superblock", "0", &slots[..256]);
    put("superblock", "1", &slots[superblock::SLOT_BYTES..][..256]);
    for name in log::FILES {
        let bytes = read(name, 2048);
        put("log", name, &bytes);
        put("log", &format!("{name}-payload"), &bytes[64..]);
    }
    put("catalog", "all", &catalog());
    put("tree", "two-leaves", &tree());
    put("records", "all", &records());
    put("store_records", "all", &records());
    edges(&put, &disk);
    let list = acl(&[(1, 7), (2, 6), (4, 5), (16, 5), (32, 1)]);
    let both = [&[0xed, 1, 18, 0, list.len() as u8, 0][..], &list, &list].concat();
    put("acl", "named", &both);
    let mut all = Vec::new();
    for (opcode, ino, body) in bodies() {
        put("request", &opcode.to_string(), &message(opcode, &body));
        request(&mut all, opcode, ino, &body);
    }
    put("mount", "all", &all);
    for flags in 0..8u8 {
        for file in 0..8u8 {
            // One byte of an early page, slot or chunk.
            let at = 24 + 31 * flags;
            put(
                "store",
                &format!("{flags}-{file}"),
                &[flags, file, at, 0x10, 0, 1, 0x55],
            );
        }
    }
    for (i, json) in [
        r#"{"request":"list"}"#,
        r#"{"request":"checkpoint","head":"main","name":null,"tags":{"a":"b"},"wait":true}"#,
        r#"{"request":"mount","mountpoint":"/m","head":null,"at":"c","options":["ro"]}"#,
        r#"{"answer":"error","code":1,"message":"m"}"#,
    ]
    .iter()
    .enumerate()
    {
        put("control", &i.to_string(), json.as_bytes());
    }
    let base = cowfs::image::Header::new(Path::new("/b"), 4 << 20, 1);
    let mut cow = base.expect("it fits").encode().to_vec();
    cow.resize(8192, 0);
    cow.extend([0x55; 1024]);
    put("image", "whole", &cow);
    for (i, names) in ["latest\na\nb", "@{-1}\na\nab", "ab\na\nabc\nabd"]
        .iter()
        .enumerate()
    {
        put("names", &i.to_string(), names.as_bytes());
    }
    seeds::snapshots(&put);
    seeds::machines(&put);
    seeds::guests(&put);
}

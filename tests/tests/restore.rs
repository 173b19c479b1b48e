//! Restoring single files and directories: completely, and safely among users who want more.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use cowfs_tests::live::Live;

fn sh(cmd: &str) -> String {
    let out = Command::new("sh").arg("-c").arg(cmd).output().expect("sh");
    assert!(
        out.status.success(),
        "{cmd}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// Everything about a tree that is to be kept: names, types, modes, owners, times, links, contents, attributes, ACLs.
fn whole(l: &Live, path: &str) -> String {
    let at = l.mnt();
    sh(&format!(
        "cd {at} && find {path} -printf '%p %y %m %U %G %s %T@ %l %n\\n' | LC_ALL=C sort; \
         cd {at} && find {path} -type f -exec sha256sum {{}} + | LC_ALL=C sort; \
         cd {at} && find {path} -print0 | LC_ALL=C sort -z | xargs -0 getfattr -h -d -m - -e hex 2>/dev/null"
    ))
}

fn leftovers(l: &Live) -> Vec<String> {
    fs::read_dir(l.at(""))
        .expect("a root")
        .flatten()
        .map(|e| e.file_name().to_string_lossy().into_owned())
        .filter(|n| n.starts_with(".cowfs"))
        .collect()
}

#[test]
fn everything_about_a_tree_comes_back() {
    let l = Live::new();
    let m = l.mnt();
    fs::create_dir_all(l.at("srv/app/sub")).expect("room");
    fs::write(l.at("srv/app/one"), "one").expect("room");
    fs::hard_link(l.at("srv/app/one"), l.at("srv/app/sub/two")).expect("room");
    symlink("/etc/passwd", l.at("srv/app/link")).expect("room");
    let sparse = File::create(l.at("srv/app/sparse")).expect("room");
    sparse.write_all_at(b"end", 8 << 20).expect("room");
    drop(sparse);
    fs::write(l.at("srv/app/-odd name\n"), "x").expect("room");
    sh(&format!(
        "cd {m}/srv/app && chown 123:456 one && chmod 4751 one && mkfifo -m 600 pipe && setfattr -n user.k -v v sub && \
         setfattr -n user.k2 -v v2 one && touch -h -d '2001-02-03 04:05:06.789' link && touch -d '2002-01-01' sub && \
         chown 7:8 {m}/srv && chmod 2750 {m}/srv && setfattr -n user.up -v yes {m}/srv && touch -d '2003-01-01' {m}/srv {m}/srv/app"
    ));
    let acl = Command::new("setfacl")
        .args(["-m", "u:77:rx,d:u:78:rwx"])
        .arg(l.at("srv/app/sub"))
        .status();
    assert!(acl.is_ok_and(|s| s.success()), "setfacl");
    // A default ACL of the root must not get into what is restored.
    sh(&format!("setfacl -m d:u:99:rwx {m}"));
    let before = whole(&l, "srv");
    l.run(&["checkpoint", &m, "good"]);
    // The whole of it is gone, with the directory around it.
    fs::remove_dir_all(l.at("srv")).expect("ours");
    l.run(&["restore", &m, "good", "srv/app"]);
    assert_eq!(whole(&l, "srv"), before);
    let meta = |p: &str| l.at(p).metadata().expect("there");
    assert_eq!(meta("srv/app/one").ino(), meta("srv/app/sub/two").ino());
    assert!(meta("srv/app/sparse").blocks() < 1000);
    // It is there, and other.
    sh(&format!(
        "cd {m}/srv/app && rm sub/two && echo no > one && chmod 777 sub && touch new"
    ));
    l.run(&["restore", &m, "good", "/srv/app"]);
    sh(&format!("touch -d '2003-01-01' {m}/srv"));
    assert_eq!(whole(&l, "srv"), before);
    // A file in the place of a directory, and the other way round.
    sh(&format!(
        "cd {m}/srv/app && rm -r sub one && touch sub && mkdir one"
    ));
    l.run(&[
        "restore",
        &m,
        "good",
        "srv/app/sub",
        "srv/app/one",
        "srv/app/-odd name\n",
    ]);
    assert!(meta("srv/app/sub").is_dir() && meta("srv/app/one").is_file());
    assert_eq!(leftovers(&l), Vec::<String>::new());
    l.check();
}

#[test]
fn what_cannot_be_restored_is_named_and_the_rest_is() {
    let l = Live::new();
    let m = l.mnt();
    fs::write(l.at("a"), "1").expect("room");
    fs::create_dir(l.at("d")).expect("room");
    l.run(&["checkpoint", &m, "good"]);
    fs::write(l.at("a"), "2").expect("room");
    let out = l.try_run(&["restore", &m, "good", "missing", "a", "../x", "/"], &[]);
    let err = String::from_utf8_lossy(&out.stderr).into_owned();
    assert_eq!(out.status.code(), Some(3), "{err}");
    assert!(
        err.contains("missing: it is not in checkpoint good"),
        "{err}"
    );
    assert!(err.contains("restored 1 path\n"), "{err}");
    assert_eq!(fs::read_to_string(l.at("a")).expect("there"), "1");
    let out = l.try_run(&["restore", &m, "good", "a", "missing", "--json"], &[]);
    assert_eq!(out.status.code(), Some(3));
    let v: serde_json::Value = serde_json::from_slice(&out.stdout).expect("JSON");
    assert_eq!(
        (&v["paths"], &v["failed"][0]["path"]),
        (&1.into(), &"missing".into())
    );
    let out = l.try_run(&["restore", &m, "good", "a/missing"], &[]);
    assert_eq!(out.status.code(), Some(1));
    // Nothing goes into what is mounted inside, or away with what is around it.
    sh(&format!("mount -t tmpfs none {m}/d"));
    let out = l.try_run(&["restore", &m, "good", "d"], &[]);
    sh(&format!("umount {m}/d"));
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("is mounted there"));
    assert_eq!(leftovers(&l), Vec::<String>::new());
    l.check();
}

#[test]
fn a_planted_symlink_leads_nowhere() {
    let l = Live::new();
    let m = l.mnt();
    let outside = l.beside("outside");
    fs::create_dir_all(l.at("home/dir")).expect("room");
    fs::write(l.at("home/dir/file"), "good").expect("room");
    l.run(&["checkpoint", &m, "good"]);
    fs::remove_dir_all(l.at("home/dir")).expect("ours");
    symlink(&outside, l.at("home/dir")).expect("room");
    // The name that copies once had.
    symlink(outside.join("planted"), l.at("home/.cowfs-restore-file")).expect("room");
    let out = l.try_run(&["restore", &m, "good", "home/dir/file"], &[]);
    assert_eq!(out.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&out.stderr).contains("a symlink is in the way"));
    // As the thing itself it is replaced, not followed.
    l.run(&["restore", &m, "good", "home/dir"]);
    assert_eq!(
        fs::read_to_string(l.at("home/dir/file")).expect("there"),
        "good"
    );
    assert_eq!(fs::read_dir(&outside).expect("there").count(), 0);
    assert_eq!(leftovers(&l), Vec::<String>::new());
    l.check();
}

#[test]
fn nobody_gets_at_the_checkpoint_or_the_copy_meanwhile() {
    let l = Live::new();
    let m = l.mnt();
    fs::create_dir_all(l.at("home/bin")).expect("room");
    for i in 0..200 {
        let p = l.at(&format!("home/bin/tool{i}"));
        fs::write(&p, vec![b'x'; 20_000]).expect("room");
        fs::set_permissions(&p, fs::Permissions::from_mode(0o4755)).expect("ours");
    }
    fs::set_permissions(l.at("home"), fs::Permissions::from_mode(0o777)).expect("ours");
    l.run(&["checkpoint", &m, "good"]);
    fs::remove_dir_all(l.at("home/bin")).expect("ours");
    let outside = l.beside("outside");
    let end = AtomicBool::new(false);
    let (c_bin, c_away) = (l.at("home/bin"), l.at("home/away"));
    std::thread::scope(|s| {
        // Somebody who swaps the place itself for a symlink, again and again.
        s.spawn(|| {
            while !end.load(Ordering::Relaxed) {
                let _ = symlink(&outside, &c_bin);
                let _ = fs::rename(&c_bin, &c_away);
                let _ = fs::remove_file(&c_away);
                let _ = fs::remove_dir_all(&c_away);
            }
        });
        let watched = s.spawn(|| {
            let mut seen = 0;
            while !end.load(Ordering::Relaxed) {
                let info = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
                let source = format!("{}#@good", l.store().display());
                for line in info
                    .lines()
                    .filter(|i| i.contains(&source) || i.contains(&source.replace('#', "\\043")))
                {
                    let f: Vec<&str> = line.split(' ').collect();
                    for o in ["nosuid", "nodev", "noexec"] {
                        assert!(f[5].contains(o), "{line}");
                    }
                    let up = std::path::Path::new(f[4]).parent().expect("a parent");
                    if let Ok(meta) = up.metadata() {
                        assert_eq!((meta.uid(), meta.mode() & 0o7777), (0, 0o700), "{line}");
                        seen += 1;
                    }
                }
                for n in leftovers(&l) {
                    if let Ok(meta) = l.at(&n).metadata() {
                        assert_eq!((meta.uid(), meta.mode() & 0o7777), (0, 0o700), "{n}");
                    }
                }
                std::thread::sleep(Duration::from_micros(200));
            }
            seen
        });
        for _ in 0..10 {
            // It may fail, as what is there changes under it; it may not lead outside.
            let _ = l.try_run(&["restore", &m, "good", "home/bin"], &[]);
            let _ = l.try_run(&["restore", &m, "good", "home/bin/tool7"], &[]);
        }
        end.store(true, Ordering::Relaxed);
        assert!(
            watched.join().expect("nothing was open") > 0,
            "it was never seen"
        );
    });
    assert_eq!(fs::read_dir(&outside).expect("there").count(), 0);
    assert_eq!(leftovers(&l), Vec::<String>::new());
    l.check();
}

//! What is refused leaves the target alone, and says why.

use crate::common::*;

/// Runs a Python program that says "ready" in a file, and is refused with these words.
fn refused(program: &str, words: &[&str]) {
    let dir = tempfile::tempdir().unwrap();
    let ready = dir.path().join("ready");
    let program = format!(
        "import os,sys,ctypes,mmap,time\nlibc=ctypes.CDLL(None,use_errno=True)\n{program}\nopen({ready:?},'w').close()\nwhile True: time.sleep(0.01)"
    );
    let t = Target::python(&program, dir);
    until("the target", || ready.exists());
    // It frees what it needed for that.
    std::thread::sleep(std::time::Duration::from_millis(200));
    let before = traces(t.pid);
    let (status, out, err) = run(t.snapshot("s"));
    assert_eq!(status.code(), Some(1), "{words:?}: {out} {err}");
    let json: serde_json::Value = serde_json::from_str(err.trim()).unwrap();
    for w in words {
        assert!(json["error"].as_str().unwrap().contains(w), "{w}: {err}");
    }
    assert_eq!(json["code"], 1);
    assert_eq!(traces(t.pid), before);
    assert!(!t.dir.path().join("s").exists() && !t.journal().exists());
}

#[test]
fn seccomp_and_more_in_one_list() {
    refused(
        "r,w=os.pipe()\npid=os.fork()\nif pid==0:\n  time.sleep(60); os._exit(0)\nio=libc.syscall(425,8,ctypes.create_string_buffer(120))\nassert io>=0",
        &["children", "add --tree", "io_uring"],
    );
    refused(
        "libc.prctl(38,1,0,0,0)\nclass F(ctypes.Structure):\n  _fields_=[('n',ctypes.c_ushort),('f',ctypes.c_char_p)]\nf=F(1,(b'\\x06\\0\\0\\0\\0\\0\\xff\\x7f'))\nassert libc.prctl(22,2,ctypes.byref(f),0,0)==0",
        &["seccomp"],
    );
}

#[test]
fn aio_and_devices() {
    refused(
        "c=ctypes.c_ulong(0)\nassert libc.syscall(206,8,ctypes.byref(c))==0",
        &["aio"],
    );
    refused("f=os.open('/dev/kmsg',os.O_RDONLY)", &["/dev/kmsg"]);
}

#[test]
fn names_and_places() {
    let t = Target::start(&["busy", "2", "8"]);
    until("rounds", || t.status()[4] > 500);
    let before = traces(t.pid);
    good(t.snapshot("s"));
    for (name, words) in [("s", "exists"), ("no/such", "cannot make the directory")] {
        let (status, _, err) = run(t.snapshot(name));
        assert_eq!(status.code(), Some(1), "{err}");
        assert!(err.contains(words), "{err}");
        t.check(name);
    }
    let mut c = umlctl();
    c.arg("verify").arg(t.dir.path().join("s"));
    good(c);

    let small = t.dir.path().join("small");
    std::fs::create_dir(&small).unwrap();
    let mount = nix::mount::mount(
        Some("small"),
        &small,
        Some("tmpfs"),
        nix::mount::MsFlags::empty(),
        Some("size=2m"),
    );
    mount.expect("root is needed");
    let (status, _, err) = run(t.snapshot("small/s"));
    let left = std::fs::read_dir(&small).unwrap().count();
    nix::mount::umount(&small).unwrap();
    assert_eq!(status.code(), Some(1), "{err}");
    assert!(
        err.contains("No space left") || err.contains("ENOSPC"),
        "{err}"
    );
    assert_eq!(left, 0, "a directory is left");
    t.check("a full disk");
    assert_eq!(traces(t.pid), before);
    assert!(!t.journal().exists());
}

#[test]
fn traced() {
    let t = Target::start(&["busy", "2", "8"]);
    nix::sys::ptrace::seize(
        nix::unistd::Pid::from_raw(t.pid),
        nix::sys::ptrace::Options::empty(),
    )
    .unwrap();
    let (status, _, err) = run(t.snapshot("s"));
    nix::sys::ptrace::interrupt(nix::unistd::Pid::from_raw(t.pid)).unwrap();
    nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(t.pid), None).unwrap();
    nix::sys::ptrace::detach(nix::unistd::Pid::from_raw(t.pid), None).unwrap();
    assert_ne!(status.code(), Some(0));
    assert!(err.contains("traced by process"), "{err}");
    t.check("traced");
    good(t.snapshot("s"));
}

//! What cannot be is refused before anything is made, with a word on what to do.

use crate::common::{Home, err};

fn nothing_left(home: &Home) {
    let vms = home.dir.path().join("home/vms");
    let left: Vec<_> = std::fs::read_dir(vms)
        .into_iter()
        .flatten()
        .flatten()
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn refused() {
    let home = Home::empty();
    let image = home.image();
    let image = image.to_str().unwrap();
    let run = |name: &str, more: &[&str]| {
        let mut args = vec!["run", "--detach"];
        args.extend(more);
        args.extend(["--", name]);
        let output = home.umlctl(&args);
        (output.status.code().unwrap(), err(&output))
    };
    let (code, text) = run("a", &["--image", image]);
    assert_eq!(code, 1);
    assert!(
        text.contains(image) && text.contains("image-busybox"),
        "{text}"
    );
    let (code, text) = run("a", &["--image", "/"]);
    assert!(code == 1 && text.contains("no regular file"), "{text}");
    std::fs::write(image, b"").unwrap();
    let (code, text) = run("a", &["--image", image]);
    assert!(code == 1 && text.contains("empty"), "{text}");
    std::fs::write(image, vec![0; 1 << 20]).unwrap();

    for name in [
        "",
        ".",
        "..",
        "../a",
        "a/b",
        "a b",
        "-a",
        "a\n",
        &"x".repeat(64),
    ] {
        let (code, text) = run(name, &["--image", image]);
        assert!(
            code == 2 && text.contains("no name for a VM"),
            "{name:?}: {text}"
        );
    }
    for (more, word) in [
        (&["--mem", "12"][..], "32M"),
        (&["--mem", "lots"], "128M"),
        (&["--append", "quiet mem=1G"], "--mem"),
        (&["--append", "rdinit=/bin/sh"], "agent"),
    ] {
        let (code, text) = run("a", &[&["--image", image][..], more].concat());
        assert!(code == 2 && text.contains(word), "{more:?}: {text}");
    }
    let comma = home.dir.path().join("a,b");
    std::fs::write(&comma, b"x").unwrap();
    let (code, text) = run("a", &["--image", comma.to_str().unwrap()]);
    assert!(code == 2 && text.contains("commas"), "{text}");
    let (code, text) = run("a", &["--image", image, "--kernel", "/nosuch"]);
    assert!(code == 1 && text.contains("/nosuch"), "{text}");
    nothing_left(&home);

    for verb in ["info", "logs", "stop", "kill", "rm", "console"] {
        let text = home.fails(&[verb, "nobody"], 10);
        assert!(text.contains("there is no VM nobody"), "{text}");
    }
    home.fails(&["exec", "nobody", "true"], 10);
    home.ok(&["rm", "-f", "nobody"]);
    assert_eq!(home.ok(&["list", "--no-headers"]), "");
    home.fails(&["cp", "/a", "/b"], 1);
    home.fails(
        &["supervise", "nobody", "--lock-fd", "0", "--report-fd", "1"],
        10,
    );
    let text = home.fails(&["run", "nobody", "--detach"], 1);
    assert!(text.contains("--image"), "{text}");
}

#[test]
fn kernels_that_do_not_boot() {
    let home = Home::empty();
    let image = home.image();
    let image = image.to_str().unwrap();
    std::fs::write(image, vec![0; 1 << 20]).unwrap();
    // It cannot be executed: nothing is left.
    let program = home.dir.path().join("linux.uml");
    std::fs::write(&program, "no program").unwrap();
    let kernel = program.to_str().unwrap();
    let text = home.fails(
        &["run", "a", "--image", image, "--kernel", kernel, "--detach"],
        1,
    );
    assert!(text.contains("linux.uml"), "{text}");
    nothing_left(&home);
    // It ends at once, or has no root file system: what it said can be looked at.
    home.fails(
        &[
            "run",
            "a",
            "--image",
            image,
            "--kernel",
            "/bin/false",
            "--detach",
        ],
        1,
    );
    let text = home.fails(&["run", "b", "--image", image, "--detach"], 1);
    assert!(text.contains("umlctl logs b"), "{text}");
    assert_eq!(home.info("b")["state"], "ended");
    assert_ne!(home.info("b")["exit_code"], 0);
    let log = home.ok(&["logs", "b"]);
    assert!(
        log.contains("cannot mount the root file system /dev/ubda"),
        "{log}"
    );
    home.ok(&["rm", "a", "b"]);
    nothing_left(&home);
}

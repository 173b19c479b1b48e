//! Builds the guest's agent: a static program, by one call of rustc, as cargo cannot give one package another's program.

use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=agent/src");
    println!("cargo::rerun-if-changed=build.rs");
    let var = |name: &str| std::env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"));
    let source = PathBuf::from(var("CARGO_MANIFEST_DIR")).join("agent/src");
    let out = PathBuf::from(var("OUT_DIR"));
    let library = out.join("libumlctl_agent.rlib");
    let rustc = |name: &str, kind: &str| {
        let mut command = Command::new(var("RUSTC"));
        command
            .args([
                "--crate-name",
                name,
                "--crate-type",
                kind,
                "--edition",
                "2024",
            ])
            .args(["--target", &var("TARGET")])
            .args([
                "-C",
                "target-feature=+crt-static",
                "-C",
                "relocation-model=static",
            ])
            .args(["-C", "opt-level=s", "-C", "panic=abort"]);
        command
    };
    run(rustc("umlctl_agent", "rlib")
        .arg("-o")
        .arg(&library)
        .arg(source.join("lib.rs")));
    run(rustc("agent", "bin")
        .args(["-C", "lto=fat", "-C", "strip=symbols"])
        .arg("--extern")
        .arg(format!("umlctl_agent={}", library.display()))
        .arg("-o")
        .arg(out.join("agent"))
        .arg(source.join("main.rs")));
}

fn run(command: &mut Command) {
    let status = command
        .status()
        .unwrap_or_else(|e| panic!("cannot run rustc: {e}"));
    assert!(status.success(), "the agent could not be built");
}

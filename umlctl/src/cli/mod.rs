//! The command line: arguments in, calls of the library, tables or JSON out.

pub mod args;
mod doctor;
mod fork;
mod hold;
mod inspect;
mod rescue;
mod resume;
mod take;
mod vm;

use anyhow::Result;
use args::{Cli, Command};
use clap::{CommandFactory, Parser};
use std::process::ExitCode;

/// Exit codes, as for all commands of the project.
pub mod code {
    /// Something failed.
    pub const ERROR: u8 = 1;
    /// The command line is wrong.
    pub const USAGE: u8 = 2;
    /// Some of it was done.
    pub const PARTIAL: u8 = 3;
    /// There is no such snapshot or VM.
    pub const NOT_FOUND: u8 = 10;
    /// Somebody else is at it.
    pub const LOCKED: u8 = 11;
}

/// Runs the command and returns its exit code.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(c) => c,
        Err(e) => {
            let _ = e.print();
            return ExitCode::from(u8::try_from(e.exit_code()).unwrap_or(code::USAGE));
        }
    };
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_env("UMLCTL_LOG"))
        .with_writer(std::io::stderr)
        .init();
    match run(&cli) {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            let code = exit_code(&e);
            if cli.json {
                eprintln!(
                    "{}",
                    serde_json::json!({ "error": format!("{e:#}"), "code": code })
                );
            } else {
                eprintln!("umlctl: {e:#}");
            }
            ExitCode::from(code)
        }
    }
}

fn run(cli: &Cli) -> Result<u8> {
    match &cli.command {
        Command::Snapshot(a) => match a.pid {
            Some(pid) => take::run(a, pid, cli.json),
            None => vm::snapshot::snapshot(a, cli.json),
        },
        Command::Resume(a) => match named(&a.dir)? {
            Some(s) => vm::snapshot::resume(a, &s, cli.json),
            None => resume::run(a, cli.json),
        },
        Command::Fork(a) => match a.pid {
            Some(pid) => fork::run(a, pid, cli.json),
            None => vm::snapshot::fork(a, cli.json),
        },
        Command::Snapshots { no_headers } => vm::snapshot::list(*no_headers, cli.json),
        Command::RmSnapshot { names } => vm::snapshot::remove(names, cli.json),
        Command::Inspect(a) => match named(&a.dir)? {
            Some(s) => vm::snapshot::inspect(&s, cli.json),
            None => inspect::show(&a.dir, cli.json),
        },
        Command::Verify(a) => match named(&a.dir)? {
            Some(s) => vm::snapshot::verify(&s, cli.json),
            None => inspect::verify(&a.dir, cli.json),
        },
        Command::Pack(a) => inspect::pack(&a.dir, a.level, cli.json),
        Command::Rescue(a) => rescue::run(a, cli.json),
        Command::Run(a) => vm::run::run(a, cli.json),
        Command::List(a) => vm::list::list(a, cli.json),
        Command::Info(a) => vm::list::info(a, cli.json),
        Command::Logs(a) => vm::logs::run(a, cli.json),
        Command::Exec(a) => vm::exec::run(a),
        Command::Console(a) => vm::console::run(a),
        Command::Cp(a) => vm::cp::run(a, cli.json),
        Command::Stop(a) => vm::end::stop(a, cli.json),
        Command::Kill(a) => vm::end::kill(a, cli.json),
        Command::Rm(a) => vm::end::rm(a, cli.json),
        Command::Supervise(a) => vm::run::supervise(a),
        Command::Hold(a) => hold::run(a),
        Command::Doctor => doctor::run(cli.json),
        Command::Completions { shell } => {
            clap_complete::generate(
                *shell,
                &mut Cli::command(),
                "umlctl",
                &mut std::io::stdout(),
            );
            Ok(0)
        }
        Command::Man { dir } => {
            std::fs::create_dir_all(dir)?;
            clap_mangen::generate_to(Cli::command(), dir)?;
            Ok(0)
        }
    }
}

/// A snapshot of a VM, if it is meant; else it is a directory.
fn named(name: &std::path::Path) -> Result<Option<crate::snapshots::store::Snapshot>> {
    match name.to_str() {
        Some(name) => vm::snapshot::find(name),
        None => Ok(None),
    }
}

/// What the error means for a script.
fn exit_code(e: &anyhow::Error) -> u8 {
    use crate::snapshots::resume::Error as Make;
    use crate::snapshots::store::Error as Store;
    use crate::vm::Error as Vm;
    use snapshot::image::Error as Image;
    use snapshot::target::Error as Target;
    for cause in e.chain() {
        match cause.downcast_ref::<Store>() {
            Some(Store::None(..)) => return code::NOT_FOUND,
            Some(Store::Exists(_)) => return code::ERROR,
            _ => {}
        }
        if matches!(cause.downcast_ref::<Make>(), Some(Make::Runs(_))) {
            return code::LOCKED;
        }
        match cause.downcast_ref::<Vm>() {
            Some(Vm::NoVm(..)) => return code::NOT_FOUND,
            Some(Vm::Running(_)) => return code::LOCKED,
            Some(Vm::Name(_) | Vm::Path(_) | Vm::Append(..) | Vm::Memory(..)) => {
                return code::USAGE;
            }
            _ => {}
        }
        if let Some(Image::Io { source, .. }) = cause.downcast_ref::<Image>()
            && source.kind() == std::io::ErrorKind::NotFound
        {
            return code::NOT_FOUND;
        }
        if matches!(
            cause.downcast_ref::<Target>(),
            Some(Target::Traced(..) | Target::NeedsRescue(_) | Target::InUse(_))
        ) {
            return code::LOCKED;
        }
    }
    code::ERROR
}

/// Bytes for people.
fn bytes(n: u64) -> String {
    match n {
        0..=9_999 => format!("{n} B"),
        10_000..=9_999_999 => format!("{:.1} kB", n as f64 / 1e3),
        _ => format!("{:.1} MB", n as f64 / 1e6),
    }
}

/// Microseconds for people.
fn time(us: u64) -> String {
    match us {
        0..=9_999 => format!("{us} us"),
        10_000..=9_999_999 => format!("{:.1} ms", us as f64 / 1e3),
        _ => format!("{:.1} s", us as f64 / 1e6),
    }
}

//! Runs every row of the table "How fast" on cowfs and its peers, in interleaved rounds of one run: first unpinned,
//! then with the clients and the daemons on one CPU. Writes `results.json`, `results.md` and plots. `bench table1` does the same for
//! snapshots of processes, `bench vm` for machines, `bench history` for histories of upgrades.

mod cli;
mod client;
mod history;
mod peers;
mod plot;
mod report;
mod results;
mod rows;
mod run;
mod session;
mod source;
mod sys;
mod table1;
mod vm;

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;

use cli::{Cli, Command, Options};
use results::Results;
use run::Placement;

/// Exit code when something of cowfs could not be measured or went wrong.
const PARTIAL: u8 = 3;

fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    match cli.command {
        Some(Command::Client { op }) => client::main(&op).map(|()| ExitCode::SUCCESS),
        Some(Command::Table1(options)) => table1::main(&options),
        Some(Command::Vm(options)) => vm::main(&options),
        Some(Command::History(options)) => history::main(&options),
        Some(Command::Target(options)) => {
            table1::target::main(&options).map(|()| ExitCode::SUCCESS)
        }
        None => bench(&cli.options),
    }
}

/// The whole run: set up, both placements, report.
fn bench(options: &Options) -> Result<ExitCode> {
    if !nix::unistd::geteuid().is_root() {
        bail!("run this as root: it mounts filesystems and drops caches");
    }
    sys::catch_signals().context("catching signals")?;
    let plan = options.plan()?;
    let mut results = Results::new(&plan);
    let outcome = rows::run_all(&plan, &mut results);
    // What was measured before a failure or an interrupt is worth having.
    run::place(Placement::Unpinned, &[])?;
    results.finish();
    report::write(&plan, &results)?;
    plot::write(&plan, &results)?;
    print!("{}", report::markdown(&results));
    outcome?;
    if results.cowfs_failed() {
        eprintln!("bench: something went wrong with cowfs; see the end of the report");
        return Ok(ExitCode::from(PARTIAL));
    }
    Ok(ExitCode::SUCCESS)
}

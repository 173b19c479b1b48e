//! `umlctl snapshot`.

use super::args::Snapshot;
use super::{bytes, time};
use anyhow::{Context, Result};
use snapshot::capture::run::{After, Method, Options, Report, snapshot};

/// Takes a snapshot and prints what it has cost.
pub fn run(a: &Snapshot, pid: i32, json: bool) -> Result<u8> {
    let after = match (a.leave_stopped, a.kill) {
        (true, _) => After::Stopped,
        (_, true) => After::Killed,
        _ => After::Runs,
    };
    let options = Options {
        tree: a.tree,
        since: a.since.clone(),
        durable: a.wait,
        after,
        method: if a.stop_and_copy {
            Method::StopAndCopy
        } else {
            Method::Tracked
        },
        guardian: Some(std::env::current_exe().context("cannot find this program's own file")?),
        external: a.external.clone(),
        close_outside: a.close_outside,
        hold: Some(super::hold::spawn),
        ..Options::new(pid, std::path::Path::new(&a.first))
    };
    let report = snapshot(&options)?;
    if json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        println!(
            "saved {} of {} in {}: stood still for {}",
            bytes(report.bytes_saved),
            if report.processes == 1 {
                format!("process {}", pid)
            } else {
                format!("{} processes", report.processes)
            },
            a.first,
            time(report.pause_us)
        );
        if a.print_stats {
            stats(&report);
        }
    }
    Ok(0)
}

fn stats(r: &Report) {
    let rows = [
        ("stop", time(r.stop_us), "until all threads were stopped"),
        (
            "mark",
            time(r.mark_us),
            "fixing the point in time for memory",
        ),
        (
            "state",
            time(r.state_us),
            "registers, signals, mappings, open files",
        ),
        ("detach", time(r.detach_us), "letting the threads go"),
        ("pause", time(r.pause_us), "all of these"),
        (
            "prepare",
            time(r.prepare_us),
            "an earlier stop of one thread",
        ),
        (
            "total",
            time(r.total_us),
            "from the start until it was published",
        ),
        (
            "durable",
            r.durable_us.map_or("-".into(), time),
            "from the start until it was on disk (--wait)",
        ),
        (
            "before",
            r.pages_before_stop.to_string(),
            "pages copied before the stop",
        ),
        (
            "by fault",
            r.pages_by_fault.to_string(),
            "pages copied after it, as they were about to be written",
        ),
        (
            "background",
            r.pages_in_background.to_string(),
            "other pages copied after it",
        ),
        (
            "faults",
            r.faults.to_string(),
            "faults that the processes took",
        ),
        (
            "given up",
            r.stops_given_up.to_string(),
            "stops given up and repeated",
        ),
        ("threads", r.threads.to_string(), ""),
    ];
    for (name, value, what) in rows {
        println!("{name:<11}{value:>12}  {what}");
    }
}

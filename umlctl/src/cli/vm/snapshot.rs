//! `umlctl snapshot`, `resume`, `fork`, `snapshots`, `rm-snapshot`, `inspect` and `verify` for VMs.

use super::connect;
use crate::cli::args::{Fork, Resume, Snapshot as SnapshotArgs};
use crate::cli::{bytes, time};
use crate::control::{Answer, Request};
use crate::snapshots::resume::{Made, make};
use crate::snapshots::store::{Figures, Snapshot, Store};
use crate::vm::home::{Home, Vm};
use crate::vm::name::Name;
use anyhow::{Context, Result, bail};
use serde_json::json;
use std::time::Instant;

fn store() -> Result<(Home, Store)> {
    let home = Home::from_env()?;
    let store = Store::of(&home);
    Ok((home, store))
}

/// A snapshot of this name, if it is one of a VM's, and not a directory of a process's.
pub fn find(name: &str) -> Result<Option<Snapshot>> {
    if name.contains('/') {
        return Ok(None);
    }
    match store()?.1.find(name) {
        Ok(found) => Ok(Some(found)),
        Err(_) if std::path::Path::new(name).join("manifest").exists() => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Has a VM's supervisor take a snapshot. Returns when the point in time is fixed, or when all is saved.
fn take(vm: &Vm, request: &Request, wait: bool) -> Result<Figures> {
    let mut client = connect(vm)?;
    let mut answer = client.ask(request)?;
    loop {
        match answer {
            Answer::Snapshot { figures, saved } if saved || !wait => return Ok(figures),
            Answer::Snapshot { .. } => answer = client.answer()?,
            other => bail!("the supervisor answers {other:?}"),
        }
    }
}

/// `umlctl snapshot NAME SNAP`
pub fn snapshot(a: &SnapshotArgs, json: bool) -> Result<u8> {
    let name = a
        .second
        .as_deref()
        .context("give the VM's name and one for the snapshot, or --pid and a directory")?;
    let vm = super::find(&a.first)?;
    let request = Request::Snapshot {
        name: name.parse()?,
        kill: a.kill,
        stop_and_copy: a.stop_and_copy,
        durable: true,
    };
    // One whose VM has ended is of no use before it is whole.
    let figures = take(&vm, &request, a.wait || a.kill)?;
    if a.kill {
        super::end::gone(&vm)?;
    }
    if json {
        let mut value = serde_json::to_value(figures)?;
        value["name"] = json!(name);
        println!("{value}");
    } else {
        println!("{name}");
        eprintln!(
            "umlctl: {} stood still for {}",
            vm.name(),
            time(figures.pause_us)
        );
        if a.print_stats {
            stats(&figures);
        }
    }
    Ok(0)
}

fn stats(f: &Figures) {
    let rows = [
        (
            "stop",
            time(f.stop_us),
            "until the processes for the disk stood still",
        ),
        ("mark", time(f.mark_us), "finding out what was written"),
        ("state", time(f.state_us), "registers and open files"),
        ("copy", time(f.copy_us), "reading what was written"),
        ("pause", time(f.pause_us), "all of these"),
        (
            "prepare",
            time(f.prepare_us),
            "how long it stood still some time before, to prepare",
        ),
        (
            "rest",
            time(f.rest_us),
            "how long it ran slowed down until it came to rest",
        ),
        (
            "disk",
            time(f.disk_us),
            "how long the disk stood still after that",
        ),
        (
            "durable",
            f.durable_us.map_or("-".into(), time),
            "until all was on the host's disk (--wait)",
        ),
        ("ahead", bytes(f.bytes_ahead), "copied while it ran"),
        (
            "in stop",
            bytes(f.bytes_in_stop),
            "copied while it stood still",
        ),
    ];
    for (name, value, what) in rows {
        eprintln!("{name:<9}{value:>12}  {what}");
    }
}

fn micros(made: &Made) -> u64 {
    u64::try_from(made.resume.as_micros()).unwrap_or(u64::MAX)
}

fn value(made: &Made) -> Result<serde_json::Value> {
    let mut value = super::list::value(&made.vm)?;
    value["resume_us"] = json!(micros(made));
    value["pid"] = value["main"].clone();
    Ok(value)
}

fn undo(vm: &Vm) {
    if let Err(e) = super::end::remove(vm) {
        eprintln!("umlctl: cannot clean up: {e:#}");
    }
}

/// `umlctl resume SNAP`
pub fn resume(a: &Resume, snapshot: &Snapshot, json: bool) -> Result<u8> {
    let (home, _) = store()?;
    let first: Option<Name> = a.name.as_deref().map(str::parse).transpose()?;
    if a.verify {
        snapshot.verify()?;
    }
    if a.eager || a.lazy {
        bail!("--eager and --lazy are for processes: a VM's memory always comes as it is touched");
    }
    let names: Vec<Option<Name>> = match (a.count, first) {
        (1, name) => vec![name],
        (_, None) => bail!("with --count give a --name: the VMs are called NAME-1, NAME-2, ..."),
        (n, Some(name)) => numbered(&name, n)?.into_iter().map(Some).collect(),
    };
    let mut all = Vec::new();
    for name in &names {
        all.push(make(&home, snapshot, name.as_ref(), &undo)?);
    }
    show(&all, json, a.count == 1)
}

fn numbered(name: &Name, count: u32) -> Result<Vec<Name>> {
    (1..=count)
        .map(|i| Ok(format!("{name}-{i}").parse()?))
        .collect()
}

fn show(all: &[Made], json: bool, single: bool) -> Result<u8> {
    if json {
        let values = all.iter().map(value).collect::<Result<Vec<_>>>()?;
        match values.first() {
            Some(one) if single => println!("{one}"),
            _ => println!("{}", json!(values)),
        }
        return Ok(0);
    }
    for made in all {
        println!("{}", made.vm.name());
        eprintln!(
            "umlctl: {} runs, after {}",
            made.vm.name(),
            time(micros(made))
        );
    }
    Ok(0)
}

/// `umlctl fork NAME NEW...`: a snapshot that nobody keeps, and VMs of it.
pub fn fork(a: &Fork, json: bool) -> Result<u8> {
    let begun = Instant::now();
    let (home, store) = store()?;
    let (of, new) = a
        .names
        .split_first()
        .context("give the VM's name, or --pid")?;
    let vm = super::find(of)?;
    let count = a.count.unwrap_or(1);
    let names: Vec<Name> = match (new, count) {
        ([], n) => numbered(vm.name(), n)?,
        ([one], n) if n > 1 => numbered(&one.parse()?, n)?,
        (many, n) if a.count.is_none() || n as usize == many.len() => {
            many.iter().map(|n| Ok(n.parse()?)).collect::<Result<_>>()?
        }
        _ => bail!("give as many names as --count says, or one, or none"),
    };
    for name in &names {
        if home.find(name).is_ok() {
            bail!(crate::vm::Error::Exists(name.to_string()));
        }
    }
    let hidden: Name = format!("fork-of-{}-{}", vm.name(), std::process::id()).parse()?;
    let request = Request::Snapshot {
        name: hidden.clone(),
        kill: false,
        stop_and_copy: false,
        durable: false,
    };
    let figures = take(&vm, &request, true)?;
    let snapshot = store.find(hidden.as_str())?;
    let mut all = Vec::new();
    let made = names.iter().try_for_each(|name| {
        all.push(make(&home, &snapshot, Some(name), &undo)?);
        anyhow::Ok(())
    });
    // The VMs have open what they need.
    let removed = store.remove(&snapshot);
    made?;
    removed?;
    if json {
        let values = all.iter().map(value).collect::<Result<Vec<_>>>()?;
        let total = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        println!(
            "{}",
            json!({ "vms": values, "pause_us": figures.pause_us, "total_us": total })
        );
        return Ok(0);
    }
    eprintln!(
        "umlctl: {} stood still for {}",
        vm.name(),
        time(figures.pause_us)
    );
    show(&all, false, false)
}

/// `umlctl snapshots`
pub fn list(no_headers: bool, json: bool) -> Result<u8> {
    let (_, store) = store()?;
    let mut values = Vec::new();
    let mut rows = Vec::new();
    for s in store.all()? {
        match s.about() {
            Ok(about) => {
                let memory = about.vm.mem_bytes;
                rows.push(vec![
                    s.name.clone(),
                    about.vm.name.to_string(),
                    when(about.taken_us),
                    bytes(memory),
                    bytes(s.bytes()),
                    time(about.figures.pause_us),
                ]);
                values.push(json!({
                    "name": s.name, "vm": about.vm.name, "taken_us": about.taken_us,
                    "mem_bytes": memory, "disk_bytes": s.bytes(), "pause_us": about.figures.pause_us,
                }));
            }
            Err(e) => {
                let e = anyhow::Error::from(e);
                eprintln!("umlctl: {}: {e:#}", s.name);
                values.push(json!({ "name": s.name, "error": format!("{e:#}") }));
            }
        }
    }
    if json {
        println!("{}", json!(values));
        return Ok(0);
    }
    if !no_headers {
        let names = ["NAME", "VM", "TAKEN", "MEMORY", "ON DISK", "PAUSE"];
        rows.insert(0, names.map(String::from).to_vec());
    }
    super::list::aligned(&rows);
    Ok(0)
}

/// Seconds since 1970 as a date, in UTC.
fn when(us: u64) -> String {
    let days = us / 86_400_000_000;
    let seconds = us / 1_000_000 % 86_400;
    // Howard Hinnant's "days to civil", for the years that can be meant.
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (d, m) = (
        doy - (153 * mp + 2) / 5 + 1,
        if mp < 10 { mp + 3 } else { mp - 9 },
    );
    let y = yoe + era * 400 + u64::from(m <= 2);
    let (h, min, s) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    format!("{y}-{m:02}-{d:02} {h:02}:{min:02}:{s:02}")
}

/// `umlctl rm-snapshot`
pub fn remove(names: &[String], json: bool) -> Result<u8> {
    let (_, store) = store()?;
    let mut removed = Vec::new();
    for name in names {
        // In full: a beginning is for looking, not for removing.
        let all = store.all()?;
        let found = all.into_iter().find(|s| s.name == *name);
        let found = found.ok_or_else(|| store.missing(name))?;
        store.remove(&found)?;
        removed.push(name);
    }
    if json {
        println!("{}", json!({ "removed": removed }));
    } else {
        removed.iter().for_each(|n| println!("{n}"));
    }
    Ok(0)
}

/// `umlctl inspect SNAP`
pub fn inspect(s: &Snapshot, json: bool) -> Result<u8> {
    let about = s.about()?;
    let machine = s.machine()?;
    if json {
        println!(
            "{}",
            json!({
                "name": s.name, "about": about, "taken": machine.taken, "host": machine.host,
                "kernel": machine.kernel, "memory_bytes": machine.memory_len,
                "private_bytes": machine.private.iter().map(|p| p.1).sum::<u64>(),
                "users": machine.users.len(), "helpers": machine.helpers.len(),
                "files": machine.files.len(), "disk_bytes": s.bytes(),
            })
        );
        return Ok(0);
    }
    let pieces: usize = machine.users.iter().map(|u| u.pieces.len()).sum();
    let rows = [
        ("snapshot", s.name.clone()),
        ("of", about.vm.name.to_string()),
        ("taken", when(about.taken_us)),
        ("image", about.vm.image.display().to_string()),
        ("kernel", machine.kernel.path.display().to_string()),
        ("host", machine.host.release.clone()),
        ("memory", bytes(machine.memory_len)),
        ("on disk", bytes(s.bytes())),
        (
            "processes",
            format!(
                "{} of users, with {pieces} mappings, and {} helpers",
                machine.users.len(),
                machine.helpers.len()
            ),
        ),
        ("open files", machine.files.len().to_string()),
        ("pause", time(about.figures.pause_us)),
    ];
    for (key, value) in rows {
        println!("{key:<11}{value}");
    }
    Ok(0)
}

/// `umlctl verify SNAP`
pub fn verify(s: &Snapshot, json: bool) -> Result<u8> {
    s.verify()?;
    if json {
        println!("{}", json!({ "name": s.name, "ok": true }));
    } else {
        println!("{} is whole", s.name);
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::when;

    #[test]
    fn dates() {
        assert_eq!(when(0), "1970-01-01 00:00:00");
        assert_eq!(when(951_782_400_000_000), "2000-02-29 00:00:00");
        assert_eq!(when(1_795_821_305_000_000), "2026-11-27 23:15:05");
    }
}

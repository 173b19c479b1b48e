//! `umlctl list` and `umlctl info`.

use super::args::{List, One};
use super::find;
use crate::cli::{bytes, time};
use crate::net::names;
use crate::vm::home::{Home, Vm};
use anyhow::{Result, bail};
use serde_json::{Value, json};

/// Version of the JSON.
const SCHEMA: u32 = 1;

/// A VM in JSON.
pub fn value(vm: &Vm) -> Result<Value> {
    let (config, state) = (vm.config()?, vm.state()?);
    Ok(json!({
        "schema": SCHEMA,
        "name": config.name,
        "state": state.phase,
        "address": config.net_index.map(names::address),
        "image": config.image,
        "mem_bytes": config.mem_bytes,
        "net": config.net,
        "kernel": config.kernel,
        "append": config.append,
        "created": config.created,
        "dir": vm.dir(),
        "supervisor": state.supervisor,
        "keeper": state.keeper,
        "main": state.main,
        "started_us": state.started_us,
        "boot_us": state.boot_us,
        "exit": state.exit,
        "reason": state.reason,
        "exit_code": state.exit.map(crate::vm::state::Exit::code),
    }))
}

/// Shows one.
pub fn info(a: &One, json: bool) -> Result<u8> {
    let vm = find(&a.name)?;
    let v = value(&vm)?;
    if json {
        println!("{v}");
        return Ok(0);
    }
    let text = |key: &str| match &v[key] {
        Value::Null => "-".to_owned(),
        Value::String(s) => s.clone(),
        other => other.to_string(),
    };
    let boot = v["boot_us"].as_u64().map_or("-".to_owned(), time);
    let rows = [
        ("name", text("name")),
        ("state", text("state")),
        ("address", text("address")),
        ("image", text("image")),
        ("memory", bytes(v["mem_bytes"].as_u64().unwrap_or_default())),
        ("kernel", text("kernel")),
        ("directory", text("dir")),
        ("supervisor", text("supervisor")),
        ("main", text("main")),
        ("boot", boot),
        ("exit code", text("exit_code")),
        ("reason", text("reason")),
    ];
    for (name, value) in rows {
        println!("{name:<11} {value}");
    }
    Ok(0)
}

const COLUMNS: [&str; 5] = ["name", "state", "address", "memory", "image"];

/// Shows all.
pub fn list(a: &List, json: bool) -> Result<u8> {
    let columns: Vec<&str> = match a.output.as_slice() {
        [] => COLUMNS.to_vec(),
        some => some.iter().map(String::as_str).collect(),
    };
    if let Some(unknown) = columns.iter().find(|c| !COLUMNS.contains(c)) {
        bail!(
            "there is no column {unknown}; there are {}",
            COLUMNS.join(", ")
        );
    }
    let mut values = Vec::new();
    let mut failed = 0;
    for vm in Home::from_env()?.all()? {
        match value(&vm) {
            Ok(v) => values.push(v),
            // Being made or removed at this moment.
            Err(_) if !vm.config_path().exists() => {}
            Err(e) => {
                failed += 1;
                eprintln!("umlctl: {}: {e:#}", vm.name());
            }
        }
    }
    if json {
        println!("{}", json!({ "schema": SCHEMA, "vms": values }));
    } else {
        table(&columns, &values, a.no_headers);
    }
    Ok(if failed == 0 {
        0
    } else {
        crate::cli::code::PARTIAL
    })
}

fn table(columns: &[&str], values: &[Value], no_headers: bool) {
    let cell = |v: &Value, column: &str| match column {
        "memory" => bytes(v["mem_bytes"].as_u64().unwrap_or_default()),
        other => v[other].as_str().unwrap_or("-").to_owned(),
    };
    let mut rows: Vec<Vec<String>> = Vec::new();
    if !no_headers {
        rows.push(columns.iter().map(|c| c.to_uppercase()).collect());
    }
    rows.extend(
        values
            .iter()
            .map(|v| columns.iter().map(|c| cell(v, c)).collect()),
    );
    aligned(&rows);
}

/// Prints rows of one length, aligned.
pub fn aligned(rows: &[Vec<String>]) {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |i: usize| rows.iter().map(|r| r[i].len()).max().unwrap_or_default();
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for row in rows {
        let line: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(c, w)| format!("{c:<w$}"))
            .collect();
        println!("{}", line.join("  ").trim_end());
    }
}

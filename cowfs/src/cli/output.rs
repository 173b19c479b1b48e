//! Printing: names and data on stdout, everything else on stderr.

use std::fmt::Write;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use serde_json::{Value, json};

use super::args::{Cli, Command};
use super::check::Found;
use crate::control::{Answer, CheckpointInfo, DiffKind, Failure, HeadInfo, Listing, SCHEMA};
use crate::names::clock;
use crate::store::{CheckReport, Origin};

/// Prints an error, under `--json` as JSON.
pub(super) fn failure(f: &Failure, json: bool) {
    if json {
        eprintln!(
            "{}",
            json!({"schema": SCHEMA, "error": f.message, "exit_code": f.code})
        );
    } else {
        eprintln!("cowfs: {f}");
    }
}

/// Prints a plain success.
pub(super) fn done(cli: &Cli, message: &str) {
    if cli.json {
        json(json!({"ok": true}));
    } else {
        eprintln!("{message}");
    }
}

/// Prints a value with the schema's number in front.
pub(super) fn json(mut value: Value) {
    if let Some(o) = value.as_object_mut() {
        o.remove("answer");
        o.insert("schema".into(), SCHEMA.into());
    }
    line(&value);
}

/// Prints a value as one line, in one go: printed piece by piece a long one would be a hundred writes.
fn line(value: &impl Serialize) {
    let mut text = serde_json::to_string(value).unwrap_or_default();
    text.push('\n');
    print!("{text}");
}

/// A duration for people.
pub(super) fn duration(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} us"),
        1_000..1_000_000 => format!("{}.{:02} ms", us / 1_000, us % 1_000 / 10),
        _ => format!("{}.{:02} s", us / 1_000_000, us % 1_000_000 / 10_000),
    }
}

/// A size for people.
pub(super) fn size(bytes: u64) -> String {
    const UNITS: [(&str, u32); 3] = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    for (unit, shift) in UNITS {
        if bytes >= 1 << shift {
            let tenths = (u128::from(bytes) * 10) >> shift;
            return format!("{}.{} {unit}", tenths / 10, tenths % 10);
        }
    }
    format!("{bytes} B")
}

/// An aligned table.
pub(super) fn table(headers: Option<&[&str]>, rows: &[Vec<String>]) {
    let columns = rows.first().map_or(0, Vec::len);
    let mut width: Vec<usize> =
        headers.map_or(vec![0; columns], |h| h.iter().map(|s| s.len()).collect());
    for r in rows {
        for (w, cell) in width.iter_mut().zip(r) {
            *w = (*w).max(cell.chars().count());
        }
    }
    // Printed in one go: a write for each row would take longer than all else.
    let mut text = String::new();
    let mut line = |cells: &[String]| {
        for (i, (cell, w)) in cells.iter().zip(&width).enumerate() {
            if i > 0 {
                text.push_str("  ");
            }
            text.push_str(cell);
            text.extend(std::iter::repeat_n(' ', w - cell.chars().count().min(*w)));
        }
        text.truncate(text.trim_end_matches(' ').len());
        text.push('\n');
    };
    if let Some(h) = headers {
        line(&h.iter().map(|s| s.to_uppercase()).collect::<Vec<_>>());
    }
    for r in rows {
        line(r);
    }
    print!("{text}");
}

/// Prints what a command was answered.
pub(super) fn answer(cli: &Cli, a: &Answer) {
    if cli.json {
        match a {
            Answer::List(l) => {
                let (heads, checkpoints) = l.whole();
                line(&Listed {
                    heads: &heads,
                    checkpoints: &checkpoints,
                    schema: SCHEMA,
                });
            }
            Answer::Done => json(json!({"ok": true})),
            a => json(serde_json::to_value(a).unwrap_or_default()),
        }
        return;
    }
    let stats = |us: u64| {
        if cli.print_stats {
            eprintln!("in {}", duration(us));
        }
    };
    match a {
        Answer::Checkpoint {
            name, elapsed_us, ..
        } => {
            println!("{name}");
            stats(*elapsed_us);
        }
        Answer::Rollback {
            name,
            head,
            left_behind,
            elapsed_us,
        } => {
            eprintln!("{head} is at {name} again");
            if let Some(l) = left_behind {
                eprintln!("what it was before is kept as");
                println!("{l}");
            }
            stats(*elapsed_us);
        }
        Answer::Plan { steps } => {
            for s in steps {
                println!("{s}");
            }
        }
        Answer::List(l) => list(cli, l),
        Answer::Diff { entries } => {
            let mut text = String::new();
            for e in entries {
                let c = match e.change {
                    DiffKind::Added => '+',
                    DiffKind::Removed => '-',
                    DiffKind::Modified => 'M',
                    DiffKind::Attributes => 'a',
                };
                let _ = writeln!(text, "{c} {}", e.path);
            }
            print!("{text}");
        }
        Answer::Restored {
            paths,
            failed,
            elapsed_us,
        } => {
            for f in failed {
                eprintln!("cowfs: {}: {}", f.path, f.error);
            }
            let s = if *paths == 1 { "" } else { "s" };
            eprintln!("restored {paths} path{s}");
            stats(*elapsed_us);
        }
        Answer::Gc {
            freed_pages,
            freed_bytes,
            live_pages,
            elapsed_us,
        } => {
            eprintln!(
                "freed {freed_pages} tree pages ({live_pages} in use) and up to {} of file data",
                size(*freed_bytes)
            );
            stats(*elapsed_us);
        }
        Answer::Stats {
            store,
            pid,
            rss_bytes,
            requests,
            mounts,
        } => {
            let mut rows = vec![
                vec!["pid".into(), pid.to_string()],
                vec!["rss_bytes".into(), rss_bytes.to_string()],
                vec!["requests".into(), requests.to_string()],
            ];
            if let Ok(Value::Object(o)) = serde_json::to_value(store) {
                rows.extend(o.into_iter().map(|(k, v)| vec![k, v.to_string()]));
            }
            for m in mounts {
                rows.push(vec!["mount".into(), m.display().to_string()]);
            }
            table(None, &rows);
        }
        Answer::Packed(r) => super::history::packed(r),
        Answer::Pruned { plan, dry_run } => super::history::pruned(plan, *dry_run),
        Answer::Sent { .. } | Answer::Received { .. } => super::history::moved(a),
        Answer::Mounted { .. } | Answer::Done => {}
        Answer::Error(f) => failure(f, false),
    }
}

/// A list under `--json`.
#[derive(Serialize)]
struct Listed<'a> {
    heads: &'a [HeadInfo],
    checkpoints: &'a [CheckpointInfo],
    schema: u32,
}

fn list(cli: &Cli, listing: &Listing) {
    let (heads, checkpoints) = listing.whole();
    let Command::List {
        no_headers, output, ..
    } = &cli.command
    else {
        return;
    };
    let default = ["name", "kind", "head", "parent", "created", "tags"];
    let columns: Vec<&str> = if output.is_empty() {
        default.to_vec()
    } else {
        output.iter().map(String::as_str).collect()
    };
    let mut rows = Vec::new();
    for h in &heads {
        rows.push(
            columns
                .iter()
                .map(|c| match *c {
                    "name" | "head" => h.name.clone(),
                    "kind" => "head".into(),
                    "parent" => h.parent.clone().unwrap_or_default(),
                    "created" => clock(h.created_us),
                    "mounted" => h
                        .mounted_at
                        .as_ref()
                        .map(|m| m.display().to_string())
                        .unwrap_or_default(),
                    _ => String::new(),
                })
                .collect(),
        );
    }
    for k in &checkpoints {
        let tags: Vec<String> = k.tags.iter().map(|(k, v)| format!("{k}={v}")).collect();
        rows.push(
            columns
                .iter()
                .map(|c| match *c {
                    "name" => k.name.clone(),
                    "kind" => match k.origin {
                        Origin::Asked if k.pinned => "checkpoint, pinned".into(),
                        Origin::Asked => "checkpoint".into(),
                        Origin::LeftBehind => "left behind".into(),
                    },
                    "head" => k.head.clone(),
                    "parent" => k.parent.clone().unwrap_or_default(),
                    "created" => clock(k.created_us),
                    "tags" => tags.join(","),
                    "pinned" => k.pinned.to_string(),
                    "mounted" => k
                        .mounted_at
                        .iter()
                        .map(|m| m.display().to_string())
                        .collect::<Vec<_>>()
                        .join(","),
                    _ => String::new(),
                })
                .collect(),
        );
    }
    table((!no_headers).then_some(&columns), &rows);
}

/// A bar for long work, which nobody sees beside `--json`.
pub(super) fn bar(cli: &Cli, template: &str) -> ProgressBar {
    let bar = ProgressBar::new(0);
    if cli.json {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

/// Prints what a check found, and what one of the contents did.
pub(super) fn check(cli: &Cli, r: &CheckReport, found: &Found) {
    let clean = r.problems.is_empty() && found.is_clean();
    if cli.json {
        let mut value = json!({
            "trees": r.trees, "pages": r.pages, "inodes": r.inodes,
            "problems": r.problems,
            "clean": clean,
        });
        if let Some(o) = value.as_object_mut() {
            found.json(o);
        }
        json(value);
        return;
    }
    for p in &r.problems {
        println!("{p}");
    }
    found.print();
    if !r.problems.is_empty() {
        eprintln!("{} problems", r.problems.len());
        if r.damaged_trees > 0 {
            eprintln!(
                "{} trees have damaged pages; 'cowfs check --repair --from STORE|URL' may get them from elsewhere",
                r.damaged_trees
            );
        }
    } else if clean {
        eprintln!(
            "clean: {} heads and checkpoints, {} inodes",
            r.trees, r.inodes
        );
    }
}

//! Printing of images.

use std::path::{Path, PathBuf};

use serde_json::json;

use crate::cli::args::Cli;
use crate::cli::output;
use crate::image::{Info, Kind, Report};

fn kind(i: &Info) -> String {
    match i.kind {
        Kind::Base => "base".into(),
        Kind::Cow => "cow".into(),
    }
}

/// One or two words; `info` has the whole story.
fn state(i: &Info) -> String {
    match (&i.problem, &i.in_use) {
        (Some(_), _) => "broken".into(),
        (None, Some(u)) => match u.pid {
            Some(pid) => format!("in use by {pid}"),
            None => "in use".into(),
        },
        (None, None) => "ok".into(),
    }
}

/// Prints all images of a directory.
pub(super) fn list(cli: &Cli, images: &[Info], no_headers: bool, columns: &[String]) {
    if cli.json {
        output::json(json!({"images": images}));
        return;
    }
    let columns: Vec<&str> = match columns {
        [] => super::args::COLUMNS.to_vec(),
        c => c.iter().map(String::as_str).collect(),
    };
    let cell = |i: &Info, column: &str| match column {
        "name" => Path::new(&i.path)
            .file_name()
            .map_or_else(String::new, |n| n.to_string_lossy().into_owned()),
        "kind" => kind(i),
        "size" => output::size(i.size_bytes),
        "disk" => output::size(i.disk_bytes),
        "written" => i
            .cow
            .as_ref()
            .map_or_else(String::new, |c| output::size(c.written_bytes)),
        "base" => i.cow.as_ref().map_or_else(String::new, |c| c.base.clone()),
        _ => state(i),
    };
    let rows: Vec<Vec<String>> = images
        .iter()
        .map(|i| columns.iter().map(|c| cell(i, c)).collect())
        .collect();
    output::table((!no_headers).then_some(&columns), &rows);
}

/// Prints one image.
pub(super) fn info(cli: &Cli, i: &Info) {
    if cli.json {
        output::json(serde_json::to_value(i).unwrap_or_default());
        return;
    }
    let mut rows = vec![
        vec!["path".into(), i.path.clone()],
        vec!["kind".into(), kind(i)],
        vec!["size".into(), output::size(i.size_bytes)],
        vec!["on disk".into(), output::size(i.disk_bytes)],
    ];
    if let Some(c) = &i.cow {
        rows.push(vec!["base".into(), c.base.clone()]);
        rows.push(vec!["written".into(), output::size(c.written_bytes)]);
        rows.push(vec!["sectors".into(), c.written_sectors.to_string()]);
        rows.push(vec!["version".into(), c.version.to_string()]);
    }
    rows.push(vec!["state".into(), state(i)]);
    output::table(None, &rows);
    if let Some(p) = &i.problem {
        eprintln!("{p}");
    }
}

/// Prints what checks found; the exit code.
pub(super) fn verified(cli: &Cli, reports: &[(&PathBuf, Report)]) -> u8 {
    let problems: usize = reports.iter().map(|(_, r)| r.problems.len()).sum();
    if cli.json {
        let images: Vec<_> = reports
            .iter()
            .map(|(path, r)| {
                json!({
                    "path": path.display().to_string(), "clean": r.problems.is_empty(),
                    "problems": r.problems, "notes": r.notes,
                })
            })
            .collect();
        output::json(json!({"images": images, "clean": problems == 0}));
        return u8::from(problems > 0);
    }
    for (path, r) in reports {
        for p in &r.problems {
            println!("{p}");
        }
        for n in &r.notes {
            eprintln!("{n}");
        }
        if r.problems.is_empty() {
            eprintln!("{}: clean", path.display());
        }
    }
    u8::from(problems > 0)
}

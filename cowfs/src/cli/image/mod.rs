//! `cowfs image`: images of User Mode Linux guests.

mod args;
mod print;

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use super::args::Cli;
use super::{output, spinner};
use crate::control::Failure;
use crate::image::{self, DuplicateOptions, ImageError};
pub use args::ImageCommand;

impl From<ImageError> for Failure {
    fn from(e: ImageError) -> Self {
        Self {
            code: match e {
                ImageError::InUse { .. } => 11,
                _ => 1,
            },
            message: e.in_full(),
        }
    }
}

/// Runs one verb and returns the exit code.
pub(super) fn run(cli: &Cli, command: &ImageCommand) -> Result<u8, Failure> {
    let start = Instant::now();
    let quick = matches!(
        command,
        ImageCommand::Info { .. } | ImageCommand::List { .. } | ImageCommand::Create { .. }
    );
    let waiting = spinner(cli, !quick);
    let done = |path: &Path, mut value: Value| {
        waiting.finish_and_clear();
        made(cli, path, &mut value, start);
    };
    match command {
        ImageCommand::Import {
            source,
            dir,
            name,
            force,
        } => {
            if name
                .as_ref()
                .is_some_and(|n| n.is_empty() || n.contains('/'))
            {
                return Err(Failure {
                    code: 2,
                    message: "--name is a name in the directory, without a slash".into(),
                });
            }
            let i = image::import(source, dir, name.as_deref(), *force)?;
            let value = json!({"size_bytes": i.size_bytes, "written_bytes": i.written_bytes, "blake3": i.digest});
            done(&i.path, value);
        }
        ImageCommand::List {
            dir,
            no_headers,
            output,
        } => print::list(cli, &image::list(dir)?, *no_headers, output),
        ImageCommand::Create { cow, base, force } => {
            let h = image::create_with(cow, base, *force)?;
            done(
                cow,
                json!({"base": h.base.display().to_string(), "size_bytes": h.size}),
            );
        }
        ImageCommand::Duplicate {
            from,
            to,
            force,
            no_sync,
        } => {
            let options = DuplicateOptions {
                force: *force,
                sync: !no_sync,
            };
            let d = image::duplicate_with(from, to, options)?;
            let value = json!({"shared": d.shared, "copied_bytes": d.copied_bytes, "size_bytes": d.size_bytes});
            done(to, value);
        }
        ImageCommand::Info { image } => print::info(cli, &image::info(image)?),
        ImageCommand::Merge {
            cow,
            to,
            in_place,
            force,
        } => {
            let (m, to) = match to {
                Some(to) if !in_place => (image::merge(cow, to, *force)?, to.clone()),
                _ => {
                    let base = image::Cow::open(cow)?.header().base.clone();
                    (image::merge_in_place(cow)?, base)
                }
            };
            let value = json!({"size_bytes": m.size_bytes, "from_cow_bytes": m.from_cow_bytes});
            done(&to, value);
        }
        ImageCommand::Rebase {
            cow,
            base,
            unchecked: true,
        } => {
            image::rebase_unchecked(cow, base)?;
            done(cow, json!({"base": base.display().to_string()}));
        }
        ImageCommand::Rebase { cow, base, .. } => {
            let r = image::rebase(cow, base)?;
            let value =
                json!({"base": base.display().to_string(), "written_bytes": r.written_bytes});
            done(cow, value);
        }
        ImageCommand::Verify { images } => {
            let mut reports = Vec::new();
            for i in images {
                reports.push((i, image::verify(i)?));
            }
            waiting.finish_and_clear();
            return Ok(print::verified(cli, &reports));
        }
        ImageCommand::Export { image, to, force } if to.as_os_str() != "-" => {
            let m = image::export(image, to, *force)?;
            done(to, json!({"size_bytes": m.size_bytes}));
        }
        ImageCommand::Export { image, .. } => {
            let mut out = std::io::stdout().lock();
            if out.is_terminal() {
                return Err(Failure {
                    code: 2,
                    message: "standard output is a terminal; redirect it, or name a file".into(),
                });
            }
            // No JSON here: standard output is the image.
            image::export_to(image, &mut out)?;
            out.flush()
                .map_err(|e| Failure::new(format!("writing the output: {e}")))?;
        }
    }
    waiting.finish_and_clear();
    Ok(0)
}

/// Says what was made: its path, or under `--json` all that is known of it.
fn made(cli: &Cli, path: &Path, value: &mut Value, start: Instant) {
    let us = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
    if cli.json {
        if let Some(o) = value.as_object_mut() {
            o.insert("path".into(), path.display().to_string().into());
            o.insert("elapsed_us".into(), us.into());
        }
        output::json(value.take());
        return;
    }
    println!("{}", path.display());
    if cli.print_stats {
        eprintln!("in {}", output::duration(us));
    }
}

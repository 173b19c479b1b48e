//! The command line: finds the store, asks its daemon (or opens it itself), and prints.

pub mod args;
mod check;
mod daemon;
mod doctor;
mod history;
mod history_args;
pub mod image;
mod locate;
mod output;
mod sys;
mod upgrade;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use clap::{CommandFactory, Parser};
use indicatif::{ProgressBar, ProgressDrawTarget};

use crate::control::{Failure, MountSpec, Request};
use crate::store::Store;
use args::{Cli, Command};
use locate::Target;

/// Runs the command and returns its exit code.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(c) => c,
        Err(e) => return usage(&e),
    };
    let json = cli.json;
    match run(&cli) {
        Ok(code) => ExitCode::from(code),
        Err(f) => {
            output::failure(&f, json);
            ExitCode::from(f.code)
        }
    }
}

/// Prints what clap has to say: help and version as they are, errors under `--json` as JSON.
fn usage(e: &clap::Error) -> ExitCode {
    let json = std::env::args_os()
        .take_while(|a| a != "--")
        .any(|a| a == "--json");
    if e.use_stderr() && json {
        let text = e.render().to_string();
        let message = text.trim().trim_start_matches("error: ").to_owned();
        output::failure(&Failure { code: 2, message }, true);
    } else if let Err(e) = e.print() {
        eprintln!("cowfs: {e}");
    }
    ExitCode::from(u8::try_from(e.exit_code()).unwrap_or(2))
}

fn run(cli: &Cli) -> Result<u8, Failure> {
    match &cli.command {
        Command::Init { store } => {
            Store::init(store)?;
            output::done(cli, &format!("made a store in {}", store.display()));
            Ok(0)
        }
        Command::Mount {
            store,
            mountpoint,
            head,
            at,
            foreground,
            options,
        } => {
            let spec = MountSpec {
                mountpoint: mountpoint.clone(),
                head: head.clone(),
                at: at.clone(),
                options: options.clone(),
            };
            daemon::mount(cli, store, &spec, *foreground)
        }
        Command::Daemon { store } => daemon::child(store),
        Command::Unmount { mountpoint, lazy } => unmount(cli, mountpoint, *lazy),
        Command::Check {
            store,
            data,
            repair,
            from,
        } => {
            let what = check::Check {
                store,
                data: *data,
                repair: *repair,
                from: from.as_deref(),
            };
            check::run(cli, &what)
        }
        Command::History(h) => history::run(cli, h),
        Command::Gc { target, wait } => history::gc(cli, target.as_deref(), *wait),
        Command::Upgrade(a) => upgrade::run(cli, a),
        Command::Image(c) => image::run(cli, c),
        Command::Doctor { store } => doctor::run(cli, store.as_deref()),
        Command::Completions { shell } => {
            let mut cmd = Cli::command();
            clap_complete::generate(*shell, &mut cmd, "cowfs", &mut std::io::stdout());
            Ok(0)
        }
        Command::Man { dir } => {
            clap_mangen::generate_to(Cli::command(), dir)
                .map_err(|e| Failure::new(format!("writing manual pages: {e}")))?;
            Ok(0)
        }
        other => {
            let (target, request) = request(other)?;
            let waiting = spinner(cli, matches!(request, Request::Diff { .. }));
            let answer = target.ask(&request)?;
            waiting.finish_and_clear();
            output::answer(cli, &answer);
            Ok(answer.code())
        }
    }
}

/// A sign of life for long work, on a terminal.
fn spinner(cli: &Cli, long: bool) -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    if !long || cli.json {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    } else {
        bar.enable_steady_tick(Duration::from_millis(200));
        bar.set_message("working");
    }
    bar
}

fn tags(list: &[String]) -> Result<(BTreeMap<String, String>, Vec<String>), Failure> {
    let mut set = BTreeMap::new();
    let mut remove = Vec::new();
    for t in list {
        match (t.split_once('='), t.strip_suffix('-')) {
            (Some((k, v)), _) if !k.is_empty() => {
                set.insert(k.to_owned(), v.to_owned());
            }
            (None, Some(k)) if !k.is_empty() => remove.push(k.to_owned()),
            _ => {
                return Err(Failure {
                    code: 2,
                    message: format!("{t:?} is no tag: write K=V to set one, K- to remove it"),
                });
            }
        }
    }
    Ok((set, remove))
}

/// What to ask, and whom.
fn request(command: &Command) -> Result<(Target, Request), Failure> {
    Ok(match command {
        Command::Checkpoint {
            mountpoint,
            name,
            tag,
            wait,
        } => {
            let t = Target::of(mountpoint)?;
            let head = t.head()?;
            let (tags, _) = tags(tag)?;
            let r = Request::Checkpoint {
                head,
                name: name.clone(),
                tags,
                wait: *wait,
            };
            (t, r)
        }
        Command::Rollback {
            mountpoint,
            checkpoint,
            discard,
            dry_run,
        } => {
            let t = Target::of(mountpoint)?;
            let r = Request::Rollback {
                head: t.head()?,
                checkpoint: checkpoint.clone(),
                discard: *discard,
                dry_run: *dry_run,
                keep_as: None,
            };
            (t, r)
        }
        Command::Clone {
            target,
            checkpoint,
            new_head,
        } => {
            let t = Target::of(target)?;
            let r = Request::Clone {
                head: t.head().ok(),
                checkpoint: checkpoint.clone(),
                new_head: new_head.clone(),
            };
            (t, r)
        }
        Command::List { target, .. } => (Target::of_or_only(target.as_deref())?, Request::List),
        Command::Diff { target, a, b } => {
            let t = Target::of(target)?;
            let r = Request::Diff {
                head: t.mounted_head(),
                a: a.clone(),
                b: b.clone(),
            };
            (t, r)
        }
        Command::Restore {
            mountpoint,
            checkpoint,
            paths,
        } => {
            let t = Target::of(mountpoint)?;
            let r = Request::Restore {
                head: t.head()?,
                checkpoint: checkpoint.clone(),
                paths: paths.clone(),
            };
            (t, r)
        }
        Command::Tag {
            target,
            checkpoint,
            tag,
        } => {
            let t = Target::of(target)?;
            let (set, remove) = tags(tag)?;
            let r = Request::Tag {
                head: t.mounted_head(),
                checkpoint: checkpoint.clone(),
                set,
                remove,
            };
            (t, r)
        }
        Command::Pin { target, checkpoint } | Command::Unpin { target, checkpoint } => {
            let t = Target::of(target)?;
            let r = Request::Pin {
                head: t.mounted_head(),
                checkpoint: checkpoint.clone(),
                on: matches!(command, Command::Pin { .. }),
            };
            (t, r)
        }
        Command::Rename { target, from, to } => {
            let r = Request::Rename {
                from: from.clone(),
                to: to.clone(),
            };
            (Target::of(target)?, r)
        }
        Command::Delete { target, name } => {
            (Target::of(target)?, Request::Delete { name: name.clone() })
        }
        Command::Stats { target } => (Target::of_or_only(target.as_deref())?, Request::Stats),
        _ => return Err(Failure::new("this command asks nobody")),
    })
}

fn unmount(cli: &Cli, mountpoint: &Path, lazy: bool) -> Result<u8, Failure> {
    let t = Target::of(mountpoint)?;
    let Some((mountpoint, _)) = t.mount.clone() else {
        return Err(Failure::new(format!(
            "{} is not a cowfs mount",
            mountpoint.display()
        )));
    };
    match t.client()? {
        Some(mut c) => {
            c.ask(&Request::Unmount {
                mountpoint: mountpoint.clone(),
                lazy,
            })?;
            daemon::wait_for_end(&t.store);
        }
        None => {
            eprintln!("cowfs: the daemon of this mount is gone; taking the dead mount away");
            crate::fuse::unmount(&mountpoint, true)
                .map_err(|e| Failure::new(format!("{}: {e}", mountpoint.display())))?;
        }
    }
    output::done(cli, &format!("unmounted {}", mountpoint.display()));
    Ok(0)
}

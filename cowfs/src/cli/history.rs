//! `pack`, `prune`, `send`, `receive` and `gc`.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::args::Cli;
use super::history_args::{History, PackArgs, PruneArgs, ReceiveArgs, SendArgs};
use super::locate::Target;
use super::output::{self, bar, size};
use crate::control::{Answer, Failure, Request};
use crate::errors::in_full;
use crate::history::prune::{Rules, Verdict};
use crate::history::remote::{Remote, RemoteError, is_url};
use crate::store::Stats;
use crate::store::packs::PackReport;
use crate::store::packs::records::Name;

pub(super) fn run(cli: &Cli, command: &History) -> Result<u8, Failure> {
    match command {
        History::Pack(a) => pack(cli, a),
        History::Prune(a) => prune(cli, a),
        History::Send(a) => send(cli, a),
        History::Receive(a) => receive(cli, a),
    }
}

pub(super) fn remote(e: RemoteError) -> Failure {
    Failure::new(in_full(&e))
}

fn io_failure(what: &str) -> impl Fn(io::Error) -> Failure {
    let what = what.to_owned();
    move |e| Failure::new(format!("{what}: {e}"))
}

/// Asks for something long, and shows meanwhile how far it is.
fn with_progress(
    cli: &Cli,
    target: &Target,
    request: &Request,
    text: &str,
    progress: fn(&Stats) -> (u64, u64),
) -> Result<Answer, Failure> {
    let bar = bar(cli, &format!("{text} {{wide_bar}} {{percent}}%"));
    let done = AtomicBool::new(false);
    let answer = std::thread::scope(|s| {
        if !bar.is_hidden() {
            s.spawn(|| {
                let mut client = target.client().ok().flatten();
                while !done.load(Ordering::Relaxed) {
                    if let Some(c) = &mut client
                        && let Ok(Answer::Stats { store, .. }) = c.ask(&Request::Stats)
                    {
                        let (at, all) = progress(&store);
                        bar.set_length(all);
                        bar.set_position(at);
                    }
                    std::thread::sleep(Duration::from_millis(200));
                }
            });
        }
        let answer = target.ask(request);
        done.store(true, Ordering::Relaxed);
        answer
    });
    bar.finish_and_clear();
    answer
}

pub(super) fn gc(cli: &Cli, target: Option<&Path>, wait: bool) -> Result<u8, Failure> {
    let target = Target::of_or_only(target)?;
    // Where no daemon runs nobody collects in the background.
    let request = if wait && target.client()?.is_some() {
        Request::GcWait
    } else {
        Request::Gc
    };
    let progress = |s: &Stats| (s.gc_done_pages, s.gc_total_pages);
    let answer = with_progress(cli, &target, &request, "collecting", progress)?;
    output::answer(cli, &answer);
    Ok(answer.code())
}

fn pack(cli: &Cli, a: &PackArgs) -> Result<u8, Failure> {
    let target = Target::of(&a.target)?;
    let request = Request::Pack {
        head: target.mounted_head(),
        checkpoints: a.checkpoint.clone(),
        level: a.level,
    };
    let progress = |s: &Stats| (s.pack_done_bytes, s.pack_total_bytes);
    let answer = with_progress(cli, &target, &request, "packing", progress)?;
    output::answer(cli, &answer);
    match &answer {
        Answer::Packed(r) if !r.damaged.is_empty() => Ok(3),
        _ => Ok(0),
    }
}

/// Prints what packing did.
pub(super) fn packed(r: &PackReport) {
    eprintln!(
        "packed {} of file contents, {} of it new, into {}; sums for {} more; freed up to {}",
        size(r.packed_bytes),
        size(r.new_bytes),
        size(r.stored_bytes),
        size(r.summed_bytes),
        size(r.freed_bytes)
    );
    if !r.damaged.is_empty() {
        eprintln!(
            "cowfs: {} ranges do not have their sum and were left; 'cowfs check --data' names the files",
            r.damaged.len()
        );
    }
}

fn prune(cli: &Cli, a: &PruneArgs) -> Result<u8, Failure> {
    let rules = Rules {
        last: a.keep_last,
        daily: a.keep_daily,
        weekly: a.keep_weekly,
        within_us: a.keep_within,
        tags: a.keep_tag.clone(),
    };
    let dry_run = a.dry_run;
    let answer = Target::of(&a.target)?.ask(&Request::Prune { rules, dry_run })?;
    output::answer(cli, &answer);
    Ok(0)
}

/// Prints what pruning did: the names of what is gone.
pub(super) fn pruned(plan: &[Verdict], dry_run: bool) {
    for v in plan.iter().filter(|v| !v.is_kept()) {
        println!("{}", v.name);
    }
    let kept = plan.iter().filter(|v| v.is_kept());
    if dry_run {
        for v in kept.clone() {
            eprintln!("keep {}: {}", v.name, v.reasons.join(", "));
        }
    }
    let kept = kept.count();
    let would = if dry_run { "would be " } else { "" };
    eprintln!("{} {would}deleted, {kept} kept", plan.len() - kept);
}

/// Prints what was sent or received.
pub(super) fn moved(a: &Answer) {
    match a {
        Answer::Sent {
            name,
            chunks,
            chunk_bytes,
            stream_bytes,
            ..
        } => eprintln!(
            "sent {name}: {chunks} chunks of {}, {} in all",
            size(*chunk_bytes),
            size(*stream_bytes)
        ),
        Answer::Received {
            name,
            new_chunks,
            new_bytes,
            ..
        } => {
            println!("{name}");
            eprintln!("{new_chunks} chunks of {} were new", size(*new_bytes));
        }
        _ => {}
    }
}

/// The path by which another process opens an end of a pipe of this one.
fn path_of(end: &impl AsFd) -> PathBuf {
    let fd = end.as_fd().as_raw_fd();
    PathBuf::from(format!("/proc/{}/fd/{fd}", std::process::id()))
}

/// A file without a name.
fn nameless() -> Result<File, Failure> {
    use std::os::unix::fs::OpenOptionsExt;
    File::options()
        .read(true)
        .write(true)
        .mode(0o600)
        .custom_flags(libc::O_TMPFILE)
        .open(std::env::temp_dir())
        .map_err(io_failure("a temporary file"))
}

fn send(cli: &Cli, a: &SendArgs) -> Result<u8, Failure> {
    let target = Target::of(&a.target)?;
    if a.to == "-" && io::IsTerminal::is_terminal(&io::stdout()) {
        return Err(Failure {
            code: 2,
            message: "a stream is not for a terminal; say where with --to, or pipe it on".into(),
        });
    }
    let (mut reader, writer) = io::pipe().map_err(io_failure("a pipe"))?;
    let at = is_url(&a.to)
        .then(|| Remote::open(&a.to))
        .transpose()
        .map_err(remote)?;
    let mut have = None;
    if let Some(at) = &at {
        let mut list = nameless()?;
        for name in at.chunks() {
            list.write_all(name)
                .map_err(io_failure("a temporary file"))?;
        }
        have = Some(list);
    }
    let request = Request::Send {
        head: target.mounted_head(),
        checkpoint: a.checkpoint.clone(),
        base: a.from.clone(),
        resume: a.resume.clone(),
        level: a.level,
        pipe: path_of(&writer),
        have: have.as_ref().map(path_of),
    };
    let (answer, pumped) = std::thread::scope(|s| {
        let to = &a.to;
        let pump = s.spawn(move || match &at {
            Some(at) => at
                .upload(&mut reader, nameless()?)
                .map(drop)
                .map_err(remote),
            None if to == "-" => io::copy(&mut reader, &mut io::stdout().lock())
                .map(drop)
                .map_err(io_failure("standard output")),
            None => save(Path::new(to), &mut reader),
        });
        let answer = target.ask(&request);
        drop(writer);
        let pumped = pump.join();
        (answer, pumped)
    });
    let pumped = pumped.map_err(|_| Failure::new("it stopped after an internal error"))?;
    let answer = match (answer, pumped) {
        (Ok(answer), pumped) => {
            pumped?;
            answer
        }
        // The end that failed first is the one that says why.
        (Err(e), Ok(())) => return Err(e),
        (Err(e), Err(m)) => {
            let broken = e.message.contains("Broken pipe");
            return Err(if broken { m } else { e });
        }
    };
    if let Answer::Sent { .. } = &answer {
        if a.to == "-" {
            // The stream is on stdout.
            if !cli.json {
                moved(&answer);
            }
        } else {
            output::answer(cli, &answer);
        }
    }
    Ok(0)
}

/// Writes a stream to a file that has its name only when it is whole.
fn save(path: &Path, from: &mut impl Read) -> Result<(), Failure> {
    let fail = |e| io_failure(&path.display().to_string())(e);
    if std::fs::metadata(path).is_ok_and(|m| !m.is_file()) {
        // A FIFO or a device.
        let mut to = File::options().write(true).open(path).map_err(fail)?;
        return io::copy(from, &mut to).map(drop).map_err(fail);
    }
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".part");
    let part = path.with_file_name(name);
    let mut to = File::create(&part).map_err(fail)?;
    let done = io::copy(from, &mut to).and_then(|_| to.sync_all());
    // Cut short, it lacks its last record.
    match done.and_then(|()| ends_whole(&part)) {
        Ok(true) => std::fs::rename(&part, path).map_err(fail),
        Ok(false) => {
            let _ = std::fs::remove_file(&part);
            Ok(())
        }
        Err(e) => {
            let _ = std::fs::remove_file(&part);
            Err(fail(e))
        }
    }
}

/// True if a file ends with the record that ends a stream: 8 bytes, a body of 16, a sum of 16.
fn ends_whole(path: &Path) -> io::Result<bool> {
    let mut f = File::open(path)?;
    let len = f.metadata()?.len();
    if len < 40 {
        return Ok(false);
    }
    io::Seek::seek(&mut f, io::SeekFrom::End(-40))?;
    let mut head = [0; 8];
    f.read_exact(&mut head)?;
    Ok(head == [4, 0, 0, 0, 16, 0, 0, 0])
}

/// Names of the chunks that a store has.
fn chunks_of(target: &Target) -> Result<HashSet<Name>, Failure> {
    let (mut reader, writer) = io::pipe().map_err(io_failure("a pipe"))?;
    let request = Request::Chunks {
        pipe: path_of(&writer),
    };
    std::thread::scope(|s| {
        let names = s.spawn(move || {
            let mut all = HashSet::new();
            let mut from = io::BufReader::new(&mut reader);
            let mut name = [0; 32];
            while from.read_exact(&mut name).is_ok() {
                all.insert(name);
            }
            all
        });
        let answer = target.ask(&request);
        drop(writer);
        let names = names
            .join()
            .map_err(|_| Failure::new("it stopped after an internal error"))?;
        answer.map(|_| names)
    })
}

fn receive(cli: &Cli, a: &ReceiveArgs) -> Result<u8, Failure> {
    let target = Target::of(&a.target)?;
    if a.checkpoint.is_some() && !is_url(&a.from) {
        return Err(Failure {
            code: 2,
            message: "--checkpoint is for URLs: a stream holds one checkpoint".into(),
        });
    }
    let at = match is_url(&a.from) {
        true => Some((Remote::open(&a.from).map_err(remote)?, chunks_of(&target)?)),
        false => None,
    };
    let file = match a.from.as_str() {
        _ if at.is_some() => None,
        "-" => None,
        path => Some(File::open(path).map_err(io_failure(path))?),
    };
    let (reader, mut writer) = io::pipe().map_err(io_failure("a pipe"))?;
    let request = Request::Receive {
        name: a.name.clone(),
        pipe: path_of(&reader),
    };
    let failed: Arc<Mutex<Option<Failure>>> = Arc::default();
    let told = Arc::clone(&failed);
    let checkpoint = a.checkpoint.clone();
    // Not waited for: it may wait for input that nobody needs any more.
    let pump = std::thread::spawn(move || {
        let done = match (at, file) {
            (Some((at, have)), _) => at
                .download(checkpoint.as_deref(), have, &mut writer)
                .map_err(remote),
            (None, Some(mut f)) => io::copy(&mut f, &mut writer)
                .map(drop)
                .map_err(io_failure("the stream")),
            (None, None) => io::copy(&mut io::stdin().lock(), &mut writer)
                .map(drop)
                .map_err(io_failure("standard input")),
        };
        if let Err(e) = done {
            *crate::mount::lock(&told) = Some(e);
        }
        drop(writer);
    });
    let answer = target.ask(&request);
    drop(reader);
    let answer = match answer {
        Ok(a) => a,
        Err(e) => {
            let why = crate::mount::lock(&failed).take();
            let why = why.filter(|w| !w.message.contains("Broken pipe"));
            // What came was cut off because the source failed: that is the reason.
            return Err(match why {
                Some(w) => Failure::new(format!("{w}; {e}")),
                None => e,
            });
        }
    };
    let _ = pump.join();
    output::answer(cli, &answer);
    Ok(0)
}

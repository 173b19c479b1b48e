//! `history.md` and `history.json`.

use std::fmt::Write;

use anyhow::{Context, Result};

use super::Plan;
use super::background::{self, JOBS, KINDS};
use super::peer::{COWFS, COWFS_ALL, NATIVE, PEERS};
use super::roots::Root;
use super::scale::{self, FEW, SMALLEST};
use super::versions::{at, of};
use crate::results::{Unit, median};
use crate::table1::Samples;
use crate::table1::report::{cell, value};

/// The smallest may be smaller by so much.
const SIZE: f64 = 1.05;
/// So many times faster than restic and borg the next version is to be stored.
const FASTER: f64 = 10.0;
/// What bringing back may take, in the daemon as of the whole call, seconds: what a rollback may, whatever the tree.
const INSTANT: f64 = 0.005;
/// What many checkpoints, or many files, may cost more than few.
const FLAT: f64 = 2.0;
/// What a job may take beside a collection, of what it takes alone.
const BESIDE: f64 = 1.1;

/// Writes both; the Markdown.
///
/// # Errors
/// If they cannot be written.
pub fn write(plan: &Plan, samples: &Samples, roots: &[Root]) -> Result<String> {
    let json = serde_json::json!({ "results": samples, "roots": roots });
    let json = serde_json::to_string_pretty(&json).context("writing the results")?;
    let text = markdown(samples, roots);
    for (name, content) in [("history.json", json), ("history.md", text.clone())] {
        let path = plan.out.join(name);
        std::fs::write(&path, content + "\n")
            .with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(text)
}

fn markdown(s: &Samples, roots: &[Root]) -> String {
    let mut t = String::from("# History\n\n");
    crate::report::about(&mut t, &s.about);
    t.push_str(
        "\nMedians (lowest to highest) of one run. Other work on the machine is in all figures. Repeat it with `tools/setup bench \
         && cargo run --release -p bench -- history`, after `cargo build --release -p cowfs`.\n",
    );
    if !roots.is_empty() {
        the_roots(&mut t, s, roots);
        size(&mut t, s, roots.len());
        store(&mut t, s, roots.len());
        back(&mut t, s);
        read(&mut t, s);
    }
    if s.median("scale_files").is_some() {
        scale(&mut t, s);
    }
    if KINDS
        .iter()
        .any(|(k, _)| s.median(&format!("background_took@{k}")).is_some())
    {
        beside(&mut t, s);
    }
    crate::report::missing(&mut t, &s.missing);
    t
}

/// Systems in the order of the tables, those of which there is a sample of this kind.
fn systems<'a>(s: &Samples, name: impl Fn(&str) -> String) -> Vec<&'a str> {
    let all = [COWFS, COWFS_ALL].into_iter().chain(PEERS);
    all.filter(|p| s.samples.contains_key(&name(p))).collect()
}

fn yes(met: bool) -> &'static str {
    if met { "yes" } else { "**no**" }
}

fn head(t: &mut String, cells: &[&str]) {
    let _ = writeln!(
        t,
        "\n| {} |\n|{}",
        cells.join(" | "),
        "---|".repeat(cells.len())
    );
}

fn the_roots(t: &mut String, s: &Samples, roots: &[Root]) {
    t.push_str(
        "\n## The roots\n\nDebian by debootstrap from the release alone, with servers and interpreters; then upgraded by apt from security \
         and stable updates, a few packages at a time. *Changed* is what rsync writes to get from the one before to this one.\n",
    );
    head(
        t,
        &[
            "version",
            "upgrade",
            "packages",
            "on ext4",
            "changed files",
            "changed",
        ],
    );
    for (i, root) in roots.iter().enumerate() {
        let get = |what: &str| s.median(&at(what, i + 1, NATIVE));
        let mb = |v: Option<f64>| v.map_or("-".into(), |v| value(Unit::Bytes, v));
        let _ = writeln!(
            t,
            "| {} | {} | {} | {} | {} | {} |",
            i + 1,
            root.title,
            root.packages.len(),
            mb(get("size")),
            get("changed_files").map_or("-".into(), |v| format!("{v:.0}")),
            mb(get("changed_bytes")),
        );
    }
}

fn size(t: &mut String, s: &Samples, versions: usize) {
    t.push_str(
        "\n## Size\n\nBytes allocated for the whole store. *cowfs* after `cowfs pack` and `cowfs gc --wait`, which packs what only older \
         checkpoints hold: what the head has is plain, as on ext4, and is read and written at full speed. *cowfs-all* after `cowfs pack \
         --checkpoint` of each: nothing is plain. btrfs has one copy of its metadata, after fstrim. restic and borg hold no \
         tree that one can work in: with the ext4 that they were made from, which cowfs and btrfs need not have, they take what the last row says.\n",
    );
    let names = systems(s, |p| at("size", 1, p));
    head(t, &[&["after version"], names.as_slice()].concat());
    for n in 1..=versions {
        let cells: Vec<String> = names
            .iter()
            .map(|p| cell(s, &at("size", n, p), Unit::Bytes))
            .collect();
        let _ = writeln!(t, "| {n} | {} |", cells.join(" | "));
    }
    let last = |p: &str| s.median(&at("size", versions, p));
    let native = last(NATIVE).unwrap_or(f64::NAN);
    let whole: Vec<String> = names
        .iter()
        .map(|p| {
            let live = if p.starts_with("restic") || *p == "borg" {
                native
            } else {
                0.0
            };
            last(p).map_or("-".into(), |v| value(Unit::Bytes, v + live))
        })
        .collect();
    let _ = writeln!(t, "| with a tree to work in | {} |", whole.join(" | "));
    let smallest = names
        .iter()
        .filter(|p| !p.starts_with(COWFS))
        .filter_map(|p| Some((*p, last(p)?)))
        .min_by(|a, b| a.1.total_cmp(&b.1));
    head(t, &["goal", "measured", "met?"]);
    for own in [COWFS_ALL, COWFS] {
        if let (Some(v), Some((peer, least))) = (last(own), smallest) {
            let _ = writeln!(
                t,
                "| {own}: within {:.0}% of the smallest peer, {peer} | {:.3} of it | {} |",
                (SIZE - 1.0) * 100.0,
                v / least,
                yes(v <= least * SIZE)
            );
        }
    }
}

/// Values of versions 2 to the last.
fn next(s: &Samples, what: &str, system: &str, versions: usize) -> Vec<f64> {
    (2..=versions)
        .filter_map(|n| s.median(&at(what, n, system)))
        .collect()
}

/// Median, lowest and highest, for people.
fn spread(unit: Unit, v: &[f64]) -> String {
    let low = v.iter().copied().fold(f64::INFINITY, f64::min);
    let high = v.iter().copied().fold(0.0, f64::max);
    median(v).map_or("-".into(), |m| {
        format!(
            "{} ({} to {})",
            value(unit, m),
            value(unit, low),
            value(unit, high)
        )
    })
}

/// Median of the ratios of what two systems took for the same version.
fn times(s: &Samples, what: [&str; 2], systems: [&str; 2], versions: usize) -> Option<f64> {
    let ratios: Vec<f64> = (2..=versions)
        .filter_map(|n| {
            Some(s.median(&at(what[0], n, systems[0]))? / s.median(&at(what[1], n, systems[1]))?)
        })
        .collect();
    median(&ratios)
}

fn store(t: &mut String, s: &Samples, versions: usize) {
    t.push_str(
        "\n## Time to store\n\n*rsync* is how the next version gets to where the system takes it from: a cowfs mount, a subvolume, or the ext4 \
         that restic and borg read. It stands for the upgrade and is not counted. cowfs: `checkpoint --wait`, until it is on disk; btrfs: \
         snapshot and sync; both have to write what rsync has left in memory. restic: `backup`, which derives a key from its password each \
         time and encrypts; borg: `create --compression zstd,3`, without encryption. Both find what is unchanged by its inode, what \
         has changed is in the page cache, and the ext4 was synced before. Packing is done later, at low priority; *all* is checkpoint, pack and collection together.\n",
    );
    head(
        t,
        &[
            "system",
            "version 1",
            "version 1, all",
            "next version",
            "rsync of the next",
            "pack",
            "gc --wait",
            "next version, all",
        ],
    );
    for p in systems(s, |p| at("store", 1, p)) {
        let rsync = if s.samples.contains_key(&at("rsync", 2, p)) {
            p
        } else {
            NATIVE
        };
        let c = |what, p| spread(Unit::Seconds, &next(s, what, p, versions));
        let _ = writeln!(
            t,
            "| {p} | {} | {} | {} | {} | {} | {} | {} |",
            cell(s, &at("store", 1, p), Unit::Seconds),
            cell(s, &at("sum", 1, p), Unit::Seconds),
            c("store", p),
            c("rsync", rsync),
            c("pack", p),
            c("gc", p),
            c("sum", p),
        );
    }
    head(t, &["goal, for the next version", "measured", "met?"]);
    for peer in ["restic", "borg"] {
        if let Some(r) = times(s, ["store", "store"], [peer, COWFS], versions) {
            let _ = writeln!(
                t,
                "| {FASTER} times faster than {peer} | {r:.1} times | {} |",
                yes(r >= FASTER)
            );
        }
    }
    for peer in ["restic", "borg"] {
        if let Some(r) = times(s, ["store", "sum"], [peer, COWFS], versions) {
            let _ = writeln!(
                t,
                "| shown: {peer} to cowfs with packing and the collection | {r:.1} times | |"
            );
        }
    }
}

fn back(t: &mut String, s: &Samples) {
    t.push_str(
        "\n## Bringing the first version back from the last\n\ncowfs: a rollback of the live mount, to a packed checkpoint (and forth again); btrfs: another snapshot in the place of the \
         subvolume, which programs that are inside do not see; restic and borg: into an empty directory. What a rollback has not brought to memory is read when it is asked for, as the next table says. *The same*: in the first \
         round all names, types, modes, owners, times, links, attributes and contents were compared.\n",
    );
    head(
        t,
        &[
            "system",
            "took",
            "in the daemon",
            "the same",
            "goal",
            "met?",
        ],
    );
    for p in systems(s, |p| of("back", p)) {
        let own = p.starts_with(COWFS);
        let met =
            ["back", "back_inside"].map(|w| s.median(&of(w, p)).map_or("-", |v| yes(v <= INSTANT)));
        let _ = writeln!(
            t,
            "| {p} | {} | {} | {} | {} | {} |",
            cell(s, &of("back", p), Unit::Seconds),
            cell(s, &of("back_inside", p), Unit::Seconds),
            if s.samples.contains_key(&of("verified", p)) {
                "yes"
            } else {
                "**no**"
            },
            if own {
                value(Unit::Seconds, INSTANT)
            } else {
                String::new()
            },
            if own { met.join("; ") } else { String::new() },
        );
    }
}

fn read(t: &mut String, s: &Samples) {
    t.push_str(
        "\n## Reading the first version\n\nAll files in the order of the directories, by one process that also walks them: with all caches dropped and mounted anew, and \
         once more. Then pages of 4 KiB at random places of the tree, opening the file each time, caches dropped, mounted anew, names known. cowfs: \
         `mount --at`; restic and borg: their `mount`; native: ext4.\n",
    );
    head(
        t,
        &["system", "cold", "warm", "random pages, cold", "bytes read"],
    );
    let names = systems(s, |p| of("read_cold", p));
    for p in [NATIVE].into_iter().chain(names) {
        let _ = writeln!(
            t,
            "| {p} | {} | {} | {} | {} |",
            cell(s, &of("read_cold", p), Unit::BytesPerSecond),
            cell(s, &of("read_warm", p), Unit::BytesPerSecond),
            cell(s, &of("places", p), Unit::PerSecond),
            cell(s, &of("read_bytes", p), Unit::Bytes),
        );
    }
}

fn scale(t: &mut String, s: &Samples) {
    let number = |what: &str| s.median(&format!("scale_{what}")).unwrap_or(0.0).round();
    // Made from integers that a f64 holds exactly.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let (files, many) = (number("files") as u64, number("checkpoints") as usize);
    let _ = writeln!(
        t,
        "\n## Many files, many checkpoints\n\n{files} files of 1 KiB, 100 of them changed before each checkpoint; every rollback was checked by contents, \
         every diff by the number of its entries. A list prints all checkpoints.",
    );
    let ten = format!("at {FEW} checkpoints");
    let thousand = format!("at {many}");
    head(t, &["what", &ten, &thousand, "ratio", "goal", "met?"]);
    for (row, title) in scale::ROWS {
        flat(
            t,
            s,
            title,
            [&scale::id(row, files, FEW), &scale::id(row, files, many)],
        );
    }
    let spawn = |n| cell(s, &scale::id(scale::SPAWN, files, n), Unit::Seconds);
    let _ = writeln!(
        t,
        "| the start of a command alone, in every whole call | {} | {} | | | |",
        spawn(FEW),
        spawn(many)
    );
    let small = format!("of {SMALLEST} files");
    let large = format!("of {files}");
    head(t, &["a tree", &small, &large, "ratio", "goal", "met?"]);
    for (row, title) in [
        ("diff_socket", "diff, 100 files changed, over the socket"),
        ("diff_call", "diff, 100 files changed, whole call"),
        (
            "diff_more_socket",
            "diff, 1000 files changed, over the socket",
        ),
        ("diff_more_call", "diff, 1000 files changed, whole call"),
    ] {
        flat(
            t,
            s,
            title,
            [&scale::id(row, SMALLEST, FEW), &scale::id(row, files, FEW)],
        );
    }
    if let Some(rss) = s.median("scale_rss") {
        let _ = writeln!(
            t,
            "\nThe daemon's resident memory at the end: {}.",
            value(Unit::Bytes, rss)
        );
    }
}

/// A line with few and with many of something, which is to cost about the same.
fn flat(t: &mut String, s: &Samples, title: &str, names: [&str; 2]) {
    let [few, many] = names.map(|n| cell(s, n, Unit::Seconds));
    let ratio = s
        .median(names[0])
        .zip(s.median(names[1]))
        .map(|(a, b)| b / a);
    let _ = writeln!(
        t,
        "| {title} | {few} | {many} | {} | <= {FLAT} | {} |",
        ratio.map_or("-".into(), |r| format!("{r:.2}")),
        ratio.map_or("-", |r| yes(r <= FLAT))
    );
}

fn beside(t: &mut String, s: &Samples) {
    t.push_str(
        "\n## Beside a collection\n\nA job alone, beside the collection that a prune of 25 checkpoints leaves to do, and alone again, in turn; only what was beside it \
         all the time is counted as that. *Ratio*: of the medians of a round, the median of all rounds. A checkpoint has 300 files of up to 24 KiB that differ from the one before, of which the next ones replace most. Of *packed* ones all was \
         packed before, and frames of which less than 40% is needed are written anew.\n",
    );
    head(
        t,
        &[
            "checkpoints",
            "job",
            "alone",
            "beside",
            "ratio",
            "goal",
            "met?",
        ],
    );
    for (kind, title) in KINDS {
        for (job, what) in JOBS {
            let [alone, beside] =
                ["alone", "beside"].map(|w| cell(s, &background::id(kind, job, w), Unit::Seconds));
            let ratios = background::id(kind, job, "ratio");
            let ratio = s.median(&ratios);
            let _ = writeln!(
                t,
                "| {title} | {what} | {alone} | {beside} | {} | <= {BESIDE} | {} |",
                s.get(&ratios).map_or("-".into(), |(m, low, high)| format!(
                    "{m:.2} ({low:.2} to {high:.2})"
                )),
                ratio.map_or("-", |r| yes(r <= BESIDE))
            );
        }
    }
    head(
        t,
        &[
            "checkpoints",
            "prune, whole call",
            "until all was given back",
            "given back",
            "the daemon's memory at most, job alone",
            "and beside",
        ],
    );
    for (kind, title) in KINDS {
        let of = |what: &str, unit| cell(s, &format!("background_{what}@{kind}"), unit);
        let _ = writeln!(
            t,
            "| {title} | {} | {} | {} | {} | {} |",
            of("prune", Unit::Seconds),
            of("took", Unit::Seconds),
            of("freed", Unit::Bytes),
            of("peak_alone", Unit::Bytes),
            of("peak_beside", Unit::Bytes)
        );
    }
}

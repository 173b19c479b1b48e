//! The rows of the report: what is said about them, and their goals.

use super::boot::{SYSTEMS, WORK};
use super::pause::{TIMES, WAYS};
use crate::results::Unit;
use crate::table1::{Samples, at, size};

/// What a row is to reach.
#[derive(Debug, Clone, Copy)]
pub enum Goal {
    /// Nothing: it is there to compare with
    None,
    /// The median this much or less
    Median(f64),
    /// The 99th percentile, too
    Both(f64, f64),
    /// No difference that can be measured: in one round at least the ratio is 1 or less
    Same,
}

/// A row: name of its samples, title, unit, goal.
pub type Row = (String, String, Unit, Goal);

fn row(name: impl Into<String>, title: impl Into<String>, unit: Unit, goal: Goal) -> Row {
    (name.into(), title.into(), unit, goal)
}

/// A table: title, what is said about it, and its rows.
pub type Table = (&'static str, &'static str, Vec<Row>);

/// All of them.
pub fn tables(samples: &Samples) -> [Table; 6] {
    [
        ("How long a machine stands still", PAUSE, pause()),
        ("By size", BIG, big(samples)),
        ("Resume", RESUME, resume(samples)),
        ("Twins", FORKS, forks()),
        ("Boot", BOOT, boot()),
        ("Speed of the guest", STEADY, steady()),
    ]
}

const PAUSE: &str = "Machines of 128 MB, one after the other: *busy* computes, forks, and writes and syncs files, in \
    three shells; *idle* only echoes; *clock* only looks at CLOCK_MONOTONIC. *Reported* is what the command says. \
    *Network*: the longest time between two replies that an echo client got over TCP, from the start of the command \
    until all is on disk; one round trip, the guest's scheduling and all slowness of the saving are in it. *Inside*: the \
    longest time between two looks at the clock, over the same time. Beside both the same figure over a time as long \
    without a snapshot, and of a bare `linux.uml` with a tap: what a goal is held against is the snapshot and the noise of the \
    host and of the guest, which now and then forgets a packet until its next timer, or until TCP repeats it (docs/uml.md, 2).";

/// Machines of the part `pause`, and who looks at them.
const LOOKERS: [(&str, &str, &str); 3] = [
    ("busy", "busy", "network"),
    ("idle", "idle", "network"),
    ("watch", "clock", "inside"),
];

fn pause() -> Vec<Row> {
    let mut rows = Vec::new();
    for (way, _) in WAYS {
        let (goal, before) = match way {
            "lazy" => (Goal::Both(0.005, 0.02), String::new()),
            _ => (Goal::None, format!("{way}: ")),
        };
        for (role, title, seen) in LOOKERS {
            for (row_name, what) in [("pause", "reported"), ("seen", seen)] {
                let name = at(&format!("{role}_{row_name}"), 128, way);
                let title = format!("{before}{title}, {what}");
                rows.push(row(name, title, Unit::Seconds, goal));
            }
        }
    }
    for (role, title, seen) in LOOKERS {
        let name = at(&format!("{role}_seen"), 128, "none");
        let title = format!("no snapshot: {title}, {seen}");
        rows.push(row(name, title, Unit::Seconds, Goal::None));
    }
    for (role, title, seen) in &LOOKERS[..2] {
        let name = at(&format!("{role}_seen"), 128, "bare");
        let title = format!("a bare kernel: {title}, {seen}");
        rows.push(row(name, title, Unit::Seconds, Goal::None));
    }
    for (role, title, _) in LOOKERS {
        let title = format!("the first snapshot: {title}, reported");
        let name = format!("first_{role}");
        rows.push(row(name, title, Unit::Seconds, Goal::None));
    }
    for field in &TIMES[1..] {
        let field = field.trim_end_matches("_us");
        let name = at(&format!("busy_{field}"), 128, "lazy");
        rows.push(row(
            name,
            format!("busy: *{field}*"),
            Unit::Seconds,
            Goal::None,
        ));
    }
    for field in ["bytes_ahead", "bytes_in_stop"] {
        let name = at(&format!("busy_{field}"), 128, "lazy");
        rows.push(row(
            name,
            format!("busy: *{field}*"),
            Unit::Bytes,
            Goal::None,
        ));
    }
    rows
}

const BIG: &str =
    "Busy machines, as reported. That of 1 GB has 512 MB of pages without zeroes in a tmpfs.";

fn big(samples: &Samples) -> Vec<Row> {
    let mut rows = Vec::new();
    for (way, _) in WAYS {
        for &mb in &samples.sizes_mb {
            let name = at("big_pause", mb, way);
            rows.push(row(
                name,
                format!("{}, {way}", size(mb)),
                Unit::Seconds,
                Goal::None,
            ));
        }
    }
    let ratio = "1 GB to 128 MB, medians of each round";
    rows.push(row("big_ratio", ratio, Unit::Ratio, Goal::Median(2.0)));
    for &mb in &samples.sizes_mb {
        let name = at("big_durable", mb, "lazy");
        let title = format!("{}, lazy: until all is on disk", size(mb));
        rows.push(row(name, title, Unit::Seconds, Goal::None));
    }
    rows
}

const RESUME: &str = "From the start of `umlctl resume` to the first echo over a new TCP connection: of a process that \
    waits for it, and of one that the guest makes for it (`nc -e cat`); beside it what the command reports, and its wall \
    time. Goals are for the former. In the last round the 512 MB of the machine of 1 GB are compared.";

fn resume(samples: &Samples) -> Vec<Row> {
    let mut rows = Vec::new();
    for (system, title, goal) in [
        ("first", "first echo", Goal::Median(0.03)),
        ("first-nc", "first echo, by a new process", Goal::None),
        ("reported", "reported", Goal::None),
        ("command", "the command", Goal::None),
    ] {
        for &mb in &samples.sizes_mb {
            let name = at("resume", mb, system);
            rows.push(row(
                name,
                format!("{}, {title}", size(mb)),
                Unit::Seconds,
                goal,
            ));
        }
    }
    rows.push(row(
        "resume_ratio",
        "1 GB to 64 MB, first echo",
        Unit::Ratio,
        Goal::Same,
    ));
    rows
}

const FORKS: &str = "Twins of an idle machine of 128 MB, made by one `umlctl fork --count`. Memory of a twin three seconds \
    later: the sum of Pss over its supervisor, keeper, main and users; and by how much MemAvailable of the host has gone \
    down, divided by the number of twins.";

fn forks() -> Vec<Row> {
    vec![
        row(
            "forks_total",
            "the command",
            Unit::Seconds,
            Goal::Median(3.0),
        ),
        row(
            "forks_answer",
            "until all have answered",
            Unit::Seconds,
            Goal::None,
        ),
        row(
            "forks_pause",
            "pause of the original, reported",
            Unit::Seconds,
            Goal::None,
        ),
        row(
            "forks_resume",
            "a twin, reported",
            Unit::Seconds,
            Goal::None,
        ),
        row(
            "forks_pss",
            "memory of a twin (Pss)",
            Unit::Bytes,
            Goal::Median(1e7),
        ),
        row(
            "forks_pss_supervisor",
            "... its supervisor's share",
            Unit::Bytes,
            Goal::None,
        ),
        row(
            "forks_available",
            "memory of a twin (MemAvailable)",
            Unit::Bytes,
            Goal::Median(1e7),
        ),
    ]
}

const BOOT: &str = "From the start of the command to the first line of the guest's init, 128 MB. The bare kernel has a pid \
    namespace, no randomized addresses and a COW file, too, but neither network nor agent. umlctl leaves out the \
    kernel's measuring of RAID 6 routines, unless told otherwise.";

fn boot() -> Vec<Row> {
    let mut rows: Vec<Row> = SYSTEMS
        .iter()
        .map(|(s, _)| row(format!("boot/{s}"), *s, Unit::Seconds, Goal::None))
        .collect();
    for (system, _) in &SYSTEMS[1..] {
        let title = format!("{system} to bare");
        let goal = if *system == "umlctl" {
            Goal::Median(1.0)
        } else {
            Goal::Same
        };
        rows.push(row(
            format!("boot_ratio/{system}"),
            title,
            Unit::Ratio,
            goal,
        ));
    }
    rows
}

const STEADY: &str = "The guest's work by the lines on its console: a loop in a shell (*cpu*), 300 forks with exec \
    (*forks*), 8 MB written and synced (*disk*). Each machine has done all of it once after its boot before that. They are the same if the \
    ratio is 1 or less in a round at least.";

fn steady() -> Vec<Row> {
    let mut rows = Vec::new();
    for piece in WORK.into_iter().chain(["all"]) {
        for (system, _) in &SYSTEMS[..2] {
            let name = format!("steady_{piece}/{system}");
            rows.push(row(
                name,
                format!("{piece}, {system}"),
                Unit::Seconds,
                Goal::None,
            ));
        }
        let name = format!("steady_ratio/{piece}");
        rows.push(row(
            name,
            format!("{piece}, umlctl to bare"),
            Unit::Ratio,
            Goal::Same,
        ));
    }
    rows
}

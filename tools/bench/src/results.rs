//! What was measured: rows, samples, and how they compare with goals.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::cli::Plan;
use crate::run::Placement;

/// What the numbers of a row are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Seconds
    Seconds,
    /// Microseconds
    Micros,
    /// Bytes per second
    BytesPerSecond,
    /// Operations per second
    PerSecond,
    /// Bytes
    Bytes,
    /// A ratio
    Ratio,
}

impl Unit {
    /// Is more better?
    pub fn is_rate(self) -> bool {
        matches!(self, Self::BytesPerSecond | Self::PerSecond)
    }

    /// For people.
    pub fn show(self, v: f64) -> String {
        match self {
            Self::Seconds if v < 1.0 => format!("{:.1} ms", v * 1e3),
            Self::Seconds => format!("{v:.2} s"),
            Self::Micros if v < 1e3 => format!("{v:.0} us"),
            Self::Micros if v < 1e6 => format!("{:.2} ms", v / 1e3),
            Self::Micros => format!("{:.2} s", v / 1e6),
            Self::BytesPerSecond => format!("{:.0} MB/s", v / 1e6),
            Self::PerSecond if v >= 1e4 => format!("{:.0}k/s", v / 1e3),
            Self::PerSecond if v >= 1e3 => format!("{:.1}k/s", v / 1e3),
            Self::PerSecond => format!("{v:.0}/s"),
            Self::Bytes => format!("{:.0} MB", v / 1e6),
            Self::Ratio => format!("{v:.3}"),
        }
    }
}

/// What cowfs is to reach in a row.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// This share of native's rate, or more
    RateAtLeast(f64),
    /// So many times native's time in this row, or less
    TimeAtMost(f64),
    /// So many times native's time in another row, or less
    TimeAtMostOf(f64, String),
    /// So many times faster than a peer
    FasterThan(f64, String),
    /// The value itself, or less
    AtMost(f64),
    /// So many times our own value in another row, or less
    Within(f64, String),
}

/// A row.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    /// Name in `--only` and in the results
    pub id: String,
    /// For people
    pub title: String,
    /// Unit of the samples
    pub unit: Unit,
    /// Goals, all to be met
    pub goals: Vec<Goal>,
}

impl Row {
    /// A row.
    pub fn new(
        id: impl Into<String>,
        title: impl Into<String>,
        unit: Unit,
        goals: Vec<Goal>,
    ) -> Self {
        Self {
            id: id.into(),
            title: title.into(),
            unit,
            goals,
        }
    }
}

/// Samples of one row on one filesystem under one placement.
#[derive(Debug, Clone, Serialize)]
pub struct Series {
    /// Placement
    pub placement: Placement,
    /// Row
    pub row: String,
    /// Filesystem
    pub system: String,
    /// Samples in the order of the rounds
    pub samples: Vec<f64>,
}

/// Everything of one run.
#[derive(Debug, Serialize)]
pub struct Results {
    /// Schema of this file
    pub version: u32,
    /// Facts about the machine and the run
    pub about: BTreeMap<String, String>,
    /// Filesystems in the order of the columns
    pub systems: Vec<String>,
    /// Rows in the order of the table
    pub rows: Vec<Row>,
    /// What was measured
    pub series: Vec<Series>,
    /// What was not, and why
    pub missing: Vec<String>,
    #[serde(skip)]
    started: std::time::Instant,
}

impl Results {
    /// Nothing measured yet.
    pub fn new(plan: &Plan) -> Self {
        let mut about = machine();
        about.insert(
            "sizes".into(),
            if plan.quick { "quick" } else { "full" }.into(),
        );
        Self {
            version: 1,
            about,
            systems: plan.systems.clone(),
            rows: Vec::new(),
            series: Vec::new(),
            missing: Vec::new(),
            started: std::time::Instant::now(),
        }
    }

    /// Adds a row to the table, once.
    pub fn row(&mut self, row: Row) {
        if !self.rows.iter().any(|r| r.id == row.id) {
            self.rows.push(row);
        }
    }

    /// Adds a sample.
    pub fn add(&mut self, placement: Placement, row: &str, system: &str, value: f64) {
        let found = self
            .series
            .iter_mut()
            .find(|s| s.placement == placement && s.row == row && s.system == system);
        match found {
            Some(s) => s.samples.push(value),
            None => self.series.push(Series {
                placement,
                row: row.to_owned(),
                system: system.to_owned(),
                samples: vec![value],
            }),
        }
    }

    /// Notes that something could not be measured, or went wrong on the way.
    pub fn miss(&mut self, system: &str, what: &str, why: &anyhow::Error) {
        let line = format!("{system}: {what}: {why:#}");
        if !self.missing.contains(&line) {
            eprintln!("bench: {line}");
            self.missing.push(line);
        }
    }

    /// Notes how long all took.
    pub fn finish(&mut self) {
        self.about.insert(
            "took".into(),
            format!("{:.0} s", self.started.elapsed().as_secs_f64()),
        );
    }

    /// Is anything of cowfs missing?
    pub fn cowfs_failed(&self) -> bool {
        self.missing.iter().any(|m| m.starts_with("cowfs:"))
    }

    /// Samples, if there are any.
    pub fn samples(&self, placement: Placement, row: &str, system: &str) -> Option<&[f64]> {
        let s = self
            .series
            .iter()
            .find(|s| s.placement == placement && s.row == row && s.system == system);
        s.map(|s| s.samples.as_slice())
    }

    /// Median of the samples.
    pub fn median(&self, placement: Placement, row: &str, system: &str) -> Option<f64> {
        self.samples(placement, row, system).and_then(median)
    }

    /// How a system compares with another in the same row: median of the ratios of the rounds.
    pub fn ratio(&self, placement: Placement, row: &str, system: &str, base: &str) -> Option<f64> {
        let a = self.samples(placement, row, system)?;
        let b = self.samples(placement, row, base)?;
        if a.len() == b.len() {
            let pairs: Vec<f64> = a.iter().zip(b).map(|(a, b)| a / b).collect();
            return median(&pairs);
        }
        Some(median(a)? / median(b)?)
    }

    /// What a goal is about, and whether it is met; `None` if it was not measured.
    pub fn judge(&self, placement: Placement, row: &Row, goal: &Goal) -> Option<(f64, bool)> {
        let id = row.id.as_str();
        let own = self.median(placement, id, "cowfs");
        match goal {
            Goal::RateAtLeast(g) => self
                .ratio(placement, id, "cowfs", "native")
                .map(|r| (r, r >= *g)),
            Goal::TimeAtMost(g) => self
                .ratio(placement, id, "cowfs", "native")
                .map(|r| (r, r <= *g)),
            Goal::TimeAtMostOf(g, other) => {
                let r = own? / self.median(placement, other, "native")?;
                Some((r, r <= *g))
            }
            Goal::FasterThan(g, peer) => {
                let r = self.ratio(placement, id, peer, "cowfs")?;
                let r = if row.unit.is_rate() { 1.0 / r } else { r };
                Some((r, r >= *g))
            }
            Goal::AtMost(g) => own.map(|v| (v, v <= *g)),
            Goal::Within(g, other) => {
                let r = own? / self.median(placement, other, "cowfs")?;
                Some((r, r <= *g))
            }
        }
    }
}

/// Facts about this machine.
pub fn machine() -> BTreeMap<String, String> {
    let mut about = BTreeMap::new();
    let read = |p: &str| std::fs::read_to_string(p).unwrap_or_default();
    about.insert(
        "kernel".into(),
        read("/proc/sys/kernel/osrelease").trim().to_owned(),
    );
    let cpu = read("/proc/cpuinfo");
    let model = cpu
        .lines()
        .find_map(|l| l.strip_prefix("model name"))
        .unwrap_or("");
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    about.insert(
        "cpus".into(),
        format!("{cpus} x {}", model.trim_start_matches([' ', '\t', ':'])),
    );
    let kb = read("/proc/meminfo")
        .split_whitespace()
        .nth(1)
        .and_then(|w| w.parse::<u64>().ok());
    about.insert("memory".into(), format!("{} MB", kb.unwrap_or(0) / 1000));
    about
}

/// Median; the mean of the middle two for an even number.
pub fn median(samples: &[f64]) -> Option<f64> {
    let mut s: Vec<f64> = samples.iter().copied().filter(|v| v.is_finite()).collect();
    s.sort_by(f64::total_cmp);
    let mid = s.len() / 2;
    match s.len() {
        0 => None,
        n if n % 2 == 1 => Some(s[mid]),
        _ => Some(f64::midpoint(s[mid - 1], s[mid])),
    }
}

#[cfg(test)]
mod tests {
    use super::median;

    #[test]
    fn medians() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, f64::NAN, 3.0]), Some(2.5));
    }
}

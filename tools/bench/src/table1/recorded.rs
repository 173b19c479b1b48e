//! Figures that were recorded elsewhere: the paper's (2003, a Pentium III of 766 MHz), and CRIU's 4.2, built from source
//! and measured earlier on a machine of the same kind with the same kernel. Debian's CRIU 3.17 does not start on it.

/// One size: megabytes, and seconds from lowest to highest.
pub type Recorded = (u64, f64, f64);

/// The paper: how long a snapshot takes, the machine standing still.
pub const PAPER: [Recorded; 3] = [(32, 0.89, 0.89), (64, 1.78, 1.78), (128, 10.42, 10.42)];

/// The paper: a resume takes less than this at any size, seconds.
pub const PAPER_RESUME: f64 = 0.01;

/// CRIU: how long processes are frozen.
pub const CRIU_FROZEN: [Recorded; 4] = [
    (32, 0.028, 0.036),
    (64, 0.057, 0.078),
    (128, 0.113, 0.125),
    (1024, 0.775, 0.844),
];

/// CRIU: the whole dump.
pub const CRIU_DUMP: [Recorded; 4] = [
    (32, 0.052, 0.073),
    (64, 0.086, 0.111),
    (128, 0.138, 0.158),
    (1024, 0.812, 0.983),
];

/// CRIU: the whole restore.
pub const CRIU_RESTORE: [Recorded; 4] = [
    (32, 0.049, 0.070),
    (64, 0.090, 0.098),
    (128, 0.128, 0.153),
    (1024, 0.866, 0.993),
];

/// CRIU: restore with lazy pages.
pub const CRIU_LAZY: [Recorded; 1] = [(128, 0.046, 0.046)];

/// Middle of the recorded range, seconds.
pub fn middle(r: &Recorded) -> f64 {
    f64::midpoint(r.1, r.2)
}

/// The figure of a size for people.
pub fn show(list: &[Recorded], mb: u64) -> String {
    let ms = |s: f64| {
        if s < 1.0 {
            format!("{:.0} ms", s * 1e3)
        } else {
            format!("{s:.2} s")
        }
    };
    match list.iter().find(|r| r.0 == mb) {
        None => "-".into(),
        Some((_, low, high)) if low >= high => ms(*low),
        Some((_, low, high)) => format!("{:.0} to {}", low * 1e3, ms(*high)),
    }
}

#[cfg(test)]
mod tests {
    use super::{CRIU_FROZEN, PAPER, show};

    #[test]
    fn shows_ranges_and_figures() {
        assert_eq!(show(&PAPER, 128), "10.42 s");
        assert_eq!(show(&PAPER, 32), "890 ms");
        assert_eq!(show(&CRIU_FROZEN, 1024), "775 to 844 ms");
        assert_eq!(show(&CRIU_FROZEN, 4096), "-");
    }
}

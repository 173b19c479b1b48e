//! What a save has cost.

use std::time::Duration;

/// One round over the memory before the stop.
#[derive(Debug, Clone, Copy, Default)]
pub struct Round {
    /// Whether its pieces were copied, or protected only.
    pub copied: bool,
    /// Pieces of 64 KiB that it found writable.
    pub pieces: u64,
    /// How long it took.
    pub took: Duration,
}

/// What a save has cost.
#[derive(Debug, Clone, Default)]
pub struct Stats {
    /// The rounds before the stop.
    pub rounds: Vec<Round>,
    /// Pieces that were still writable at the stop.
    pub pieces_at_stop: u64,
    /// How long `freeze` took.
    pub freeze: Duration,
    /// Pages copied before the stop (some more than once), and after it.
    pub copied_before: u64,
    /// Pages copied after the stop.
    pub copied_after: u64,
    /// Of these, pages that the target was about to write.
    pub by_fault: u64,
    /// Faults on protected pages.
    pub faults: u64,
    /// Faults on missing pages.
    pub missing: u64,
    /// How long copying the rest took, during which calls that destroy memory must wait.
    pub rest: Duration,
    /// How long lifting the protection and leaving took.
    pub release: Duration,
    /// How long the remaining sums took.
    pub sums: Duration,
}

//! For the fuzz targets (`tests/fuzz`): what they feed that nobody else calls from outside.

use crate::image::manifest::Manifest;
use crate::resume::source::PageSource;
use crate::uml::manifest::Machine;

/// The tables of calls that a resume makes of a manifest, without any process; gives how many bytes they need.
/// Files, shared objects and templates are not there.
pub fn tables(m: &Manifest, source: &dyn PageSource) -> Result<usize, crate::resume::Error> {
    crate::resume::rehearse(m, source)
}

/// Whether the rebuilding of a machine takes its manifest.
pub fn check_machine(machine: &Machine) -> Result<(), crate::uml::Error> {
    crate::uml::rebuild::check(machine)
}

/// Numbers of POSIX timers in `/proc/PID/timers`.
#[must_use]
pub fn timers(text: &str) -> Vec<i32> {
    let timers = crate::capture::state::parse_timers(text);
    timers.iter().map(|t| t.id).collect()
}

/// Offsets in `/proc/PID/timens_offsets`.
#[must_use]
pub fn clocks(text: &str) -> [i64; 2] {
    crate::uml::clock::parse(text)
}

//! The kernel's texts, in which names are the target's: maps, smaps, stat, status, fdinfo, timers, clocks. Asserted: never a
//! panic, and numbers are where they should be.
#![no_main]

use libfuzzer_sys::fuzz_target;
use snapshot::proc::{MapKind, parse_maps, parse_stat, parse_status, parse_vm_flags};

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    if let Ok(maps) = parse_maps(data) {
        let lines = data.split(|b| *b == b'\n').filter(|l| !l.is_empty());
        assert_eq!(maps.len(), lines.count());
        for m in maps {
            assert!(m.ino == 0 || matches!(m.kind, MapKind::File { .. }));
            assert_eq!(m.prot & !7, 0);
        }
    }
    for flags in parse_vm_flags(&text).values().flatten() {
        assert!(!flags.contains(' '));
    }
    if let Some(stat) = parse_stat(&text) {
        assert!(text.contains(&format!("({})", stat.comm)));
    }
    let _ = parse_status(&text);
    let _ = snapshot::files::fuzz::fdinfo(&text);
    assert!(snapshot::fuzz::timers(&text).len() <= text.len());
    let _ = snapshot::fuzz::clocks(&text);
});

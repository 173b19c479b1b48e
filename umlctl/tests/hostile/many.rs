//! Many snapshots of one process in a row.

use crate::common::*;

#[test]
fn many_in_a_row() {
    let t = Target::start(&["busy", "4", "16"]);
    until("rounds", || t.status()[4] > 500);
    let before = traces(t.pid);
    for i in 0..count("HOSTILE_MANY", 30) {
        good(t.snapshot("s"));
        if i % 10 == 0 {
            t.check("many");
            let mut c = umlctl();
            c.arg("verify").arg(t.dir.path().join("s"));
            good(c);
        }
        std::fs::remove_dir_all(t.dir.path().join("s")).unwrap();
        assert!(!t.journal().exists());
    }
    t.check("at the end");
    let after = traces(t.pid);
    assert_eq!(after.0, before.0, "mappings");
    assert_eq!(after.1, before.1, "descriptors");
}

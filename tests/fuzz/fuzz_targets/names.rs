//! Names as users write them: a wanted one, then those of checkpoints, a line each. Asserted: a name that is allowed has
//! none of the characters with a meaning, what is found fits, and a name made of the time is allowed and free.
#![no_main]

use std::collections::BTreeMap;

use cowfs::names;
use cowfs::store::{Catalog, CatalogOp};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let text = String::from_utf8_lossy(data);
    let mut lines = text.split('\n');
    let wanted = lines.next().unwrap_or_default();
    let allowed = names::check(wanted).is_ok();
    assert!(!allowed || wanted.len() <= names::NAME_MAX && !wanted.contains(['/', '#', ' ', '\0']));
    let mut catalog = Catalog::new(1, 2, 0);
    for (id, name) in lines.take(50).enumerate() {
        let op = CatalogOp::Checkpoint {
            head: "main".into(),
            id: id as u64 + 1,
            name: name.into(),
            tags: BTreeMap::new(),
            created_us: 0,
        };
        let _ = catalog.apply(&op, 1);
    }
    for head in [None, Some("main"), Some(wanted)] {
        if let Ok(c) = names::resolve(&catalog, head, wanted) {
            let special = wanted == "latest" || wanted.starts_with("@{-");
            assert!(special || c.name.starts_with(wanted));
        }
    }
    let us = data
        .iter()
        .fold(0i64, |v, b| v.wrapping_mul(251) ^ i64::from(*b));
    let made = names::automatic(&catalog, "before-", us);
    assert!(
        names::check(&made).is_ok() && !catalog.is_taken(&made),
        "{made}"
    );
});

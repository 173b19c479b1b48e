//! The catalog's JSON in the first line and operations, as the log has them, in the others. Asserted: never a panic, and
//! an operation that is refused has changed nothing.
#![no_main]

use cowfs::store::{Catalog, CatalogOp};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut lines = data.split(|b| *b == b'\n');
    let json = lines.next().unwrap_or_default();
    let mut catalog = match Catalog::decode(json) {
        Ok(c) => {
            assert_eq!(Catalog::decode(&c.encode()).ok().as_ref(), Some(&c));
            c
        }
        Err(_) => Catalog::new(1, 2, 0),
    };
    let mut generation = 1;
    for line in lines.take(50) {
        let Ok(op) = serde_json::from_slice::<CatalogOp>(line) else {
            continue;
        };
        let before = catalog.clone();
        match catalog.apply(&op, generation) {
            Ok(()) => generation += u64::from(Catalog::fixes_state(&op)),
            Err(_) => assert_eq!(catalog, before),
        }
        let _ = cowfs::names::automatic(&catalog, "", 0);
    }
});

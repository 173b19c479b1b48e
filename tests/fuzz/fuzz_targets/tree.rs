//! Pages in any relation to each other, then operations on the tree they form. Asserted: no walk is endless; if `verify`
//! is content with a tree, it holds what a map would hold through all changes, and `verify` stays content.
#![no_main]

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use cowfs::tree::{self, Visit};
use cowfs_fuzz::Bytes;
use cowfs_fuzz::pages::MemPages;
use libfuzzer_sys::fuzz_target;

fn all(p: &mut MemPages, root: u64) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut out = Vec::new();
    let _ = tree::scan(p, root, &[], None, &mut |k, v| {
        out.push((k.to_vec(), v.to_vec()));
        ControlFlow::Continue(())
    });
    out
}

fuzz_target!(|data: &[u8]| {
    let mut b = Bytes(data);
    let mut p = MemPages::from_input(&mut b);
    let mut root = 1;
    let verified = tree::verify(&mut p, root);
    let mut pages = Vec::new();
    let mark = &mut |id, _| {
        pages.push(id);
        Visit::Descend
    };
    let _ = tree::mark(&mut p, root, mark, Some(&mut |_, _| ()));
    let _ = tree::diff(&mut p, 1, 2, &mut |_, _, _| ControlFlow::Continue(()));
    let entries = all(&mut p, root);
    let mut model: BTreeMap<_, _> = entries.iter().cloned().collect();
    if let Ok(stats) = verified {
        assert_eq!(stats.entries, entries.len() as u64);
        assert!(entries.is_sorted_by(|a, b| a.0 < b.0));
        pages.sort_unstable();
        assert!(pages.windows(2).all(|w| w[0] != w[1]), "a page used twice");
    }
    let sound = verified.is_ok() && !p.claims_present();
    for _ in 0..100 {
        let Some(kind) = b.next() else { break };
        let key = b.short();
        let known = entries.get(usize::from(kind >> 2)).map(|e| e.0.as_slice());
        let key = if key.is_empty() {
            known.unwrap_or(key)
        } else {
            key
        };
        match kind & 3 {
            0 => {
                let value = vec![kind; usize::from(b.u16()) % (tree::MAX_VALUE + 2)];
                let Ok((new, _)) = tree::insert(&mut p, root, key, &value) else {
                    continue;
                };
                root = new;
                model.insert(key.to_vec(), value);
            }
            1 => {
                let Ok((new, old)) = tree::remove(&mut p, root, key) else {
                    assert!(!sound);
                    continue;
                };
                root = new;
                let was = model.remove(key);
                assert!(!sound || old == was);
            }
            2 => {
                let got = tree::get(&mut p, root, key, <[u8]>::to_vec);
                assert!(!sound || got == Ok(model.get(key).cloned()));
            }
            _ => {
                let got = tree::last_before(&mut p, root, &[], key);
                let want = model.range(..key.to_vec()).next_back();
                assert!(!sound || got == Ok(want.map(|(k, v)| (k.clone(), v.clone()))));
            }
        }
    }
    if sound {
        assert!(tree::verify(&mut p, root).is_ok());
        assert!(all(&mut p, root).into_iter().eq(model));
    }
});

use super::*;
use crate::image::pageset::PAGES;
use proptest::prelude::*;

fn entry(space: u32, block: u64, layer: u32, pages: std::ops::Range<usize>) -> Entry {
    Entry {
        space,
        layer,
        block,
        slot: block * 3 + u64::from(layer),
        pages: PageSet::of(pages),
        sum: [block as u8; 32],
    }
}

fn sample() -> Index {
    Index::new(vec![
        entry(1, 5, 0, 0..512),
        entry(0, 7, 2, 100..200),
        entry(0, 7, 0, 3..10),
        entry(0, 9, 1, 511..512),
    ])
}

#[test]
fn a_page_is_found_in_its_layer_or_not_at_all() {
    let i = sample();
    let at = |space, block: u64, page: usize| {
        i.page_source(space, block * BLOCK + (page * PAGE) as u64 + 17)
    };
    assert_eq!(
        at(0, 7, 3).map(|r| (r.layer, r.offset)),
        Some((0, 21 * BLOCK + 3 * 4096))
    );
    assert_eq!(
        at(0, 7, 150).map(|r| (r.layer, r.offset)),
        Some((2, 23 * BLOCK + 150 * 4096))
    );
    assert_eq!(at(0, 7, 10), None);
    assert_eq!(at(0, 8, 3), None);
    assert_eq!(at(1, 7, 3), None);
    assert_eq!(
        i.runs(0, 7).map(|r| r.len).collect::<Vec<_>>(),
        [7 * 4096, 100 * 4096]
    );
    assert_eq!(i.blocks(0).collect::<Vec<_>>(), [7, 9]);
    assert_eq!((i.slots(0), i.layers()), (22, 2));
}

#[test]
fn the_bytes_are_as_documented() {
    let i = Index::new(vec![entry(1, 5, 0, 9..10)]);
    let b = i.to_bytes();
    assert_eq!(b.len(), 16 + 128);
    assert_eq!(&b[..16], b"UMLINDX\n\x01\0\0\0\x01\0\0\0");
    assert_eq!((b[16], b[20], b[24], b[32]), (1, 0, 5, 15));
    assert_eq!(
        b[48..112]
            .iter()
            .position(|&x| x != 0)
            .map(|p| (p, b[48 + p])),
        Some((1, 2))
    );
    assert_eq!(b[112..], [5; 32]);
    assert_eq!(Index::parse(&b, Path::new("i")).unwrap(), i);
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let parse = |b: &[u8]| {
        Index::parse(b, Path::new("/snap/index"))
            .unwrap_err()
            .to_string()
    };
    let good = sample().to_bytes();
    for (at, value, wanted) in [
        (0, b'X', "does not begin"),
        (8, 2, "newer"),
        (12, 9, "says 9 entries"),
        (16 + 24, 1, "not zero"),
        (16 + 13, 0xff, "impossible block"),
        (16 + 128 + 8, 6, "out of order"),
    ] {
        let mut b = good.clone();
        b[at] = value;
        let message = parse(&b);
        assert!(
            message.contains(wanted) && message.contains("/snap/index"),
            "{message}"
        );
    }
    let mut twice = good.clone();
    twice[16 + 128 + 32] |= 8;
    assert!(parse(&twice).contains("another one holds too"));
    assert!(parse(&good[..good.len() - 1]).contains("are not those"));
    assert!(parse(b"UML").contains("too few"));
}

proptest! {
    #[test]
    fn mutated_bytes_never_panic(edits in prop::collection::vec((0usize..528, any::<u8>()), 0..8), cut in 0usize..=528) {
        let mut b = sample().to_bytes();
        for (at, v) in edits {
            b[at] = v;
        }
        b.truncate(cut.max(1));
        if let Ok(i) = Index::parse(&b, Path::new("x")) {
            prop_assert_eq!(i.to_bytes(), b);
            for e in i.entries() {
                let n: u64 = i.runs(e.space, e.block).map(|r| r.len).sum();
                prop_assert!(n <= (PAGES * PAGE) as u64);
                i.page_source(e.space, e.block * BLOCK);
            }
        }
    }
}

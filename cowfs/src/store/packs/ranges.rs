//! Sets of places: sorted ranges of addresses, where an address is a segment and an offset in one number.

use crate::fs::Extent;
use crate::store::segments::SEGMENT_BYTES;

/// An address: segment * 2^30 + offset.
pub(crate) type Address = u64;
/// From, to.
pub(crate) type Range = (Address, Address);

/// The address of a place.
pub(super) fn address(segment: u32, off: u64) -> Address {
    u64::from(segment) * SEGMENT_BYTES + off
}

/// Segment and offset of an address.
pub(super) fn place(a: Address) -> (u32, u64) {
    let segment = u32::try_from(a / SEGMENT_BYTES).unwrap_or(u32::MAX);
    (segment, a % SEGMENT_BYTES)
}

/// The range of an extent; nothing if it cannot be in a segment.
pub(super) fn of_extent(e: &Extent) -> Option<Range> {
    let from = address(e.seg, e.off);
    (e.off + u64::from(e.len) <= SEGMENT_BYTES).then(|| (from, from + u64::from(e.len)))
}

/// Sorts, and cuts what overlaps so that every address is in one range; where ranges began stays a boundary.
pub(super) fn disjoint(v: &mut Vec<Range>) {
    v.sort_unstable();
    v.dedup();
    let mut end = 0;
    v.retain_mut(|r| {
        r.0 = r.0.max(end);
        let keep = r.0 < r.1;
        if keep {
            end = r.1;
        }
        keep
    });
}

/// What of `a` is not in `b`, and what of it is; both are disjoint and sorted.
pub(crate) fn split(a: &[Range], b: &[Range]) -> (Vec<Range>, Vec<Range>) {
    let (mut out, mut inside) = (Vec::new(), Vec::new());
    let mut j = 0;
    for &(mut from, to) in a {
        while j < b.len() && b[j].1 <= from {
            j += 1;
        }
        let mut k = j;
        while from < to {
            match b.get(k).filter(|r| r.0 < to) {
                None => {
                    out.push((from, to));
                    break;
                }
                Some(&(s, e)) => {
                    if s > from {
                        out.push((from, s));
                    }
                    inside.push((from.max(s), to.min(e)));
                    from = e;
                    k += 1;
                }
            }
        }
    }
    (out, inside)
}

/// True if a range touches any of `b`, which is disjoint and sorted.
pub(super) fn touches(r: Range, b: &[Range]) -> bool {
    let i = b.partition_point(|x| x.1 <= r.0);
    b.get(i).is_some_and(|x| x.0 < r.1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets() {
        let mut v = vec![(10, 20), (0, 5), (15, 25), (10, 12), (30, 40)];
        disjoint(&mut v);
        assert_eq!(v, [(0, 5), (10, 12), (12, 20), (20, 25), (30, 40)]);
        let (out, inside) = split(&v, &[(3, 11), (18, 22), (35, 36)]);
        assert_eq!(
            out,
            [(0, 3), (11, 12), (12, 18), (22, 25), (30, 35), (36, 40)]
        );
        assert_eq!(inside, [(3, 5), (10, 11), (18, 20), (20, 22), (35, 36)]);
        assert!(touches((24, 31), &v) && !touches((25, 30), &v));
    }
}

//! Content-defined chunking (FastCDC with normalised chunk sizes): the same bytes are cut at the same places wherever they
//! stand, so that versions of a file share what did not change.

/// Bytes of a chunk at least, but for the last one.
pub const MIN: usize = 8 << 10;
/// Wanted mean.
const AVERAGE: usize = 32 << 10;
/// Bytes of a chunk at most.
pub const MAX: usize = 128 << 10;

/// A cut needs so many zero bits at the top: more before the wanted mean, fewer behind it, which keeps sizes near it.
const BITS: u32 = AVERAGE.ilog2();
const STRICT: u64 = top_bits(BITS + 2);
const LOOSE: u64 = top_bits(BITS - 2);

const fn top_bits(n: u32) -> u64 {
    u64::MAX << (64 - n)
}

/// A random number for each byte (splitmix64). Changing it only makes new chunks differ from old ones.
const GEAR: [u64; 256] = {
    let mut table = [0; 256];
    let mut state: u64 = 0x636f_7766_735f_6364;
    let mut i = 0;
    while i < 256 {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        table[i] = z ^ (z >> 31);
        i += 1;
    }
    table
};

/// Length of the first chunk of `bytes`, which must be [`MAX`] bytes or all that is left.
pub fn cut(bytes: &[u8]) -> usize {
    if bytes.len() <= MIN {
        return bytes.len();
    }
    let end = bytes.len().min(MAX);
    let middle = end.min(AVERAGE);
    let mut hash: u64 = 0;
    for (i, b) in bytes[..end].iter().enumerate().skip(MIN) {
        hash = (hash << 1).wrapping_add(GEAR[usize::from(*b)]);
        let mask = if i < middle { STRICT } else { LOOSE };
        if hash & mask == 0 {
            return i + 1;
        }
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(mut state: u64, len: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(len + 8);
        while out.len() < len {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            out.extend_from_slice(&state.to_le_bytes());
        }
        out.truncate(len);
        out
    }

    fn chunks(mut bytes: &[u8]) -> Vec<&[u8]> {
        let mut out = Vec::new();
        while !bytes.is_empty() {
            let (a, b) = bytes.split_at(cut(bytes));
            out.push(a);
            bytes = b;
        }
        out
    }

    #[test]
    fn sizes_are_bounded_and_near_the_mean() {
        let data = noise(1, 8 << 20);
        let all = chunks(&data);
        assert!(all.iter().all(|c| c.len() <= MAX));
        assert!(all[..all.len() - 1].iter().all(|c| c.len() > MIN));
        let mean = data.len() / all.len();
        assert!((AVERAGE / 2..AVERAGE * 2).contains(&mean), "{mean}");
        assert_eq!(
            chunks(&[0; 300_000]).len(),
            3,
            "zeros go in the largest ones"
        );
        assert_eq!(cut(&[]), 0);
        assert_eq!(cut(&[1; MIN]), MIN);
    }

    #[test]
    fn an_insertion_changes_few_chunks() {
        let a = noise(7, 4 << 20);
        let mut b = a.clone();
        b.splice(1_000_000..1_000_000, noise(9, 77));
        let have: std::collections::HashSet<&[u8]> = chunks(&a).into_iter().collect();
        let new = chunks(&b).iter().filter(|c| !have.contains(*c)).count();
        assert!(new <= 4, "{new} new chunks");
    }
}

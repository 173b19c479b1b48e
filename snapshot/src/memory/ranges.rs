//! A list of address ranges.

use super::Span;

/// Ranges by rising address, none of which overlap.
#[derive(Debug, Clone, Default)]
pub(super) struct Ranges(Vec<Span>);

impl Ranges {
    /// Neighbours are not joined: each is one mapping. Of two that overlap (which /proc never says), the second is cut.
    pub fn new(spans: &[Span]) -> Self {
        let mut spans = spans.to_vec();
        spans.sort_by_key(|s| s.start);
        let mut end = 0;
        for s in &mut spans {
            s.start = s.start.max(end);
            end = end.max(s.end);
        }
        spans.retain(|s| s.start < s.end);
        Self(spans)
    }

    /// Keeps some of them.
    pub fn retain(&mut self, keep: impl FnMut(&Span) -> bool) {
        self.0.retain(keep);
    }

    /// The same without some other ranges.
    pub fn less(&self, other: &Self) -> Self {
        Self(self.0.iter().flat_map(|s| other.without(s)).collect())
    }

    /// What is in these and in others.
    pub fn both(&self, other: &Self) -> Vec<Span> {
        other
            .0
            .iter()
            .flat_map(|s| self.cut(s.start, s.end))
            .collect()
    }

    pub fn iter(&self) -> std::slice::Iter<'_, Span> {
        self.0.iter()
    }

    /// What of `start..end` is in them.
    pub fn cut(&self, start: u64, end: u64) -> impl Iterator<Item = Span> + '_ {
        let from = self.0.partition_point(|s| s.end <= start);
        self.0[from..]
            .iter()
            .take_while(move |s| s.start < end)
            .map(move |s| s.start.max(start)..s.end.min(end))
    }

    /// What of a range is not in them.
    pub fn without(&self, span: &Span) -> Vec<Span> {
        let mut out = Vec::new();
        let mut at = span.start;
        for s in self
            .cut(span.start, span.end)
            .chain(std::iter::once(span.end..span.end))
        {
            if at < s.start {
                out.push(at..s.start);
            }
            at = s.end;
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_to_what_is_asked() {
        let r = Ranges::new(&[30..40, 10..20, 20..25, 35..50]);
        assert_eq!(
            r.cut(0, 100).collect::<Vec<_>>(),
            [10..20, 20..25, 30..40, 40..50]
        );
        assert_eq!(r.cut(15, 31).collect::<Vec<_>>(), [15..20, 20..25, 30..31]);
        assert_eq!(r.cut(25, 30).count(), 0);
        assert_eq!(r.without(&(0..60)), [0..10, 25..30, 50..60]);
        assert_eq!(r.without(&(12..38)), [Span { start: 25, end: 30 }]);
        assert_eq!(r.without(&(60..70)), [Span { start: 60, end: 70 }]);
        assert!(r.without(&(31..49)).is_empty());
        let hot = Ranges::new(&[12..13, 19..21, 60..61]);
        let left = r.less(&hot);
        assert_eq!(
            left.iter().cloned().collect::<Vec<_>>(),
            [10..12, 13..19, 21..25, 30..40, 40..50]
        );
        assert_eq!(r.both(&hot), [12..13, 19..20, 20..21]);
    }
}

//! Which checkpoints to keep. Nothing here changes a store: a plan is made from a catalog, rules and a time.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::store::{Catalog, Checkpoint, Origin, StoreError};

const DAY_US: i64 = 86_400_000_000;

/// What to keep, of each head. Times are UTC.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rules {
    /// The last so many.
    pub last: u32,
    /// The last of each of so many days that have one.
    pub daily: u32,
    /// The last of each of so many weeks, from Monday on, that have one.
    pub weekly: u32,
    /// All that are younger, microseconds.
    pub within_us: Option<i64>,
    /// All that have one of these tags, `K` or `K=V`.
    pub tags: Vec<String>,
}

impl Rules {
    /// Refuses to keep nothing.
    ///
    /// # Errors
    /// Refused.
    pub fn check(&self) -> Result<(), StoreError> {
        let some = self.last > 0
            || self.daily > 0
            || self.weekly > 0
            || self.within_us.is_some()
            || !self.tags.is_empty();
        if some {
            return Ok(());
        }
        Err(StoreError::Refused(
            "nothing says what to keep; give at least one of --keep-last, --keep-daily, --keep-weekly, --keep-within, --keep-tag"
                .into(),
        ))
    }
}

/// What becomes of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Its number.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// Its head.
    pub head: String,
    /// Why it is kept; it goes if there is no reason.
    pub reasons: Vec<String>,
}

impl Verdict {
    /// True if it is kept.
    pub fn is_kept(&self) -> bool {
        !self.reasons.is_empty()
    }
}

fn has_tag(c: &Checkpoint, tag: &str) -> bool {
    match tag.split_once('=') {
        Some((k, v)) => c.tags.get(k).is_some_and(|have| have == v),
        None => c.tags.contains_key(tag),
    }
}

/// Why a checkpoint must not be deleted just now, if there is a reason.
pub fn held(catalog: &Catalog, id: u64) -> Option<String> {
    if catalog.checkpoints.get(&id).is_some_and(|c| c.pinned) {
        return Some("pinned".into());
    }
    let mut heads = catalog.heads.iter().chain(&catalog.hidden);
    heads
        .find(|(_, h)| h.parent == Some(id))
        .map(|(name, _)| format!("head {name} continues it"))
}

/// Says of each checkpoint whether it is kept, and why. Whatever the rules say, these are: pinned ones, what a head
/// continues, what is `mounted`, and of each head the last state that a rollback left behind.
pub fn plan(
    catalog: &Catalog,
    rules: &Rules,
    mounted: &BTreeSet<u64>,
    now_us: i64,
) -> Vec<Verdict> {
    let mut why: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    let mut keep = |id: u64, reason: String| why.entry(id).or_default().push(reason);
    for (name, h) in catalog.heads.iter().chain(&catalog.hidden) {
        if let Some(parent) = h.parent {
            keep(parent, format!("head {name} continues it"));
        }
    }
    let mut lines: BTreeMap<&str, Vec<&Checkpoint>> = BTreeMap::new();
    for c in catalog.checkpoints.values() {
        if c.pinned {
            keep(c.id, "pinned".into());
        }
        if mounted.contains(&c.id) {
            keep(c.id, "mounted".into());
        }
        if rules
            .within_us
            .is_some_and(|w| c.created_us > now_us.saturating_sub(w))
        {
            keep(c.id, "within".into());
        }
        for t in rules.tags.iter().filter(|t| has_tag(c, t)) {
            keep(c.id, format!("tag {t}"));
        }
        lines.entry(c.head.as_str()).or_default().push(c);
    }
    for line in lines.values_mut() {
        // Later numbers first among those of one moment.
        line.sort_unstable_by_key(|c| std::cmp::Reverse((c.created_us, c.id)));
        if let Some(c) = line.iter().find(|c| c.origin == Origin::LeftBehind) {
            keep(c.id, "last left behind".into());
        }
        // What somebody asked for; what rollbacks left does not take their places.
        let asked = || line.iter().filter(|c| c.origin == Origin::Asked);
        for c in asked().take(rules.last as usize) {
            keep(c.id, "last".into());
        }
        let mut each = |count: u32, reason: &str, bucket: fn(i64) -> i64| {
            let mut seen = BTreeSet::new();
            for c in asked() {
                if seen.len() >= count as usize {
                    break;
                }
                if seen.insert(bucket(c.created_us)) {
                    keep(c.id, reason.into());
                }
            }
        };
        each(rules.daily, "daily", |us| us.div_euclid(DAY_US));
        // The first of January 1970 was a Thursday.
        each(rules.weekly, "weekly", |us| {
            (us.div_euclid(DAY_US) + 3).div_euclid(7)
        });
    }
    let all = catalog.checkpoints.values();
    all.map(|c| Verdict {
        id: c.id,
        name: c.name.clone(),
        head: c.head.clone(),
        reasons: why.remove(&c.id).unwrap_or_default(),
    })
    .collect()
}

/// Reads a duration: numbers with s, m (minutes), h, d, w or y behind, one or more; microseconds.
///
/// # Errors
/// What is wrong, in words.
pub fn duration(text: &str) -> Result<i64, String> {
    let wrong = || {
        format!("{text:?} is no duration: write a number and s, m, h, d, w or y, as in 36h or 1w3d")
    };
    let mut total: i64 = 0;
    let mut number = String::new();
    for c in text.chars() {
        if c.is_ascii_digit() {
            number.push(c);
            continue;
        }
        let unit: i64 = match c {
            's' => 1,
            'm' => 60,
            'h' => 3600,
            'd' => 86_400,
            'w' => 7 * 86_400,
            'y' => 365 * 86_400,
            _ => return Err(wrong()),
        };
        let n: i64 = std::mem::take(&mut number).parse().map_err(|_| wrong())?;
        total = n
            .checked_mul(unit * 1_000_000)
            .and_then(|us| total.checked_add(us))
            .ok_or_else(wrong)?;
    }
    if text.is_empty() || !number.is_empty() {
        return Err(wrong());
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::CatalogOp;

    const HOUR: i64 = 3_600_000_000;

    /// A catalog with a checkpoint at each of these hours; names say the hour.
    fn catalog(hours: &[i64]) -> Catalog {
        let mut c = Catalog::new(1, 2, 0);
        for (i, h) in hours.iter().enumerate() {
            let op = CatalogOp::Checkpoint {
                head: "main".into(),
                id: i as u64 + 1,
                name: format!("h{h}"),
                tags: BTreeMap::new(),
                created_us: h * HOUR,
            };
            c.apply(&op, i as u64 + 1).expect("fine");
        }
        c
    }

    fn kept(c: &Catalog, rules: &Rules, now_h: i64) -> Vec<String> {
        let plan = plan(c, rules, &BTreeSet::new(), now_h * HOUR);
        plan.iter()
            .filter(|v| v.is_kept())
            .map(|v| v.name.clone())
            .collect()
    }

    #[test]
    fn rules_one_by_one() {
        // Day 0 is a Thursday: weeks end after hours 96, 264.
        let c = catalog(&[1, 5, 23, 25, 30, 95, 97, 100, 263, 265, 266]);
        let none = Rules::default;
        let table: &[(Rules, &[&str])] = &[
            (Rules { last: 2, ..none() }, &["h265", "h266"]),
            (
                Rules { last: 99, ..none() },
                &[
                    "h1", "h5", "h23", "h25", "h30", "h95", "h97", "h100", "h263", "h265", "h266",
                ],
            ),
            (Rules { daily: 3, ..none() }, &["h100", "h263", "h266"]),
            (
                Rules {
                    weekly: 2,
                    ..none()
                },
                &["h263", "h266"],
            ),
            (
                Rules {
                    weekly: 3,
                    ..none()
                },
                &["h95", "h263", "h266"],
            ),
            (
                Rules {
                    within_us: Some(HOUR * 5),
                    ..none()
                },
                &["h266"],
            ),
            (
                Rules {
                    within_us: Some(HOUR * 6),
                    ..none()
                },
                &["h265", "h266"],
            ),
            (
                Rules {
                    within_us: Some(HOUR * 8),
                    ..none()
                },
                &["h263", "h265", "h266"],
            ),
            (
                Rules {
                    daily: 1,
                    weekly: 2,
                    ..none()
                },
                &["h263", "h266"],
            ),
        ];
        for (i, (rules, want)) in table.iter().enumerate() {
            rules.check().expect("something is kept");
            assert_eq!(kept(&c, rules, 270), *want, "{i}");
        }
        assert!(none().check().is_err());
    }

    #[test]
    fn some_are_kept_whatever_the_rules_say() {
        let mut c = catalog(&[1, 2, 3, 4, 5, 6]);
        let apply = |c: &mut Catalog, op: CatalogOp, g| c.apply(&op, g).expect("fine");
        apply(&mut c, CatalogOp::Pin { id: 2, on: true }, 10);
        let rollback = |n: u64, to| CatalogOp::Rollback {
            head: "main".into(),
            to,
            left: Some((n, format!("left{n}"))),
            created_us: 10 * HOUR + i64::try_from(n).expect("small"),
        };
        apply(&mut c, rollback(7, 5), 11);
        apply(&mut c, rollback(8, 3), 12);
        let set = BTreeMap::from([("why".to_owned(), "upgrade".to_owned())]);
        apply(
            &mut c,
            CatalogOp::Tag {
                id: 1,
                set,
                remove: vec![],
            },
            13,
        );
        let rules = |tag: &str| Rules {
            last: 1,
            tags: vec![tag.into()],
            ..Rules::default()
        };
        // The pinned one, the one that the head continues, the last asked for, and the last that was left.
        assert_eq!(kept(&c, &rules("no"), 99), ["h2", "h3", "h6", "left8"]);
        assert_eq!(
            kept(&c, &rules("why"), 99),
            ["h1", "h2", "h3", "h6", "left8"]
        );
        assert_eq!(kept(&c, &rules("why=not"), 99), ["h2", "h3", "h6", "left8"]);
        let mounted = BTreeSet::from([4]);
        let plan = plan(&c, &rules("why=upgrade"), &mounted, 99 * HOUR);
        let gone: Vec<&str> = plan
            .iter()
            .filter(|v| !v.is_kept())
            .map(|v| v.name.as_str())
            .collect();
        assert_eq!(gone, ["h5", "left7"]);
    }

    #[test]
    fn durations() {
        assert_eq!(duration("36h"), Ok(36 * HOUR));
        assert_eq!(duration("1w3d"), Ok(10 * DAY_US));
        assert_eq!(duration("90s"), Ok(90_000_000));
        for bad in ["", "5", "h", "5x", "-1h", "99999999999999y", "1h5"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}

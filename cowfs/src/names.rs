//! Names of checkpoints and heads: which are allowed, and what a user may write for one.

use crate::store::{Catalog, Checkpoint, Origin, StoreError};

/// Longest name, bytes.
pub const NAME_MAX: usize = 200;

/// Checks a name that is to be given.
///
/// # Errors
/// Refused, with what is wrong.
pub fn check(name: &str) -> Result<(), StoreError> {
    let why = if name.is_empty() || name.len() > NAME_MAX {
        "it must have 1 to 200 bytes"
    } else if ["latest", "HEAD"].contains(&name) || name.contains("@{") {
        "'latest', 'HEAD' and '@{' have a meaning of their own"
    } else if name.starts_with(['-', '.', '@']) {
        // A mount shows '@NAME' for a checkpoint.
        "it must not begin with '-', '.' or '@'"
    } else if name
        .chars()
        .any(|c| c.is_control() || c.is_whitespace() || "/#".contains(c))
    {
        "it must not hold '/', '#', spaces or control characters"
    } else {
        return Ok(());
    };
    Err(StoreError::Refused(format!(
        "{name:?} cannot be a name: {why}"
    )))
}

/// A name made of the time, `20261124T101530.123456Z`, with a number behind if it is taken.
pub fn automatic(catalog: &Catalog, prefix: &str, now_us: i64) -> String {
    let base = format!("{prefix}{}", timestamp(now_us));
    let mut name = base.clone();
    let mut n = 1;
    while catalog.is_taken(&name) {
        n += 1;
        name = format!("{base}-{n}");
    }
    name
}

/// A time in UTC for people, to the second.
pub fn clock(us: i64) -> String {
    let t = timestamp(us);
    // The year may have more digits than four.
    let at = t.find('T').unwrap_or(t.len());
    let part = |from: usize, to: usize| t.get(from..to).unwrap_or_default();
    let (month, day) = (at.saturating_sub(4), at.saturating_sub(2));
    format!(
        "{}-{}-{} {}:{}:{}Z",
        part(0, month),
        part(month, day),
        part(day, at),
        part(at + 1, at + 3),
        part(at + 3, at + 5),
        part(at + 5, at + 7)
    )
}

/// A time in UTC, to the microsecond (civil-from-days, Howard Hinnant).
pub fn timestamp(us: i64) -> String {
    let (secs, micros) = (us.div_euclid(1_000_000), us.rem_euclid(1_000_000));
    let (days, rest) = (secs.div_euclid(86_400), secs.rem_euclid(86_400));
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let doe = z.rem_euclid(146_097);
    let yoe = (doe - doe / 1460 + doe / 36_524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let day = doy - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    let year = yoe + era * 400 + i64::from(month <= 2);
    format!(
        "{year:04}{month:02}{day:02}T{:02}{:02}{:02}.{micros:06}Z",
        rest / 3600,
        rest / 60 % 60,
        rest % 60
    )
}

/// Finds the checkpoint that a user means: a full name, `latest` (the newest that somebody asked for), `@{-N}` (the N-th
/// newest of those), or the beginning of one name only. `head` limits `latest` and `@{-N}` to one head's line.
///
/// # Errors
/// Not found, or ambiguous.
pub fn resolve<'a>(
    catalog: &'a Catalog,
    head: Option<&str>,
    name: &str,
) -> Result<&'a Checkpoint, StoreError> {
    if let Some(c) = catalog.checkpoint_named(name) {
        return Ok(c);
    }
    let back = if name == "latest" {
        Some(1)
    } else {
        name.strip_prefix("@{-")
            .and_then(|n| n.strip_suffix('}'))
            .and_then(|n| n.parse::<usize>().ok())
    };
    if let Some(back) = back {
        let mut line = catalog
            .checkpoints
            .values()
            .rev()
            .filter(|c| c.origin == Origin::Asked && head.is_none_or(|h| c.head == h));
        return back
            .checked_sub(1)
            .and_then(|n| line.nth(n))
            .ok_or_else(|| StoreError::NotFound(format!("there is no checkpoint {name} yet")));
    }
    let mut found = catalog
        .checkpoints
        .values()
        .filter(|c| c.name.starts_with(name));
    match (found.next(), found.next()) {
        (Some(c), None) if !name.is_empty() => Ok(c),
        (Some(a), Some(b)) if !name.is_empty() => Err(StoreError::NotFound(format!(
            "{name} may be {}, {} or others; write more of it",
            a.name, b.name
        ))),
        _ => Err(StoreError::NotFound(format!(
            "there is no checkpoint {name}; 'cowfs list' shows them"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        assert_eq!(timestamp(0), "19700101T000000.000000Z");
        assert_eq!(timestamp(1_709_210_096_000_007), "20240229T123456.000007Z");
        assert_eq!(timestamp(-1), "19691231T235959.999999Z");
        assert_eq!(clock(1_709_210_096_000_007), "2024-02-29 12:34:56Z");
    }

    #[test]
    fn forbidden() {
        for bad in [
            "",
            "latest",
            "HEAD",
            "@{-1}",
            "@x",
            "-x",
            "a/b",
            "a b",
            "x#y",
            &"n".repeat(201),
        ] {
            assert!(check(bad).is_err(), "{bad:?}");
        }
        check("before-upgrade_2.0+deb12").unwrap();
    }
}

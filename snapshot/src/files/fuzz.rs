//! For the fuzz targets (`tests/fuzz`): the parsers of what the kernel says about open files, which are nobody else's.

/// Offset and flags of an fdinfo; all its fields are looked at.
#[must_use]
pub fn fdinfo(text: &str) -> Option<(u64, i32)> {
    let info = super::fdinfo::Info::parse(text)?;
    let mut locks = Vec::new();
    super::locks::capture(&info, 1, &mut locks);
    assert!(locks.iter().all(|l| l.len >= 0));
    for key in ["it_value:", "it_interval:"] {
        let _ = info.pair(key);
    }
    for line in info.values("tfd:").chain(info.values("inotify")) {
        for key in ["events", "data", "pos", "ino", "mask"] {
            let _ = super::fdinfo::field(line, key);
        }
    }
    Some((info.pos, info.flags))
}

/// An answer of sock_diag, and an address: whether they are understood.
#[must_use]
pub fn sockets(bytes: &[u8]) -> (bool, bool) {
    let address = super::inet::parse(bytes);
    if let Some(a) = &address {
        assert_eq!(super::inet::parse(&super::inet::raw(a)).as_ref(), Some(a));
    }
    (super::unix::parse(bytes).is_some(), address.is_some())
}

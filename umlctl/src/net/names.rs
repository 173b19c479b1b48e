//! Addresses and names: all follow from a VM's number in the pool.

use std::net::Ipv4Addr;

/// The host, as VMs see it.
pub const HOST: Ipv4Addr = Ipv4Addr::new(10, 84, 0, 1);
/// Every guest, as it sees itself.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 83, 0, 2);
/// Every guest's gateway.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 83, 0, 1);
/// The gateway's Ethernet address.
pub const GATEWAY_MAC: &str = "02:00:00:5a:00:01";
/// Both ends of the pair between the host and a namespace. Fixed, so that neither has to ask for the other's.
pub const HOST_MAC: &str = "02:00:00:5a:01:01";
/// See [`HOST_MAC`].
pub const INNER_MAC: &str = "02:00:00:5a:01:02";
/// The namespace's end of the pair.
pub const INNER: &str = "host0";
/// The guest's Ethernet in the namespace.
pub const TAP: &str = "tap0";

/// Numbers go from 1 to this.
pub const LAST: u32 = 254 * 254;

/// The address that the host and other VMs reach a VM by.
#[must_use]
pub fn address(index: u32) -> Ipv4Addr {
    let i = index.saturating_sub(1).min(LAST - 1);
    let octet = |n: u32| u8::try_from(n + 1).unwrap_or(u8::MAX);
    Ipv4Addr::new(10, 84, octet(i / 254), octet(i % 254))
}

/// The namespace's name.
#[must_use]
pub fn namespace(index: u32) -> String {
    format!("umlctl-{index}")
}

/// The host's end of the pair.
#[must_use]
pub fn outer(index: u32) -> String {
    format!("umlv{index}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        assert_eq!(address(1), Ipv4Addr::new(10, 84, 1, 1));
        assert_eq!(address(254), Ipv4Addr::new(10, 84, 1, 254));
        assert_eq!(address(255), Ipv4Addr::new(10, 84, 2, 1));
        assert_eq!(address(LAST), Ipv4Addr::new(10, 84, 254, 254));
        let all: std::collections::HashSet<_> = (1..=LAST).map(address).collect();
        assert_eq!(all.len() as u32, LAST);
        assert!(outer(LAST).len() < 16);
    }
}

//! `config.json`: what a VM was made of. Written once, and again only when the VM is given another address.

use super::{Error, home, name::Name};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The version that is written.
pub const VERSION: u32 = 1;

/// How a VM is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Net {
    /// A network namespace of its own, and an address that the host and other VMs reach it by
    Nat,
    /// No network
    None,
}

/// A VM's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Of this file.
    pub version: u32,
    /// The VM's name.
    pub name: Name,
    /// The disk that its COW disk stands on.
    pub image: PathBuf,
    /// Memory, in bytes.
    pub mem_bytes: u64,
    /// How it is connected.
    pub net: Net,
    /// Its number in the pool of addresses, if it is connected.
    pub net_index: Option<u32>,
    /// The guest's kernel: a `linux.uml`.
    pub kernel: PathBuf,
    /// Further arguments for the kernel.
    pub append: Vec<String>,
    /// Whether the kernel may measure its RAID 6 routines as it boots.
    pub raid6: bool,
    /// When it was made: seconds since 1970.
    pub created: u64,
}

impl Config {
    /// Reads it.
    ///
    /// # Errors
    /// It is not there, damaged, or of a newer umlctl.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let config: Self = home::read_json(path, VERSION)?;
        Ok(config)
    }

    /// Writes it, whole or not at all.
    ///
    /// # Errors
    /// The file system's.
    pub fn save(&self, path: &Path) -> Result<(), Error> {
        home::write_json(path, self)
    }
}

/// Smallest memory that the kernel boots in.
const LEAST: u64 = 32 << 20;
/// More is not addressable by the guest.
const MOST: u64 = 64 << 30;

/// Reads a size like `128M`.
///
/// # Errors
/// It is none, or out of range.
pub fn memory(text: &str) -> Result<u64, Error> {
    let bad = |why: &str| Error::Memory(text.to_owned(), why.to_owned());
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K' | b'k') => (&text[..text.len() - 1], 10),
        Some(b'M' | b'm') => (&text[..text.len() - 1], 20),
        Some(b'G' | b'g') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let bytes = digits
        .parse::<u64>()
        .ok()
        .filter(|_| digits.bytes().all(|b| b.is_ascii_digit()))
        .and_then(|n| n.checked_mul(1 << shift))
        .ok_or_else(|| bad("write a size like 128M or 1G"))?;
    match bytes {
        LEAST..=MOST if bytes.is_multiple_of(4096) => Ok(bytes),
        LEAST..=MOST => Err(bad("the size must be a multiple of 4K")),
        _ => Err(bad("the guest needs at least 32M and can use at most 64G")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(memory("128M").unwrap(), 128 << 20);
        assert_eq!(memory("1g").unwrap(), 1 << 30);
        assert_eq!(memory("134217728").unwrap(), 128 << 20);
        for bad in [
            "",
            "M",
            "-1M",
            "+64M",
            "1.5G",
            "16M",
            "1T",
            "100G",
            "33554433",
            "99999999999999999999G",
        ] {
            assert!(memory(bad).is_err(), "{bad}");
        }
    }
}

//! What the tests share: a simulated disk, a driver that speaks to a mount as the kernel does, and dumps of trees.

pub mod driver;
pub mod dump;
pub mod history;
pub mod image;
pub mod live;
pub mod pages;
pub mod simdisk;

/// A small random generator (splitmix64), so that a failure can be repeated by its seed.
#[derive(Debug, Clone)]
pub struct Rng(pub u64);

impl Rng {
    /// The next number.
    pub fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.draw() % n.max(1)
    }
}

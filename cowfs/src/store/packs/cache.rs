//! Unpacked frames, in bounded memory.

use std::collections::HashMap;
use std::sync::Arc;

use super::frame::Frame;

/// Bytes kept at most.
const BYTES_MAX: usize = 48 << 20;

type Key = (u32, u64);

/// The frames used last.
#[derive(Debug, Default)]
pub(super) struct Cache {
    frames: HashMap<Key, (Arc<Frame>, u64)>,
    bytes: usize,
    clock: u64,
}

impl Cache {
    pub fn get(&mut self, key: Key) -> Option<Arc<Frame>> {
        self.clock += 1;
        let (frame, used) = self.frames.get_mut(&key)?;
        *used = self.clock;
        Some(Arc::clone(frame))
    }

    pub fn insert(&mut self, key: Key, frame: Arc<Frame>) {
        self.remove(key);
        self.clock += 1;
        self.bytes += frame.raw.len();
        self.frames.insert(key, (frame, self.clock));
        while self.bytes > BYTES_MAX && self.frames.len() > 1 {
            // About a hundred of them.
            let oldest = self.frames.iter().min_by_key(|(_, (_, used))| *used);
            let Some(key) = oldest.map(|(k, _)| *k) else {
                return;
            };
            self.remove(key);
        }
    }

    pub fn remove(&mut self, key: Key) {
        if let Some((f, _)) = self.frames.remove(&key) {
            self.bytes -= f.raw.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_what_was_used_last() {
        let mut c = Cache::default();
        let frame = || {
            Arc::new(Frame {
                raw: vec![0; 1 << 20],
                chunks: Vec::new(),
            })
        };
        c.insert((0, 0), frame());
        for i in 1..100 {
            c.insert((0, i), frame());
            assert!(c.get((0, 0)).is_some());
        }
        assert!(c.bytes <= BYTES_MAX && c.frames.len() == BYTES_MAX >> 20);
        assert!(c.get((0, 99)).is_some() && c.get((0, 1)).is_none());
    }
}

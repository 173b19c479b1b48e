//! A filesystem's tree in memory.

use std::collections::BTreeMap;

use cowfs::fs::{Extent, FsError, Kv, OnEntry};

/// Key of the directory hash.
pub const HASH_KEY: [u8; 16] = [2; 16];

/// The tree. It refuses what the store's would: keys and values that are too long.
#[derive(Debug, Default)]
pub struct MemKv {
    /// Its records.
    pub map: BTreeMap<Vec<u8>, Vec<u8>>,
    next_ino: u64,
}

impl Kv for MemKv {
    fn get(&mut self, key: &[u8], f: &mut dyn FnMut(&[u8])) -> Result<bool, FsError> {
        Ok(self.map.get(key).map(|v| f(v)).is_some())
    }

    fn put(&mut self, key: &[u8], value: &[u8]) -> Result<(), FsError> {
        if key.len() > cowfs::tree::MAX_KEY || value.len() > cowfs::tree::MAX_VALUE {
            return Err(FsError::Errno(libc::EIO));
        }
        self.map.insert(key.to_vec(), value.to_vec());
        Ok(())
    }

    fn del(&mut self, key: &[u8]) -> Result<bool, FsError> {
        Ok(self.map.remove(key).is_some())
    }

    fn scan(&mut self, from: &[u8], to: &[u8], f: &mut OnEntry<'_>) -> Result<(), FsError> {
        if from < to {
            for (k, v) in self.map.range(from.to_vec()..to.to_vec()) {
                if f(k, v).is_break() {
                    break;
                }
            }
        }
        Ok(())
    }

    fn last_before(
        &mut self,
        from: &[u8],
        before: &[u8],
    ) -> Result<Option<(Vec<u8>, Vec<u8>)>, FsError> {
        if from >= before {
            return Ok(None);
        }
        let last = self.map.range(from.to_vec()..before.to_vec()).next_back();
        Ok(last.map(|(k, v)| (k.clone(), v.clone())))
    }

    fn alloc_ino(&mut self) -> u64 {
        self.next_ino += 1;
        1000 + self.next_ino
    }

    fn generation(&self) -> u64 {
        7
    }

    fn hash_key(&self) -> [u8; 16] {
        HASH_KEY
    }

    fn drop_extent(&mut self, _: &Extent) {}
}

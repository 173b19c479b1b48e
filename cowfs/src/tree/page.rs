//! The slotted page.

use super::{MAX_KEY, MAX_LEVEL, MAX_VALUE, PAGE_SIZE, PageId, TreeError, corrupt};

const MAGIC: [u8; 4] = *b"CoWt";
const VERSION: u8 = 1;

const O_VERSION: usize = 4;
const O_LEVEL: usize = 5;
const O_COUNT: usize = 6;
const O_HEAP: usize = 8;
const O_LIVE: usize = 10;
const O_SKIP: usize = 12;
const O_HINT: usize = 14;
const O_BIRTH: usize = 16;
const HEADER: usize = 24;
const SLOT: usize = 6;
const CELL: usize = 4;
const DATA_END: usize = PAGE_SIZE - 16;

/// Bytes for slots and cells in a page.
pub(super) const CAPACITY: usize = DATA_END - HEADER;

/// One page of the tree. All integers are little-endian.
///
/// | bytes       | field                                                                        |
/// |-------------|------------------------------------------------------------------------------|
/// | 0..4        | magic `CoWt`                                                                 |
/// | 4           | format version, 1                                                            |
/// | 5           | level, 0 = leaf, at most 12                                                  |
/// | 6..8        | count of entries                                                             |
/// | 8..10       | heap: offset of the lowest cell; 24 + 6 * count ..= 4080                     |
/// | 10..12      | live: sum of the sizes of all cells                                          |
/// | 12..14      | skip: bytes that all keys are known to share                                 |
/// | 14..16      | hint: slot after the last insertion; any value is harmless                   |
/// | 16..24      | birth: generation that wrote the page                                        |
/// | 24..        | slots in key order: head u32, cell offset u16                                |
/// | heap..4080  | cells, and holes: key length u16, value length u16, key, value               |
/// | 4080..4096  | checksum: BLAKE3 of bytes 0..4080 keyed with the page id, first 16 bytes     |
///
/// A slot's head is the big-endian number in the 4 key bytes after the first `skip` (padded with
/// zeros), so a search rarely touches cells. In an inner page the value is the child id (u64), the
/// key of entry 0 is empty (its head 0), and `skip` is about the other keys.
#[derive(Clone)]
pub struct Page(Box<[u8; PAGE_SIZE]>);

impl std::fmt::Debug for Page {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Page {{ level: {}, count: {}, birth: {} }}",
            self.level(),
            self.count(),
            self.birth()
        )
    }
}

/// Key and value; in an inner page separator and child id.
pub(super) type Item<'a> = (&'a [u8], &'a [u8]);

/// Bytes that an entry takes up in a page.
pub(super) fn entry_size(key: &[u8], value: &[u8]) -> usize {
    SLOT + CELL + key.len() + value.len()
}

/// Length of the common prefix.
pub(super) fn common(a: &[u8], b: &[u8]) -> usize {
    a.iter().zip(b).take_while(|(x, y)| x == y).count()
}

fn head_of(key: &[u8], skip: usize) -> u32 {
    let rest = key.get(skip..).unwrap_or(&[]);
    if let Some(four) = rest.first_chunk::<4>() {
        return u32::from_be_bytes(*four);
    }
    let mut four = [0; 4];
    four[..rest.len()].copy_from_slice(rest);
    u32::from_be_bytes(four)
}

fn slot_head(slot: &[u8; SLOT]) -> u32 {
    u32::from_le_bytes([slot[0], slot[1], slot[2], slot[3]])
}

impl Page {
    /// A leaf without entries, birth 0, not sealed.
    pub fn empty_leaf() -> Page {
        Page::empty(0)
    }

    pub(super) fn empty(level: u8) -> Page {
        let mut page = Page(Box::new([0; PAGE_SIZE]));
        page.0[..4].copy_from_slice(&MAGIC);
        page.0[O_VERSION] = VERSION;
        page.0[O_LEVEL] = level;
        page.put(O_HEAP, DATA_END);
        page
    }

    /// Checks everything inside a page, so that no later access can go wrong: header, slots and
    /// cells in bounds and disjoint, lengths, keys strictly ascending, heads. It does not check the
    /// checksum (see [`verify_sum`](Page::verify_sum)).
    ///
    /// # Errors
    ///
    /// [`TreeError::Corrupt`] with page id 0.
    pub fn from_bytes(bytes: Box<[u8; PAGE_SIZE]>) -> Result<Page, TreeError> {
        let page = Page(bytes);
        match page.check() {
            Ok(()) => Ok(page),
            Err(what) => Err(corrupt(0, what)),
        }
    }

    fn check(&self) -> Result<(), &'static str> {
        if self.0[..4] != MAGIC {
            return Err("no magic");
        }
        if self.0[O_VERSION] != VERSION {
            return Err("unknown version");
        }
        if self.level() > MAX_LEVEL {
            return Err("level too high");
        }
        let (count, heap, skip) = (self.count(), self.get(O_HEAP), self.skip());
        if heap > DATA_END || HEADER + SLOT * count > heap {
            return Err("slots or heap out of bounds");
        }
        if skip > MAX_KEY {
            return Err("shared prefix too long");
        }
        let first = self.first_key();
        if count < first {
            return Err("inner page without a child");
        }
        let mut used = [0u64; PAGE_SIZE / 64];
        let mut live = 0;
        for i in 0..count {
            let off = self.offset(i);
            if off < heap || off + CELL > DATA_END {
                return Err("cell out of bounds");
            }
            let (klen, vlen) = (self.get(off), self.get(off + 2));
            if klen > MAX_KEY || vlen > MAX_VALUE || (first == 1 && vlen != 8) {
                return Err("bad key or value length");
            }
            let end = off + CELL + klen + vlen;
            if end > DATA_END {
                return Err("cell out of bounds");
            }
            live += end - off;
            let mut at = off;
            while at < end {
                let upto = end.min((at | 63) + 1);
                let mask = (u64::MAX >> (64 - (upto - at))) << (at & 63);
                if used[at / 64] & mask != 0 {
                    return Err("cells overlap");
                }
                used[at / 64] |= mask;
                at = upto;
            }
            let key = self.key(i);
            let head = if i < first {
                if klen != 0 {
                    return Err("first separator is not empty");
                }
                0
            } else {
                if klen < skip {
                    return Err("shared prefix is not shared");
                }
                head_of(key, skip)
            };
            if i > 0 && self.key(i - 1) >= key {
                return Err("keys out of order");
            }
            if self.head(i) != head {
                return Err("head does not match its key");
            }
            if first == 1 && self.child(i) == 0 {
                return Err("child id is 0");
            }
        }
        if live != self.get(O_LIVE) {
            return Err("wrong sum of cell sizes");
        }
        // Sorted, so what the outermost keys share is shared by all.
        if count > first && common(self.key(first), self.key(count - 1)) < skip {
            return Err("shared prefix is not shared");
        }
        Ok(())
    }

    /// Writes the checksum. `id` is where the page will be written.
    pub fn seal(&mut self, id: PageId) {
        let sum = self.sum(id);
        self.0[DATA_END..].copy_from_slice(&sum);
    }

    /// Whether the checksum is that of this page at this place.
    pub fn verify_sum(&self, id: PageId) -> bool {
        self.0[DATA_END..] == self.sum(id)
    }

    fn sum(&self, id: PageId) -> [u8; 16] {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&id.to_le_bytes());
        let hash = blake3::keyed_hash(&key, &self.0[..DATA_END]);
        let mut sum = [0; 16];
        sum.copy_from_slice(&hash.as_bytes()[..16]);
        sum
    }

    /// The page as it is stored.
    pub fn as_bytes(&self) -> &[u8; PAGE_SIZE] {
        &self.0
    }

    /// Distance from the leaves: 0 is a leaf.
    pub fn level(&self) -> u8 {
        self.0[O_LEVEL]
    }

    /// Whether this page holds values.
    pub fn is_leaf(&self) -> bool {
        self.level() == 0
    }

    /// Number of entries.
    pub fn count(&self) -> usize {
        self.get(O_COUNT)
    }

    /// Generation that wrote the page.
    pub fn birth(&self) -> u64 {
        self.get64(O_BIRTH)
    }

    /// Sets the generation.
    pub fn set_birth(&mut self, birth: u64) {
        self.0[O_BIRTH..O_BIRTH + 8].copy_from_slice(&birth.to_le_bytes());
    }

    #[inline]
    fn get(&self, at: usize) -> usize {
        let mut two = [0; 2];
        two.copy_from_slice(&self.0[at..at + 2]);
        usize::from(u16::from_le_bytes(two))
    }

    /// `value` is always below 2^16: an offset or a length in a page.
    #[inline]
    fn put(&mut self, at: usize, value: usize) {
        self.0[at..at + 2].copy_from_slice(&(value as u16).to_le_bytes());
    }

    #[inline]
    fn get64(&self, at: usize) -> u64 {
        let mut eight = [0; 8];
        eight.copy_from_slice(&self.0[at..at + 8]);
        u64::from_le_bytes(eight)
    }

    fn skip(&self) -> usize {
        self.get(O_SKIP)
    }

    /// Slot after the last insertion.
    pub(super) fn hint(&self) -> usize {
        self.get(O_HINT)
    }

    pub(super) fn set_hint(&mut self, hint: usize) {
        self.put(O_HINT, hint);
    }

    /// Index of the first entry with a real key.
    pub(super) fn first_key(&self) -> usize {
        usize::from(!self.is_leaf())
    }

    #[inline]
    fn slots(&self) -> &[[u8; SLOT]] {
        self.0[HEADER..HEADER + SLOT * self.count()].as_chunks().0
    }

    #[inline]
    fn offset(&self, i: usize) -> usize {
        self.get(HEADER + SLOT * i + 4)
    }

    fn head(&self, i: usize) -> u32 {
        slot_head(&self.slots()[i])
    }

    fn put_slot(&mut self, i: usize, head: u32, offset: usize) {
        let at = HEADER + SLOT * i;
        self.0[at..at + 4].copy_from_slice(&head.to_le_bytes());
        self.put(at + 4, offset);
    }

    fn cell_size(&self, i: usize) -> usize {
        let off = self.offset(i);
        CELL + self.get(off) + self.get(off + 2)
    }

    #[inline]
    pub(super) fn key(&self, i: usize) -> &[u8] {
        let off = self.offset(i);
        &self.0[off + CELL..off + CELL + self.get(off)]
    }

    #[inline]
    pub(super) fn value(&self, i: usize) -> &[u8] {
        let off = self.offset(i);
        let at = off + CELL + self.get(off);
        &self.0[at..at + self.get(off + 2)]
    }

    pub(super) fn item(&self, i: usize) -> Item<'_> {
        (self.key(i), self.value(i))
    }

    #[inline]
    pub(super) fn child(&self, i: usize) -> PageId {
        let off = self.offset(i);
        self.get64(off + CELL + self.get(off))
    }

    pub(super) fn set_child(&mut self, i: usize, id: PageId) {
        if !self.is_leaf() && i < self.count() {
            let off = self.offset(i);
            let at = off + CELL + self.get(off);
            self.0[at..at + 8].copy_from_slice(&id.to_le_bytes());
        }
    }

    /// Bytes in use by entries.
    pub(super) fn used(&self) -> usize {
        SLOT * self.count() + self.get(O_LIVE)
    }

    /// Bytes that entries could still take, after compaction.
    pub(super) fn free(&self) -> usize {
        CAPACITY - self.used()
    }

    /// Lowest index with `key(index) >= key`, and whether they are equal.
    #[inline]
    pub(super) fn search(&self, key: &[u8]) -> (usize, bool) {
        let first = self.first_key();
        let slots = self.slots();
        if slots.len() <= first {
            return (first, false);
        }
        let skip = self.skip();
        if skip > 0 {
            let shared = &self.key(first)[..skip];
            match key[..skip.min(key.len())].cmp(shared) {
                std::cmp::Ordering::Less => return (first, false),
                std::cmp::Ordering::Equal => {}
                std::cmp::Ordering::Greater => return (slots.len(), false),
            }
        }
        self.search_heads(key, first, skip)
    }

    /// [`search`](Page::search) for a key that has the shared prefix. For other keys the index is
    /// meaningless, but the `bool` is right.
    #[inline]
    fn search_heads(&self, key: &[u8], first: usize, skip: usize) -> (usize, bool) {
        let slots = self.slots();
        let head = head_of(key, skip);
        let mut low = first + slots[first..].partition_point(|s| slot_head(s) < head);
        let mut high = low;
        if low < slots.len() && slot_head(&slots[low]) == head {
            high = low + 1;
            if high < slots.len() && slot_head(&slots[high]) == head {
                high += slots[high..].partition_point(|s| slot_head(s) == head);
            }
        }
        while low < high {
            let mid = low + (high - low) / 2;
            match self.key(mid).cmp(key) {
                std::cmp::Ordering::Less => low = mid + 1,
                std::cmp::Ordering::Equal => return (mid, true),
                std::cmp::Ordering::Greater => high = mid,
            }
        }
        (low, false)
    }

    /// The value of a key in a leaf.
    #[inline]
    pub(super) fn lookup(&self, key: &[u8]) -> Option<&[u8]> {
        match self.search_heads(key, 0, self.skip()) {
            (i, true) => Some(self.value(i)),
            _ => None,
        }
    }

    /// Index of the child that covers a key.
    #[inline]
    pub(super) fn child_index(&self, key: &[u8]) -> usize {
        let (i, found) = self.search(key);
        if found { i } else { i - 1 }
    }

    /// Adds an entry at `i` (at least [`first_key`](Page::first_key)), where its key belongs.
    /// False, and nothing changed, if there is no room.
    pub(super) fn insert_at(&mut self, i: usize, key: &[u8], value: &[u8]) -> bool {
        let size = CELL + key.len() + value.len();
        if self.free() < size + SLOT {
            return false;
        }
        let (count, first) = (self.count(), self.first_key());
        let slots_end = HEADER + SLOT * count;
        if self.get(O_HEAP) - slots_end < size + SLOT {
            self.compact();
        }
        let mut skip = self.skip();
        if count <= first {
            skip = key.len();
            self.put(O_SKIP, skip);
        } else {
            let near = if i < count { i } else { i - 1 };
            let shared = common(key, &self.key(near)[..skip]);
            if shared < skip {
                skip = shared;
                self.put(O_SKIP, skip);
                for j in first..count {
                    let head = head_of(self.key(j), skip);
                    self.put_slot(j, head, self.offset(j));
                }
            }
        }
        let off = self.get(O_HEAP) - size;
        self.put(O_HEAP, off);
        self.put(O_LIVE, self.get(O_LIVE) + size);
        self.write_cell(off, key, value);
        let at = HEADER + SLOT * i;
        self.0.copy_within(at..slots_end, at + SLOT);
        self.put_slot(i, head_of(key, skip), off);
        self.put(O_COUNT, count + 1);
        self.put(O_HINT, i + 1);
        true
    }

    fn write_cell(&mut self, off: usize, key: &[u8], value: &[u8]) {
        self.put(off, key.len());
        self.put(off + 2, value.len());
        let at = off + CELL;
        self.0[at..at + key.len()].copy_from_slice(key);
        let at = at + key.len();
        self.0[at..at + value.len()].copy_from_slice(value);
    }

    /// Removes entry `i`. In an inner page a new entry 0 loses its key.
    pub(super) fn remove_at(&mut self, i: usize) {
        let (count, size, off) = (self.count(), self.cell_size(i), self.offset(i));
        if off == self.get(O_HEAP) {
            self.put(O_HEAP, off + size);
        }
        self.put(O_LIVE, self.get(O_LIVE) - size);
        let at = HEADER + SLOT * i;
        self.0.copy_within(at + SLOT..HEADER + SLOT * count, at);
        self.put(O_COUNT, count - 1);
        if i == 0 && !self.is_leaf() && count > 1 {
            let (off, child, klen) = (self.offset(0), self.child(0), self.key(0).len());
            self.write_cell(off, &[], &child.to_le_bytes());
            self.put(O_LIVE, self.get(O_LIVE) - klen);
            self.put_slot(0, 0, off);
        }
    }

    /// Replaces the value of entry `i` of a leaf. False, and nothing changed, if there is no room.
    pub(super) fn set_value(&mut self, i: usize, value: &[u8]) -> bool {
        let off = self.offset(i);
        let (klen, old) = (self.get(off), self.get(off + 2));
        if value.len() <= old {
            let at = off + CELL + klen;
            self.0[at..at + value.len()].copy_from_slice(value);
            self.put(off + 2, value.len());
            self.put(O_LIVE, self.get(O_LIVE) - (old - value.len()));
            return true;
        }
        if self.free() + old < value.len() {
            return false;
        }
        // Off the stack: the key is at most 288 bytes.
        let mut buf = [0; MAX_KEY];
        buf[..klen].copy_from_slice(self.key(i));
        let hint = self.hint();
        self.remove_at(i);
        let done = self.insert_at(i, &buf[..klen], value);
        self.set_hint(hint);
        done
    }

    /// Moves all cells together at the end of the page.
    fn compact(&mut self) {
        let old = self.0.clone();
        let mut heap = DATA_END;
        for i in 0..self.count() {
            let (off, size) = (self.offset(i), {
                let off = self.offset(i);
                let len = |at: usize| usize::from(u16::from_le_bytes([old[at], old[at + 1]]));
                CELL + len(off) + len(off + 2)
            });
            heap -= size;
            self.0[heap..heap + size].copy_from_slice(&old[off..off + size]);
            self.put(HEADER + SLOT * i + 4, heap);
        }
        self.put(O_HEAP, heap);
    }

    /// A page of the given entries. The key of the first entry of an inner page is dropped.
    ///
    /// # Errors
    ///
    /// What is wrong: keys that do not ascend, or too much for a page. Neither can come from sound
    /// pages.
    pub(super) fn build(level: u8, items: &[Item<'_>]) -> Result<Page, &'static str> {
        let mut page = Page::empty(level);
        let first = usize::from(level > 0);
        let skip = match (items.get(first), items.last()) {
            (Some((low, _)), Some((high, _))) => common(low, high),
            _ => 0,
        };
        let slots_end = HEADER + SLOT * items.len();
        let mut heap = DATA_END;
        for (i, &(key, value)) in items.iter().enumerate() {
            let key = if i < first { &[][..] } else { key };
            if i > 0 && items[i - 1].0 >= key {
                return Err("keys of neighbouring pages out of order");
            }
            let size = CELL + key.len() + value.len();
            if heap < slots_end + size {
                return Err("entries do not fit");
            }
            heap -= size;
            page.write_cell(heap, key, value);
            let head = if i < first { 0 } else { head_of(key, skip) };
            page.put_slot(i, head, heap);
        }
        page.put(O_COUNT, items.len());
        page.put(O_HEAP, heap);
        page.put(O_LIVE, DATA_END - heap);
        page.put(O_SKIP, skip);
        Ok(page)
    }

    /// Takes over everything but birth and checksum.
    pub(super) fn assign(&mut self, other: &Page) {
        let birth = self.birth();
        self.0.copy_from_slice(&other.0[..]);
        self.set_birth(birth);
    }
}

//! The program that is snapshotted: memory of a given size in pages of 4 KiB, and a loop that watches the clock, so that
//! it can say how long it stood still. It keeps nothing open, and answers by files in a directory.
//!
//! SIGUSR1: write `seen.json` and begin anew. SIGUSR2: change one percent of the pages. After a gap of more than
//! 3 ms it looks for a file `resume`; if there is one it has been resumed: it reads its first 32 MB and adds a line to
//! `resumed.jsonl` (and another when it has read everything, if the file says `all`).

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use clap::Args;
use serde::{Deserialize, Serialize};

use crate::sys;

/// Words in a page.
const PAGE: usize = 512;
/// What "the first work" reads, bytes.
pub const WORK: usize = 32 << 20;
/// A shorter gap cannot have been a resume.
const RESUME_GAP: Duration = Duration::from_millis(3);
/// A write that took longer has met a fault.
const SLOW_WRITE: Duration = Duration::from_micros(2);
/// From here on it is asked how much of a gap was waiting for a CPU.
const LONG_GAP: Duration = Duration::from_micros(200);

/// How it runs.
#[derive(Debug, Clone, Args)]
pub struct Options {
    /// Megabytes (2^20) of memory
    #[arg(long)]
    pub mb: usize,
    /// Threads in all; all but one sleep ten milliseconds at a time
    #[arg(long, default_value_t = 1)]
    pub threads: usize,
    /// Write pages at random all the time
    #[arg(long)]
    pub busy: bool,
    /// Sleep a millisecond at a time instead of watching the clock
    #[arg(long)]
    pub idle: bool,
    /// Where the answers go
    #[arg(long)]
    pub dir: PathBuf,
}

/// What it has seen since it was asked last; nanoseconds.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub struct Seen {
    /// Longest time between two looks at the clock
    pub gap_ns: u64,
    /// How much of it went by waiting for a CPU (at most; what shorter gaps waited before it is in here)
    pub gap_waiting_ns: u64,
    /// The second longest
    pub second_ns: u64,
    /// Writes of a page
    pub writes: u64,
    /// Time of all writes
    pub write_ns: u64,
    /// Writes that took more than 2 us
    pub slow: u64,
    /// Time of these
    pub slow_ns: u64,
    /// The longest write
    pub slowest_ns: u64,
    /// Different pages that were written
    pub pages: u64,
}

/// What it says when it was resumed.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Resumed {
    /// First look at the clock; nanoseconds since 1970
    pub first_ns: u64,
    /// When the work was done; the same clock
    pub done_ns: u64,
    /// Bytes read
    pub bytes: u64,
    /// Is memory what it was?
    pub right: bool,
}

/// Content of a page that does not change: everything but its second word.
fn word(index: usize) -> u64 {
    let mut x = (index as u64)
        .wrapping_add(1)
        .wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (x ^ (x >> 27)) | 1
}

/// Sum of everything but the second words.
fn sum(memory: &[AtomicU64]) -> u64 {
    memory.chunks_exact(PAGE).fold(0_u64, |all, page| {
        let page_sum = page
            .iter()
            .fold(0_u64, |a, w| a.wrapping_add(w.load(Ordering::Relaxed)));
        all.wrapping_add(page_sum)
            .wrapping_sub(page[1].load(Ordering::Relaxed))
    })
}

/// Sum of the second words: what SIGUSR2 has changed.
fn changes(memory: &[AtomicU64]) -> u64 {
    memory
        .chunks_exact(PAGE)
        .fold(0_u64, |a, p| a.wrapping_add(p[1].load(Ordering::Relaxed)))
}

fn now_ns() -> u64 {
    let t = SystemTime::now().duration_since(UNIX_EPOCH);
    nanos(t.unwrap_or_default())
}

fn nanos(d: Duration) -> u64 {
    u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)
}

/// How long this thread has waited for a CPU, nanoseconds.
fn waited() -> u64 {
    std::fs::read_to_string("/proc/thread-self/schedstat")
        .ok()
        .and_then(|t| t.split_whitespace().nth(1)?.parse().ok())
        .unwrap_or(0)
}

struct Target {
    memory: &'static [AtomicU64],
    dir: PathBuf,
    /// Sums of the first work and of everything
    right: (u64, u64),
    changed: u64,
    random: u64,
    /// A bit for each page: written since it was asked last
    touched: Vec<u64>,
    seen: Seen,
    waited: u64,
    resumed: bool,
}

/// Runs until it is killed.
pub fn main(o: &Options) -> Result<()> {
    sys::count_signals()?;
    let memory = sys::small_pages(o.mb << 20)?;
    for (i, w) in memory.iter().enumerate() {
        w.store(if i % PAGE == 1 { 0 } else { word(i) }, Ordering::Relaxed);
    }
    for _ in 1..o.threads {
        std::thread::Builder::new()
            .stack_size(64 << 10)
            .spawn(|| {
                loop {
                    std::thread::sleep(Duration::from_millis(10));
                }
            })
            .context("starting a thread")?;
    }
    let first = &memory[..memory.len().min(WORK / 8)];
    let mut t = Target {
        memory,
        dir: o.dir.clone(),
        right: (sum(first), sum(memory)),
        changed: 0,
        random: 1,
        touched: vec![0; memory.len() / PAGE / 64 + 1],
        seen: Seen::default(),
        waited: waited(),
        resumed: false,
    };
    t.answer()?;
    t.watch(o)
}

impl Target {
    fn watch(&mut self, o: &Options) -> Result<()> {
        // Nobody asks before the first answer, and then at once: what is counted by now may be a question.
        let (mut asked, mut change) = (0, 0);
        let mut last = Instant::now();
        loop {
            let now = Instant::now();
            let gap = now.duration_since(last);
            self.gap(gap);
            last = now;
            if gap > RESUME_GAP && !self.resumed {
                self.look()?;
            }
            if sys::usr2() != change {
                change = change.wrapping_add(1);
                self.change();
            }
            if sys::usr1() != asked {
                asked = asked.wrapping_add(1);
                self.answer()?;
                last = Instant::now();
            }
            if o.busy {
                // A gap is what is not a write; a write that waits for its page is counted as a write.
                last = self.write();
            } else if o.idle {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }

    fn gap(&mut self, gap: Duration) {
        let ns = nanos(gap);
        let mut waiting = 0;
        if gap > LONG_GAP {
            let waited = waited();
            waiting = waited.saturating_sub(self.waited).min(ns);
            self.waited = waited;
        }
        if ns > self.seen.gap_ns {
            self.seen.second_ns = self.seen.gap_ns;
            self.seen.gap_ns = ns;
            self.seen.gap_waiting_ns = waiting;
        } else if ns > self.seen.second_ns {
            self.seen.second_ns = ns;
        }
    }

    fn next(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// First word of a page chosen at random.
    fn any_page(&mut self) -> usize {
        let pages = (self.memory.len() / PAGE) as u64;
        (self.next() % pages) as usize * PAGE
    }

    /// Writes to a page what is there already, which is a write all the same.
    fn write(&mut self) -> Instant {
        let at = self.any_page();
        let value = word(at);
        let start = Instant::now();
        self.memory[at].store(value, Ordering::Relaxed);
        let end = Instant::now();
        let took = end.duration_since(start);
        let ns = nanos(took);
        self.seen.writes += 1;
        self.seen.write_ns += ns;
        let page = at / PAGE;
        let (word, bit) = (&mut self.touched[page / 64], 1 << (page % 64));
        self.seen.pages += u64::from(*word & bit == 0);
        *word |= bit;
        if took > SLOW_WRITE {
            self.seen.slow += 1;
            self.seen.slow_ns += ns;
            self.seen.slowest_ns = self.seen.slowest_ns.max(ns);
        }
        end
    }

    /// Changes one percent of the pages.
    fn change(&mut self) {
        let pages = self.memory.len() / PAGE;
        let mut left = pages / 100;
        while left > 0 {
            let at = self.any_page() + 1;
            // Not one page twice.
            if self.memory[at].swap(self.changed + 1, Ordering::Relaxed) != self.changed + 1 {
                left -= 1;
            }
        }
        self.changed += 1;
        self.right.1 = sum(self.memory).wrapping_add(changes(self.memory));
    }

    /// Says what was seen, and forgets it.
    fn answer(&mut self) -> Result<()> {
        let text = serde_json::to_string(&self.seen).context("writing the answer")?;
        let new = self.dir.join("seen.new");
        std::fs::write(&new, text).with_context(|| format!("writing {}", new.display()))?;
        std::fs::rename(&new, self.dir.join("seen.json")).context("giving the answer")?;
        self.seen = Seen::default();
        self.touched.fill(0);
        self.waited = waited();
        Ok(())
    }

    /// Has it been resumed? Then work.
    fn look(&mut self) -> Result<()> {
        let first_ns = now_ns();
        let Ok(how) = std::fs::read_to_string(self.dir.join("resume")) else {
            return Ok(());
        };
        self.resumed = true;
        let work = &self.memory[..self.memory.len().min(WORK / 8)];
        let right = sum(work) == self.right.0;
        self.tell(first_ns, work.len(), right)?;
        if how == "all" {
            let all = sum(self.memory).wrapping_add(changes(self.memory));
            self.tell(first_ns, self.memory.len(), all == self.right.1)?;
        }
        Ok(())
    }

    fn tell(&self, first_ns: u64, words: usize, right: bool) -> Result<()> {
        let line = Resumed {
            first_ns,
            done_ns: now_ns(),
            bytes: words as u64 * 8,
            right,
        };
        let text = serde_json::to_string(&line).context("writing the answer")? + "\n";
        append(&self.dir.join("resumed.jsonl"), &text)
    }
}

/// Copies of one process may do so at the same time.
fn append(path: &Path, text: &str) -> Result<()> {
    let mut file: File = OpenOptions::new()
        .append(true)
        .create(true)
        .open(path)
        .with_context(|| format!("opening {}", path.display()))?;
    file.write_all(text.as_bytes())
        .with_context(|| format!("writing {}", path.display()))
}

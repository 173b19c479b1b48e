//! Pages that the kernel writes as a thread ends. They must not be protected: a thread that is ending is given no fault to
//! wait for (`handle_userfault` in fs/userfaultfd.c), so the kernel's write fails, and nobody hears of it. The word that
//! says that the thread is there (set_tid_address(2)) then stays, and whoever joins the thread waits for ever.
//!
//! Where the word of another process's thread is, only the thread itself can be asked. But glibc has the words of all
//! threads, and of stacks that are kept for threads to come, in `struct pthread`, which is in lists (as nptl_db knows them,
//! from 2.34 on) that begin at the first thread; and musl has one word for all threads.

use crate::sys::remote;

const PAGE: u64 = 4096;
/// In glibc's `struct pthread` the links of the list are so far before the word, and the list of robust futexes behind it.
const TO_LIST: u64 = 16;
/// So many threads are followed.
const MOST: usize = 1 << 16;
/// A list that is changed while it is followed is followed again, so often while the process runs.
pub const TRIES: usize = 200;

/// The pages of one process, as its threads are now. `first` is the first thread's word, as it has said itself, or 0.
pub fn pages(pid: i32, first: u64, tids: &[i32], tries: usize) -> Vec<u64> {
    let mut words = Vec::new();
    if first != 0 {
        words = (0..tries)
            .find_map(|_| stacks(pid, first))
            .unwrap_or_default();
        words.push(first);
    }
    let heads = tids.iter().filter_map(|&t| remote::robust_list(t).ok());
    words.extend(heads.filter_map(|(head, _)| head.checked_sub(TO_LIST).filter(|&w| w != 0)));
    let mut pages: Vec<u64> = words.iter().map(|w| w & !(PAGE - 1)).collect();
    pages.sort_unstable();
    pages.dedup();
    pages
}

/// The words of all stacks that glibc knows. `None`: there are no such lists, or they were just changed.
fn stacks(pid: i32, first: u64) -> Option<Vec<u64>> {
    let links = |at: u64| {
        let mut bytes = [0u8; 16];
        remote::read(pid, at, &mut bytes).ok()?;
        let word = |i: usize| u64::from_le_bytes(std::array::from_fn(|k| bytes[i + k]));
        Some((word(0), word(8)))
    };
    // All nodes from one to itself, without it.
    let follow = |from: u64| {
        let mut nodes = Vec::new();
        let (mut at, mut next) = (from, links(from)?.0);
        while next != from {
            let (after, before) = links(next)?;
            if before != at || nodes.len() == MOST {
                return None;
            }
            nodes.push(next);
            (at, next) = (next, after);
        }
        (links(from)?.1 == at).then_some(nodes)
    };
    // The first thread is in the list of stacks that are not glibc's own; its head stands between those of the stacks in
    // use and of those that are kept. Only one of its nodes is in no stack, and has lists before and behind it.
    let own = first.checked_sub(TO_LIST)?;
    for head in follow(own)? {
        if let (Some(used), Some(kept)) = (follow(head - 16), follow(head + 16)) {
            let all = used.into_iter().chain(kept);
            return Some(all.map(|node| node + TO_LIST).collect());
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of a thread that lives, and of one that has ended and whose stack is kept.
    #[test]
    fn the_words_of_all_threads_are_found() {
        let pid = std::process::id().cast_signed();
        let of = |tid: i32| remote::robust_list(tid).unwrap().0 - TO_LIST;
        let word = move || of(nix::unistd::gettid().as_raw());
        let (say, hear) = std::sync::mpsc::channel();
        let (end, ends) = std::sync::mpsc::channel::<()>();
        let send = say.clone();
        let alive = std::thread::spawn(move || {
            send.send(word()).unwrap();
            let _ = ends.recv();
        });
        let lives = hear.recv().unwrap();
        std::thread::spawn(move || say.send(word()).unwrap())
            .join()
            .unwrap();
        let kept = hear.recv().unwrap();
        let tids = crate::proc::threads(pid).unwrap();
        let pages = pages(pid, of(pid), &tids, TRIES);
        for word in [lives, kept, of(pid)] {
            assert!(pages.contains(&(word & !(PAGE - 1))), "{word:#x}");
        }
        drop(end);
        alive.join().unwrap();
    }
}

//! A look at the threads of a process, one after the other, before all are stopped: what each would have to be asked in the
//! stop it is asked here, and its calls that could change the answer are counted from then on. `docs/snapshot.md`, section 3.

use super::Error;
use super::state::Before;
use crate::proc;
use crate::sys::calls::{Calls, Counter};
use crate::sys::ptrace;
use crate::target::batch::Arg;
use crate::target::driver::Foothold;
use crate::target::journal::Journal;
use crate::target::{Batch, Driver, Stopped};
use std::collections::HashMap;

/// So many threads are looked at; each takes a descriptor. The others are asked in the stop.
const MOST: usize = 400;
/// The calls that change what is asked (rt_sigreturn brings back what was before a signal), and those that end a thread: its
/// number may be another one's by the time of the stop.
const CHANGES: [i64; 6] = [
    libc::SYS_sigaltstack,
    libc::SYS_set_tid_address,
    libc::SYS_rt_sigreturn,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_execve,
];
/// The kernel's SS_AUTODISARM (`include/uapi/linux/signal.h`): a signal changes the alternate stack without a call.
const AUTODISARM: u32 = 1 << 31;
/// Tells where the thread is, and is no part of the setting.
const ONSTACK: u32 = libc::SS_ONSTACK as u32;

/// What only a thread itself can tell.
#[derive(Debug, Clone, Copy)]
pub struct Own {
    /// The alternate stack: address, flags, length.
    pub altstack: (u64, u32, u64),
    /// Where a zero is written at its end.
    pub clear_child_tid: u64,
}

/// Where the answers will be.
#[derive(Debug, Clone, Copy)]
pub struct Questions {
    altstack: Arg,
    clear_child_tid: Arg,
}

impl Questions {
    /// Adds the calls to a batch.
    pub fn ask(b: &mut Batch) -> Self {
        let altstack = b.room(24);
        b.call(libc::SYS_sigaltstack, &[0.into(), altstack]);
        let clear_child_tid = b.room(8);
        b.call(
            libc::SYS_prctl,
            &[libc::PR_GET_TID_ADDRESS.into(), clear_child_tid],
        );
        Self {
            altstack,
            clear_child_tid,
        }
    }

    /// The answers, after it was run.
    #[must_use]
    pub fn answers(&self, b: &Batch) -> Own {
        Own {
            altstack: (
                b.word(self.altstack, 0),
                b.word(self.altstack, 8) as u32 & !ONSTACK,
                b.word(self.altstack, 16),
            ),
            clear_child_tid: b.word(self.clear_child_tid, 0),
        }
    }
}

#[derive(Debug)]
struct Answer {
    own: Own,
    counter: Counter,
    /// Its count when the answer was given.
    count: u64,
}

/// What threads have told, and whether it holds still.
#[derive(Debug, Default)]
pub struct Known(HashMap<i32, Answer>);

impl Known {
    /// Looks at all threads but the first, which is asked for the whole process in the stop. Gives also the pages that the
    /// kernel will write for them when they are stopped again. Where calls cannot be counted nothing is known.
    pub fn look(
        pid: i32,
        before: &mut Before,
        journal: &mut Journal,
        foothold: Foothold,
    ) -> Result<(Self, Vec<u64>), Error> {
        let (mut known, mut hot) = (Self::default(), Vec::new());
        let calls = Calls::new(&CHANGES);
        for tid in proc::threads(pid)?.into_iter().take(MOST) {
            if tid == pid {
                continue;
            }
            let counter = calls.as_ref().and_then(|c| c.count(tid).ok());
            let Some(stopped) = Stopped::glance(pid, tid)? else {
                continue;
            };
            before.note_interrupted(tid);
            hot.extend(hot_pages(tid));
            if let Some(counter) = counter {
                let own = ask(&stopped, tid, journal, foothold)?;
                if own.altstack.1 & AUTODISARM == 0
                    && let Ok(count) = counter.read()
                {
                    let answer = Answer {
                        own,
                        counter,
                        count,
                    };
                    known.0.insert(tid, answer);
                }
            }
            stopped.release();
        }
        Ok((known, hot))
    }

    /// Ends the counting, on a thread of its own: it takes the kernel some tens of milliseconds.
    pub fn forget(self) {
        if !self.0.is_empty() {
            // Without another thread it is ended here.
            let _ = std::thread::Builder::new().spawn(move || drop(self));
        }
    }

    /// In the stop: the answers that hold still, of threads that have neither ended nor made one of the calls.
    #[must_use]
    pub fn still(&self) -> HashMap<i32, Own> {
        let same = |a: &Answer| a.counter.read() == Ok(a.count);
        let still = self.0.iter().filter(|(_, a)| same(a));
        still.map(|(&tid, a)| (tid, a.own)).collect()
    }
}

fn ask(
    stopped: &Stopped,
    tid: i32,
    journal: &mut Journal,
    foothold: Foothold,
) -> Result<Own, Error> {
    let mut driver = Driver::enter(stopped, &[tid], journal, Some(foothold))?;
    let mut batch = Batch::new();
    let questions = Questions::ask(&mut batch);
    driver.run(&mut batch)?;
    driver.leave()?;
    Ok(questions.answers(&batch))
}

/// Pages that the kernel will write for a stopped thread when it is stopped again, or makes a call: its restartable
/// sequence (rseq(2)), and the end of its stack, where an interrupted call may leave an answer. Protected, each of them would
/// have to be asked for by a fault in the stop, and a hundred threads' faults take milliseconds.
pub fn hot_pages(tid: i32) -> Vec<u64> {
    /// An argument that is as near as this to the top of the stack points into it.
    const NEAR: u64 = 64 << 10;
    let mut pages = Vec::new();
    if let Ok((area, ..)) = ptrace::rseq(tid)
        && area != 0
    {
        pages.push(area & !0xfff);
    }
    if let Ok(r) = ptrace::regs(tid) {
        let arguments = [r.rdi, r.rsi, r.rdx, r.r10, r.r8, r.r9];
        let near = |a: &&u64| a.abs_diff(r.rsp) < NEAR;
        pages.push(r.rsp & !0xfff);
        pages.extend(arguments.iter().filter(near).map(|a| a & !0xfff));
    }
    pages
}

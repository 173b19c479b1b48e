//! Tables of system calls that a process or thread makes by itself when nothing of this program is left in it: see
//! `sys::scratch` for the loop that runs them.

use crate::sys::scratch::{Scratch, code};

/// Bytes before the first table: the loop's code, and the message of a child that fails before it enters the loop.
pub const HEADER: usize = 4096;
/// Where in the header that message is.
pub const MESSAGE: usize = 1024;
/// Where in the header processes are counted that are ready for what needs all of them.
pub const READY: usize = 3072;
/// An entry, bytes.
const ENTRY: usize = 64;
/// What a result is before its call was made.
const NOT_YET: u64 = 0x8000_0000_0bad_0bad;

/// What a result must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// No error.
    Success,
    /// Exactly this.
    Exactly(u64),
    /// It may fail.
    Anything,
}

/// An argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arg {
    /// A number.
    Value(u64),
    /// The address of data of the script.
    Data(Data),
    /// The address of a table.
    Table(TableId),
    /// The address of the word that changes when a table is done.
    Done(TableId),
}

impl From<u64> for Arg {
    fn from(v: u64) -> Arg {
        Arg::Value(v)
    }
}

impl From<Data> for Arg {
    fn from(d: Data) -> Arg {
        Arg::Data(d)
    }
}

/// A table of the script.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TableId(usize);

/// Data of the script: an offset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Data(usize);

#[derive(Debug)]
struct Call {
    what: &'static str,
    nr: i64,
    args: [Arg; 6],
    expect: Expect,
}

/// The tables of all processes and threads of a resume, with their data.
#[derive(Debug, Default)]
pub struct Script {
    tables: Vec<Vec<Call>>,
    data: Vec<u8>,
    /// Words of the data that become addresses.
    relocations: Vec<(Data, Arg, u64)>,
}

/// A call that failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} failed (call {nr}, {args:x?}): {errno}")]
pub struct CallFailed {
    /// What it was for.
    pub what: &'static str,
    /// Its number.
    pub nr: i64,
    /// Its arguments.
    pub args: Vec<u64>,
    /// How it failed.
    pub errno: nix::errno::Errno,
}

impl Script {
    /// A new, empty table.
    pub fn table(&mut self) -> TableId {
        self.tables.push(Vec::new());
        TableId(self.tables.len() - 1)
    }

    /// Adds a call to a table.
    pub fn call(
        &mut self,
        table: TableId,
        what: &'static str,
        nr: i64,
        args: &[Arg],
        expect: Expect,
    ) {
        let mut all = [Arg::Value(0); 6];
        all[..args.len()].copy_from_slice(args);
        self.tables[table.0].push(Call {
            what,
            nr,
            args: all,
            expect,
        });
    }

    /// Lets a table wait for the end of another one, which another thread runs.
    pub fn wait_for(&mut self, table: TableId, other: TableId) {
        let args = [
            Arg::Done(other),
            (libc::FUTEX_WAIT as u64).into(),
            u64::from(NOT_YET as u32).into(),
            0.into(),
        ];
        self.call(
            table,
            "waiting for a thread",
            libc::SYS_futex,
            &args,
            Expect::Anything,
        );
    }

    /// Adds data, aligned to 8 bytes.
    pub fn bytes(&mut self, bytes: &[u8]) -> Data {
        let at = Data(self.data.len());
        self.data.extend_from_slice(bytes);
        self.data.resize(self.data.len().next_multiple_of(8), 0);
        at
    }

    /// Adds words as data.
    pub fn words(&mut self, words: &[u64]) -> Data {
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_ne_bytes()).collect();
        self.bytes(&bytes)
    }

    /// Makes word `index` of the data an address.
    pub fn relocate(&mut self, data: Data, index: usize, to: Arg) {
        self.relocate_back(data, index, to, 0);
    }

    /// The same, so many bytes below the address.
    pub fn relocate_back(&mut self, data: Data, index: usize, to: Arg, back: u64) {
        self.relocations.push((Data(data.0 + index * 8), to, back));
    }

    /// How many bytes of scratch memory it needs; whole pages.
    #[must_use]
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        (self.data_start() + self.data.len()).next_multiple_of(4096)
    }

    fn data_start(&self) -> usize {
        self.offset(TableId(self.tables.len()))
    }

    /// Where a table starts.
    #[must_use]
    pub fn offset(&self, table: TableId) -> usize {
        // Three more entries each: the two that announce the end, and the end.
        let before: usize = self.tables[..table.0].iter().map(|t| t.len() + 3).sum();
        HEADER + before * ENTRY
    }

    fn resolve(&self, base: u64, arg: Arg) -> u64 {
        base + match arg {
            Arg::Value(v) => return v,
            Arg::Data(d) => self.data_start() + d.0,
            Arg::Table(t) => self.offset(t),
            Arg::Done(t) => self.done(t),
        } as u64
    }

    /// Writes everything.
    pub fn install(&self, scratch: &Scratch) {
        let base = scratch.base();
        scratch.write(0, code());
        let mut out = Vec::with_capacity(self.len());
        let mut entry = |nr: i64, args: [u64; 6], result: u64| {
            out.extend_from_slice(&nr.to_ne_bytes());
            for a in args {
                out.extend_from_slice(&a.to_ne_bytes());
            }
            out.extend_from_slice(&result.to_ne_bytes());
        };
        for (i, table) in self.tables.iter().enumerate() {
            for c in table {
                entry(c.nr, c.args.map(|a| self.resolve(base, a)), NOT_YET);
            }
            // The result of gettid is what the parent waits for.
            let done = base + self.done(TableId(i)) as u64;
            entry(libc::SYS_gettid, [0; 6], NOT_YET);
            let wake = [done, libc::FUTEX_WAKE as u64, i32::MAX as u64, 0, 0, 0];
            entry(libc::SYS_futex, wake, 0);
            entry(-1, [0; 6], 0);
        }
        let mut data = self.data.clone();
        for &(at, to, back) in &self.relocations {
            let word = self.resolve(base, to) - back;
            data[at.0..at.0 + 8].copy_from_slice(&word.to_ne_bytes());
        }
        out.extend_from_slice(&data);
        scratch.write(HEADER, &out);
    }

    fn done(&self, table: TableId) -> usize {
        self.offset(table) + self.tables[table.0].len() * ENTRY + 56
    }

    /// Waits for the end of a table; false if it was not reached within `ms` milliseconds.
    #[must_use]
    pub fn wait(&self, scratch: &Scratch, table: TableId, ms: i64) -> bool {
        let done = self.done(table);
        if scratch.word(done) == NOT_YET {
            scratch.wait(done, NOT_YET as u32, ms);
        }
        scratch.word(done) != NOT_YET
    }

    /// The first call of a table that did not do what it should; the first that was not made is no failure.
    pub fn check(&self, scratch: &Scratch, table: TableId) -> Result<(), CallFailed> {
        let base = scratch.base();
        for (i, c) in self.tables[table.0].iter().enumerate() {
            let result = scratch.word(self.offset(table) + i * ENTRY + 56);
            if result == NOT_YET {
                return Ok(());
            }
            let error = (-4095..0).contains(&(result as i64));
            let good = match c.expect {
                Expect::Anything => true,
                Expect::Success => !error,
                Expect::Exactly(v) => result == v,
            };
            if !good {
                let errno = if error { -(result as i64) as i32 } else { 0 };
                return Err(CallFailed {
                    what: c.what,
                    nr: c.nr,
                    args: c.args.iter().map(|&a| self.resolve(base, a)).collect(),
                    errno: nix::errno::Errno::from_raw(errno),
                });
            }
        }
        Ok(())
    }

    /// The last call that was made, for the message when a process died in between.
    #[must_use]
    pub fn last(&self, scratch: &Scratch, table: TableId) -> &'static str {
        let made = (0..self.tables[table.0].len())
            .take_while(|i| scratch.word(self.offset(table) + i * ENTRY + 56) != NOT_YET);
        made.last()
            .map_or("nothing", |i| self.tables[table.0][i].what)
    }
}

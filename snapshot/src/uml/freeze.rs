//! Bringing a machine to rest, and letting it go.
//!
//! The kernel process (main) is driven by PTRACE_SYSCALL to one of two points, at which every user process is in a
//! ptrace stop that main has seen, and no register of theirs is needed any more: the entry of rt_sigsuspend (the guest is
//! idle), or the end of the PTRACE_GETREGSET that follows a wait4 (a user process stopped, and `userspace()` of
//! `arch/um/os-Linux/skas/process.c` has fetched all its registers). The helpers, which share main's memory and read
//! and write the disk, can be stopped anywhere: their registers and main's memory are all there is to them.

use super::{Error, traced};
use crate::proc;
use crate::sys::ptrace::{self, Call, Report};
use crate::sys::remote;
use crate::sys::sched::Boost;
use std::collections::HashMap;
use std::time::{Duration, Instant};

const REQUEST_CONT: u64 = 7;
const REQUEST_GETREGS: u64 = 12;
const REQUEST_SYSEMU: u64 = 31;
const REQUEST_SYSEMU_STEP: u64 = 32;
const REQUEST_GETREGSET: u64 = 0x4204;
/// How long main may take to come to rest.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long main, and a user process that is to stop, are preferred to everybody else: on a busy machine each stop would
/// otherwise cost a turn of all others. What takes longer than this computes.
const PREFERRED: Duration = Duration::from_millis(50);
/// A user process that ran when we attached is asked to stop after this time.
const FIRST_KICK: Duration = Duration::from_micros(300);

/// Where main is at rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// Before rt_sigsuspend.
    Idle,
    /// After the registers of the user process that stopped were fetched.
    User,
}

/// What of the sequence of calls that leads to [`Point::User`] has been seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Seen {
    #[default]
    Nothing,
    /// wait4 told of a stop after which nothing more is asked of the user process.
    Stopped,
    /// Its general registers were fetched.
    Registers,
}

/// A machine whose main process is attached.
#[derive(Debug)]
pub struct Attached {
    /// Main.
    pub main: i32,
    helpers: Vec<i32>,
    attached: bool,
    /// Main is in a stop that we have seen; the signal that it is to go on with.
    stopped: Option<i32>,
    /// Our numbers of the machine's processes, by theirs.
    numbers: HashMap<i32, i32>,
    /// The last request that lets a user process run.
    last: Option<u64>,
    /// Who is preferred.
    boosted: Vec<Boost>,
}

impl Attached {
    /// Attaches to main without stopping it. Whoever has attached must soon stop it or let it go: every signal stops it
    /// until it is waited for.
    pub fn new(main: i32) -> Result<Self, Error> {
        let mut new = Self {
            main,
            helpers: Vec::new(),
            attached: false,
            stopped: None,
            numbers: HashMap::new(),
            last: None,
            boosted: Vec::new(),
        };
        new.learn_numbers();
        ptrace::seize(main, libc::PTRACE_O_TRACESYSGOOD).map_err(traced(main, "PTRACE_SEIZE"))?;
        new.attached = true;
        Ok(new)
    }

    /// Stops main at a [`Point`].
    pub fn stop(&mut self) -> Result<Point, Error> {
        let main = self.main;
        let start = Instant::now();
        let mut seen = Seen::Nothing;
        let mut request = 0;
        let mut status_at = 0;
        let mut first = true;
        self.last = None;
        self.boosted.extend(Boost::begin(main));
        ptrace::interrupt(main).map_err(traced(main, "PTRACE_INTERRUPT"))?;
        loop {
            if start.elapsed() > PREFERRED {
                self.boosted.clear();
            }
            let report = self.next(start, &mut first)?;
            self.stopped = Some(0);
            let signal = match report {
                Report::Ended(_) => {
                    self.attached = false;
                    return Err(Error::Ended(main));
                }
                Report::Signal(signal) => {
                    self.stopped = Some(signal);
                    signal
                }
                // A machine is no shell's job; whoever stopped it by hand must wait for us.
                Report::Interrupted | Report::Event(_) | Report::JobStop(_) => 0,
                Report::Syscall => {
                    match ptrace::syscall_info(main)
                        .map_err(traced(main, "PTRACE_GET_SYSCALL_INFO"))?
                    {
                        Call::Entry(nr, args) => {
                            request = 0;
                            match nr {
                                libc::SYS_rt_sigsuspend => return Ok(Point::Idle),
                                libc::SYS_wait4 => {
                                    status_at = args[1];
                                    seen = Seen::Nothing;
                                    if matches!(
                                        self.last,
                                        Some(REQUEST_SYSEMU | REQUEST_SYSEMU_STEP)
                                    ) {
                                        self.kick(args[0] as i32);
                                    }
                                }
                                libc::SYS_ptrace => {
                                    request = args[0];
                                    if matches!(
                                        request,
                                        REQUEST_CONT | REQUEST_SYSEMU | REQUEST_SYSEMU_STEP
                                    ) {
                                        self.last = Some(request);
                                    }
                                }
                                _ => seen = Seen::Nothing,
                            }
                        }
                        Call::Exit(result) => {
                            if status_at != 0 {
                                seen = self.waited(result, status_at)?;
                                status_at = 0;
                            } else if result == 0
                                && request == REQUEST_GETREGS
                                && seen == Seen::Stopped
                            {
                                seen = Seen::Registers;
                            } else if result == 0
                                && request == REQUEST_GETREGSET
                                && seen == Seen::Registers
                            {
                                return Ok(Point::User);
                            } else {
                                seen = Seen::Nothing;
                            }
                        }
                        Call::None => {}
                    }
                    0
                }
            };
            ptrace::syscall(main, signal).map_err(traced(main, "PTRACE_SYSCALL"))?;
            self.stopped = None;
        }
    }

    /// The next report of main. One that waits for a user process which runs is helped after a while.
    fn next(&mut self, start: Instant, first: &mut bool) -> Result<Report, Error> {
        let main = self.main;
        let mut kick_at = FIRST_KICK;
        let since = Instant::now();
        loop {
            if let Some((_, report)) = ptrace::wait(main, false).map_err(traced(main, "waiting"))? {
                return Ok(report);
            }
            let waited = start.elapsed();
            if waited > PATIENCE {
                return Err(Error::Busy(PATIENCE.as_secs()));
            }
            if *first && waited > kick_at {
                // What main waits for is not known before its first call is seen.
                self.kick_running();
                kick_at *= 8;
            }
            *first = *first && waited < Duration::from_millis(50);
            // Mostly the next call is microseconds away, on another CPU; but main may need ours.
            let since = since.elapsed();
            if since < Duration::from_micros(15) {
                std::hint::spin_loop();
            } else if since < Duration::from_millis(2) {
                std::thread::sleep(Duration::from_micros(5));
            } else {
                std::thread::sleep(Duration::from_micros(100));
            }
        }
    }

    /// What a wait4 told. A stop by SIGSEGV and its like is not the end: main asks the user process for more.
    fn waited(&self, result: i64, status_at: u64) -> Result<Seen, Error> {
        if result <= 0 {
            return Ok(Seen::Nothing);
        }
        let mut status = [0; 4];
        remote::read(self.main, status_at, &mut status)
            .map_err(|e| Error::Memory(self.main, status_at, e))?;
        let status = i32::from_ne_bytes(status);
        let plain = [
            libc::SIGTRAP | 0x80,
            libc::SIGALRM,
            libc::SIGIO,
            libc::SIGUSR1,
        ];
        if libc::WIFSTOPPED(status) && plain.contains(&libc::WSTOPSIG(status)) {
            return Ok(Seen::Stopped);
        }
        Ok(Seen::Nothing)
    }

    /// Makes a user process stop, as the guest's timer does.
    fn kick(&mut self, number: i32) {
        if !self.numbers.contains_key(&number) {
            self.learn_numbers();
        }
        if let Some(&pid) = self.numbers.get(&number) {
            self.boosted.extend(Boost::begin(pid));
            kick(pid);
        }
    }

    /// Only those that main traces: one that has just been made is not traced yet, would take the signal by main's
    /// handler, which it has not, and die.
    fn kick_running(&mut self) {
        for pid in proc::children(self.main).unwrap_or_default() {
            let runs = proc::stat(pid).is_ok_and(|s| s.state == 'R');
            if runs && proc::status(pid).is_ok_and(|s| s.tracer == self.main) {
                self.boosted.extend(Boost::begin(pid));
                kick(pid);
            }
        }
    }

    /// Looks up the numbers of the machine's processes.
    fn learn_numbers(&mut self) {
        let mut numbers = HashMap::new();
        for pid in proc::children(self.main).unwrap_or_default() {
            let inner = inner_number(pid);
            numbers.insert(inner.unwrap_or(pid), pid);
        }
        self.numbers = numbers;
    }

    /// Stops the helpers, wherever they are. A call that cannot be interrupted ends first.
    pub fn hold_helpers(&mut self, helpers: &[i32]) -> Result<(), Error> {
        for &pid in helpers {
            ptrace::seize(pid, libc::PTRACE_O_TRACESYSGOOD).map_err(traced(pid, "PTRACE_SEIZE"))?;
            self.helpers.push(pid);
            ptrace::interrupt(pid).map_err(traced(pid, "PTRACE_INTERRUPT"))?;
        }
        for &pid in helpers {
            loop {
                match ptrace::wait(pid, true).map_err(traced(pid, "waiting"))? {
                    Some((_, Report::Interrupted)) => break,
                    Some((_, Report::Ended(_))) => return Err(Error::Ended(pid)),
                    Some((_, Report::Signal(s))) => {
                        ptrace::cont(pid, s).map_err(traced(pid, "PTRACE_CONT"))?;
                    }
                    _ => ptrace::cont(pid, 0).map_err(traced(pid, "PTRACE_CONT"))?,
                }
            }
        }
        Ok(())
    }

    /// Lets main go, which is stopped; the helpers stay.
    pub fn detach_main(&mut self) -> Result<(), Error> {
        self.boosted.clear();
        wake(self.main);
        ptrace::detach(self.main, 0).map_err(traced(self.main, "PTRACE_DETACH"))?;
        self.attached = false;
        Ok(())
    }

    /// Waits until main, which is being killed, is dead. Nothing is let go meanwhile.
    pub fn wait_for_end(&mut self) -> Result<(), Error> {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            match ptrace::wait(self.main, false) {
                Ok(Some((_, Report::Ended(_)))) | Err(_) => {
                    self.attached = false;
                    self.helpers.clear();
                    return Ok(());
                }
                _ => std::thread::sleep(Duration::from_micros(200)),
            }
        }
        Err(Error::Busy(PATIENCE.as_secs()))
    }

    /// Lets the helpers go.
    pub fn release_helpers(&mut self) -> Result<(), Error> {
        for pid in std::mem::take(&mut self.helpers) {
            ptrace::detach(pid, 0).map_err(traced(pid, "PTRACE_DETACH"))?;
        }
        Ok(())
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let _ = self.release_helpers();
        if !self.attached {
            return;
        }
        // Only one that has stopped can be let go. If it has by itself, for a signal, it must go on with that: a detach
        // without having looked would lose it.
        if let Some(signal) = self.stopped {
            wake(self.main);
            let _ = ptrace::detach(self.main, signal);
        } else if ptrace::interrupt(self.main).is_ok() {
            while let Ok(Some((_, report))) = ptrace::wait(self.main, true) {
                let signal = match report {
                    Report::Ended(_) => return,
                    Report::Signal(signal) => signal,
                    _ => 0,
                };
                wake(self.main);
                if ptrace::detach(self.main, signal).is_ok() {
                    return;
                }
            }
        }
    }
}

/// The number that a process has in its own namespace.
pub fn inner_number(pid: i32) -> Option<i32> {
    proc::status(pid).ok()?.ns_pid.last().copied()
}

/// Makes main look for events once more, before it is let go. An idle guest takes no interrupts while it looks whether it
/// has a timer, and then sleeps in rt_sigsuspend without asking whether one came (`os_idle_sleep` of
/// `arch/um/os-Linux/time.c`): a packet of that moment waits for the guest's next timer. By itself main is there for
/// microseconds; driven from call to call it is there for many times as long.
fn wake(main: i32) {
    let main = nix::unistd::Pid::from_raw(main);
    // One that has ended meanwhile has no events.
    let _ = nix::sys::signal::kill(main, nix::sys::signal::Signal::SIGIO);
}

fn kick(pid: i32) {
    let pid = nix::unistd::Pid::from_raw(pid);
    // One that has ended meanwhile needs no kick.
    let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGALRM);
}

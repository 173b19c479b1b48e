//! The loop.

use super::agent::{Channel, Owner, Said, allowed};
use super::capture::{self, Capture, Event};
use super::clients::{Client, MOST, Role};
use super::console::Console;
use super::keeper::Keeper;
use super::queue::Got;
use super::{Error, system};
use crate::control::{Answer, Request, WaitFor};
use crate::snapshots::take::{Job, Learned};
use crate::vm::home::Vm;
use crate::vm::state::{Exit, Phase, State};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use umlctl_agent::exec::{Exec, What};
use umlctl_agent::wire::{Frame, Kind, VERSION};

/// How long a supervisor that was told to end gives its VM.
const GRACE: Duration = Duration::from_secs(10);
/// How long after its agent has spoken a machine is met (`uml::capture::meet`): its first moments are busy ones.
const ACQUAINTANCE: Duration = Duration::from_millis(500);
/// How long answers may take to be sent when all is over.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What a descriptor belongs to.
#[derive(Debug, Clone, Copy)]
enum Source {
    Signals,
    Listener,
    Console,
    Agent,
    Capture,
    Client(u32),
}

/// All there is of a running VM.
#[derive(Debug)]
pub struct Supervisor {
    vm: Vm,
    state: State,
    keeper: Keeper,
    console: Console,
    agent: Channel,
    listener: UnixListener,
    signals: SignalFd,
    clients: BTreeMap<u32, Client>,
    last: u32,
    kill_at: Option<Instant>,
    meet_at: Option<Instant>,
    started: Instant,
    capture: Option<Capture>,
    learned: Arc<Mutex<Learned>>,
}

/// What a supervisor is made of.
#[derive(Debug)]
pub struct Parts {
    /// The VM.
    pub vm: Vm,
    /// Its state, up to now.
    pub state: State,
    /// Its keeper, with a running main.
    pub keeper: Keeper,
    /// Our end of its console.
    pub console: Console,
    /// Our end of its agent channel.
    pub agent: Channel,
    /// The control socket.
    pub listener: UnixListener,
    /// See [`block_signals`].
    pub signals: SignalFd,
}

/// Blocks the signals that the loop reads instead.
///
/// # Errors
/// The kernel's.
pub fn block_signals() -> Result<SignalFd, Error> {
    let mut set = SigSet::empty();
    for s in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT] {
        set.add(s);
    }
    set.thread_block().map_err(system("block signals"))?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
        .map_err(system("make a signalfd"))
}

impl Supervisor {
    /// With a keeper that runs.
    pub fn new(parts: Parts) -> Self {
        let Parts {
            vm,
            mut state,
            keeper,
            console,
            agent,
            listener,
            signals,
        } = parts;
        state.phase = Phase::Booting;
        state.keeper = Some(keeper.pid.as_raw());
        state.main = Some(keeper.main_pid.as_raw());
        state.started_us = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .ok()
            .and_then(|d| u64::try_from(d.as_micros()).ok());
        Self {
            vm,
            state,
            keeper,
            console,
            agent,
            listener,
            signals,
            clients: BTreeMap::new(),
            last: 0,
            kill_at: None,
            meet_at: None,
            started: Instant::now(),
            capture: None,
            learned: Arc::default(),
        }
    }

    /// The VM was made of a snapshot: its agent is there, with streams that are nobody's, a clock that may be wrong, and
    /// random numbers that a twin has, too.
    pub fn resumed(&mut self) {
        self.state.phase = Phase::Running;
        self.agent.reset();
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        let mut time = now.as_secs().to_le_bytes().to_vec();
        time.extend(now.subsec_nanos().to_le_bytes());
        let stream = self.agent.begin(Owner::Own);
        self.agent.send(&Frame::new(Kind::TimeSet, stream, time));
        let mut seed = vec![0; 64];
        if std::fs::File::open("/dev/urandom")
            .and_then(|mut f| std::io::Read::read_exact(&mut f, &mut seed))
            .is_ok()
        {
            let stream = self.agent.begin(Owner::Own);
            self.agent.send(&Frame::new(Kind::Reseed, stream, seed));
        }
        self.flush();
    }

    /// Writes the state. A full disk must not end the VM.
    pub fn save(&self) {
        if let Err(e) = self.state.save(&self.vm.state_path()) {
            tracing::warn!("{:#}", anyhow::Error::from(e));
        }
    }

    /// Runs until the VM has ended.
    ///
    /// # Errors
    /// The loop itself fails. Then the VM ends with us.
    pub fn run(mut self) -> Result<Exit, Error> {
        let exit = loop {
            for (source, events) in self.wait()? {
                self.handle(source, events);
            }
            self.flush();
            if let Some(exit) = self.ended()? {
                break exit;
            }
            if self.kill_at.is_some_and(|t| t <= Instant::now()) {
                self.kill_at = None;
                self.kill();
            }
            if self.meet_at.is_some_and(|t| t <= Instant::now()) {
                self.meet_at = None;
                capture::meet(self.keeper.main_pid, Arc::clone(&self.learned));
            }
        };
        self.finish(exit);
        Ok(exit)
    }

    /// Waits until there is something to do.
    fn wait(&self) -> Result<Vec<(Source, PollFlags)>, Error> {
        let when = |wanted, flag| if wanted { flag } else { PollFlags::empty() };
        let (read, write) = (PollFlags::POLLIN, PollFlags::POLLOUT);
        let mut sources: Vec<(Source, BorrowedFd<'_>, PollFlags)> = vec![
            (Source::Signals, self.signals.as_fd(), read),
            (Source::Listener, self.listener.as_fd(), read),
        ];
        if let Some(fd) = self.console.fd() {
            let events = read | when(!self.console.input.is_empty(), write);
            sources.push((Source::Console, fd, events));
        }
        if let Some(fd) = self.agent.fd() {
            let events = read | when(self.agent.wants_to_write(), write);
            sources.push((Source::Agent, fd, events));
        }
        if let Some(capture) = &self.capture {
            sources.push((Source::Capture, capture.fd(), read));
        }
        for (number, client) in &self.clients {
            let wanted = match client.role {
                _ if client.closing => false,
                Role::Console => self.console.input.is_empty(),
                Role::Stream { .. } => !self.agent.full(),
                _ => true,
            };
            let events = when(wanted, read) | when(client.has_output(), write);
            sources.push((Source::Client(*number), client.fd(), events));
        }
        let mut fds: Vec<PollFd<'_>> = sources.iter().map(|s| PollFd::new(s.1, s.2)).collect();
        let next = self.kill_at.into_iter().chain(self.meet_at).min();
        let timeout = next.map_or(PollTimeout::NONE, |t| {
            // Rounded up: else the last millisecond would be spent turning round.
            let left = t.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        });
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(system("wait for events")(e)),
        }
        let got = fds
            .iter()
            .map(|f| f.revents().unwrap_or(PollFlags::empty()));
        let got = sources.iter().zip(got);
        Ok(got
            .filter(|(_, r)| !r.is_empty())
            .map(|(s, r)| (s.0, r))
            .collect())
    }

    fn handle(&mut self, source: Source, events: PollFlags) {
        let read = events.intersects(PollFlags::POLLIN | PollFlags::POLLHUP | PollFlags::POLLERR);
        match source {
            Source::Signals => self.signal(),
            Source::Listener => self.accept(),
            Source::Console if read => self.console_output(),
            Source::Agent if read => self.agent_output(),
            Source::Capture if read => self.captured(false),
            Source::Client(n) if read => self.client_input(n),
            _ => {}
        }
    }

    fn signal(&mut self) {
        while let Ok(Some(info)) = self.signals.read_signal() {
            let end = [Signal::SIGTERM as u32, Signal::SIGINT as u32];
            if end.contains(&info.ssi_signo) {
                self.stop(GRACE);
            }
        }
    }

    fn accept(&mut self) {
        let Some(mut client) = Client::accept(&self.listener) else {
            return;
        };
        if self.clients.len() >= MOST {
            client.refuse("too many connections to this VM");
            let _ = client.flush();
            return;
        }
        self.last = self.last.wrapping_add(1);
        self.clients.insert(self.last, client);
    }

    fn console_output(&mut self) {
        if let Some(bytes) = self.console.take() {
            for client in self.clients.values_mut() {
                if matches!(client.role, Role::Console) {
                    client.send(&bytes);
                }
            }
        }
    }

    fn agent_output(&mut self) {
        for said in self.agent.take() {
            match said {
                Said::Hello(version) => self.hello(version),
                Said::To(number, mut frame) => {
                    let Some(client) = self.clients.get_mut(&number) else {
                        continue;
                    };
                    let last = matches!(frame.kind, Kind::Exit | Kind::Reset);
                    frame.stream = 1;
                    let mut bytes = Vec::new();
                    frame.encode(&mut bytes);
                    client.send(&bytes);
                    client.closing |= last;
                }
            }
        }
    }

    fn hello(&mut self, version: u32) {
        if version != VERSION {
            tracing::warn!("the agent speaks version {version}, not {VERSION}");
            return;
        }
        let _ = std::fs::remove_file(self.vm.initrd());
        if self.state.phase == Phase::Booting {
            self.state.phase = Phase::Running;
            self.state.boot_us = u64::try_from(self.started.elapsed().as_micros()).ok();
            self.save();
        }
        self.meet_at = Some(Instant::now() + ACQUAINTANCE);
        self.tell(WaitFor::Agent);
    }

    /// Answers those who wait for something.
    fn tell(&mut self, what: WaitFor) {
        let state = self.state.clone();
        for client in self.clients.values_mut() {
            if matches!(client.role, Role::Waits(w) if w == what) {
                client.answer(&Answer::State {
                    state: state.clone(),
                });
                client.role = Role::New;
            }
        }
    }

    fn client_input(&mut self, number: u32) {
        let Some(client) = self.clients.get_mut(&number) else {
            return;
        };
        let bytes = match client.read() {
            Got::Nothing => return,
            Got::End => return self.leave(number),
            Got::Bytes(bytes) if client.closing => return drop(bytes),
            Got::Bytes(bytes) => bytes,
        };
        match &client.role {
            Role::New => match client.request(&bytes) {
                Ok(Some(request)) => self.request(number, request),
                Ok(None) => {}
                Err(e) => client.refuse(e.to_string()),
            },
            // Nothing is to come.
            Role::Waits(_) | Role::Captures => self.leave(number),
            Role::Console => self.console.input.push(&bytes),
            Role::Stream { .. } => self.stream_input(number, &bytes),
        }
    }

    fn stream_input(&mut self, number: u32, bytes: &[u8]) {
        let Some(client) = self.clients.get_mut(&number) else {
            return;
        };
        let Role::Stream { stream, decoder } = &mut client.role else {
            return;
        };
        decoder.push(bytes);
        while let Some(mut frame) = decoder.next_frame() {
            if allowed(frame.kind) && self.agent.has(*stream) {
                frame.stream = *stream;
                self.agent.send(&frame);
            }
        }
        // Not noise, as on a line: somebody who does not speak the language.
        if decoder.skipped > 0 {
            self.leave(number);
        }
    }

    /// Takes leave of a client.
    fn leave(&mut self, number: u32) {
        if let Some(client) = self.clients.remove(&number)
            && let Role::Stream { stream, .. } = client.role
        {
            self.agent.abandon(stream);
        }
    }

    fn request(&mut self, number: u32, request: Request) {
        let state = self.state.clone();
        let Some(client) = self.clients.get_mut(&number) else {
            return;
        };
        match request {
            Request::Info => client.answer(&Answer::State { state }),
            Request::Wait {
                until: WaitFor::Agent,
            } if state.phase == Phase::Running => client.answer(&Answer::State { state }),
            Request::Wait { until } => client.role = Role::Waits(until),
            Request::Console => {
                client.answer(&Answer::Go);
                client.role = Role::Console;
                let rest = client.rest();
                self.console.input.push(&rest);
            }
            Request::Agent if !matches!(state.phase, Phase::Running | Phase::Stopping) => {
                client.refuse(
                    "the agent in the guest has not answered yet: wait, or look at `umlctl logs`",
                );
            }
            Request::Agent => {
                client.answer(&Answer::Go);
                let rest = client.rest();
                client.role = Role::Stream {
                    stream: self.agent.begin(Owner::Client(number)),
                    decoder: umlctl_agent::wire::Decoder::default(),
                };
                self.stream_input(number, &rest);
            }
            Request::Stop { timeout_s } => {
                client.role = Role::Waits(WaitFor::End);
                self.stop(Duration::from_secs(timeout_s.into()));
            }
            Request::Kill => {
                client.role = Role::Waits(WaitFor::End);
                self.kill();
            }
            Request::Snapshot {
                name,
                kill,
                stop_and_copy,
                durable,
            } => {
                let job = Job {
                    vm: self.vm.clone(),
                    main: self.keeper.main_pid,
                    keeper: self.keeper.pid,
                    name,
                    kill,
                    stop_and_copy,
                    durable,
                };
                self.begin_capture(number, job);
            }
        }
    }

    fn begin_capture(&mut self, number: u32, job: Job) {
        let Some(client) = self.clients.get_mut(&number) else {
            return;
        };
        if self.capture.is_some() {
            return client
                .refuse("a snapshot of this VM is being taken already: wait for it to end");
        }
        match Capture::start(job, Arc::clone(&self.learned), number) {
            Ok(capture) => {
                client.role = Role::Captures;
                self.capture = Some(capture);
            }
            Err(e) => client.refuse(format!("{:#}", anyhow::Error::from(e))),
        }
    }

    /// Tells the client how its snapshot goes. Whether that is still there does not matter for the snapshot.
    fn captured(&mut self, block: bool) {
        let Some(capture) = &mut self.capture else {
            return;
        };
        let number = capture.client;
        while let Some(event) = capture.next(block) {
            let Some(client) = self.clients.get_mut(&number) else {
                continue;
            };
            match event {
                Event::Fixed(figures) => client.answer(&Answer::Snapshot {
                    figures,
                    saved: false,
                }),
                Event::Saved(figures) => {
                    client.answer(&Answer::Snapshot {
                        figures,
                        saved: true,
                    });
                    client.role = Role::New;
                }
                Event::Failed(why) => client.refuse(why),
            }
        }
        if capture.over() {
            self.capture = None;
        }
    }

    /// Asks the guest to power off, and sets a time for the end of patience.
    fn stop(&mut self, patience: Duration) {
        let end = Instant::now() + patience;
        self.kill_at = Some(self.kill_at.map_or(end, |t| t.min(end)));
        match self.state.phase {
            Phase::Running => {
                let stream = self.agent.begin(Owner::Own);
                if let Some(payload) = Exec::new(What::PowerOff, Vec::new()).encode() {
                    self.agent.send(&Frame::new(Kind::Exec, stream, payload));
                }
                self.state.phase = Phase::Stopping;
                self.save();
            }
            Phase::Stopping => {}
            // Nobody there who could be asked.
            _ => self.kill(),
        }
    }

    /// Kills the keeper, and so everything.
    fn kill(&self) {
        // Not reaped yet, so its number is still its own.
        let _ = kill(self.keeper.pid, Signal::SIGKILL);
    }

    fn flush(&mut self) {
        self.console.flush();
        self.agent.flush();
        let mut gone = Vec::new();
        for (number, client) in &mut self.clients {
            if client.flush().is_err() || (client.closing && !client.has_output()) {
                gone.push(*number);
            }
        }
        for number in gone {
            self.leave(number);
        }
    }

    /// Whether the VM has ended, and how.
    fn ended(&self) -> Result<Option<Exit>, Error> {
        match waitpid(self.keeper.pid, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(_, code)) => Ok(Some(Exit::Code(code))),
            Ok(WaitStatus::Signaled(_, signal, _)) => Ok(Some(Exit::Signal(signal as i32))),
            Ok(_) | Err(Errno::EINTR) => Ok(None),
            Err(e) => Err(system("wait for the keeper")(e)),
        }
    }

    /// Writes down how it ended, tells those who wait, and lets the others have what is theirs.
    fn finish(&mut self, exit: Exit) {
        // What a capture has read it still has to save.
        self.captured(true);
        while self.console.fd().is_some() {
            let before = self.console.fd().is_some();
            match self.console.take() {
                Some(bytes) => {
                    for client in self.clients.values_mut() {
                        if matches!(client.role, Role::Console) {
                            client.send(&bytes);
                        }
                    }
                }
                None if before => break,
                None => {}
            }
        }
        let _ = std::fs::remove_file(self.vm.initrd());
        self.state.phase = Phase::Ended;
        self.state.exit = Some(exit);
        let damage = self.vm.dir().join(crate::snapshots::memory::DAMAGE);
        self.state.reason = std::fs::read_to_string(damage).ok();
        self.state.supervisor = None;
        self.state.keeper = None;
        self.state.main = None;
        self.save();
        // Who connects now finds nobody, and looks at the state.
        let _ = std::fs::remove_file(self.vm.socket());
        self.tell(WaitFor::End);
        for client in self.clients.values_mut() {
            if matches!(client.role, Role::Waits(WaitFor::Agent)) {
                client.refuse("the VM has ended before its agent answered");
            }
            client.closing = true;
        }
        let end = Instant::now() + LAST_WORDS;
        self.flush();
        while !self.clients.is_empty() && Instant::now() < end {
            let mut fds: Vec<PollFd<'_>> = self
                .clients
                .values()
                .map(|c| PollFd::new(c.fd(), PollFlags::POLLOUT))
                .collect();
            let _ = poll(&mut fds, PollTimeout::from(100u8));
            self.flush();
        }
    }
}

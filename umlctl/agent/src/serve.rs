//! The daemon: frames in, frames out.

use crate::boot::Devices;
use crate::stream::Stream;
use crate::sys::{self, POLLIN, POLLOUT, PollFd, signals};
use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use umlctl_agent::wire::{Decoder, Frame, Kind, LINE_ACK, VERSION};

/// No more is taken from processes while so much waits for the line.
const ROOM: usize = 64 << 10;

struct Agent {
    line: File,
    random: OwnedFd,
    output: VecDeque<u8>,
    decoder: Decoder,
    /// Bytes that were read and not told yet.
    taken: usize,
    streams: BTreeMap<u32, Stream>,
    children: File,
}

/// Serves, for ever.
pub fn serve(devices: Devices) -> ! {
    sys::new_session();
    for signal in [signals::HUP, signals::TERM, signals::PIPE] {
        // That init tells everybody to end is no reason for us to do so.
        sys::ignore(signal, true);
    }
    // The console is not ours.
    let null = devices.null.as_raw_fd();
    let line = File::from(devices.line);
    sys::stdio(null);
    let Ok(children) = sys::children() else {
        sys::exit_now(1);
    };
    let mut agent = Agent {
        line,
        random: devices.random,
        output: VecDeque::new(),
        decoder: Decoder::default(),
        taken: 0,
        streams: BTreeMap::new(),
        children: File::from(children),
    };
    agent.hello();
    loop {
        agent.turn();
    }
}

fn encode(output: &mut VecDeque<u8>, frame: &Frame) {
    let mut bytes = Vec::new();
    frame.encode(&mut bytes);
    output.extend(bytes);
}

impl Agent {
    fn send(&mut self, frame: &Frame) {
        encode(&mut self.output, frame);
    }

    fn hello(&mut self) {
        self.send(&Frame::new(Kind::Hello, 0, VERSION.to_le_bytes()));
    }

    fn room(&self) -> bool {
        self.output.len() < ROOM
    }

    /// Waits for something, and does it.
    fn turn(&mut self) {
        self.flush();
        let mut events = POLLIN;
        if !self.output.is_empty() {
            events |= POLLOUT;
        }
        let mut fds = vec![
            PollFd {
                fd: self.line.as_raw_fd(),
                events,
                revents: 0,
            },
            PollFd {
                fd: self.children.as_raw_fd(),
                events: POLLIN,
                revents: 0,
            },
        ];
        let room = self.room();
        for stream in self.streams.values() {
            stream.poll(room, &mut fds);
        }
        sys::wait(&mut fds);
        if fds[0].revents & POLLIN != 0 {
            self.read();
        }
        if fds[1].revents & POLLIN != 0 {
            let _ = self.children.read(&mut [0; 1024]);
            while let Some((pid, by_signal, value)) = sys::reap() {
                for s in self.streams.values_mut().filter(|s| s.pid == pid) {
                    s.has_ended(by_signal, value);
                }
            }
        }
        let room = self.room();
        let Self {
            streams, output, ..
        } = self;
        streams.retain(|_, s| !s.work(room, &mut |f| encode(output, &f)));
    }

    fn read(&mut self) {
        let mut bytes = [0; 16384];
        match self.line.read(&mut bytes) {
            Ok(n) => {
                self.taken += n;
                if self.decoder.push_or_reset(&bytes[..n]) {
                    self.reset();
                }
            }
            Err(_) => return,
        }
        if self.taken >= LINE_ACK {
            let taken = u32::try_from(self.taken).unwrap_or(u32::MAX);
            self.send(&Frame::new(Kind::Taken, 0, taken.to_le_bytes()));
            self.taken = 0;
        }
        while let Some(frame) = self.decoder.next_frame() {
            self.frame(&frame);
        }
    }

    /// Another host, or another life of this one.
    fn reset(&mut self) {
        for (_, s) in std::mem::take(&mut self.streams) {
            s.hang_up();
        }
        self.output.clear();
        // Both ends begin to count anew.
        self.taken = 0;
        self.hello();
    }

    fn frame(&mut self, frame: &Frame) {
        let id = frame.stream;
        match frame.kind {
            Kind::Ping => self.send(&Frame::new(Kind::Pong, id, frame.payload.clone())),
            Kind::TimeSet => {
                let result = match frame.payload.split_at_checked(8) {
                    Some((s, n)) => match (s.try_into(), n.try_into()) {
                        (Ok(s), Ok(n)) => {
                            sys::set_clock(i64::from_le_bytes(s), u32::from_le_bytes(n))
                        }
                        _ => Err(io::Error::from_raw_os_error(22)),
                    },
                    None => Err(io::Error::from_raw_os_error(22)),
                };
                self.done(id, result);
            }
            Kind::Reseed => {
                let result = sys::reseed(&self.random, &frame.payload);
                self.done(id, result);
            }
            Kind::Reset => {
                if let Some(s) = self.streams.remove(&id) {
                    s.hang_up();
                }
            }
            Kind::Exec if !self.streams.contains_key(&id) => {
                let output = &mut self.output;
                if let Some(s) = Stream::begin(id, &frame.payload, &mut |f| encode(output, &f)) {
                    self.streams.insert(id, s);
                }
            }
            _ => {
                if self.streams.get_mut(&id).is_some_and(|s| !s.frame(frame)) {
                    if let Some(s) = self.streams.remove(&id) {
                        s.hang_up();
                    }
                    self.send(&Frame::new(
                        Kind::Reset,
                        id,
                        "more was sent than was allowed",
                    ));
                }
            }
        }
    }

    fn done(&mut self, id: u32, result: io::Result<()>) {
        let errno = result.err().map_or(0, |e| e.raw_os_error().unwrap_or(22));
        self.send(&Frame::new(Kind::Done, id, errno.to_le_bytes()));
    }

    fn flush(&mut self) {
        while !self.output.is_empty() {
            match self.line.write(self.output.as_slices().0) {
                Ok(0) => return,
                Ok(n) => drop(self.output.drain(..n)),
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                // Full. Anything else does not go away by trying at once.
                Err(_) => return,
            }
        }
    }
}

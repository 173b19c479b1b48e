//! A stream: one started process, what goes into it and what comes out.

use crate::child::{Child, start};
use crate::sys::{self, POLLIN, POLLOUT, PollFd, signals};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use umlctl_agent::exec::Exec;
use umlctl_agent::wire::{Frame, Kind, MAX_DATA, WINDOW, channel};

/// Something the process writes to.
struct Output {
    file: Option<File>,
    /// How many bytes the host will take.
    credit: usize,
}

/// The stream.
pub struct Stream {
    id: u32,
    /// The process, and its group.
    pub pid: i32,
    input: Option<File>,
    waiting: VecDeque<u8>,
    input_ends: bool,
    /// Bytes that were taken and not told yet.
    taken: usize,
    outputs: [Output; 2],
    terminal: Option<OwnedFd>,
    ended: Option<(bool, i32)>,
}

fn output(file: Option<OwnedFd>) -> Output {
    Output {
        file: file.map(File::from),
        credit: WINDOW,
    }
}

impl Stream {
    /// Begins one. If it cannot be, the frames say so.
    pub fn begin(id: u32, payload: &[u8], send: &mut dyn FnMut(Frame)) -> Option<Self> {
        let Some(exec) = Exec::decode(payload) else {
            send(Frame::new(
                Kind::Reset,
                id,
                "the request cannot be understood",
            ));
            return None;
        };
        match start(&exec) {
            Ok(Child {
                pid,
                input,
                output: out,
                error,
                terminal,
            }) => Some(Self {
                id,
                pid,
                terminal: terminal.then(|| out.try_clone().ok()).flatten(),
                input: Some(File::from(input)),
                waiting: VecDeque::new(),
                input_ends: false,
                taken: 0,
                outputs: [output(Some(out)), output(error)],
                ended: None,
            }),
            Err((code, message)) => {
                send(Frame::new(Kind::Stderr, id, format!("{message}\n")));
                send(Frame::exit(id, false, code));
                None
            }
        }
    }

    /// A frame for it. False if the host does not keep to the rules.
    pub fn frame(&mut self, frame: &Frame) -> bool {
        match frame.kind {
            Kind::Stdin => {
                self.waiting.extend(&frame.payload);
                return self.waiting.len() <= WINDOW;
            }
            Kind::Eof => self.input_ends = true,
            Kind::Credit => {
                if let Some((ch @ (channel::STDOUT | channel::STDERR), n)) = frame.as_credit() {
                    let out = &mut self.outputs[usize::from(ch - channel::STDOUT)];
                    out.credit = out.credit.saturating_add(n);
                }
            }
            Kind::Signal => {
                if let Some(signal @ 1..=64) = frame.as_i32() {
                    sys::send_signal(-self.pid, signal);
                }
            }
            Kind::WinSize => {
                if let (Some(t), [a, b, c, d]) = (
                    &self.terminal,
                    frame.payload[..].try_into().unwrap_or([0; 4]),
                ) {
                    sys::set_size(t, u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
                }
            }
            _ => {}
        }
        true
    }

    /// The process has ended.
    pub fn has_ended(&mut self, by_signal: bool, value: i32) {
        self.ended = Some((by_signal, value));
        self.input = None;
    }

    /// What to wait for. With `room` there is room for what comes out.
    pub fn poll(&self, room: bool, fds: &mut Vec<PollFd>) {
        if let Some(input) = &self.input
            && (!self.waiting.is_empty() || self.input_ends)
        {
            fds.push(PollFd {
                fd: input.as_raw_fd(),
                events: POLLOUT,
                revents: 0,
            });
        }
        for out in self.outputs.iter().filter(|o| room && o.credit > 0) {
            if let Some(file) = &out.file {
                fds.push(PollFd {
                    fd: file.as_raw_fd(),
                    events: POLLIN,
                    revents: 0,
                });
            }
        }
    }

    /// Moves what can be moved. True when all is over.
    pub fn work(&mut self, room: bool, send: &mut dyn FnMut(Frame)) -> bool {
        self.feed(send);
        if room {
            for (out, kind) in self.outputs.iter_mut().zip([Kind::Stdout, Kind::Stderr]) {
                drain(self.id, kind, out, self.ended.is_some(), send);
            }
        }
        let Some((by_signal, value)) = self.ended else {
            return false;
        };
        let done = self.outputs.iter().all(|o| o.file.is_none());
        if done {
            send(Frame::exit(self.id, by_signal, value));
        }
        done
    }

    /// Into the process.
    fn feed(&mut self, send: &mut dyn FnMut(Frame)) {
        while let Some(input) = &mut self.input {
            if self.waiting.is_empty() {
                if self.input_ends {
                    if self.terminal.is_some() {
                        // What a person would type.
                        let _ = input.write(&[4]);
                    }
                    self.input = None;
                }
                break;
            }
            match input.write(self.waiting.as_slices().0) {
                Ok(n) => {
                    self.waiting.drain(..n);
                    self.taken += n;
                }
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                // Nobody reads it any more.
                Err(_) => self.input = None,
            }
        }
        if self.input.is_none() {
            self.taken += self.waiting.len();
            self.waiting.clear();
        }
        if self.taken > 0 && (self.waiting.is_empty() || self.taken >= WINDOW / 4) {
            send(Frame::credit(self.id, channel::STDIN, self.taken));
            self.taken = 0;
        }
    }

    /// Nobody is interested any more.
    pub fn hang_up(self) {
        if self.ended.is_none() {
            sys::send_signal(-self.pid, signals::HUP);
        }
    }
}

/// Out of the process: one piece, so that others get their turn.
fn drain(id: u32, kind: Kind, out: &mut Output, ended: bool, send: &mut dyn FnMut(Frame)) {
    let Some(file) = &mut out.file else {
        return;
    };
    if out.credit == 0 {
        return;
    }
    let mut piece = vec![0; MAX_DATA.min(out.credit)];
    match file.read(&mut piece) {
        Ok(n) if n > 0 => {
            piece.truncate(n);
            out.credit -= n;
            send(Frame::new(kind, id, piece));
        }
        Err(e) if e.kind() == ErrorKind::Interrupted => {}
        // What the process itself has written is all there when it has ended. Others may hold the other end open for ever.
        Err(e) if e.kind() == ErrorKind::WouldBlock && !ended => {}
        _ => {
            out.file = None;
            let ch = if kind == Kind::Stdout {
                channel::STDOUT
            } else {
                channel::STDERR
            };
            send(Frame::new(Kind::Eof, id, vec![ch]));
        }
    }
}

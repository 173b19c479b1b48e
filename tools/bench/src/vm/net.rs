//! Talking with guests: echoes, and questions.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;

use super::guest::{ASK, ECHO};
use crate::run::check_interrupted;

/// A guest that says nothing for so long is lost.
const LIMIT: Duration = Duration::from_secs(60);
/// A connection that does not come about in this time is tried anew: the kernel repeats a lost packet only after a second.
const ATTEMPT: Duration = Duration::from_millis(200);
/// Between an echo and the next request, so that the client is no load of its own.
const REST: Duration = Duration::from_micros(200);

/// A text of umlctl's answer.
pub fn text(answer: &Value, field: &str) -> Result<String> {
    let text = answer[field].as_str();
    text.map(str::to_owned)
        .with_context(|| format!("umlctl's answer has no {field}: {answer}"))
}

/// A connection, as soon as there is one.
fn connect(address: &str, port: u16) -> Result<TcpStream> {
    let ip: IpAddr = address
        .parse()
        .with_context(|| format!("the address {address}"))?;
    let end = Instant::now() + LIMIT;
    loop {
        check_interrupted()?;
        match TcpStream::connect_timeout(&SocketAddr::new(ip, port), ATTEMPT) {
            Ok(s) => {
                s.set_nodelay(true)
                    .and_then(|()| s.set_read_timeout(Some(LIMIT)))?;
                return Ok(s);
            }
            Err(e) if Instant::now() > end => {
                return Err(e).with_context(|| format!("connecting to {address}:{port}"));
            }
            // Refused at once as long as nobody listens.
            Err(_) => std::thread::sleep(Duration::from_millis(1)),
        }
    }
}

fn echo(s: &mut TcpStream) -> std::io::Result<Instant> {
    s.write_all(b"x")?;
    s.read_exact(&mut [0])?;
    Ok(Instant::now())
}

/// When the first echo came over a new connection.
pub fn first_reply(address: &str, port: u16) -> Result<Instant> {
    let mut s = connect(address, port)?;
    echo(&mut s).context("waiting for the first echo")
}

/// Somebody who asks a guest's program.
#[derive(Debug)]
pub struct Asker(BufReader<TcpStream>);

impl Asker {
    /// Connects.
    pub fn new(address: &str) -> Result<Self> {
        Ok(Self(BufReader::new(connect(address, ASK)?)))
    }

    fn ask(&mut self, what: u8) -> Result<String> {
        let mut line = String::new();
        self.0
            .get_mut()
            .write_all(&[what])
            .and_then(|()| self.0.read_line(&mut line))
            .context("asking the guest's program")?;
        Ok(line.trim_end().to_owned())
    }

    /// Its longest gap since it was asked last, seconds.
    pub fn gap(&mut self) -> Result<f64> {
        let line = self.ask(b'g')?;
        let ns: f64 = line
            .parse()
            .with_context(|| format!("the guest's answer: {line}"))?;
        Ok(ns / 1e9)
    }

    /// Fails if its file is not what it was.
    pub fn check(&mut self) -> Result<()> {
        match self.ask(b's')?.as_str() {
            "ok" => Ok(()),
            wrong => bail!("the guest has WRONG MEMORY: {wrong}"),
        }
    }
}

/// What the client has seen.
#[derive(Debug)]
struct Seen {
    last: Instant,
    longest: Duration,
    failed: Option<std::io::Error>,
}

/// A client that has something echoed all the time, over one connection.
#[derive(Debug)]
pub struct Client {
    seen: Arc<Mutex<Seen>>,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Client {
    /// Begins.
    pub fn new(address: &str) -> Result<Self> {
        let mut s = connect(address, ECHO)?;
        let last = echo(&mut s).context("waiting for an echo")?;
        let seen = Arc::new(Mutex::new(Seen {
            last,
            longest: Duration::ZERO,
            failed: None,
        }));
        let end = Arc::new(AtomicBool::new(false));
        let (shared, ended) = (seen.clone(), end.clone());
        let thread = std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                let reply = echo(&mut s);
                let Ok(mut seen) = shared.lock() else { return };
                match reply {
                    Ok(now) => {
                        seen.longest = seen.longest.max(now.duration_since(seen.last));
                        seen.last = now;
                    }
                    Err(e) => {
                        seen.failed = Some(e);
                        return;
                    }
                }
                drop(seen);
                std::thread::sleep(REST);
            }
        });
        Ok(Self {
            seen,
            end,
            thread: Some(thread),
        })
    }

    /// The longest time between two replies since this was asked last, seconds. One that has not ended is waited for.
    pub fn gap(&self) -> Result<f64> {
        let asked = Instant::now();
        while asked.elapsed() < LIMIT {
            check_interrupted()?;
            let mut seen = self.seen.lock().map_err(|_| anyhow!("the client died"))?;
            if let Some(e) = seen.failed.take() {
                return Err(e).context("the echo client");
            }
            if seen.last > asked {
                return Ok(std::mem::take(&mut seen.longest).as_secs_f64());
            }
            drop(seen);
            std::thread::sleep(Duration::from_millis(1));
        }
        bail!("no echo for {} s", LIMIT.as_secs())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        if let Some(t) = self.thread.take() {
            // If it waits for an echo that never comes, it does so until its limit.
            let _ = t.join();
        }
    }
}

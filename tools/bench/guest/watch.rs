//! Runs in the guest of `bench vm`: looks at the clock without pause, and says the longest time between two looks; or
//! fills a file, and says whether it is still what it was. The bench compiles it, as the guest has no compiler.
//!
//!     watch serve ECHO PORT [FILE]    at ECHO, gives back every byte; at PORT, for each byte of the client one line:
//!                                     g  the longest gap since it was last asked, nanoseconds
//!                                     s  whether FILE is as `fill` made it: "ok", or what is not
//!     watch look ECHO PORT            the same, with a thread that looks at the clock
//!     watch fill FILE MB              writes that many megabytes (2^20) without a zero page

use std::fs::File;
use std::io::{BufReader, BufWriter, Read, Result, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Clients that are echoed at a time.
const ECHOES: usize = 4;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args[..] {
        ["fill", file, mb] => fill(file, number(mb)),
        ["serve", echo, port] => serve(number(echo), number(port), None, false),
        ["serve", echo, port, file] => serve(number(echo), number(port), Some(file), false),
        ["look", echo, port] => serve(number(echo), number(port), None, true),
        _ => panic!("arguments: {args:?}"),
    }
}

fn number(text: &str) -> u64 {
    text.parse().expect("a number")
}

/// The words of the file: different ones, none of them zero.
fn words() -> impl Iterator<Item = u64> {
    let mut x = 0x9e37_79b9_7f4a_7c15_u64;
    std::iter::repeat_with(move || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        x
    })
}

fn fill(file: &str, mb: u64) -> Result<()> {
    let mut out = BufWriter::with_capacity(1 << 16, File::create(file)?);
    for word in words().take((mb << 17) as usize) {
        out.write_all(&word.to_le_bytes())?;
    }
    out.flush()
}

/// Compares the file with what it should be.
fn check(file: &str) -> Result<String> {
    let mut input = BufReader::with_capacity(1 << 16, File::open(file)?);
    let mut word = [0; 8];
    let bytes = input.get_ref().metadata()?.len();
    for (i, right) in words().take((bytes / 8) as usize).enumerate() {
        input.read_exact(&mut word)?;
        if word != right.to_le_bytes() {
            return Ok(format!("wrong at byte {}", i * 8));
        }
    }
    Ok("ok".into())
}

fn serve(echo: u64, port: u64, file: Option<&str>, look: bool) -> Result<()> {
    let listener = Arc::new(TcpListener::bind(("0.0.0.0", echo as u16))?);
    // Made before anybody comes, as a new thread takes its time in such a guest.
    for _ in 0..ECHOES {
        let listener = listener.clone();
        std::thread::spawn(move || {
            for client in listener.incoming() {
                // A client that goes away is no reason to end.
                let _ = client.and_then(give_back);
            }
        });
    }
    let longest = Arc::new(AtomicU64::new(0));
    if look {
        let longest = longest.clone();
        std::thread::spawn(move || {
            let mut last = Instant::now();
            loop {
                let now = Instant::now();
                let gap = now.duration_since(last).as_nanos() as u64;
                longest.fetch_max(gap, Ordering::Relaxed);
                last = now;
            }
        });
    }
    for client in TcpListener::bind(("0.0.0.0", port as u16))?.incoming() {
        let _ = client.and_then(|c| answer(c, &longest, file));
    }
    Ok(())
}

fn give_back(mut client: TcpStream) -> Result<()> {
    client.set_nodelay(true)?;
    let mut piece = [0; 4096];
    loop {
        match client.read(&mut piece)? {
            0 => return Ok(()),
            n => client.write_all(&piece[..n])?,
        }
    }
}

fn answer(mut client: TcpStream, longest: &AtomicU64, file: Option<&str>) -> Result<()> {
    client.set_nodelay(true)?;
    let mut asked = [0];
    while client.read(&mut asked)? == 1 {
        let line = match (asked[0], file) {
            (b'g', _) => longest.swap(0, Ordering::Relaxed).to_string(),
            (b's', Some(file)) => check(file)?,
            _ => "what?".into(),
        };
        client.write_all(format!("{line}\n").as_bytes())?;
    }
    Ok(())
}

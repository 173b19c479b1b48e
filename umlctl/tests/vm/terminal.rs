//! Programs in the guest on a terminal.

use crate::common::{Home, LONG, end_of, until};
use nix::pty::{Winsize, openpty};
use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};

/// A command on a terminal, and what it has shown.
struct OnTerminal {
    child: Child,
    master: File,
    shown: Arc<Mutex<String>>,
}

impl OnTerminal {
    fn start(home: &Home, args: &[&str]) -> Self {
        let size = Winsize {
            ws_row: 33,
            ws_col: 77,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        let pty = openpty(Some(&size), None).unwrap();
        let slave = || Stdio::from(pty.slave.try_clone().unwrap());
        let mut command = home.command(args);
        command.stdin(slave()).stdout(slave()).stderr(slave());
        let child = command.spawn().unwrap();
        let master = File::from(pty.master);
        let shown = Arc::new(Mutex::new(String::new()));
        let (mut reader, to) = (master.try_clone().unwrap(), Arc::clone(&shown));
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(n @ 1..) = reader.read(&mut bytes) {
                to.lock()
                    .unwrap()
                    .push_str(&String::from_utf8_lossy(&bytes[..n]));
            }
        });
        Self {
            child,
            master,
            shown,
        }
    }

    fn sees(&self, text: &str) {
        let begin = std::time::Instant::now();
        while !self.shown.lock().unwrap().contains(text) {
            assert!(
                begin.elapsed() < LONG,
                "{text:?} is not in {:?}",
                self.shown.lock().unwrap()
            );
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }

    fn types(&mut self, text: &str) {
        self.master.write_all(text.as_bytes()).unwrap();
    }
}

#[test]
fn terminals() {
    let home = Home::new();
    home.boot("v");
    let mut t = OnTerminal::start(&home, &["exec", "-t", "v", "sh"]);
    t.types("tty; stty size; echo term=$TERM.\n");
    t.sees("/dev/pts/");
    t.sees("33 77");
    // ^C interrupts the program in the guest, and neither umlctl nor the shell.
    t.types("sleep 1000\n");
    until("the start of sleep", || {
        !home.sh("v", "pidof sleep || true").is_empty()
    });
    t.types("\x03");
    t.types("echo after=$?\n");
    t.sees("after=130");
    t.types("exit 5\n");
    assert_eq!(end_of(&mut t.child).code(), Some(5));

    let text = home.fails(&["exec", "-t", "v", "sh"], 1);
    assert!(text.contains("terminal"), "{text}");

    // The console, left and come back to.
    for round in 0..2 {
        let mut t = OnTerminal::start(&home, &["console", "v"]);
        t.sees("Ctrl-]");
        t.types(&format!("echo $((6*7))-{round}\n"));
        t.sees(&format!("42-{round}"));
        t.types("\x1d");
        assert!(end_of(&mut t.child).success());
    }
    home.ok(&["rm", "-f", "v"]);
}

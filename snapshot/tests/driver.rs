//! Driving a process that knows nothing of it: it goes on as before.

use snapshot::proc;
use snapshot::target::journal::Journal;
use snapshot::target::{Batch, Driver, Stopped, guardian};
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};

/// Echoes lines with a counter; threads of it sleep and sum.
const PROGRAM: &str = r#"
import sys, threading, time
def work():
    while True:
        sum(range(1000)); time.sleep(0.0005)
for _ in range(int(sys.argv[1])):
    threading.Thread(target=work, daemon=True).start()
for n, line in enumerate(sys.stdin):
    print(n, line.strip(), flush=True)
"#;

struct Echo {
    child: Child,
    lines: BufReader<std::process::ChildStdout>,
    n: usize,
}

impl Echo {
    fn new(threads: usize) -> Self {
        let mut child = Command::new("python3")
            .args(["-c", PROGRAM, &threads.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        let mut echo = Self { child, lines, n: 0 };
        echo.check();
        echo
    }

    fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    fn check(&mut self) {
        writeln!(self.child.stdin.as_mut().unwrap(), "hello").unwrap();
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        assert_eq!(line, format!("{} hello\n", self.n));
        self.n += 1;
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn maps_without_vdso_copy(pid: i32) -> Vec<proc::Map> {
    proc::maps(pid).unwrap()
}

#[test]
fn calls_are_made_and_leave_no_trace() {
    let dir = tempfile::tempdir().unwrap();
    let mut echo = Echo::new(3);
    let pid = echo.pid();
    let before = maps_without_vdso_copy(pid);
    let mut journal =
        Journal::create(dir.path(), pid, proc::stat(pid).unwrap().start_time).unwrap();
    for round in 0..20 {
        let stopped = Stopped::all(pid).unwrap();
        assert_eq!(stopped.threads().len(), 4);
        assert_eq!(stopped.threads()[0], pid);
        let tids = stopped.threads().to_vec();
        let mut driver = Driver::enter(&stopped, &tids, &mut journal, None).unwrap();
        driver.settle(16384).unwrap();
        let mut batches: Vec<Batch> = tids
            .iter()
            .map(|_| {
                let mut b = Batch::new();
                b.call(libc::SYS_gettid, &[]);
                let d = b.room(24);
                b.call(libc::SYS_sigaltstack, &[0u64.into(), d]);
                b.call(libc::SYS_close, &[(-1i32).into()]);
                b
            })
            .collect();
        driver.run_all(&mut batches).unwrap();
        for (b, tid) in batches.iter().zip(&tids) {
            assert_eq!(b.result(0).unwrap(), i64::from(*tid));
            assert_eq!(b.result(1).unwrap(), 0);
            assert_eq!(b.result(2), Err(nix::errno::Errno::EBADF));
        }
        driver.unsettle().unwrap();
        stopped.release();
        if round % 5 == 0 {
            echo.check();
        }
    }
    echo.check();
    assert!(!journal.record.active);
    assert_eq!(maps_without_vdso_copy(pid), before);
}

#[test]
fn a_saver_that_dies_at_any_point_is_repaired() {
    // The saver is this same test binary, with the point to die at in its environment.
    if let Ok(pid) = std::env::var("DRIVER_TEST_PID") {
        let pid: i32 = pid.parse().unwrap();
        let dir = std::env::var("DRIVER_TEST_DIR").unwrap();
        let mut journal =
            Journal::create(dir.as_ref(), pid, proc::stat(pid).unwrap().start_time).unwrap();
        let stopped = Stopped::all(pid).unwrap();
        let mut driver = Driver::enter(&stopped, stopped.threads(), &mut journal, None).unwrap();
        driver.settle(16384).unwrap();
        let mut b = Batch::new();
        b.call(libc::SYS_getpid, &[]);
        driver.run(&mut b).unwrap();
        driver.unsettle().unwrap();
        stopped.release();
        panic!("the point was never passed");
    }
    let points = [
        "driver.enter",
        "driver.loop",
        "driver.scratch",
        "driver.table",
        "driver.running",
        "driver.done",
        "driver.unmapped",
        "driver.back",
    ];
    let mut echo = Echo::new(2);
    let pid = echo.pid();
    let before = maps_without_vdso_copy(pid);
    for point in points.repeat(3) {
        let dir = tempfile::tempdir().unwrap();
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "a_saver_that_dies_at_any_point_is_repaired"])
            .env("DRIVER_TEST_PID", pid.to_string())
            .env("DRIVER_TEST_DIR", dir.path())
            .env("SNAPSHOT_FAULT", point)
            .stdout(Stdio::null())
            .status()
            .unwrap();
        assert!(
            std::os::unix::process::ExitStatusExt::signal(&status).is_some(),
            "{point}: {status}"
        );
        let outcome = guardian::repair(&dir.path().join(pid.to_string()), &|_| {}).unwrap();
        assert_eq!(outcome, guardian::Outcome::Repaired, "{point}");
        echo.check();
        assert_eq!(maps_without_vdso_copy(pid), before, "{point}");
        assert_eq!(
            guardian::repair(&dir.path().join(pid.to_string()), &|_| {}).unwrap(),
            guardian::Outcome::Nothing
        );
        echo.check();
    }
}

//! PostgreSQL: a tree of processes with shared memory and semaphores, and a client in a transaction.

use super::common::{Program, good, port, until};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

/// The newest one's programs.
fn bin() -> PathBuf {
    let mut all: Vec<_> = fs::read_dir("/usr/lib/postgresql")
        .expect("PostgreSQL is not installed: tools/setup test")
        .map(|e| e.unwrap().path().join("bin"))
        .collect();
    all.sort();
    all.pop().expect("PostgreSQL is not installed")
}

/// It refuses to be root.
fn as_postgres(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command
        .args(["--reuid=postgres", "--regid=postgres", "--init-groups"])
        .arg(program)
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("LC_ALL", "C.UTF-8");
    command
}

/// psql on a connection that stays open.
struct Session {
    child: Child,
    out: BufReader<ChildStdout>,
}

impl Session {
    fn begin(bin: &Path, port: u16) -> Self {
        let mut command = Command::new(bin.join("psql"));
        command
            .args(["-h", "127.0.0.1", "-p", &port.to_string(), "-U", "postgres"])
            .args(["-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "postgres"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        Self { child, out }
    }

    /// The one line that a query is answered.
    fn ask(&mut self, sql: &str) -> String {
        let stdin = self.child.stdin.as_mut().unwrap();
        writeln!(stdin, "{sql}").unwrap();
        let mut line = String::new();
        self.out.read_line(&mut line).unwrap();
        assert!(line.ends_with('\n'), "psql has ended: {sql}");
        line.trim_end().into()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn postgresql_goes_on_in_the_middle_of_a_transaction() {
    let (bin, port) = (bin(), port());
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    let user = nix::unistd::User::from_name("postgres").unwrap().unwrap();
    fs::create_dir(&data).unwrap();
    for path in [dir.path(), &data] {
        chown(path, Some(user.uid.as_raw()), Some(user.gid.as_raw())).unwrap();
    }
    fs::set_permissions(&data, fs::Permissions::from_mode(0o700)).unwrap();
    let mut init = as_postgres(&bin.join("initdb"));
    init.args(["-A", "trust", "-N", "-D"]).arg(&data);
    good(init);
    let mut command = as_postgres(&bin.join("postgres"));
    command.arg("-D").arg(&data).args(["-p", &port.to_string()]);
    for setting in [
        "listen_addresses=127.0.0.1",
        "unix_socket_directories=",
        "fsync=off",
        "shared_buffers=16MB",
    ] {
        command.args(["-c", setting]);
    }
    let mut server = Program::start(command, dir.path());
    until("PostgreSQL is ready", || {
        let mut ready = Command::new(bin.join("pg_isready"));
        ready.args(["-q", "-h", "127.0.0.1", "-p", &port.to_string()]);
        ready.status().unwrap().success()
    });

    let mut one = Session::begin(&bin, port);
    let made = "CREATE TABLE t AS SELECT i, md5(i::text) AS sum FROM generate_series(1, 20000) i; SELECT count(*) FROM t;";
    assert_eq!(one.ask(made), "20000");
    let backend = one.ask("SELECT pg_backend_pid();");
    let open = "BEGIN; INSERT INTO t SELECT i, md5(i::text) FROM generate_series(20001, 25000) i; SELECT count(*) FROM t;";
    assert_eq!(one.ask(open), "25000");
    let mut other = Session::begin(&bin, port);
    assert_eq!(other.ask("SELECT count(*) FROM t;"), "20000");

    for round in 0..3 {
        let from = server.end(dir.path());
        server.resume(&from);
        assert_eq!(
            other.ask("SELECT count(*) FROM t;"),
            "20000",
            "{round}: it is not committed"
        );
    }
    assert_eq!(one.ask("SELECT pg_backend_pid();"), backend);
    assert_eq!(one.ask("SELECT count(*) FROM t;"), "25000");
    assert_eq!(
        one.ask("COMMIT; SELECT count(*) FROM t WHERE sum = md5(i::text);"),
        "25000"
    );
    assert_eq!(other.ask("SELECT count(*) FROM t;"), "25000");
    // New ones are made by the postmaster, and what all of them share is right.
    let mut third = Session::begin(&bin, port);
    assert_eq!(
        third.ask("UPDATE t SET i = i + 1; VACUUM t; SELECT sum(i) FROM t;"),
        "312537500"
    );
    assert_eq!(
        third.ask("CHECKPOINT; SELECT count(DISTINCT sum) FROM t;"),
        "25000"
    );
}

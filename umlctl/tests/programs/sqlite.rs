//! sqlite3 in a transaction.

use super::common::{Program, umlctl, until};
use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

#[test]
fn sqlite_goes_on_in_the_middle_of_a_transaction() {
    let dir = tempfile::tempdir().unwrap();
    let said = dir.path().join("said");
    // Its input is a pipe, whose other end a resume gives anew.
    let (input, mut to) = std::io::pipe().unwrap();
    let mut command = Command::new("sqlite3");
    command.arg("data.db");
    let mut sqlite = Program::start_with_input(command, dir.path(), input);
    to.write_all(
        b"CREATE TABLE t (i INTEGER PRIMARY KEY, s TEXT);
BEGIN;
WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000) INSERT INTO t SELECT i, hex(i) FROM n;
SELECT 'inserted ' || count(*) FROM t;
",
    )
    .unwrap();
    until("the rows", || {
        fs::read_to_string(&said)
            .unwrap()
            .contains("inserted 20000")
    });
    let from = sqlite.end(dir.path());
    drop(to);
    // Nobody but it may go on with the journal.
    assert!(dir.path().join("data.db-journal").exists());

    // Its output is a file, and goes on there.
    let mut resumed = umlctl()
        .arg("resume")
        .arg(&from)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut to = resumed.stdin.take().unwrap();
    to.write_all(b"INSERT INTO t VALUES (20001, 'last');\nCOMMIT;\nSELECT count(*) || ' ' || sum(i) FROM t;\n.quit\n")
        .unwrap();
    drop(to);
    assert!(resumed.wait().unwrap().success());
    let text = fs::read_to_string(&said).unwrap();
    assert_eq!(text, "inserted 20000\n20001 200030001\n");
    let check = Command::new("sqlite3")
        .arg(dir.path().join("data.db"))
        .arg("PRAGMA integrity_check; SELECT count(*) FROM t;")
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&check.stdout), "ok\n20001\n");
}

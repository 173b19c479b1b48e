//! nginx with open keep-alive connections: a master and its workers.

use super::common::{Lines, Program, port, until};
use std::fs;
use std::process::Command;

/// One request on a connection that stays open: status line, and the page.
fn get(connection: &mut Lines, path: &str) -> (String, Vec<u8>) {
    connection.send(&format!("GET {path} HTTP/1.1\r\nHost: here\r\n\r\n"));
    let status = connection.line();
    let mut len = 0;
    loop {
        let line = connection.line();
        if line.is_empty() {
            return (status, connection.bytes(len));
        }
        if let Some(n) = line.strip_prefix("Content-Length: ") {
            len = n.parse().unwrap();
        }
    }
}

#[test]
fn nginx_keeps_its_connections() {
    let dir = tempfile::tempdir().unwrap();
    let port = port();
    let path = dir.path().display();
    let config = |extra: &str| {
        format!(
            "daemon off; user root; pid {path}/pid; error_log {path}/error.log; worker_processes 2;
events {{ worker_connections 64; }}
http {{
  access_log off; keepalive_timeout 600s; root {path}/www;
  client_body_temp_path {path}/t1; proxy_temp_path {path}/t2; fastcgi_temp_path {path}/t3;
  uwsgi_temp_path {path}/t4; scgi_temp_path {path}/t5;
  server {{ listen 127.0.0.1:{port}; {extra} }}
}}"
        )
    };
    fs::create_dir(dir.path().join("www")).unwrap();
    let page: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
    fs::write(dir.path().join("www/page"), &page).unwrap();
    fs::write(dir.path().join("nginx.conf"), config("")).unwrap();
    let mut command = Command::new("nginx");
    command.arg("-c").arg(dir.path().join("nginx.conf"));
    let mut nginx = Program::start(command, dir.path());
    let mut connections: Vec<Lines> = (0..5).map(|_| Lines::connect(port)).collect();
    let right = |c: &mut Lines| {
        let (status, body) = get(c, "/page");
        assert_eq!(status, "HTTP/1.1 200 OK");
        assert!(body == page);
    };
    connections.iter_mut().for_each(right);

    for round in 0..3 {
        let from = nginx.end(dir.path());
        nginx.resume(&from);
        connections.iter_mut().for_each(right);
        right(&mut Lines::connect(port));
        assert_eq!(
            get(&mut Lines::connect(port), "/none").0,
            "HTTP/1.1 404 Not Found",
            "{round}"
        );
    }

    // The master and its workers still know each other: it has them exchanged.
    fs::write(
        dir.path().join("nginx.conf"),
        config("location /new { return 204; }"),
    )
    .unwrap();
    let mut reload = Command::new("nginx");
    reload
        .args(["-s", "reload", "-c"])
        .arg(dir.path().join("nginx.conf"));
    assert!(reload.status().unwrap().success());
    until("the new configuration", || {
        get(&mut Lines::connect(port), "/new").0 == "HTTP/1.1 204 No Content"
    });
}

//! Host to guest, guest to host, guest to guest, with all guests having the same addresses.

use crate::common::{Home, end_of, noise};
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

const HOST: Ipv4Addr = Ipv4Addr::new(10, 84, 0, 1);
/// For what must not come.
const SHORT: Duration = Duration::from_secs(2);

fn address(home: &Home, name: &str) -> Ipv4Addr {
    home.info(name)["address"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap()
}

/// Connects to what is about to listen.
fn connect(to: SocketAddr) -> TcpStream {
    let begin = Instant::now();
    loop {
        match TcpStream::connect_timeout(&to, Duration::from_secs(60)) {
            Ok(s) => {
                s.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
                return s;
            }
            Err(e) => assert!(begin.elapsed() < Duration::from_secs(120), "{to}: {e}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn in_guest(home: &Home, name: &str, script: &str) -> Child {
    home.command(&["exec", name, "--", "sh", "-c", script])
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn network() {
    let home = Home::new();
    std::thread::scope(|s| {
        for name in ["a", "b"] {
            s.spawn(|| home.boot(name));
        }
    });
    let (a, b) = (address(&home, "a"), address(&home, "b"));
    for name in ["a", "b"] {
        let text = home.sh(name, "ip addr show vec0; ip route");
        for word in ["10.83.0.2/24", "02:00:00:5a:00:02", "default via 10.83.0.1"] {
            assert!(text.contains(word), "{text}");
        }
    }
    to_guests(&home, a, b);
    to_host(&home, a);
    datagrams(&home, a);
    between(&home, b);
    silence(&home, a);
    home.ok(&["rm", "-f", "a", "b"]);
}

/// Both at the same time, and each answers as itself.
fn to_guests(home: &Home, a: Ipv4Addr, b: Ipv4Addr) {
    let bytes = noise(1 << 20, 9);
    let mut all = Vec::new();
    for (name, ip) in [("a", a), ("b", b)] {
        let server = in_guest(home, name, "nc -l -p 5000 -e /bin/cat");
        all.push((name, ip, server));
    }
    std::thread::scope(|s| {
        for (name, ip, server) in &mut all {
            let bytes = &bytes;
            s.spawn(move || {
                let stream = connect((*ip, 5000).into());
                let mut writer = stream.try_clone().unwrap();
                let sent = bytes.clone();
                let feeder = std::thread::spawn(move || {
                    writer.write_all(&sent).unwrap();
                    writer.shutdown(Shutdown::Write).unwrap();
                });
                let mut back = Vec::new();
                (&stream).read_to_end(&mut back).unwrap();
                feeder.join().unwrap();
                assert!(back == *bytes, "{name}: {} bytes", back.len());
                end_of(server);
            });
        }
    });
}

fn to_host(home: &Home, a: Ipv4Addr) {
    let listener = TcpListener::bind((HOST, 0)).unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut child = in_guest(
        home,
        "a",
        &format!("echo hello from guest | nc {HOST} {port}"),
    );
    let (mut stream, peer) = listener.accept().unwrap();
    assert_eq!(peer.ip(), a, "it comes from its own address");
    stream
        .set_read_timeout(Some(Duration::from_secs(120)))
        .unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hello from guest\n");
    drop(stream);
    end_of(&mut child);
}

/// A file by TFTP: the guest asks by a datagram, and is answered by one.
fn datagrams(home: &Home, a: Ipv4Addr) {
    let socket = UdpSocket::bind((HOST, 0)).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(120)))
        .unwrap();
    let port = socket.local_addr().unwrap().port();
    let script = format!("cd /root && tftp -g -r file {HOST} {port} && cat file");
    let mut command = home.command(&["exec", "a", "--", "sh", "-c", &script]);
    let child = command.stdout(Stdio::piped()).spawn().unwrap();
    let mut bytes = [0; 600];
    let (n, peer) = socket.recv_from(&mut bytes).unwrap();
    assert_eq!(peer.ip(), a);
    assert_eq!(bytes[..2], [0, 1], "{n} bytes");
    // Data, block 1, shorter than 512 bytes: the last.
    let answer = b"\x00\x03\x00\x01datagram";
    loop {
        socket.send_to(answer, peer).unwrap();
        let (n, from) = socket.recv_from(&mut bytes).unwrap();
        // Its answer, if it has not asked again.
        if from == peer && bytes[..n] == [0, 4, 0, 1] {
            break;
        }
    }
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "datagram");
}

fn between(home: &Home, b: Ipv4Addr) {
    let mut server = in_guest(home, "b", "nc -l -p 6000 -e /bin/dd of=/root/got");
    home.sh("a", "yes between | head -c 500000 > /root/sent");
    home.sh("a", &format!("ping -c 1 -W 60 {b} > /dev/null"));
    home.sh(
        "a",
        &format!("until nc {b} 6000 < /root/sent; do sleep 1; done"),
    );
    assert!(end_of(&mut server).success());
    assert_eq!(
        home.sh("a", "md5sum < /root/sent"),
        home.sh("b", "md5sum < /root/got")
    );
}

/// Nothing answers for a VM that is down: a resumed one may go on with its connections.
fn silence(home: &Home, a: Ipv4Addr) {
    let mut server = in_guest(home, "a", "nc -l -p 5002 -e /bin/cat");
    let mut stream = connect((a, 5002).into());
    stream.write_all(b"x").unwrap();
    stream.read_exact(&mut [0]).unwrap();
    let keeper = home.info("a")["supervisor"].to_string();
    assert!(
        std::process::Command::new("kill")
            .args(["-9", &keeper])
            .status()
            .unwrap()
            .success()
    );
    end_of(&mut server);
    stream.set_read_timeout(Some(SHORT)).unwrap();
    stream.write_all(b"y").unwrap();
    let error = stream.read_exact(&mut [0]).unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut),
        "{error}"
    );
    let error = TcpStream::connect_timeout(&(a, 5002).into(), SHORT).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
}

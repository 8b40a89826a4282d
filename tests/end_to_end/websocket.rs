//! WebSockets through the ingress.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use capsule_tests::{Server, probe};
use libtest_mimic::Trial;

use crate::test_of_processes as test;

pub fn trials() -> Vec<Trial> {
    vec![test("a WebSocket through the ingress stays open when the server is killed", echoes)]
}

fn echoes() {
    let mut server = Server::default();
    server.deploy(probe("one").path(), "app").ok();
    let mut socket = TcpStream::connect(("127.0.0.1", server.port())).expect("connected");
    socket.set_read_timeout(Some(Duration::from_secs(10))).expect("set");
    let request = "GET /socket HTTP/1.1\r\nHost: app-production.localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
                   Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
    socket.write_all(request.as_bytes()).expect("sent");
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        socket.read_exact(&mut byte).expect("an answer");
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).expect("text");
    assert!(head.starts_with("HTTP/1.1 101"), "{head}");
    // The accept key of RFC 6455's own example.
    assert!(head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{head}");
    echo(&mut socket, "hello");
    server.kill();
    echo(&mut socket, "still there");
    server.start();
    echo(&mut socket, "and back");
}

fn echo(socket: &mut TcpStream, text: &str) {
    let mask = [1, 2, 3, 4];
    let length = u8::try_from(text.len()).expect("short");
    let mut frame = vec![0x81, 0x80 | length];
    frame.extend(mask);
    frame.extend(text.bytes().enumerate().map(|(index, byte)| byte ^ mask[index % 4]));
    socket.write_all(&frame).expect("sent");
    let mut answer = vec![0; 2 + text.len()];
    socket.read_exact(&mut answer).expect("echoed");
    assert_eq!(answer[0], 0x81);
    assert_eq!(&answer[2..], text.as_bytes());
}

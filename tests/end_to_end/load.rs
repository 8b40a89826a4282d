//! A steady load of requests on an application that records every wrong response.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use capsule_tests::Server;

/// Clients that send requests until the load is stopped.
pub struct Load {
    stopping: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
    failures: Arc<Mutex<Vec<String>>>,
    clients: Vec<JoinHandle<()>>,
}

impl Load {
    /// Half of the clients reuse their connection, half open a new one for each request.
    pub fn start(server: &Server, host: &str) -> Self {
        let (port, host) = (server.port(), host.to_owned());
        let mut load = Self { stopping: Arc::default(), answered: Arc::default(), failures: Arc::default(), clients: Vec::new() };
        for client in 0..4 {
            let (stopping, answered, failures, host) =
                (load.stopping.clone(), load.answered.clone(), load.failures.clone(), host.clone());
            load.clients.push(std::thread::spawn(move || {
                let mut kept = None;
                while !stopping.load(Ordering::Relaxed) {
                    match send_request(&mut kept, port, &host) {
                        Ok(200) => {
                            answered.fetch_add(1, Ordering::Relaxed);
                        }
                        Ok(status) => failures.lock().expect("no panic").push(format!("status {status}")),
                        Err(error) => failures.lock().expect("no panic").push(error.to_string()),
                    }
                    if client % 2 == 0 {
                        kept = None;
                    }
                    std::thread::sleep(Duration::from_millis(2));
                }
            }));
        }
        // Return only after the first responses.
        while load.answered.load(Ordering::Relaxed) < 20 && load.failures.lock().expect("no panic").is_empty() {
            std::thread::sleep(Duration::from_millis(2));
        }
        load
    }

    /// Stops the load and panics if any request has failed.
    pub fn stop(self) {
        self.stopping.store(true, Ordering::Relaxed);
        for client in self.clients {
            client.join().expect("a client panicked");
        }
        let failures = self.failures.lock().expect("no panic");
        let answered = self.answered.load(Ordering::Relaxed);
        assert!(
            failures.is_empty(),
            "{} of {} requests failed: {:?}",
            failures.len(),
            answered + failures.len(),
            &failures[..failures.len().min(5)]
        );
        assert!(answered > 20, "only {answered} requests");
    }
}

type Connection = BufReader<TcpStream>;

/// Sends one request over the given connection or a new one.
fn send_request(kept: &mut Option<Connection>, port: u16, host: &str) -> std::io::Result<u16> {
    let mut connection = match kept.take() {
        Some(connection) => connection,
        None => {
            let stream = TcpStream::connect(("127.0.0.1", port))?;
            stream.set_read_timeout(Some(Duration::from_secs(30)))?;
            BufReader::new(stream)
        }
    };
    write!(connection.get_mut(), "GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")?;
    let mut line = String::new();
    connection.read_line(&mut line)?;
    let status =
        line.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or_else(|| std::io::Error::other(format!("`{line}`")))?;
    let mut length = 0;
    let mut keep = true;
    loop {
        line.clear();
        connection.read_line(&mut line)?;
        let lower = line.to_ascii_lowercase();
        if let Some(value) = lower.strip_prefix("content-length:") {
            length = value.trim().parse().map_err(std::io::Error::other)?;
        }
        keep &= !lower.starts_with("connection: close");
        if line.trim().is_empty() {
            break;
        }
    }
    let mut body = vec![0; length];
    connection.read_exact(&mut body)?;
    if keep {
        *kept = Some(connection);
    }
    Ok(status)
}

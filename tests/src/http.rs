//! A server under test, and the least of a client that can behave badly.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStdout};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::command;

/// No answer of a test takes longer, on a machine whose processes are stopped for minutes.
const PATIENCE: Duration = Duration::from_secs(300);

/// A running `strata serve`; it is ended when this is dropped.
pub struct Served {
    child: Child,
    _out: BufReader<ChildStdout>,
    /// `127.0.0.1:PORT`.
    pub address: String,
}

/// An answer.
#[derive(Debug, Clone)]
pub struct Reply {
    /// The status.
    pub status: u16,
    /// Status line and headers, in lower case.
    pub head: String,
    /// The body.
    pub body: String,
}

impl Reply {
    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }

    /// The body of a good answer.
    pub fn good(&self) -> Value {
        assert_eq!(self.status, 200, "{self:?}");
        self.json()
    }

    /// What an error says; its form is OpenAI's.
    pub fn error(&self, status: u16) -> String {
        assert_eq!(self.status, status, "{self:?}");
        let error = &self.json()["error"];
        for key in ["message", "type", "param", "code"] {
            assert!(error.get(key).is_some(), "{key} is missing: {self:?}");
        }
        error["message"].as_str().unwrap().into()
    }

    /// The data of events, up to `[DONE]`.
    pub fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{self:?}");
        let data = self.body.lines().filter_map(|l| l.strip_prefix("data: "));
        data.filter(|data| *data != "[DONE]")
            .map(|data| serde_json::from_str(data).unwrap())
            .collect()
    }
}

impl Served {
    /// Starts a server on a free port.
    pub fn start(folder: &Path, args: &[&str]) -> Served {
        let mut all = vec!["serve", "--port", "0", "--json"];
        all.extend(args);
        let mut child = command(&all, folder).spawn().unwrap();
        let mut out = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        out.read_line(&mut line).unwrap();
        if line.is_empty() {
            let mut said = String::new();
            let mut err = child.stderr.take().unwrap();
            err.read_to_string(&mut said).unwrap();
            panic!("the server did not start: {said}");
        }
        let told: Value = serde_json::from_str(&line).unwrap();
        let url = told["url"].as_str().unwrap();
        Served {
            child,
            _out: out,
            address: url.strip_prefix("http://").unwrap().into(),
        }
    }

    /// A connection.
    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    }

    /// Sends bytes as they are, and reads what comes until the connection ends.
    pub fn raw(&self, bytes: &[u8]) -> Reply {
        let mut stream = self.connect();
        // A server that refuses early reads no more.
        let _ = stream.write_all(bytes);
        read_reply(stream)
    }

    /// A request with headers of its own.
    pub fn send(&self, method: &str, path: &str, headers: &str, body: &[u8]) -> Reply {
        let head = format!(
            "{method} {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\ncontent-length: {}\r\n{headers}\r\n",
            self.address,
            body.len()
        );
        self.raw(&[head.as_bytes(), body].concat())
    }

    /// GET.
    pub fn get(&self, path: &str) -> Reply {
        self.send("GET", path, "", b"")
    }

    /// POST of JSON.
    pub fn post(&self, path: &str, body: &Value) -> Reply {
        let headers = "content-type: application/json\r\n";
        self.send("POST", path, headers, body.to_string().as_bytes())
    }

    /// What the engine is doing, once `so` holds.
    pub fn wait(&self, what: &str, so: impl Fn(&Value) -> bool) -> Value {
        let start = Instant::now();
        loop {
            let state = self.get("/strata/state").good();
            if so(&state) {
                return state;
            }
            assert!(start.elapsed() < PATIENCE, "never {what}: {state:#}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until nobody is served.
    pub fn wait_idle(&self) -> Value {
        self.wait("idle", |state| {
            state["queue"]["open"] == 0 && state["running"].as_array().unwrap().is_empty()
        })
    }

    /// Sends SIGTERM.
    pub fn terminate(&self) {
        let id = self.child.id().to_string();
        let sent = std::process::Command::new("kill").arg(id).status();
        assert!(sent.unwrap().success());
    }

    /// Waits for the end: exit status and what was said on standard error.
    pub fn ended(mut self) -> (Option<i32>, String) {
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(start.elapsed() < PATIENCE, "it does not end");
            std::thread::sleep(Duration::from_millis(20));
        };
        let mut said = String::new();
        let mut err = self.child.stderr.take().unwrap();
        err.read_to_string(&mut said).unwrap();
        assert!(!said.contains("panicked"), "{said}");
        (status.code(), said)
    }

    /// Kilobytes of memory that are in use.
    pub fn resident_kb(&self) -> usize {
        let status = format!("/proc/{}/status", self.child.id());
        let status = std::fs::read_to_string(status).unwrap();
        let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads an answer to the end of its connection.
pub fn read_reply(mut stream: TcpStream) -> Reply {
    let mut bytes = Vec::new();
    // A connection that is reset behind an answer has brought the answer.
    let _ = stream.read_to_end(&mut bytes);
    let at = bytes.windows(4).position(|w| w == b"\r\n\r\n");
    let at = at.unwrap_or_else(|| panic!("no answer: {:?}", String::from_utf8_lossy(&bytes)));
    let head = String::from_utf8_lossy(&bytes[..at]).to_lowercase();
    let status = head.split_whitespace().nth(1).unwrap().parse().unwrap();
    let mut body = bytes[at + 4..].to_vec();
    if head.contains("transfer-encoding: chunked") {
        body = unchunked(&body);
    }
    Reply {
        status,
        head,
        body: String::from_utf8_lossy(&body).into(),
    }
}

/// The bytes of chunks, as far as they came.
fn unchunked(mut bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    while let Some(at) = bytes.windows(2).position(|w| w == b"\r\n") {
        let size = std::str::from_utf8(&bytes[..at]).unwrap();
        let size = usize::from_str_radix(size, 16).unwrap();
        let rest = &bytes[at + 2..];
        if size == 0 || rest.len() < size + 2 {
            break;
        }
        out.extend_from_slice(&rest[..size]);
        bytes = &rest[size + 2..];
    }
    out
}

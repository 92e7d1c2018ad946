//! `strata serve` and those who mean it ill, or are slow, or leave: a clear answer, and nothing lost.

#![cfg(target_os = "linux")]

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread::sleep;
use std::time::Duration;

use serde_json::{Value, json};
use strata_tests::http::{Served, read_reply};
use strata_tests::{Folder, root};

const SMALL: [&str; 4] = ["--memory", "64MiB", "--max-sequences", "2"];

fn start(folder: &Folder, more: &[&str]) -> Served {
    Served::start(&folder.0, &[&SMALL[..], more].concat())
}

/// Sends a request whose answer is a long stream, and reads how it begins.
fn begin_stream(served: &Served, max_tokens: usize) -> TcpStream {
    let body = json!({
        "prompt": "Hugo:\n* Age: ", "max_tokens": max_tokens, "stream": true, "ignore_eos": true,
        "logprobs": 20,
    });
    let body = body.to_string();
    let mut stream = served.connect();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    let mut begin = [0; 12];
    stream.read_exact(&mut begin).unwrap();
    assert_eq!(&begin, b"HTTP/1.1 200");
    stream
}

#[test]
fn what_cannot_be_read_is_refused_with_its_place() {
    let folder = Folder::new("serve-bad-bodies");
    let served = start(&folder, &["--max-body", "1MiB", "--context", "4096"]);
    let post = |body: &[u8]| served.send("POST", "/v1/completions", "", body);
    let deep = format!("{{\"prompt\": {}", "[".repeat(100_000));
    let bad_text = b"{\"prompt\": \"a\xff\xfe\"}";
    for (body, says) in [
        (&b""[..], "the body is empty"),
        (b"{\"prompt\": \"a\"", "no JSON"),
        (b"{\"prompt\": NaN}", "no JSON"),
        (b"[1, 2]", "expected a JSON object"),
        (b"null", "expected a JSON object"),
        (deep.as_bytes(), "nested more than 64 levels deep at byte"),
        (bad_text, "no JSON"),
        (b"{\"prompt\": \"\\ud800\"}", "no JSON"),
        (b"{\"max_tokens\": 1e999}", "no JSON"),
    ] {
        let told = post(body).error(400);
        assert!(told.contains(says), "{says:?} is missing: {told}");
    }
    let text = post(b"\xff\xfe").error(400);
    assert!(text.contains("no JSON"), "{text}");
    let huge = post(&vec![b' '; (1 << 20) + 1]).error(413);
    assert!(huge.contains("1048576 bytes (--max-body)"), "{huge}");
    // Told by its length before it is sent; and by its bytes, where its length is not told.
    let told = served.raw(
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999999\r\n\r\n",
    );
    told.error(413);
    let mut chunks =
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
            .to_vec();
    for _ in 0..17 {
        chunks.extend(b"10000\r\n");
        chunks.extend(vec![b' '; 0x10000]);
        chunks.extend(b"\r\n");
    }
    served.raw(&chunks).error(413);
    let document = served.send("POST", "/v1/documents", "", b"good\xff");
    assert!(
        document
            .error(400)
            .contains("byte 4 of the document is no UTF-8")
    );
    assert!(
        served
            .send("POST", "/v1/documents", "", b" \n")
            .error(400)
            .contains("empty")
    );
    let form = "content-type: multipart/form-data; boundary=x\r\n";
    served
        .send("POST", "/v1/documents", form, b"--x--")
        .error(415);
    assert_eq!(served.raw(b"\x16\x03\x01\x02 no http\r\n\r\n").status, 400);
    served.wait_idle();
}

#[test]
fn all_that_is_wrong_with_a_request_is_told_at_once() {
    let folder = Folder::new("serve-bad-fields");
    let served = start(&folder, &["--max-tokens", "300", "--context", "4096"]);
    let told = served.post(
        "/v1/completions",
        &json!({
            "prompt": [[1, 2], [3, 260]], "temperature": "hot", "top_p": 7, "n": 0, "seed": 1.5,
            "stop": [1], "logit_bias": {"300": 1, "5": 1000}, "stream": "yes", "suffix": "x",
            "logprobs": 99, "max_tokens": -1, "stream_options": {"include_usage": 1},
            "somebody_elses_field": {"is": "ignored"}, "top_k": "many",
        }),
    );
    let told = told.error(400);
    for says in [
        "prompt[1]: [1]: expected the id of one of 260 tokens, found 260",
        "temperature: expected a number from 0 to 2, found \"hot\"",
        "top_p: expected a number from 0 to 1, found 7",
        "n: expected a whole number from 1 to 128, found 0",
        "seed: expected a whole number, found 1.5",
        "stop: expected a string or a list of strings",
        "logit_bias: \"300\": expected the id of one of 260 tokens",
        "logit_bias: \"5\": expected",
        "stream: expected true or false, found \"yes\"",
        "suffix: ",
        "logprobs: expected a whole number from 0 to 20, found 99",
        "max_tokens: expected",
        "stream_options.include_usage: expected true or false, found 1",
        "top_k: expected",
    ] {
        assert!(told.contains(says), "{says:?} is missing:\n{told}");
    }
    assert!(!told.contains("somebody_elses_field"), "{told}");
    let told = served.post(
        "/v1/chat/completions",
        &json!({"messages": [
            7, {"role": "king", "content": "x"}, {"role": "user"}, {"role": "user", "content": 5},
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        ]}),
    );
    let told = told.error(400);
    for says in [
        "messages[0]: expected an object, found 7",
        "messages[1].role: expected",
        "messages[2].content: expected",
        "messages[3].content: expected",
        "messages[4].content[0]: this model reads text, not parts of type \"image_url\"",
    ] {
        assert!(told.contains(says), "{says:?} is missing:\n{told}");
    }
    for (path, body, status, says) in [
        (
            "/v1/completions",
            json!({"model": "gpt-x", "prompt": "a"}),
            404,
            "no model `gpt-x`",
        ),
        (
            "/v1/completions",
            json!({"prompt": "a", "max_tokens": 301}),
            400,
            "at most 300",
        ),
        ("/v1/completions", json!({"prompt": ""}), 400, "no token"),
        (
            "/v1/completions",
            json!({"prompt": []}),
            400,
            "the list is empty",
        ),
        ("/v1/completions", json!({}), 400, "prompt: expected"),
        (
            "/v1/completions",
            json!({"prompt": vec!["a"; 100], "n": 2}),
            400,
            "more than 128",
        ),
        (
            "/v1/completions",
            json!({"prompt": "x".repeat(5000), "max_tokens": 16}),
            400,
            "5,000 tokens and the context 4,096",
        ),
        (
            "/v1/completions",
            json!({"prompt": "x".repeat(4000), "max_tokens": 200}),
            400,
            "4,000 tokens of prompt and 200 to generate are more than the context of 4,096; at most 96",
        ),
        (
            "/v1/chat/completions",
            json!({"messages": []}),
            400,
            "the list is empty",
        ),
        ("/v1/chat/completions", json!({}), 400, "messages: expected"),
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "user", "content": "x"}], "document": "doc-1"}),
            404,
            "no document doc-1",
        ),
        ("/v1/responses", json!({"input": 7}), 400, "input: expected"),
        (
            "/v1/responses",
            json!({"input": [{"type": "dance"}]}),
            400,
            "input[0].type",
        ),
    ] {
        let told = served.post(path, &body).error(status);
        assert!(
            told.contains(says),
            "{says:?} is missing for {path}: {told}"
        );
    }
    let long = served
        .post("/v1/completions", &json!({"prompt": "x".repeat(5000)}))
        .json();
    assert_eq!(long["error"]["code"], "context_length_exceeded");
    let state = served.wait_idle();
    assert_eq!(state["slots"]["used"], 0);
}

#[test]
fn keys_hosts_and_origins_are_checked() {
    let folder = Folder::new("serve-keys");
    let keys = folder.write("keys", "first\n\nsecond\n");
    let served = start(
        &folder,
        &["--api-key-file", &keys, "--cors", "https://page.example"],
    );
    served.get("/health").good();
    assert_eq!(served.get("/").status, 200);
    for header in [
        "",
        "authorization: Bearer wrong\r\n",
        "authorization: Basic first\r\n",
    ] {
        for path in ["/v1/models", "/metrics", "/strata/state", "/v1/documents"] {
            let told = served.send("GET", path, header, b"");
            assert_eq!(told.json()["error"]["code"], "invalid_api_key");
            told.error(401);
        }
    }
    for key in ["first", "second"] {
        let header = format!("authorization: Bearer {key}\r\n");
        served.send("GET", "/v1/models", &header, b"").good();
    }
    let from = |origin: &str, method: &str| {
        let header = format!(
            "authorization: Bearer first\r\norigin: {origin}\r\naccess-control-request-method: POST\r\n"
        );
        served.send(method, "/v1/models", &header, b"")
    };
    assert_eq!(from("https://evil.example", "GET").status, 403);
    let allowed = from("https://page.example", "GET");
    assert_eq!(allowed.status, 200);
    let says = "access-control-allow-origin: https://page.example";
    assert!(allowed.head.contains(says), "{allowed:?}");
    let asked = from("https://page.example", "OPTIONS");
    assert_eq!(asked.status, 204);
    assert!(
        asked.head.contains(says) && asked.head.contains("authorization"),
        "{asked:?}"
    );
    assert!(from(&format!("http://{}", served.address), "GET").status == 200);
    let renamed =
        served.raw(b"GET /health HTTP/1.1\r\nhost: evil.example:80\r\nconnection: close\r\n\r\n");
    assert!(renamed.error(403).contains("localhost"));
}

#[test]
fn clients_that_are_slow_or_never_read_hold_nothing_for_long() {
    let folder = Folder::new("serve-slow");
    let more = [
        "--read-timeout",
        "1",
        "--write-timeout",
        "1",
        "--context",
        "100000",
    ];
    let served = Served::start(
        &folder.0,
        &[&["--memory", "64MiB", "--max-sequences", "2"], &more[..]].concat(),
    );
    // A head that never ends, and a body that never comes.
    let mut head = served.connect();
    head.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: lo")
        .unwrap();
    let mut ended = Vec::new();
    let _ = head.read_to_end(&mut ended);
    let mut body = served.connect();
    body.write_all(
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n{\"pro",
    )
    .unwrap();
    let told = read_reply(body);
    assert!(told.error(408).contains("--read-timeout"));
    // A client that never reads: what it is sent fills its buffers, and then it is gone.
    let streams = [begin_stream(&served, 50_000), begin_stream(&served, 50_000)];
    served.wait("running", |s| s["slots"]["used"] == 2);
    let state = served.wait_idle();
    assert_eq!(state["slots"]["used"], 0);
    let metrics = served.get("/metrics").body;
    assert!(metrics.contains("strata_cancelled_total 2"), "{metrics}");
    drop(streams);
    served
        .post("/v1/completions", &json!({"prompt": "a", "max_tokens": 2}))
        .good();
}

#[test]
fn who_leaves_frees_his_place_and_who_finds_none_is_told() {
    let folder = Folder::new("serve-leaving");
    let served = start(&folder, &["--max-queue", "1", "--context", "100000"]);
    let mut streams: Vec<TcpStream> = (0..3).map(|_| begin_stream(&served, 50_000)).collect();
    let state = served.wait("full", |s| s["slots"]["used"] == 2 && s["waiting"] == 1);
    assert_eq!(state["queue"], json!({"open": 3, "most": 3}));
    let refused = served.post("/v1/completions", &json!({"prompt": "a"}));
    assert!(refused.head.contains("retry-after: 1"), "{refused:?}");
    assert_eq!(refused.json()["error"]["code"], "queue_full");
    assert!(refused.error(503).contains("--max-queue"));
    let many = json!({"prompt": "a", "n": 4});
    assert!(
        served
            .post("/v1/completions", &many)
            .error(400)
            .contains("4 choices")
    );
    // One leaves, and who waited has his place.
    drop(streams.remove(0));
    served.wait("two", |s| s["queue"]["open"] == 2 && s["waiting"] == 0);
    let next = served.post("/v1/completions", &json!({"prompt": "a", "max_tokens": 1}));
    assert_eq!(next.status, 200, "{next:?}");
    drop(streams);
    let state = served.wait_idle();
    assert_eq!(state["slots"]["used"], 0);
    // A request that is not streamed ends with its connection, too.
    let body = json!({"prompt": "a", "max_tokens": 50_000, "ignore_eos": true}).to_string();
    let mut waiting = served.connect();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    waiting.write_all(head.as_bytes()).unwrap();
    served.wait("running", |s| s["slots"]["used"] == 1);
    drop(waiting);
    served.wait_idle();
}

#[test]
fn a_request_that_takes_too_long_is_ended() {
    let folder = Folder::new("serve-late");
    let served = start(&folder, &["--request-timeout", "1", "--context", "100000"]);
    let body = json!({"prompt": "a", "max_tokens": 90_000, "ignore_eos": true});
    let late = served.post("/v1/completions", &body);
    assert_eq!(late.json()["error"]["code"], "timeout");
    assert!(late.error(504).contains("--request-timeout"));
    let mut body = body;
    body["stream"] = true.into();
    let late = served.post("/v1/completions", &body);
    let last = late.events().pop().unwrap();
    assert_eq!(last["error"]["code"], "timeout");
    served.wait_idle();
}

#[test]
fn a_server_that_is_told_to_stop_lets_answers_end() {
    let folder = Folder::new("serve-drain");
    let served = start(
        &folder,
        &[
            "--documents",
            "books",
            "--drain-seconds",
            "200",
            "--context",
            "100000",
        ],
    );
    let stream = begin_stream(&served, 3000);
    served.terminate();
    served.wait("draining", |s| s["draining"] == true);
    let health = served.get("/health");
    assert_eq!(
        (health.status, &health.json()["status"]),
        (503, &json!("draining"))
    );
    let refused = served.post("/v1/completions", &json!({"prompt": "a"}));
    assert_eq!(refused.json()["error"]["code"], "draining");
    refused.error(503);
    served.send("POST", "/v1/documents", "", b"text").error(503);
    let mut rest = String::new();
    let mut stream = stream;
    stream.read_to_string(&mut rest).unwrap();
    assert!(
        rest.contains("data: [DONE]"),
        "{}",
        &rest[rest.len().saturating_sub(500)..]
    );
    let (status, said) = served.ended();
    assert_eq!(status, Some(0), "{said}");
    assert!(said.contains("1 answer is let end"), "{said}");

    // Who gets no time is told, too.
    let served = start(&folder, &["--drain-seconds", "0", "--context", "100000"]);
    let mut stream = begin_stream(&served, 90_000);
    served.terminate();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(
        rest.contains("\"code\":\"stopped\""),
        "{}",
        &rest[rest.len().saturating_sub(500)..]
    );
    assert_eq!(served.ended().0, Some(0));
}

#[test]
fn a_document_goes_on_where_a_stopped_server_left_it() {
    let folder = Folder::new("serve-unfinished");
    let args = [
        "--memory",
        "256MiB",
        "--context",
        "200000",
        "--documents",
        "books",
    ];
    let served = Served::start(&folder.0, &args);
    let sample = fs::read_to_string(root().join("model-cards/demo/sample.md")).unwrap();
    let text: String = (0..12).map(|i| format!("Part {i}.\n{sample}\n")).collect();
    let id = served
        .send("POST", "/v1/documents", "", text.as_bytes())
        .json()["id"]
        .clone();
    let path = format!("/v1/documents/{}", id.as_str().unwrap());
    let begun = loop {
        let document = served.get(&path).good();
        if document["read_tokens"].as_u64().unwrap() > 3000 {
            break document;
        }
        sleep(Duration::from_millis(5));
    };
    assert_eq!(
        begun["status"], "reading",
        "it is read too soon for this test"
    );
    let ask = json!({"question": "Where does Mara Tolvin live?"});
    let told = served.post(&format!("{path}/ask"), &ask).error(409);
    assert!(told.contains("is reading"), "{told}");
    served.terminate();
    let (status, said) = served.ended();
    assert_eq!(status, Some(0), "{said}");

    let served = Served::start(&folder.0, &args);
    let document = loop {
        let document = served.get(&path).good();
        if document["status"] == "ready" {
            break document;
        }
        assert_ne!(document["status"], "failed", "{document}");
        sleep(Duration::from_millis(20));
    };
    let resumed = document["resumed_at"].as_u64().unwrap();
    let tokens = document["tokens"].as_u64().unwrap();
    assert!(resumed >= 3000 && resumed < tokens, "{document}");
    let answer = served.post(&format!("{path}/ask"), &ask).good();
    assert_eq!(answer["strata"]["resumed_at"], document["tokens"]);
    drop(served);

    // What is damaged is told, left out, or read anew.
    for book in fs::read_dir(folder.0.join("books")).unwrap().flatten() {
        if book.path().extension().is_some_and(|e| e == "state") {
            let bytes = fs::read(book.path()).unwrap();
            fs::write(book.path(), &bytes[..bytes.len() / 2]).unwrap();
        }
    }
    folder.write("books/doc-1.json", "{\"name\": 7}");
    let served = Served::start(&folder.0, &args);
    let list = served.get("/v1/documents").good();
    assert_eq!(list["data"].as_array().unwrap().len(), 1, "{list}");
    assert_eq!(list["data"][0]["resumed_at"], 0);
    let deleted: Value = served.send("DELETE", &path, "", b"").good();
    assert_eq!(deleted["deleted"], true);
    served.wait_idle();
    served.terminate();
    let (status, said) = served.ended();
    assert_eq!(status, Some(0), "{said}");
    assert!(
        said.contains("doc-1.json") && said.contains("is left out"),
        "{said}"
    );
}

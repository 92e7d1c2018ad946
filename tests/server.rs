//! `strata serve` as its clients meet it: every route, and answers that are the command's, token for token.

#![cfg(target_os = "linux")]

use std::fs;
use std::io::{Read, Write};
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};
use strata_tests::http::{Reply, Served};
use strata_tests::{Folder, check, finish, root, run};

/// Small sizes: a test's process may take 4 GiB of addresses.
const SMALL: [&str; 6] = [
    "--memory",
    "64MiB",
    "--context",
    "4096",
    "--max-sequences",
    "4",
];
const QUESTION: &str = "Where does Mara Tolvin live?";
const PROMPT: &str = "Captain Bren sails the Silver Heron. The boat of Captain Bren is the";

fn sample() -> String {
    fs::read_to_string(root().join("model-cards/demo/sample.md")).unwrap()
}

/// What `strata generate` says to the same.
fn generated(folder: &Folder, args: &[&str]) -> Value {
    let mut all = vec!["generate", "--json"];
    all.extend(args);
    let done = run(&all, &folder.0);
    assert_eq!(done.status, 0, "{done:?}");
    serde_json::from_str(&done.out).unwrap()
}

/// The pieces of a stream of completions put together: text, token ids, reason.
fn joined(reply: &Reply, index: usize) -> (String, Vec<Value>, Value) {
    let (mut text, mut ids, mut reason) = (String::new(), Vec::new(), Value::Null);
    for event in reply.events() {
        for choice in event["choices"].as_array().unwrap() {
            if choice["index"] != index {
                continue;
            }
            let piece = choice["text"]
                .as_str()
                .or(choice["delta"]["content"].as_str());
            text.push_str(piece.unwrap_or_default());
            ids.extend(choice["token_ids"].as_array().cloned().unwrap_or_default());
            if !choice["finish_reason"].is_null() {
                reason = choice["finish_reason"].clone();
            }
        }
    }
    (text, ids, reason)
}

#[test]
fn help_teaches_and_what_cannot_be_served_is_said_before_a_model_is_loaded() {
    let folder = Folder::new("serve-help");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let empty = folder.write("keys", "\n \n");
    check(
        &[
            (&["serve", "--help"], 0, "as OpenAI does"),
            (&["serve", "--port", "70000"], 2, "70000"),
            (&["serve", "--memory", "much"], 2, "no size"),
            (&["serve", "--cache", "often"], 2, "has no `often`"),
            (
                &["serve", "--port", &port],
                1,
                "is taken by another program",
            ),
            (
                &["serve", "--port", "0", "--host", "no.such.host.invalid"],
                1,
                "cannot be listened on",
            ),
            (
                &["serve", "--port", "0", "--api-key-file", &empty],
                1,
                "there is no key in it",
            ),
            (
                &[
                    "serve",
                    "--port",
                    "0",
                    "--memory",
                    "1MiB",
                    "--context",
                    "200000",
                ],
                1,
                "raise --memory",
            ),
            (
                &["serve", "no-such-model", "--port", "0", "--offline"],
                1,
                "no-such-model",
            ),
        ],
        &folder.0,
    );
}

#[test]
fn what_the_server_is_can_be_asked() {
    let folder = Folder::new("serve-about");
    let served = Served::start(
        &folder.0,
        &[&SMALL[..], &["--name", "a", "--name", "b/c"]].concat(),
    );
    let health = served.get("/health").good();
    assert_eq!(health["status"], "ready");
    let models = served.get("/v1/models").good();
    assert_eq!(models["object"], "list");
    assert_eq!(models["data"][0]["id"], "a");
    assert_eq!(models["data"][1]["id"], "b/c");
    assert_eq!(models["data"][0]["max_model_len"], 4096);
    assert_eq!(served.get("/v1/models/a").good()["id"], "a");
    assert!(
        served
            .get("/v1/models/x")
            .error(404)
            .contains("no model `x`")
    );
    let page = served.get("/");
    assert_eq!(page.status, 200);
    assert!(page.head.contains("text/html") && page.body.contains("Strata"));
    let state = served.get("/strata/state").good();
    for key in [
        "pages",
        "slots",
        "snapshots",
        "cache",
        "running",
        "decisions",
        "model",
        "queue",
    ] {
        assert!(state.get(key).is_some(), "{key} is missing: {state:#}");
    }
    assert_eq!(state["model"]["context"], 4096);
    assert_eq!(state["slots"]["used"], 0);
    assert!(served.get("/nothing").error(404).contains("/nothing"));
    assert!(served.get("/v1/completions").error(405).contains("GET"));
    let embeddings = served.post("/v1/embeddings", &json!({"model": "a", "input": "x"}));
    assert!(embeddings.error(400).contains("no embedding model"));
    let metrics = served.get("/metrics");
    for line in [
        "strata_requests_total{route=\"/health\",status=\"200\"} 1",
        "strata_requests_total{route=\"other\",status=\"404\"} 1",
        "strata_slots_used 0",
    ] {
        assert!(
            metrics.body.lines().any(|l| l == line),
            "{line}: {}",
            metrics.body
        );
    }
}

#[test]
fn texts_become_tokens_and_tokens_texts() {
    let folder = Folder::new("serve-tokens");
    let served = Served::start(&folder.0, &SMALL);
    let text = "Où est-elle? 日本";
    let told = served.post("/tokenize", &json!({"content": text})).good();
    let tokens = &told["tokens"];
    assert_eq!(told["count"], text.len());
    let back = served
        .post("/detokenize", &json!({"tokens": tokens}))
        .good();
    assert_eq!(back["content"], text);
    let special = json!({"prompt": "a", "add_special": true, "with_pieces": true});
    let told = served.post("/v1/tokenize", &special).good();
    assert_eq!(
        told["tokens"].as_array().unwrap().last().unwrap()["piece"],
        "a"
    );
    let wrong = served.post("/detokenize", &json!({"tokens": [65, -1]}));
    assert!(
        wrong
            .error(400)
            .starts_with("tokens[1]: expected the id of one of 260 tokens")
    );
    assert!(
        served
            .post("/tokenize", &json!({}))
            .error(400)
            .contains("content")
    );
}

#[test]
fn completions_are_those_of_the_command_streamed_or_not() {
    let folder = Folder::new("serve-completions");
    let served = Served::start(&folder.0, &SMALL);
    let alone = generated(
        &folder,
        &["--prompt", PROMPT, "--max-tokens", "24", "--logprobs", "2"],
    );
    let body = json!({
        "model": "demo", "prompt": PROMPT, "max_tokens": 24, "return_token_ids": true,
    });
    let mut reply = served.post("/v1/completions", &body).good();
    let choice = reply["choices"][0].take();
    assert_eq!(choice["token_ids"], alone["token_ids"]);
    assert_eq!(choice["text"], alone["text"]);
    assert_eq!(
        reply["usage"]["completion_tokens"],
        alone["generated_tokens"]
    );
    assert_eq!(reply["usage"]["prompt_tokens"], alone["prompt_tokens"]);
    assert_eq!(reply["strata"]["why"], "nothing was known");

    let with = |more: Value| {
        let mut body = body.clone();
        body.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        served.post("/v1/completions", &body)
    };
    let streamed = with(json!({"stream": true, "stream_options": {"include_usage": true}}));
    assert!(streamed.body.ends_with("data: [DONE]\n\n"), "{streamed:?}");
    let (text, ids, reason) = joined(&streamed, 0);
    assert_eq!(text, alone["text"].as_str().unwrap());
    assert_eq!(Value::Array(ids), alone["token_ids"]);
    assert_eq!(reason, choice["finish_reason"]);
    let usage = streamed.events().pop().unwrap();
    assert_eq!(usage["choices"], json!([]));
    let known = usage["usage"]["prompt_tokens_details"]["cached_tokens"]
        .as_u64()
        .unwrap();
    assert!(known as usize >= PROMPT.len() - 1, "{usage}");

    // As token ids, in a list of two, and with the prompt before it.
    let ids = served
        .post(
            "/tokenize",
            &json!({"content": PROMPT, "add_special": true}),
        )
        .good();
    let by_ids = with(json!({"prompt": ids["tokens"]})).good();
    assert_eq!(by_ids["choices"][0]["token_ids"], alone["token_ids"]);
    let two = with(json!({"prompt": [PROMPT, "Hugo works as a"], "n": 2})).good();
    assert_eq!(two["choices"].as_array().unwrap().len(), 4);
    assert_eq!(two["choices"][1]["token_ids"], alone["token_ids"]);
    assert_eq!(
        two["choices"][3]["token_ids"],
        two["choices"][2]["token_ids"]
    );
    assert_eq!(two["strata"].as_array().unwrap().len(), 2);
    let echoed = with(json!({"echo": true})).good();
    let whole = format!("{PROMPT}{}", alone["text"].as_str().unwrap());
    assert_eq!(echoed["choices"][0]["text"], whole);
    let (text, _, _) = joined(&with(json!({"echo": true, "stream": true})), 0);
    assert_eq!(text, whole);

    // The prompt's own log-probabilities, nothing generated.
    let scored = with(json!({"echo": true, "logprobs": 1, "max_tokens": 0})).good();
    let columns = &scored["choices"][0]["logprobs"];
    let scores = columns["token_logprobs"].as_array().unwrap();
    assert_eq!(
        scores.len(),
        scored["usage"]["prompt_tokens"].as_u64().unwrap() as usize
    );
    assert!(scores[0].is_null());
    assert!(
        scores[1..].iter().all(|s| s.as_f64().unwrap() <= 0.0),
        "{columns}"
    );
    assert_eq!(scored["usage"]["completion_tokens"], 0);
    let more = with(json!({"logprobs": 2})).good();
    let told = more["choices"][0]["logprobs"]["token_logprobs"]
        .as_array()
        .unwrap();
    for (found, expected) in told.iter().zip(alone["logprobs"].as_array().unwrap()) {
        let difference = found.as_f64().unwrap() - expected["logprob"].as_f64().unwrap();
        assert!(difference.abs() < 1e-6, "{found} {expected}");
    }

    // Stop strings end before themselves, in both forms.
    let whole = alone["text"].as_str().unwrap();
    let stop: String = whole.chars().skip(3).take(3).collect();
    let stopped = with(json!({"stop": [stop, "never said"]})).good();
    let text = stopped["choices"][0]["text"].as_str().unwrap();
    assert_eq!(text, whole.split(&stop).next().unwrap());
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    let (streamed, _, reason) = joined(&with(json!({"stop": stop, "stream": true})), 0);
    assert_eq!((streamed.as_str(), reason), (text, json!("stop")));

    let warm = [
        "--prompt",
        PROMPT,
        "--max-tokens",
        "24",
        "--temperature",
        "1.3",
        "--seed",
        "7",
    ];
    let drawn = with(json!({"temperature": 1.3, "seed": 7})).good();
    assert_eq!(
        drawn["choices"][0]["token_ids"],
        generated(&folder, &warm)["token_ids"]
    );
    served.wait_idle();
}

#[test]
fn conversations_are_answered_as_the_command_answers_them() {
    let folder = Folder::new("serve-chat");
    let served = Served::start(&folder.0, &SMALL);
    let file = folder.write("sample.md", sample());
    let asked = ["--chat", "--prompt-file", &file, "--prompt", QUESTION];
    let alone = generated(&folder, &asked);
    let messages = json!([
        {"role": "developer", "content": sample()},
        {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
    ]);
    let body = json!({"model": "demo", "messages": messages, "return_token_ids": true});
    let reply = served.post("/v1/chat/completions", &body).good();
    let choice = &reply["choices"][0];
    assert_eq!(choice["token_ids"], alone["token_ids"]);
    assert_eq!(choice["message"]["content"], alone["text"]);
    assert_eq!(choice["message"]["content"], " Greyford.");
    assert_eq!(choice["finish_reason"], "stop");
    assert_eq!(reply["usage"]["prompt_tokens_details"]["cached_tokens"], 0);

    let mut streaming = body.clone();
    streaming["stream"] = true.into();
    streaming["stream_options"] = json!({"include_usage": true});
    streaming["logprobs"] = true.into();
    streaming["top_logprobs"] = 2.into();
    let streamed = served.post("/v1/chat/completions", &streaming);
    assert_eq!(
        streamed.events()[0]["choices"][0]["delta"]["role"],
        "assistant"
    );
    let (text, ids, reason) = joined(&streamed, 0);
    assert_eq!(
        (text.as_str(), &Value::Array(ids)),
        (" Greyford.", &choice["token_ids"])
    );
    assert_eq!(reason, "stop");
    let events = streamed.events();
    let said: String = events
        .iter()
        .filter_map(|e| e["choices"][0]["logprobs"]["content"][0]["token"].as_str())
        .collect();
    assert_eq!(said, " Greyford.");
    let usage = &events.last().unwrap()["usage"];
    let known = usage["prompt_tokens_details"]["cached_tokens"]
        .as_u64()
        .unwrap();
    let prompt = usage["prompt_tokens"].as_u64().unwrap();
    assert!(known + 1 >= prompt, "{usage}");

    // Several choices, each as its seed says.
    let several = |n: usize, seed: u64| {
        let mut body = body.clone();
        let more = json!({"n": n, "seed": seed, "temperature": 1.5, "max_completion_tokens": 12});
        body.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        served.post("/v1/chat/completions", &body).good()
    };
    let three = several(3, 40);
    for i in 0..3 {
        let one = several(1, 40 + i);
        assert_eq!(
            three["choices"][i as usize]["token_ids"],
            one["choices"][0]["token_ids"]
        );
    }

    // The other question leaves the same document behind itself, and says where.
    let mut other = body.clone();
    other["messages"][1]["content"] = "Who is the mayor of Greyford?".into();
    let reply = served.post("/v1/chat/completions", &other).good();
    let why = reply["strata"]["why"].as_str().unwrap();
    assert!(why.contains("diverged at token"), "{why}");
    let state = served.wait_idle();
    assert_eq!(state["decisions"][0]["why"], reply["strata"]["why"]);
    assert!(state["cache"]["hits"].as_u64().unwrap() >= 2, "{state:#}");
}

#[test]
fn responses_come_with_their_events_and_go_on() {
    let folder = Folder::new("serve-responses");
    let served = Served::start(&folder.0, &SMALL);
    let body = json!({
        "model": "demo", "instructions": sample(), "input": QUESTION, "metadata": {"a": "b"},
    });
    let reply = served.post("/v1/responses", &body).good();
    assert_eq!(reply["status"], "completed");
    assert_eq!(reply["output"][0]["content"][0]["text"], " Greyford.");
    assert_eq!(reply["metadata"]["a"], "b");
    assert!(reply["usage"]["output_tokens"].as_u64().unwrap() > 0);

    let mut streaming = body.clone();
    streaming["stream"] = true.into();
    let streamed = served.post("/v1/responses", &streaming);
    let events = streamed.events();
    let names: Vec<&str> = events.iter().map(|e| e["type"].as_str().unwrap()).collect();
    let deltas = names
        .iter()
        .filter(|n| **n == "response.output_text.delta")
        .count();
    let text: String = events.iter().filter_map(|e| e["delta"].as_str()).collect();
    assert_eq!(text, " Greyford.");
    let mut expected = vec![
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ];
    expected.extend(vec!["response.output_text.delta"; deltas]);
    expected.extend([
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]);
    assert_eq!(names, expected);
    for (i, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], i);
    }
    assert!(streamed.body.starts_with("event: response.created\ndata: "));
    assert_eq!(
        events.last().unwrap()["response"]["output"][0]["content"][0]["text"],
        " Greyford."
    );

    let next = json!({
        "instructions": sample(), "previous_response_id": reply["id"],
        "input": [{"role": "user", "content": [{"type": "input_text", "text": QUESTION}]}],
        "max_output_tokens": 2,
    });
    let next = served.post("/v1/responses", &next).good();
    assert_eq!(next["status"], "incomplete");
    assert_eq!(next["incomplete_details"]["reason"], "max_output_tokens");
    let longer = next["usage"]["input_tokens"].as_u64() > reply["usage"]["input_tokens"].as_u64();
    assert!(longer, "{next}");
    let unknown = json!({"input": "x", "previous_response_id": "resp_0"});
    assert!(
        served
            .post("/v1/responses", &unknown)
            .error(400)
            .contains("no response resp_0")
    );
}

#[test]
fn documents_are_read_once_and_kept_over_restarts() {
    let folder = Folder::new("serve-documents");
    let file = folder.write("sample.md", sample());
    let state = folder.0.join("by-hand.state").display().to_string();
    let read = run(&["doc", "read", &file, "-o", &state], &folder.0);
    assert_eq!(read.status, 0, "{read:?}");
    let asked = run(&["doc", "ask", &state, QUESTION, "--json"], &folder.0);
    let by_hand: Value = serde_json::from_str(&asked.out).unwrap();
    // The command leaves out the space before an answer.
    let expected = format!(" {}", by_hand["answer"].as_str().unwrap());

    let args = [&SMALL[..], &["--documents", "books"]].concat();
    let served = Served::start(&folder.0, &args);
    let text = sample();
    let uploaded = served.send(
        "POST",
        "/v1/documents?name=harbour%20notes.md",
        "",
        text.as_bytes(),
    );
    assert_eq!(uploaded.status, 201, "{uploaded:?}");
    let id = uploaded.json()["id"].as_str().unwrap().to_string();
    let path = format!("/v1/documents/{id}");
    let ready = |served: &Served| loop {
        let document = served.get(&path).good();
        match document["status"].as_str().unwrap() {
            "ready" => return document,
            "failed" => panic!("{document}"),
            _ => std::thread::sleep(std::time::Duration::from_millis(20)),
        }
    };
    let document = ready(&served);
    assert_eq!(document["name"], "harbour notes.md");
    assert_eq!(document["read_tokens"], document["tokens"]);
    assert_eq!(document["bytes"], text.len());
    assert!(
        document["cached_bytes"].as_u64().unwrap() > 1000,
        "{document}"
    );
    // The same text again is the same document.
    let again = served.post("/v1/documents", &json!({"name": "x", "text": text}));
    assert_eq!((again.status, &again.json()["id"]), (200, &json!(id)));
    assert_eq!(
        served.get("/v1/documents").good()["data"][0]["id"],
        id.as_str()
    );

    let ask = |served: &Served, more: Value| {
        let mut body = json!({"question": QUESTION});
        body.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        served.post(&format!("{path}/ask"), &body)
    };
    let answer = ask(&served, json!({})).good();
    assert_eq!(answer["choices"][0]["message"]["content"], expected);
    assert_eq!(answer["strata"]["resumed_at"], document["tokens"]);
    let (streamed, _, _) = joined(&ask(&served, json!({"stream": true})), 0);
    assert_eq!(streamed, expected);
    let about = json!({"document": id, "messages": [
        {"role": "user", "content": QUESTION}, {"role": "assistant", "content": " Greyford."},
        {"role": "user", "content": "Who is the mayor of Greyford?"},
    ]});
    let longer = served.post("/v1/chat/completions", &about).good();
    let resumed = longer["strata"]["resumed_at"].as_u64() >= document["tokens"].as_u64();
    assert!(resumed, "{longer}");
    let system = json!({"document": id, "messages": [
        {"role": "system", "content": "x"}, {"role": "user", "content": "y"},
    ]});
    assert!(
        served
            .post("/v1/chat/completions", &system)
            .error(400)
            .contains("system message")
    );
    assert!(
        ask(&served, json!({"question": " "}))
            .error(400)
            .contains("question")
    );
    served.terminate();
    assert_eq!(served.ended().0, Some(0));

    // The state is a document's for the command, too.
    let books: Vec<_> = fs::read_dir(folder.0.join("books"))
        .unwrap()
        .flatten()
        .collect();
    let kept = books
        .iter()
        .find(|b| b.path().extension().is_some_and(|e| e == "state"));
    let kept = kept.unwrap().path().display().to_string();
    let asked = run(&["doc", "ask", &kept, QUESTION, "--json"], &folder.0);
    let by_command: Value = serde_json::from_str(&asked.out).unwrap();
    assert_eq!(by_command["answer"], by_hand["answer"]);

    let served = Served::start(&folder.0, &args);
    let document = ready(&served);
    assert_eq!(document["resumed_at"], document["tokens"], "{document}");
    let answer = ask(&served, json!({})).good();
    assert_eq!(answer["choices"][0]["message"]["content"], expected);
    assert_eq!(answer["strata"]["from_file"], true);
    assert_eq!(answer["strata"]["resumed_at"], document["tokens"]);
    let gone = served.send("DELETE", &path, "", b"");
    assert_eq!(gone.good()["deleted"], true);
    served.get(&path).error(404);
    assert_eq!(fs::read_dir(folder.0.join("books")).unwrap().count(), 0);
    assert!(ask(&served, json!({})).error(404).contains("no document"));
}

#[test]
fn clients_at_once_get_the_tokens_that_each_gets_alone() {
    const CLIENTS: usize = 12;
    let folder = Folder::new("serve-parallel");
    let served = Served::start(&folder.0, &SMALL);
    let text = sample();
    let beginnings: Vec<&str> = text.split_inclusive("\n\n").collect();
    let body = |client: usize, turn: usize| {
        let from = (client * 5 + turn * 3) % beginnings.len();
        let till = (from + 1 + client % 4).min(beginnings.len());
        json!({
            "prompt": beginnings[from..till].concat(), "max_tokens": 1 + (client * 7 + turn * 5) % 23,
            "temperature": if client.is_multiple_of(2) { 0.0 } else { 1.2 }, "seed": client * 100 + turn,
            "ignore_eos": true, "return_token_ids": true, "stream": (client + turn).is_multiple_of(3),
        })
    };
    let ids = |reply: Reply| -> Vec<Value> {
        if reply.head.contains("event-stream") {
            return joined(&reply, 0).1;
        }
        reply.good()["choices"][0]["token_ids"]
            .as_array()
            .unwrap()
            .clone()
    };
    let idle = served.wait_idle();
    let left = AtomicUsize::new(0);
    let together: Vec<Vec<Vec<Value>>> = std::thread::scope(|scope| {
        let (served, left) = (&served, &left);
        let clients = (0..CLIENTS).map(|client| {
            scope.spawn(move || {
                let turn = |turn: usize| {
                    if (client + turn).is_multiple_of(4) {
                        // Leaves in the middle.
                        let mut body = body(client, turn);
                        (body["max_tokens"], body["stream"]) = (2000.into(), true.into());
                        let body = body.to_string();
                        let mut stream = served.connect();
                        let head = format!(
                            "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {}\r\n\r\n",
                            body.len()
                        );
                        stream.write_all(head.as_bytes()).unwrap();
                        stream.write_all(body.as_bytes()).unwrap();
                        let _ = stream.read(&mut [0; 64]).unwrap();
                        left.fetch_add(1, Ordering::Relaxed);
                    }
                    ids(served.post("/v1/completions", &body(client, turn)))
                };
                (0..3).map(turn).collect()
            })
        });
        let clients: Vec<_> = clients.collect();
        clients.into_iter().map(|c| c.join().unwrap()).collect()
    });
    assert!(left.load(Ordering::Relaxed) >= CLIENTS / 2);
    let after = served.wait_idle();
    assert_eq!(after["slots"]["used"], idle["slots"]["used"]);
    // Alone: on a server that keeps no states, one after the other.
    let alone = Served::start(&folder.0, &[&SMALL[..], &["--cache", ""]].concat());
    for (client, turns) in together.iter().enumerate() {
        for (turn, found) in turns.iter().enumerate() {
            let expected = ids(alone.post("/v1/completions", &body(client, turn)));
            assert_eq!(found, &expected, "client {client}, turn {turn}");
        }
    }
    let state = alone.wait_idle();
    assert_eq!(
        (&state["pages"]["used"], &state["slots"]["used"]),
        (&json!(0), &json!(0))
    );
}

/// The packages as people use them, where they can be had: `.ci/run` makes a Python environment with them.
#[test]
fn clients_that_people_have_run_unchanged() {
    let python = root().join("target/clients/bin/python");
    if !python.exists() {
        println!(
            "SKIPPED: clients_that_people_have_run_unchanged: no {} with openai and langchain-openai",
            python.display()
        );
        return;
    }
    let folder = Folder::new("serve-clients");
    let served = Served::start(&folder.0, &SMALL);
    let mut command = std::process::Command::new(python);
    command
        .arg(root().join("tests/openai_client.py"))
        .arg(format!("http://{}", served.address))
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped());
    let done = finish(command, b"");
    assert_eq!(done.status, 0, "{done:?}");
    assert!(done.out.contains("all is well"), "{done:?}");
}

#[test]
fn what_is_asked_of_the_form_of_an_answer_is_read_and_refused_clearly() {
    let folder = Folder::new("serve-form");
    let served = Served::start(&folder.0, &SMALL);
    let with = |more: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 1});
        body.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        served.post("/v1/chat/completions", &body)
    };
    with(json!({"response_format": {"type": "text"}, "tool_choice": "none"})).good();
    let wrong = with(json!({
        "response_format": {"type": "json_schema", "json_schema": {}},
        "tools": [{"type": "function", "function": {}}, {"type": "search"}, 7],
        "tool_choice": {"type": "function", "function": {"name": "absent"}},
    }));
    let told = wrong.error(400);
    for path in [
        "response_format.json_schema.schema:",
        "tools[0].function.name:",
        "tools[1].type:",
        "tools[2]:",
        "tool_choice: there is no tool \"absent\"",
    ] {
        assert!(told.contains(path), "{path} is missing: {told}");
    }
}

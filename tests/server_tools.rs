//! Answers of a given form and calls of functions, over HTTP; and what answers say beyond the context.

#![cfg(target_os = "linux")]

use serde_json::{Value, json};
use strata_tests::http::{Reply, Served};
use strata_tests::{Folder, run};

const SMALL: [&str; 6] = [
    "--memory",
    "64MiB",
    "--context",
    "4096",
    "--max-sequences",
    "4",
];

fn weather() -> Value {
    let place = json!({"type": "string", "maxLength": 6});
    let days = json!({"type": "integer", "minimum": 1, "maximum": 9});
    json!({"name": "weather", "description": "The weather of a place", "parameters": {
        "type": "object", "additionalProperties": false, "required": ["place", "days"],
        "properties": {"place": place, "days": days},
    }})
}

fn now() -> Value {
    json!({"name": "now"})
}

/// A conversation with two functions.
fn body(more: &Value) -> Value {
    let tool = |function: Value| json!({"type": "function", "function": function});
    let mut body = json!({
        "messages": [{"role": "user", "content": "Will it rain in Oslo?"}],
        "tools": [tool(weather()), tool(now())],
        "temperature": 1.5, "seed": 3, "max_tokens": 300,
    });
    let more = more.as_object().unwrap().clone();
    body.as_object_mut().unwrap().extend(more);
    body
}

/// Checks a call; its name.
fn checked(call: &Value) -> String {
    assert_eq!(call["type"], "function", "{call}");
    assert!(call["id"].as_str().unwrap().starts_with("call_"), "{call}");
    let name = call["function"]["name"].as_str().unwrap();
    check_arguments(name, call["function"]["arguments"].as_str().unwrap());
    name.into()
}

fn check_arguments(name: &str, arguments: &str) {
    let arguments: Value = serde_json::from_str(arguments).unwrap();
    match name {
        "weather" => {
            let place = arguments["place"].as_str().unwrap();
            let days = arguments["days"].as_u64().unwrap();
            let fields = arguments.as_object().unwrap().len();
            assert!(
                place.chars().count() <= 6 && (1..=9).contains(&days) && fields == 2,
                "{arguments}"
            );
        }
        "now" => assert_eq!(arguments, json!({})),
        other => panic!("{other} was called"),
    }
}

fn message(reply: &Reply) -> (Value, Value) {
    let choice = &reply.good()["choices"][0];
    (choice["message"].clone(), choice["finish_reason"].clone())
}

#[test]
fn functions_are_called_as_the_request_says() {
    let folder = Folder::new("serve-tools");
    let served = Served::start(&folder.0, &SMALL);
    let ask = |more: Value| served.post("/v1/chat/completions", &body(&more));

    for seed in 0..4 {
        let (said, reason) = message(&ask(
            json!({"tool_choice": "required", "seed": seed, "parallel_tool_calls": false}),
        ));
        let calls = said["tool_calls"].as_array().unwrap();
        assert_eq!(
            (calls.len(), &said["content"], reason),
            (1, &Value::Null, json!("tool_calls"))
        );
        checked(&calls[0]);
    }
    let named = json!({"type": "function", "function": {"name": "weather"}});
    let (said, _) = message(&ask(json!({"tool_choice": named})));
    assert_eq!(checked(&said["tool_calls"][0]), "weather");
    // As the model likes: whatever it says, it is an answer.
    let (said, reason) = message(&ask(json!({"max_tokens": 8})));
    assert!(
        said["content"].is_string() || reason == "tool_calls",
        "{said}"
    );
    let (said, _) = message(&ask(json!({"max_tokens": 8, "tool_choice": "none"})));
    assert!(
        said["content"].is_string() && said.get("tool_calls").is_none(),
        "{said}"
    );

    // Streamed, several choices at once: the same as whole.
    let wanted = json!({"tool_choice": "required", "n": 3});
    let whole = ask(wanted.clone()).good();
    let mut streamed = wanted;
    streamed["stream"] = true.into();
    let events = ask(streamed).events();
    let mut ended = 0;
    for choice in whole["choices"].as_array().unwrap() {
        let index = &choice["index"];
        let of = events.iter().flat_map(|e| e["choices"].as_array().unwrap());
        let of: Vec<&Value> = of.filter(|c| c["index"] == *index).collect();
        let calls: Vec<&Value> = of
            .iter()
            .flat_map(|c| c["delta"]["tool_calls"].as_array().into_iter().flatten())
            .collect();
        let expected = choice["message"]["tool_calls"].as_array().unwrap();
        assert_eq!(calls.len(), expected.len());
        for (i, (call, expected)) in calls.iter().zip(expected).enumerate() {
            checked(call);
            assert_eq!(
                (&call["index"], &call["function"]),
                (&json!(i), &expected["function"])
            );
        }
        assert_eq!(of.last().unwrap()["finish_reason"], choice["finish_reason"]);
        // A model without sense may call for ever, and is cut off in the middle.
        if choice["finish_reason"] == "length" {
            continue;
        }
        ended += 1;
        assert!(
            of.iter()
                .all(|c| c["delta"]["content"].as_str().is_none_or(str::is_empty)),
            "{of:?}"
        );
        assert_eq!(choice["finish_reason"], "tool_calls");
    }
    assert!(ended > 0, "{whole}");

    // The conversation goes on with the result.
    let call = &whole["choices"][0]["message"]["tool_calls"][0];
    let messages = json!([
        {"role": "user", "content": "Will it rain in Oslo?"},
        {"role": "assistant", "content": null, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "content": "It is dry."},
    ]);
    let (said, _) = message(&ask(
        json!({"messages": messages, "max_tokens": 8, "tool_choice": "none"}),
    ));
    assert!(said["content"].is_string(), "{said}");
}

#[test]
fn responses_tell_calls_as_items() {
    let folder = Folder::new("serve-tools-responses");
    let served = Served::start(&folder.0, &SMALL);
    let mut function = weather();
    function["type"] = "function".into();
    let mut asked = json!({
        "input": "Will it rain in Oslo?", "tools": [function], "tool_choice": "required",
        "parallel_tool_calls": false, "temperature": 1.5, "max_output_tokens": 300,
    });
    let whole = served.post("/v1/responses", &asked).good();
    let [item] = &whole["output"].as_array().unwrap()[..] else {
        panic!("{whole}");
    };
    assert_eq!(
        (&item["type"], &item["name"]),
        (&json!("function_call"), &json!("weather"))
    );
    check_arguments("weather", item["arguments"].as_str().unwrap());

    let result =
        json!([{"type": "function_call_output", "call_id": item["call_id"], "output": "dry"}]);
    let next =
        json!({"input": result, "previous_response_id": whole["id"], "max_output_tokens": 8});
    assert_eq!(
        served.post("/v1/responses", &next).good()["object"],
        "response"
    );

    asked["stream"] = true.into();
    let events = served.post("/v1/responses", &asked).events();
    let of = |kind: &str| -> Vec<&Value> { events.iter().filter(|e| e["type"] == kind).collect() };
    let done = of("response.function_call_arguments.done");
    assert_eq!(done.len(), 1);
    check_arguments("weather", done[0]["arguments"].as_str().unwrap());
    let output = &of("response.completed")[0]["response"]["output"];
    let last = output.as_array().unwrap().last().unwrap();
    assert_eq!(last["arguments"], done[0]["arguments"]);
}

#[test]
fn answers_have_the_form_that_is_asked_for() {
    let folder = Folder::new("serve-forms");
    let served = Served::start(&folder.0, &SMALL);
    let ask = |more: Value| {
        let mut asked = body(&more);
        asked.as_object_mut().unwrap().remove("tools");
        served.post("/v1/chat/completions", &asked)
    };
    let schema = json!({"type": "object", "additionalProperties": false, "required": ["city"], "properties": {"city": {"enum": ["Oslo", "Bergen"]}}});
    let format = json!({"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": true}});
    for seed in 0..4 {
        // A form ends by itself, also where end tokens are to be gone past.
        let (said, reason) = message(&ask(
            json!({"response_format": format, "seed": seed, "ignore_eos": seed == 3}),
        ));
        let city: Value = serde_json::from_str(said["content"].as_str().unwrap()).unwrap();
        assert!(
            ["Oslo", "Bergen"].contains(&city["city"].as_str().unwrap()),
            "{said}"
        );
        assert_eq!(reason, "stop");
    }
    let flat = json!({"format": {"type": "json_schema", "name": "answer", "schema": schema}});
    let whole = served
        .post(
            "/v1/responses",
            &json!({"input": "Where?", "text": flat, "temperature": 1.5, "max_output_tokens": 300}),
        )
        .good();
    let text = whole["output"][0]["content"][0]["text"].as_str().unwrap();
    assert!(
        serde_json::from_str::<Value>(text).unwrap()["city"].is_string(),
        "{text}"
    );
    assert_eq!(whole["text"], flat);
    // A model without sense may write an object for ever, but an object it is.
    let (said, reason) = message(&ask(
        json!({"response_format": {"type": "json_object"}, "max_tokens": 40}),
    ));
    let text = said["content"].as_str().unwrap();
    assert!(text.starts_with('{'), "{text}");
    assert!(
        reason == "length" || serde_json::from_str::<Value>(text).is_ok(),
        "{text}"
    );

    // Schemas that cannot be, or cost too much.
    let mut deep = json!({"type": "integer"});
    for _ in 0..25 {
        deep = json!({"type": "array", "items": deep});
    }
    let many: Vec<String> = (0..30_000).map(|i| format!("value {i}")).collect();
    for (schema, expected) in [
        (
            json!({"type": "integer", "minimum": 3, "maximum": 2}),
            "minimum",
        ),
        (
            json!({"$ref": "https://example.org/schema.json"}),
            "example.org",
        ),
        (
            json!({"type": "object", "required": ["a"], "properties": {"a": false}}),
            "nsatisfiable",
        ),
        (json!({"type": "strong"}), "strong"),
        (json!({"enum": many}), "bytes"),
    ] {
        let format = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}});
        let reply = ask(json!({"response_format": format}));
        let told = reply.error(400);
        assert!(told.contains(expected) && told.len() < 1000, "{told}");
        assert_eq!(reply.json()["error"]["param"], "response_format");
    }
    // It serves on.
    message(&ask(json!({"max_tokens": 2})));
    served.wait_idle();
}

#[test]
fn the_page_is_served_with_its_policy_and_without_a_key() {
    let folder = Folder::new("serve-page");
    let served = Served::start(&folder.0, &[&SMALL[..], &["--api-key", "secret"]].concat());
    for (path, kind) in [
        ("/", "text/html"),
        ("/page/app.js", "text/javascript"),
        ("/page/style.css", "text/css"),
    ] {
        let reply = served.get(path);
        assert_eq!(reply.status, 200, "{reply:?}");
        assert!(
            reply.head.contains(&format!("content-type: {kind}")),
            "{path}: {}",
            reply.head
        );
        assert!(
            reply
                .head
                .contains("content-security-policy: default-src 'none'"),
            "{}",
            reply.head
        );
    }
    assert_eq!(served.get("/page/none.js").status, 404);
    assert_eq!(served.get("/strata/state").status, 401);
}

#[test]
fn beyond_the_context_answers_say_what_attention_sees() {
    let folder = Folder::new("serve-beyond");
    let small = [
        "--memory",
        "64MiB",
        "--context",
        "64",
        "--max-sequences",
        "2",
    ];
    let policy = ["--beyond-context", "attend-last"];
    let prompt: Vec<u32> = (0..100).map(|i| 3 + i % 90).collect();
    let body = json!({"prompt": prompt, "max_tokens": 5, "temperature": 0, "ignore_eos": true, "return_token_ids": true});
    let refusing = Served::start(&folder.0, &small);
    let told = refusing.post("/v1/completions", &body).json();
    assert_eq!(told["error"]["code"], "context_length_exceeded");
    let served = Served::start(&folder.0, &[&small[..], &policy].concat());
    let ids: Vec<String> = prompt.iter().map(u32::to_string).collect();
    let ids = ids.join(",");
    let args = [
        "--token-ids",
        &ids,
        "--max-tokens",
        "5",
        "--ignore-eos",
        "--context",
        "64",
    ];
    let all = [&["generate", "--json"], &args[..], &policy].concat();
    let alone: Value = serde_json::from_str(&run(&all, &folder.0).out).unwrap();
    for _ in 0..2 {
        // The second time from a state that was kept.
        let told = served.post("/v1/completions", &body).good();
        let choice = &told["choices"][0];
        assert_eq!(choice["text"], alone["text"], "{told}");
        let attention = &told["strata"]["sight"];
        assert_eq!(*attention, alone["sight"], "{told}");
        assert_eq!(attention["attention_sees"], json!([[40, 104]]));
        assert_eq!(attention["only_in_state"], 40);
    }
    let short = json!({"prompt": [70, 71, 72], "max_tokens": 2, "temperature": 0});
    let told = served.post("/v1/completions", &short).good();
    assert!(told["strata"]["sight"].is_null(), "{told}");
}

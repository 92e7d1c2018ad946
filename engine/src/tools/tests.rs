use serde_json::{Value, json};

use super::*;
use crate::constraint::Vocabulary;
use crate::sampler::{Sampler, SamplingParams};
use crate::text::{Bytes, Tokenizer};

fn tokenizer() -> Tokenizer {
    Tokenizer::from_bytes(Bytes {
        offset: 2,
        bos: None,
        eos: Some(1),
        pad: Some(0),
    })
}

fn weather() -> Vec<Tool> {
    vec![
        Tool {
            name: "weather".into(),
            description: Some("The weather of a place".into()),
            parameters: json!({"type": "object", "required": ["place", "days"], "additionalProperties": false,
                "properties": {"place": {"$ref": "#/$defs/place"}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
                "$defs": {"place": {"type": "string", "maxLength": 5}}}),
        },
        Tool {
            name: "now \"here\"".into(),
            description: None,
            parameters: json!({}),
        },
    ]
}

fn names() -> Vec<String> {
    weather().into_iter().map(|tool| tool.name).collect()
}

/// Text and calls of a text, as it comes in pieces of `step` bytes.
fn parsed(format: Format, text: &str, step: usize) -> (String, Vec<(String, Value)>) {
    let mut calls = Calls::new(format, names());
    let mut pieces = Vec::new();
    let chars: Vec<char> = text.chars().collect();
    for piece in chars.chunks(step) {
        pieces.extend(calls.push(&piece.iter().collect::<String>()));
    }
    pieces.extend(calls.finish());
    let (mut said, mut called) = (String::new(), Vec::new());
    for piece in pieces {
        match piece {
            Piece::Text(text) => said.push_str(&text),
            Piece::Call(call) => called.push((
                call.name,
                serde_json::from_str(&call.arguments).expect("arguments are JSON"),
            )),
        }
    }
    assert_eq!(calls.found(), called.len());
    (said, called)
}

#[test]
fn calls_are_found_in_texts_however_they_are_cut() {
    let hermes = Format::of_template("… <tool_call></tool_call>");
    let list = Format::of_template("{{ '<tool_calls>' }} not <tool_call>");
    let open = Format::of_template("<|tool_call|>");
    let oslo = json!({"place": "Oslo"});
    let one = |arguments: &Value| vec![("weather".to_string(), arguments.clone())];
    let marks = json!({"place": "</tool_call> <tool_call>"});
    let cases: Vec<(Format, &str, &str, Vec<(String, Value)>)> = vec![
        (hermes, "no call", "no call", vec![]),
        (hermes, "é <tool_cal é", "é <tool_cal é", vec![]),
        (
            hermes,
            "Let me see.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"place\": \"Oslo\"}}\n</tool_call>\n",
            "Let me see.\n",
            one(&oslo),
        ),
        (
            hermes,
            "<tool_call>{\"name\":\"weather\",\"arguments\":{\"place\":\"</tool_call> <tool_call>\"}}</tool_call>",
            "",
            one(&marks),
        ),
        // Arguments as text, by their other name, and an end that was an end token.
        (
            hermes,
            "<tool_call>{\"name\":\"weather\",\"parameters\":\"{\\\"place\\\": \\\"Oslo\\\"}\"}",
            "",
            one(&oslo),
        ),
        (
            hermes,
            "<tool_call>{\"name\":\"weather\"}</tool_call> <tool_call>{\"name\":\"weather\",\"arguments\":{\"place\":\"Oslo\"}}</tool_call>",
            "",
            [one(&json!({})), one(&oslo)].concat(),
        ),
        // What is no call is text, whole.
        (
            hermes,
            "a <tool_call>{oops}</tool_call> b",
            "a <tool_call>{oops}</tool_call> b",
            vec![],
        ),
        (
            hermes,
            "<tool_call>{\"name\":\"none\"}</tool_call>",
            "<tool_call>{\"name\":\"none\"}</tool_call>",
            vec![],
        ),
        (
            hermes,
            "<tool_call>[]</tool_call>",
            "<tool_call>[]</tool_call>",
            vec![],
        ),
        (
            list,
            "<tool_calls>[\n{\"name\": \"weather\", \"arguments\": {\"place\": \"Oslo\"}},\n{\"name\": \"weather\"}\n]</tool_calls>",
            "",
            [one(&oslo), one(&json!({}))].concat(),
        ),
        (
            open,
            "<|tool_call|>[{\"name\": \"weather\", \"arguments\": {\"place\": \"Oslo\"}}]",
            "",
            one(&oslo),
        ),
    ];
    for (format, text, said, called) in cases {
        for step in [1, 2, 3, 7, 1000] {
            let found = parsed(format, text, step);
            assert_eq!(
                found,
                (said.to_string(), called.clone()),
                "{text:?} by {step}"
            );
        }
    }
}

/// What a model without any sense calls under a constraint.
fn babble(source: &Source, seed: u64) -> Option<String> {
    let tokenizer = tokenizer();
    let vocabulary = Vocabulary::new(&tokenizer, &[1]).expect("a vocabulary");
    let constraint = vocabulary.compile(source).expect("compiles");
    let sampling = SamplingParams {
        temperature: 1.5,
        seed,
        constraint: Some(constraint),
        ..SamplingParams::default()
    };
    let mut sampler = Sampler::new(sampling, 258).expect("parameters");
    let mut said = Vec::new();
    // The end is a little likelier than other tokens.
    let mut logits = vec![0.0; 258];
    logits[1] = 2.0;
    while said.len() < 4000 {
        let token = sampler.sample(&logits, &[], &said).expect("a token").token;
        if token == 1 {
            return Some(tokenizer.decode(&said, true).expect("text"));
        }
        said.push(token);
    }
    None
}

#[test]
fn required_calls_are_valid_and_are_what_is_read() {
    let tools = weather();
    let tokenizer = tokenizer();
    for format in FORMATS {
        for (choice, parallel) in [
            (ToolChoice::Required, true),
            (ToolChoice::Required, false),
            (ToolChoice::Named("weather".into()), true),
        ] {
            let form = Form {
                tools: &tools,
                choice: &choice,
                parallel,
                answer: None,
            };
            let source = form.source(format, &tokenizer).expect("a form");
            for seed in 0..12 {
                let text = babble(&source, seed).expect("ends");
                let (said, called) = parsed(format, &text, 5);
                assert_eq!(said, "", "{text}");
                let most = if parallel && choice == ToolChoice::Required {
                    MOST_CALLS
                } else {
                    1
                };
                assert!((1..=most).contains(&called.len()), "{text}");
                for (name, arguments) in called {
                    let named = !matches!(choice, ToolChoice::Named(_)) || name == "weather";
                    assert!(named, "{text}");
                    let tool = tools.iter().find(|tool| tool.name == name).expect("a tool");
                    let valid = jsonschema::is_valid(&tool.schema(), &arguments);
                    assert!(valid, "{text}");
                }
            }
        }
    }
}

#[test]
fn what_is_not_promised_is_not_held() {
    let (tools, tokenizer) = (weather(), tokenizer());
    let schema = json!({"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": false});
    let source = |tools: &[Tool], choice: ToolChoice, answer: Option<&Value>| {
        let form = Form {
            tools,
            choice: &choice,
            parallel: true,
            answer,
        };
        form.source(Format::default(), &tokenizer)
    };
    assert_eq!(source(&tools, ToolChoice::Auto, None), None);
    assert_eq!(source(&tools, ToolChoice::None, None), None);
    let plain = Some(Source::JsonSchema(schema.clone()));
    assert_eq!(source(&tools, ToolChoice::None, Some(&schema)), plain);
    assert_eq!(source(&[], ToolChoice::Auto, Some(&schema)), plain);
    let either = source(&tools, ToolChoice::Auto, Some(&schema)).expect("a form");
    let texts: Vec<String> = (0..20).filter_map(|seed| babble(&either, seed)).collect();
    let is_answer =
        |text: &&String| serde_json::from_str::<Value>(text).is_ok_and(|v| v == json!({"a": 1}));
    let answers = texts.iter().filter(is_answer).count();
    assert!(answers > 0 && answers < texts.len(), "{texts:?}");
}

#[test]
fn templates_that_know_no_tools_are_given_text() {
    let call = json!({"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{\"place\": \"Oslo\"}"}});
    let messages = [
        json!({"role": "system", "content": "Be brief."}),
        json!({"role": "user", "content": "Rain?"}),
        json!({"role": "assistant", "content": null, "tool_calls": [call]}),
        json!({"role": "tool", "tool_call_id": "1", "name": "weather", "content": "dry"}),
    ];
    let format = Format::default();
    let known = prepare(&messages, &weather(), format, true);
    assert_eq!(
        known[2]["tool_calls"][0]["function"]["arguments"]["place"],
        "Oslo"
    );
    assert_eq!(known[0], messages[0]);
    let told = prepare(&messages, &weather(), format, false);
    let system = told[0]["content"].as_str().expect("text");
    assert!(system.starts_with("Be brief.\n\nYou can call"), "{system}");
    assert!(system.contains("The weather of a place"), "{system}");
    let said = told[2]["content"].as_str().expect("text");
    assert_eq!(
        parsed(format, said, 4).1,
        [("weather".to_string(), json!({"place": "Oslo"}))]
    );
    assert_eq!(
        told[3],
        json!({"role": "user", "content": "Result of weather: dry"})
    );
    let alone = prepare(&messages[1..2], &weather(), format, false);
    assert_eq!((alone.len(), &alone[0]["role"]), (2, &json!("system")));
    assert_eq!(prepare(&messages[1..2], &[], format, false), messages[1..2]);
}

//! Constrained output of the demonstration model: valid whatever is drawn, alone and beside others, with guesses, in
//! forks and from snapshots, in the command.

use serde_json::{Value, json};
use strata::constraint::{self, Constraint, Source};
use strata::ids::{SeqId, TokenId};
use strata::load::{LoadOptions, Model, Silent, load};
use strata::sampler::{SampleError, SamplingParams};
use strata::sequence::Reason;
use strata::session::{Engine, EngineConfig, Error, Output, Request};
use strata_kernels::DType;
use strata_tests::{Folder, run};

fn demo() -> Model {
    let options = LoadOptions {
        model: Some("demo".into()),
        device: "cpu".into(),
        threads: Some(2),
        ..LoadOptions::default()
    };
    load(&options, &mut Silent::default()).expect("the demonstration model")
}

/// Numbers and places of closed form, so that a model without much sense comes to an end.
fn schema() -> Value {
    json!({
        "type": "object", "additionalProperties": false, "required": ["place", "count", "near"],
        "properties": {
            "place": {"type": "string", "maxLength": 8},
            "count": {"type": "integer", "minimum": 1, "maximum": 500},
            "near": {"type": "array", "items": {"enum": ["Oslo", "Bergen"]}, "maxItems": 2},
        }
    })
}

fn is_valid(text: &str) -> bool {
    let Ok(Value::Object(found)) = serde_json::from_str(text) else {
        return false;
    };
    let place = found.get("place").and_then(Value::as_str);
    let count = found.get("count").and_then(Value::as_u64);
    let near = found.get("near").and_then(Value::as_array);
    found.len() == 3
        && place.is_some_and(|p| p.chars().count() <= 8)
        && count.is_some_and(|n| (1..=500).contains(&n))
        && near.is_some_and(|n| n.len() <= 2 && n.iter().all(|v| v == "Oslo" || v == "Bergen"))
}

fn engine(model: &Model, lookup: usize) -> Engine {
    let config = EngineConfig::new(512, 6, DType::F32).with_lookup(lookup);
    Engine::new(model.network.clone(), config).expect("an engine")
}

fn request(model: &Model, prompt: &str, constraint: Option<Constraint>, seed: u64) -> Request {
    Request {
        prompt: model.tokenizer().unwrap().encode(prompt, true).unwrap(),
        max_tokens: 200,
        stop: model.eos(),
        sampling: SamplingParams {
            temperature: if seed == 0 { 0.0 } else { 1.5 },
            seed,
            constraint,
            ..SamplingParams::default()
        },
        ..Request::default()
    }
}

/// Runs all to their ends: tokens, and why each ended.
fn run_all(engine: &mut Engine, ids: &[SeqId]) -> Vec<(Vec<TokenId>, Option<Reason>)> {
    let mut ends: Vec<(Vec<TokenId>, Option<Reason>)> = vec![Default::default(); ids.len()];
    while engine.advance().expect("a step") {
        for output in engine.outputs() {
            match output {
                Output::Token { id, sampled } => {
                    let at = ids.iter().position(|i| i == id).expect("known");
                    ends[at].0.push(sampled.token);
                }
                Output::Finished { id, reason } => {
                    let at = ids.iter().position(|i| i == id).expect("known");
                    ends[at].1 = Some(*reason);
                }
            }
        }
    }
    ends
}

fn text(model: &Model, tokens: &[TokenId]) -> String {
    model.tokenizer().unwrap().decode(tokens, true).unwrap()
}

const PROMPTS: [&str; 3] = [
    "Q: Where does Mara live?\nA:",
    "{\"place\": \"Oslo\", \"count\": 12, \"near\": [\"Oslo\"]}\n{\"place\": \"Oslo\", \"count\": 12, \"near\": [\"Oslo\"]}\n",
    "x",
];

#[test]
fn every_draw_is_valid_and_the_same_with_guesses_and_neighbours() {
    let model = demo();
    let form = model
        .constrain(&Source::JsonSchema(schema()))
        .expect("a form");
    let mut all = Vec::new();
    for lookup in [0, 16] {
        for together in [1, 5] {
            let mut engine = engine(&model, lookup);
            let requests: Vec<Request> = (0..15)
                .map(|i| request(&model, PROMPTS[i % 3], Some(form.clone()), i as u64))
                .collect();
            let mut texts = Vec::new();
            for group in requests.chunks(together) {
                let mut ids: Vec<SeqId> = group
                    .iter()
                    .map(|r| engine.submit(r.clone()).unwrap())
                    .collect();
                // One that may say what it likes runs beside them.
                ids.push(
                    engine
                        .submit(request(&model, PROMPTS[0], None, 99))
                        .unwrap(),
                );
                let ends = run_all(&mut engine, &ids);
                for (tokens, reason) in &ends[..group.len()] {
                    let said = text(&model, tokens);
                    assert_eq!(*reason, Some(Reason::Stop), "{said}");
                    assert!(is_valid(&said), "{said}");
                    texts.push(said);
                }
                ids.iter().for_each(|id| assert!(engine.remove(*id)));
            }
            all.push(texts);
        }
    }
    assert!(all.iter().all(|texts| *texts == all[0]), "{all:#?}");
}

#[test]
fn forks_and_snapshots_stand_where_their_text_does() {
    let model = demo();
    let form = model
        .constrain(&Source::JsonSchema(schema()))
        .expect("a form");
    let mut engine = engine(&model, 0);
    let id = engine
        .submit(request(&model, PROMPTS[0], Some(form.clone()), 3))
        .unwrap();
    for _ in 0..6 {
        engine.advance().unwrap();
    }
    let sampling = |constraint, seed| SamplingParams {
        temperature: 1.5,
        seed,
        constraint,
        ..SamplingParams::default()
    };
    let fork = engine.fork(id, sampling(Some(form.clone()), 4)).unwrap();
    let begun = engine.sequence(fork).unwrap().generated().to_vec();
    assert!(!begun.is_empty());
    // What was written so far is no date.
    let date = model
        .constrain(&Source::Regex("[0-9]{4}".into()))
        .expect("a form");
    let refused = engine.fork(id, sampling(Some(date), 4)).unwrap_err();
    let is_left = matches!(
        &refused,
        Error::Sample(SampleError::Constraint(constraint::Error::Left { .. }))
    );
    assert!(is_left, "{refused}");
    // A snapshot has no generated tokens: whoever goes on from it begins anew.
    let snapshot = engine.snapshot(id).unwrap();
    let ends = run_all(&mut engine, &[id, fork]);
    for (i, id) in [id, fork].into_iter().enumerate() {
        let said = text(&model, engine.sequence(id).unwrap().generated());
        assert!(is_valid(&said), "{said}");
        assert_eq!(ends[i].1, Some(Reason::Stop));
    }
    let prompt = engine.sequence(id).unwrap().tokens.clone();
    let again = Request {
        prompt: [
            &prompt[..],
            &model.tokenizer().unwrap().encode("\n", false).unwrap(),
        ]
        .concat(),
        ..request(&model, "", Some(form), 5)
    };
    let restored = engine.restore(snapshot, again).unwrap();
    let ends = run_all(&mut engine, &[restored]);
    assert!(is_valid(&text(&model, &ends[0].0)), "{ends:?}");
}

#[test]
fn a_form_that_gets_lost_ends_its_own_sequence_only() {
    let model = demo();
    let form = model
        .constrain(&Source::Regex("[a-z]{3}".into()))
        .expect("a form");
    let mut engine = engine(&model, 8);
    let mut broken = request(&model, PROMPTS[0], Some(form.clone()), 1);
    // All that the form allows is made impossible: twice the least number is minus infinity.
    let vocab = model.network.graph.vocab as u32;
    broken.sampling.logit_bias = (0..2 * vocab).map(|i| (i / 2, -f32::MAX)).collect();
    let ids = [
        engine.submit(broken).unwrap(),
        engine
            .submit(request(&model, PROMPTS[0], Some(form), 1))
            .unwrap(),
    ];
    let ends = run_all(&mut engine, &ids);
    assert_eq!(ends[0], (Vec::new(), Some(Reason::Failed)));
    let why = engine.failure(ids[0]).expect("a reason").to_string();
    assert!(why.contains("no token of"), "{why}");
    assert_eq!(
        (ends[1].1, engine.failure(ids[1])),
        (Some(Reason::Stop), None)
    );
    let said = text(&model, &ends[1].0);
    assert!(
        said.len() == 3 && said.bytes().all(|b| b.is_ascii_lowercase()),
        "{said}"
    );
}

fn strata(arguments: &[&str]) -> (bool, String, String) {
    let folder = Folder::new("constraint");
    let done = run(arguments, &folder.0);
    (done.status == 0, done.out, done.err)
}

#[test]
fn the_command_writes_what_is_asked_for() {
    let schema = schema().to_string();
    let generate = [
        "generate",
        "--prompt",
        "Q: Where?\nA:",
        "--temperature",
        "1.5",
        "--seed",
    ];
    for seed in ["1", "2"] {
        let (done, out, err) = strata(&[&generate[..], &[seed, "--json-schema", &schema]].concat());
        assert!(done && is_valid(&out), "{out} {err}");
    }
    let (done, out, err) =
        strata(&[&generate[..], &["3", "--choice", "yes", "--choice", "no"]].concat());
    assert!(done && ["yes", "no"].contains(&out.trim()), "{out} {err}");
    let (done, out, err) =
        strata(&[&generate[..], &["3", "--regex", "[ab]{4}", "--lookup", "8"]].concat());
    assert!(done && out.trim().len() == 4, "{out} {err}");
    for (option, value, expected) in [
        (
            "--json-schema",
            "{\"type\": \"integer\", \"minimum\": 2, \"maximum\": 1}",
            "minimum",
        ),
        ("--json-schema", "{\"type\"", "no JSON"),
        ("--json-schema", "/nowhere.json", "/nowhere.json"),
        ("--regex", "(", "regular expression"),
        ("--grammar", "/nowhere.lark", "/nowhere.lark"),
    ] {
        let (done, out, err) = strata(&["generate", "--prompt", "x", option, value]);
        assert!(
            !done && out.is_empty() && err.contains(expected),
            "{option} {value}: {err}"
        );
    }
    let (done, _, err) = strata(&["generate", "--prompt", "x", "--regex", "a", "--choice", "b"]);
    assert!(!done && err.contains("cannot be used with"), "{err}");
    let (done, _, err) = strata(&["generate", "--prompt", "x", "--regex", "a", "--ignore-eos"]);
    assert!(!done && err.contains("cannot be used with"), "{err}");
}

use std::path::Path;
use std::sync::Arc;

use serde_json::{Value, json};

use super::*;
use crate::sampler::{SampleError, Sampler, SamplingParams};
use crate::text::{Bytes, Tokenizer};

/// Tokenizers of every kind that there is, each with its end token.
fn tokenizers() -> Vec<(&'static str, Tokenizer, u32)> {
    let names = ["byte_level", "sentencepiece", "metaspace", "unigram"];
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/text");
    let mut all = vec![("bytes", Tokenizer::from_bytes(bytes()), 1)];
    all.extend(names.map(|name| {
        let opened = Tokenizer::open(golden.join(name).as_path(), None);
        let tokenizer = opened.expect("a golden tokenizer");
        let end = (0..tokenizer.vocab_size() as u32).find(|id| tokenizer.is_special(*id));
        let end = tokenizer.eos_id().or(end).expect("a special token");
        (name, tokenizer, end)
    }));
    all
}

fn bytes() -> Bytes {
    Bytes {
        offset: 3,
        bos: Some(0),
        eos: Some(1),
        pad: Some(2),
    }
}

fn byte_vocabulary() -> Arc<Vocabulary> {
    Vocabulary::new(&Tokenizer::from_bytes(bytes()), &[1]).expect("a vocabulary")
}

/// What a model without any sense writes under a constraint: text and whether it came to its end.
fn babble(tokenizer: &Tokenizer, constraint: &Constraint, end: u32, seed: u64) -> (String, bool) {
    let vocab = tokenizer.vocab_size() + 5; // models have rows that are no tokens
    let sampling = SamplingParams {
        temperature: 1.5,
        seed,
        repetition_penalty: if seed.is_multiple_of(3) { 1.3 } else { 1.0 },
        top_k: if seed.is_multiple_of(2) { 0 } else { 40 },
        constraint: Some(constraint.clone()),
        ..SamplingParams::default()
    };
    let mut sampler = Sampler::new(sampling, vocab).expect("parameters");
    let mut said: Vec<u32> = Vec::new();
    while said.len() < 400 {
        let noise = |i: usize| {
            let x = (i as u64 + 1).wrapping_mul(seed * 31 + said.len() as u64 + 7);
            (x.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as f32 / (1 << 24) as f32
        };
        let logits: Vec<f32> = (0..vocab).map(|i| 8.0 * noise(i)).collect();
        let token = sampler.sample(&logits, &[0], &said).expect("a token").token;
        if token == end {
            return (tokenizer.decode(&said, true).expect("text"), true);
        }
        assert!(!tokenizer.is_special(token), "{token} is no text");
        said.push(token);
    }
    (tokenizer.decode(&said, true).expect("text"), false)
}

fn schemas() -> Vec<Value> {
    vec![
        json!({"type": "object", "additionalProperties": false, "required": ["name", "age", "tags"],
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 6},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["a", "bb", "c c"]}, "maxItems": 3},
        }}),
        json!({"anyOf": [{"type": "boolean"}, {"type": "null"}, {"const": {"x": [1, "é"]}}]}),
        json!({"type": "object", "required": ["tree"], "additionalProperties": false,
            "properties": {"tree": {"$ref": "#/$defs/node"}},
            "$defs": {"node": {"type": "object", "required": ["v"], "additionalProperties": false,
                "properties": {"v": {"type": "integer", "minimum": 0, "maximum": 9},
                    "next": {"$ref": "#/$defs/node"}}}}}),
        json!({"type": "string", "pattern": "^[a-f]{2,4}-[0-9]{2}$"}),
        json!({"type": "array", "minItems": 2, "maxItems": 2,
            "prefixItems": [{"type": "number", "minimum": -1.5, "maximum": 2.5}, {"type": "string", "format": "date"}]}),
    ]
}

#[test]
fn whatever_is_drawn_is_valid_json_of_the_schema_in_every_vocabulary() {
    for (name, tokenizer, end) in tokenizers() {
        let vocabulary = Vocabulary::new(&tokenizer, &[end]).expect("a vocabulary");
        for schema in schemas() {
            let valid = jsonschema::validator_for(&schema).expect("a schema");
            let source = Source::JsonSchema(schema.clone());
            let constraint = match vocabulary.compile(&source) {
                Ok(constraint) => constraint,
                // Small vocabularies lack letters, and are told so.
                Err(Error::Refused { reason, .. }) if reason.starts_with("no text") => continue,
                Err(error) => panic!("{name}: {error}"),
            };
            let mut ended = 0;
            for seed in 0..30 {
                let (text, whole) = babble(&tokenizer, &constraint, end, seed);
                if whole {
                    ended += 1;
                    let found: Value = serde_json::from_str(&text)
                        .unwrap_or_else(|e| panic!("{name}: {text:?}: {e}"));
                    assert!(valid.is_valid(&found), "{name}: {text} under {schema}");
                }
            }
            assert!(ended > 10, "{name}: {ended} of 30 ended under {schema}");
        }
    }
}

#[test]
fn expressions_grammars_and_choices_are_followed_to_their_end() {
    let date = "(19|20)[0-9]{2}-(0[1-9]|1[0-2])";
    let sums = "start: number (\"+\" number)~1..3\nnumber: /[1-9][0-9]?/";
    let choices = vec![
        "yes".to_string(),
        "no (really)".into(),
        "1 + 1 = \"2\"\n".into(),
        "</a> #&~ \\ ^$".into(),
    ];
    let every = choices.concat();
    for (name, tokenizer, end) in tokenizers() {
        let vocabulary = Vocabulary::new(&tokenizer, &[end]).expect("a vocabulary");
        type Right<'a> = &'a dyn Fn(&str) -> bool;
        // Each with a text of its form, which a vocabulary may be too small to write.
        let forms: [(Source, &str, Right); 3] = [
            (Source::Regex(date.into()), "2019-12", &|t| {
                t.len() == 7
                    && t[..4]
                        .parse::<u32>()
                        .is_ok_and(|y| (1900..2100).contains(&y))
            }),
            (Source::Grammar(sums.into()), "12+34+56+78", &|t| {
                t.contains('+') && t.split('+').all(|n| n.parse::<u32>().is_ok())
            }),
            (Source::Choice(choices.clone()), &every, &|t| {
                choices.iter().any(|c| c == t)
            }),
        ];
        for (source, sample, holds) in forms {
            let tokens = tokenizer.encode(sample, false).expect("tokens");
            if tokenizer.decode(&tokens, true).expect("text").trim() != sample {
                continue;
            }
            let constraint = vocabulary.compile(&source).expect("compiles");
            for seed in 0..20 {
                let (text, whole) = babble(&tokenizer, &constraint, end, seed);
                assert!(whole && holds(&text), "{name}: {text:?} under {source:?}");
            }
        }
    }
    // In the vocabulary of bytes none of them may be left out.
    let vocabulary = byte_vocabulary();
    for source in [
        Source::Regex(date.into()),
        Source::Grammar(sums.into()),
        Source::Choice(choices),
    ] {
        vocabulary.compile(&source).expect("compiles");
    }
}

#[test]
fn what_has_one_form_only_is_written_whatever_the_model_wants() {
    let tokenizer = Tokenizer::from_bytes(bytes());
    let vocabulary = byte_vocabulary();
    let constraint = vocabulary
        .compile(&Source::Choice(vec!["{\"only\": true}".into()]))
        .expect("compiles");
    let wanted: Vec<(u32, f32)> = vec![(b'x' as u32 + 3, 90.0), (1, 80.0)];
    let sampling = SamplingParams {
        constraint: Some(constraint),
        logit_bias: wanted,
        logprobs: Some(1),
        ..SamplingParams::greedy()
    };
    let mut sampler = Sampler::new(sampling, 259).expect("parameters");
    assert!(!sampler.takes_likeliest(), "the device must not choose");
    let (mut said, logits) = (Vec::new(), vec![0.0; 259]);
    while said.last() != Some(&1) {
        let sampled = sampler.sample(&logits, &[], &said).expect("a token");
        // Log-probabilities are the model's, whatever is allowed.
        assert_eq!(sampled.logprob, Some(-(259f32.ln())));
        said.push(sampled.token);
    }
    said.pop();
    assert_eq!(tokenizer.decode(&said, true).unwrap(), "{\"only\": true}");
}

#[test]
fn a_follower_finds_its_place_from_any_other() {
    let vocabulary = byte_vocabulary();
    let constraint = vocabulary
        .compile(&Source::Regex("(ab|cd)*e?".into()))
        .expect("compiles");
    let ids = |text: &str| -> Vec<u32> { text.bytes().map(|b| u32::from(b) + 3).collect() };
    let mut follower = constraint.begin();
    let mut allowed = |text: &str| {
        let mut logits = vec![0.0; 259];
        follower.restrict(&ids(text), &mut logits).map(|()| {
            let open = (0..259u32).filter(|i| logits[*i as usize] == 0.0);
            open.map(|i| {
                if i == 1 {
                    '$'
                } else {
                    char::from((i - 3) as u8)
                }
            })
            .collect::<String>()
        })
    };
    let cases = [
        ("", "$ace"),
        ("abcd", "$ace"),
        ("abc", "d"),
        ("ab", "$ace"),
        ("cd", "$ace"),
        ("cde", "$"),
        ("a", "b"),
    ];
    for (text, expected) in cases {
        assert_eq!(allowed(text).as_deref(), Ok(expected), "after {text:?}");
    }
    let left = allowed("abx").unwrap_err();
    assert!(matches!(left, Error::Left { position: 2, .. }), "{left}");
    assert_eq!(allowed("ab").as_deref(), Ok("$ace"), "after an error");
}

#[test]
fn a_model_that_makes_all_allowed_tokens_impossible_fails_alone() {
    let vocabulary = byte_vocabulary();
    let constraint = vocabulary
        .compile(&Source::Regex("ab".into()))
        .expect("compiles");
    let sampling = SamplingParams {
        constraint: Some(constraint),
        ..SamplingParams::default()
    };
    let mut sampler = Sampler::new(sampling, 259).expect("parameters");
    let mut logits = vec![0.0; 259];
    logits[usize::from(b'a') + 3] = f32::NEG_INFINITY;
    let error = sampler.sample(&logits, &[], &[]).unwrap_err();
    assert!(error.is_of_sequence(), "{error}");
    logits[0] = f32::NAN;
    let error = sampler.sample(&logits, &[], &[]).unwrap_err();
    assert!(matches!(error, SampleError::Nan { .. }), "{error}");
}

#[test]
fn what_cannot_be_is_an_error_that_says_what_to_do() {
    let vocabulary = byte_vocabulary();
    let schema = |value: Value| Source::JsonSchema(value);
    let cases: Vec<(Source, &str)> = vec![
        (
            schema(json!({"type": "integer", "minimum": 5, "maximum": 3})),
            "minimum",
        ),
        (schema(json!({"enum": []})), "empty"),
        (schema(json!({"type": "strong"})), "strong"),
        (schema(json!(false)), "expected an object"),
        (schema(json!([1])), "expected an object"),
        (schema(json!({"$ref": "#/$defs/none"})), "none"),
        (
            schema(json!({"$ref": "https://example.org/s.json"})),
            "example.org",
        ),
        (
            schema(json!({"type": "object", "required": ["a"], "properties": {"a": false}})),
            "nsatisfiable",
        ),
        (Source::Regex("a(".into()), "regular expression"),
        (Source::Regex("(?=a)b".into()), "regular expression"),
        (
            Source::Regex("[^\\x00-\\u{10FFFF}]".into()),
            "regular expression",
        ),
        (Source::Grammar(String::new()), "grammar"),
        (Source::Grammar("start: missing".into()), "missing"),
        (Source::Grammar("start: start \"a\"".into()), "grammar"),
        (Source::Choice(vec![]), "no text to choose"),
        (Source::Choice(vec![String::new()]), "no text to choose"),
    ];
    for (source, expected) in cases {
        let error = vocabulary.compile(&source).expect_err("cannot be compiled");
        let message = error.to_string();
        assert!(message.contains(expected), "{source:?}: {message}");
        assert!(message.len() < 900, "{message}");
    }
    assert_eq!(
        Vocabulary::new(&Tokenizer::from_bytes(bytes()), &[]).unwrap_err(),
        Error::NoEnd
    );
}

/// Sources that explode: an error or a constraint, in bounded time, and none that a first token costs much.
#[test]
fn hostile_sources_are_errors_or_work() {
    let vocabulary = byte_vocabulary();
    let mut deep = json!({"type": "integer"});
    for _ in 0..1000 {
        let mut outer = serde_json::Map::new();
        outer.insert("items".into(), deep); // json! would copy what is inside, level by level
        deep = Value::Object(outer);
    }
    let mut nested = json!({"type": "integer"});
    for _ in 0..60 {
        nested = json!({"anyOf": [nested.clone(), {"type": "null"}]});
    }
    let many: Vec<String> = (0..40_000).map(|i| format!("value {i}")).collect();
    let wide: serde_json::Map<String, Value> = (0..3000)
        .map(|i| {
            (
                format!("p{i}"),
                json!({"type": "string", "pattern": "^(a|b)*c{3,9}$"}),
            )
        })
        .collect();
    let mut doubling = serde_json::Map::new();
    for i in 0..60 {
        let next = json!({"$ref": format!("#/$defs/d{}", i + 1)});
        doubling.insert(
            format!("d{i}"),
            json!({"allOf": [next, next], "anyOf": [next, next]}),
        );
    }
    doubling.insert("d60".into(), json!({"type": "object"}));
    let all = |value: Value| Source::JsonSchema(value);
    let cases: Vec<(&str, Source)> = vec![
        ("deep", all(deep)),
        ("nested", all(nested)),
        ("huge enum", all(json!({"enum": many}))),
        ("wide", all(json!({"type": "object", "properties": wide}))),
        ("loop", all(json!({"$ref": "#"}))),
        (
            "two in a loop",
            all(
                json!({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}),
            ),
        ),
        ("loop of all", all(json!({"allOf": [{"$ref": "#"}]}))),
        (
            "doubling",
            all(json!({"$ref": "#/$defs/d0", "$defs": doubling})),
        ),
        (
            "counts",
            all(json!({"type": "string", "minLength": 1_000_000_000})),
        ),
        (
            "items",
            all(json!({"type": "array", "minItems": 1_000_000_000, "items": {"type": "null"}})),
        ),
        (
            "pattern",
            all(json!({"type": "string", "pattern": "^((a{1,900}){1,900}){1,900}$"})),
        ),
        (
            "multiple",
            all(json!({"type": "integer", "multipleOf": 999_983})),
        ),
        (
            "powers",
            Source::Regex("((((((a?){99}){99}){99}){99}){99}){99}".into()),
        ),
        (
            "parentheses",
            Source::Regex("(".repeat(50_000) + &")".repeat(50_000)),
        ),
        ("backwards", Source::Regex("(a|b)*a(a|b){40}".into())),
        ("classes", Source::Regex("\\w{500}\\W{500}".into())),
        (
            "ambiguous",
            Source::Grammar("start: a\na: a a | \"x\" | ".into()),
        ),
        (
            "brackets",
            Source::Grammar("start: ".to_string() + &"(".repeat(20_000)),
        ),
        ("long", Source::Grammar("x".repeat(1 << 20))),
    ];
    let mut refused = 0;
    for (name, source) in cases {
        match vocabulary.compile(&source) {
            Err(error) => {
                refused += 1;
                assert!(error.to_string().len() < 900, "{name}: {error}");
            }
            Ok(constraint) => {
                let tokenizer = Tokenizer::from_bytes(bytes());
                let mut follower = constraint.begin();
                let mut said = Vec::new();
                // The first tokens that are allowed, again and again.
                for _ in 0..50 {
                    let mut logits = vec![0.0; tokenizer.vocab_size()];
                    if let Err(error) = follower.restrict(&said, &mut logits) {
                        assert!(matches!(error, Error::Lost { .. }), "{name}: {error}");
                        break;
                    }
                    let next = logits.iter().rposition(|l| *l == 0.0).expect("a token");
                    said.push(next as u32);
                }
            }
        }
    }
    assert!(refused > 8, "{refused} were refused");
}

//! Configs as they are found, and as they should not be.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::common::{Chance, golden};
use strata_converters::{Card, Checkpoint, Config, Mapping, Origin, cards};
use strata_layers::Graph;
use strata_layers::yaml::{Mark, Value};

#[test]
fn numbers_of_python_are_read() {
    let text = r#"{"a": Infinity, "b": -Infinity, "c": NaN, "d": {"__float__": "Infinity"}, "e": "-Infinity",
 "f": 1e-6, "g": 12, "h": -0.5, "i": 1e400, "j": 123456789012345678901, "k": [], "l": {},
 "m": "a\"\\\n\u00e9\ud83d\ude00\ud800", "n": null, "o": true, "p": 1, "p": 2}"#;
    let config = Config::parse(text, "config.json").unwrap();
    let float = |key: &str| match config.get(key).unwrap().value {
        Value::Float(f) => f,
        ref other => panic!("{key}: {other:?}"),
    };
    assert_eq!((float("a"), float("b")), (f64::INFINITY, f64::NEG_INFINITY));
    assert!(float("c").is_nan());
    assert_eq!((float("d"), float("e")), (f64::INFINITY, f64::NEG_INFINITY));
    assert_eq!(
        (float("f"), float("h"), float("i")),
        (1e-6, -0.5, f64::INFINITY)
    );
    assert_eq!(float("j"), 123456789012345678901.0);
    assert_eq!(config.get("g").unwrap().value, Value::Int(12));
    assert_eq!(
        config.get("g").unwrap().at,
        Mark {
            line: 2,
            column: 18
        }
    );
    let text = Value::Text("a\"\\\né😀\u{fffd}".into());
    assert_eq!(config.get("m").unwrap().value, text);
    // As in Python, the last one counts.
    assert_eq!(config.get("p").unwrap().value, Value::Int(2));
    assert_eq!(config.entries().len(), 16);
    assert_eq!(config.texts("e"), Vec::<&str>::new());
}

#[test]
fn faults_have_line_and_column() {
    let check = |text: &str, expected: &str| {
        let message = Config::parse(text, "c.json").unwrap_err().to_string();
        assert!(message.contains(expected), "{text:.40}: {message}");
    };
    check("", "c.json:1:1: the file ends where a value is expected");
    check(
        "{\"a\": 1,\n \"b\" 2}",
        "c.json:2:6: found '2', expected `:` after the key \"b\"",
    );
    check(
        "{\"a\": 1,\n  x: 2}",
        "c.json:2:3: found 'x', expected a key in double quotes",
    );
    check("{\"a\": 1,}", "c.json:1:9: found '}', expected a key");
    check("{\"a\": wat}", "c.json:1:7: found `wat`, expected a value");
    check("{\"a\": +1}", "found `+1`");
    check("{\"a\": inf}", "found `inf`");
    check("{\"a\": 1.2.3}", "found `1.2.3`");
    check("{\"a\": [1 2]}", "expected `,` or `]`");
    check("{\"a\": \"x", "the file ends inside a text");
    check("{\"a\": \"\\q\"}", "there is no escape \\q");
    check("{\"a\": \"\\u12\"}", "four hexadecimal digits");
    check("{\"a\": \"x\ny\"}", "inside a text");
    check("[1]", "c.json:1:1: found a list, expected a mapping");
    check("{} {}", "c.json:1:4: found '{' after the end");
    check(
        &("{\"a\":".to_string() + &"[".repeat(100_000)),
        "nested more than 64 deep",
    );
    check(&" ".repeat(5 << 20), "more than the 4194304 that are read");
}

#[test]
fn no_config_makes_it_panic() {
    let mut chance = Chance(11);
    let golden = std::fs::read(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../tests/golden/jamba/odd/config.json"
    ))
    .unwrap();
    let start = Instant::now();
    let mut plans = 0;
    while start.elapsed() < Duration::from_millis(1500) {
        let mut bytes = golden.clone();
        chance.spoil(&mut bytes);
        let Ok(text) = String::from_utf8(bytes) else {
            continue;
        };
        if let Ok(config) = Config::parse(&text, "config.json")
            && let Ok(card) = cards::find(&config)
        {
            plans += usize::from(card.plan(&config, "spoiled").is_ok());
        }
    }
    assert!(plans > 0);
}

#[test]
fn no_card_makes_it_panic() {
    let mut chance = Chance(13);
    let text = include_bytes!("../../../model-cards/mamba.yaml");
    let files = golden("mamba/tied");
    let config = Config::open(&files).unwrap();
    let checkpoint = Arc::new(Checkpoint::open(&files).unwrap());
    let (start, mut resolved) = (Instant::now(), 0);
    while start.elapsed() < Duration::from_millis(1500) {
        let mut bytes = text.to_vec();
        chance.spoil(&mut bytes);
        let Ok(text) = String::from_utf8(bytes) else {
            continue;
        };
        if let Ok(card) = Card::parse(&text, "card.yaml")
            && let Ok(plan) = card.plan(&config, "spoiled")
            && let Ok(graph) = Graph::lower(&plan, "card.yaml")
        {
            let weights = graph.weights();
            let mapping = Mapping::resolve(Some(&card), &weights, checkpoint.clone(), Origin::Card);
            if let Ok(mapping) = mapping {
                let loaded = weights.iter().all(|w| mapping.load(&w.path).is_ok());
                resolved += usize::from(loaded);
            }
        }
    }
    assert!(resolved > 0);
}

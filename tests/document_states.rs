//! Documents' state files: that what is answered from one is, bit for bit, what is answered without; how a document
//! stands before its questions; and files that lie.

#![cfg(target_os = "linux")]

use std::fs;

use serde_json::{Value, json};
use strata::document::{self, Book, Error, ModelSource, Notes, Part, Placed, Worded, Wording};
use strata::ids::TokenId;
use strata::load::{LoadOptions, Model, Silent, load};
use strata::session::{Engine, EngineConfig, Output, Request};
use strata::state_file;
use strata::text::Tokenizer;
use strata_kernels::KvType;
use strata_tests::{Folder, check, golden, root, run, text};

const QUESTION: &str = "Where does Mara Tolvin live?";

fn sample() -> String {
    fs::read_to_string(root().join("model-cards/demo/sample.md")).unwrap()
}

/// Tokens and the bits of the logits that chose them.
fn follow(engine: &mut Engine, prompt: &[TokenId]) -> Vec<(TokenId, Vec<u32>)> {
    let request = Request {
        prompt: prompt.to_vec(),
        max_tokens: 12,
        ..Request::default()
    };
    let id = engine.submit(request).unwrap();
    let mut found = Vec::new();
    loop {
        let mut bits = Vec::new();
        let mut observe =
            |_, _, logits: &[f32]| bits = logits.iter().map(|l| l.to_bits()).collect();
        if !engine.step(&mut observe).unwrap() {
            engine.remove(id);
            return found;
        }
        for output in engine.outputs() {
            if let Output::Token { sampled, .. } = output {
                found.push((sampled.token, bits.clone()));
            }
        }
    }
}

fn notes(placed: &Placed, model: &Model) -> Notes {
    Notes {
        parts: vec![Part {
            name: "a".into(),
            bytes: 1,
            end: placed.ends[0],
        }],
        tokens: placed.tokens.len(),
        chat: true,
        anchor: placed.anchor.clone(),
        anchor_tokens: placed.anchor_tokens,
        name: model.name.clone(),
        source: ModelSource::default(),
    }
}

fn fresh(model: &Model, policy: &str) -> Engine {
    let config = EngineConfig::new(4096, 2, model.kv_dtype);
    let mut engine = Engine::new(model.network.clone(), config).unwrap();
    engine.keep_states(policy.parse().unwrap(), model.fingerprint().unwrap());
    engine
}

#[test]
fn what_is_answered_from_a_file_is_bit_equal() {
    answered_from_a_file("bit-equal", None);
}

#[test]
fn so_it_is_with_keys_and_values_in_bytes() {
    answered_from_a_file("bit-equal-int8", Some(KvType::Int8));
}

fn demo(kv: Option<KvType>) -> Model {
    let options = LoadOptions {
        device: "cpu".into(),
        kv,
        ..LoadOptions::default()
    };
    load(&options, &mut Silent::default()).unwrap()
}

#[test]
fn a_state_of_another_type_of_keys_and_values_is_refused() {
    let folder = Folder::new("other-kv");
    let path = folder.0.join("a.state");
    let read = |kv| {
        let model = demo(kv);
        let config = EngineConfig::new(256, 1, model.kv_dtype);
        (
            Engine::new(model.network.clone(), config).unwrap(),
            model.fingerprint().unwrap(),
        )
    };
    let (mut engine, fingerprint) = read(Some(KvType::Int8));
    let prompt = (1..100).collect();
    let request = Request {
        prompt,
        ..Request::default()
    };
    let id = engine.submit(request).unwrap();
    while engine.advance().unwrap() {}
    let snapshot = engine.snapshot(id).unwrap();
    state_file::save(&engine, snapshot, &fingerprint, &path).unwrap();
    state_file::load(&mut engine, &fingerprint, &path).unwrap();
    let (mut other, fingerprint) = read(None);
    let used = other.pages_used();
    let error = state_file::load(&mut other, &fingerprint, &path)
        .unwrap_err()
        .to_string();
    let expected =
        "the state has keys and values in int8, and they are kept in bf16 here; give --kv int8";
    assert!(error.ends_with(expected), "{error}");
    assert_eq!(other.pages_used(), used);
}

fn answered_from_a_file(name: &str, kv: Option<KvType>) {
    let folder = Folder::new(name);
    let model = demo(kv);
    let wording = Worded {
        model: &model,
        chat: true,
    };
    let document = sample();
    let placed = document::place(&wording, &[&document]).unwrap();
    let prompt = placed.prompt(&wording, QUESTION).unwrap();
    let whole = wording.text(&document, QUESTION).unwrap();
    assert_eq!(prompt, wording.encode(&whole).unwrap());
    let config = EngineConfig::new(4096, 1, model.kv_dtype);
    let mut plain = Engine::new(model.network.clone(), config).unwrap();
    let unbroken = follow(&mut plain, &prompt);
    assert!(unbroken.len() >= 11);

    // Read in two goes, the second after a restart.
    let path = folder.0.join("a.state");
    let notes = notes(&placed, &model);
    let mut engine = fresh(&model, "every=100");
    let mut steps = 0;
    let mut twice = |_| {
        steps += 1;
        steps < 4
    };
    let first = document::read(&mut engine, &placed, &mut twice).unwrap();
    assert!((1..placed.tokens.len()).contains(&first.read), "{first:?}");
    document::write(&engine, &placed, first.read, &notes, &path).unwrap();
    drop(engine);
    let book = Book::open(&path).unwrap();
    assert!(matches!(book.placed(0), Err(Error::Unfinished { .. })));
    let mut engine = fresh(&model, "every=100; budget=1200kB");
    engine.attach(&book.file).unwrap();
    let second = document::read(&mut engine, &placed, &mut |_| true).unwrap();
    assert_eq!(
        (second.resumed, second.read),
        (first.read, placed.tokens.len())
    );
    document::write(&engine, &placed, second.read, &notes, &path).unwrap();
    assert_eq!(engine.cache_faults(), Vec::<String>::new());
    drop(engine);

    let book = Book::open(&path).unwrap();
    assert_eq!(book.notes, notes);
    assert_eq!(book.placed(0).unwrap(), placed);
    assert!(
        book.file.snapshots().len() > 3,
        "{:?}",
        book.file.snapshots()
    );
    // From every state of the file, and more than once.
    for policy in ["", "every=64; ends; branches", "ends; budget=1"] {
        let mut engine = fresh(&model, policy);
        engine.attach(&book.file).unwrap();
        for _ in 0..2 {
            assert!(follow(&mut engine, &prompt) == unbroken, "{policy:?}");
        }
        for at in book.file.snapshots() {
            let mut other = prompt[..*at].to_vec();
            other.extend([40, 41, 42]);
            let expected = follow(&mut plain, &other);
            assert!(
                follow(&mut engine, &other) == expected,
                "after {at} tokens, {policy:?}"
            );
        }
        assert_eq!(engine.cache_faults(), Vec::<String>::new());
        assert_eq!(engine.cache_use().unwrap().trouble, None);
    }
}

/// Tokenizers of every kind under templates of two kinds.
struct Golden {
    tokenizer: Tokenizer,
    chat: bool,
}

impl Wording for Golden {
    fn text(&self, document: &str, question: &str) -> Result<String, Error> {
        Ok(match self.chat {
            true => format!("### {}\n\n[Q] {}\n[A]", document.trim(), question.trim()),
            false => format!("{}\n\n{question}", document.trim_end()),
        })
    }

    fn encode(&self, text: &str) -> Result<Vec<TokenId>, Error> {
        Ok(self.tokenizer.encode(text, !self.chat)?)
    }

    fn bytes(&self, token: TokenId) -> Vec<u8> {
        self.tokenizer.token_bytes(token)
    }
}

#[test]
fn a_question_is_cut_as_within_the_whole_text() {
    for name in [
        "unigram",
        "sentencepiece",
        "metaspace",
        "byte_level",
        "word_piece",
        "byte_level_bos",
    ] {
        let folder = golden("text").join(name);
        for chat in [true, false] {
            let wording = Golden {
                tokenizer: Tokenizer::open(folder.as_path(), None).unwrap(),
                chat,
            };
            for parts in [
                &["A line.\n"][..],
                &["One  two\nthree…", " four\n\nfive "],
                &[&"word ".repeat(400)],
            ] {
                let placed = document::place(&wording, parts).unwrap();
                let document = document::join(parts);
                assert_eq!(placed.ends.len(), parts.len(), "{name}: {:?}", placed.ends);
                for question in [
                    "Who?",
                    "  a b  ",
                    "\"q",
                    "1",
                    "…",
                    "日本",
                    "Which one\nof them?",
                ] {
                    let tokens = placed.prompt(&wording, question).unwrap();
                    let alike = tokens
                        .iter()
                        .zip(&placed.tokens)
                        .take_while(|(a, b)| a == b);
                    assert_eq!(alike.count(), placed.tokens.len(), "{name}: {question:?}");
                    let whole = wording
                        .encode(&wording.text(&document, question).unwrap())
                        .unwrap();
                    assert_eq!(
                        tokens, whole,
                        "{name}, chat {chat}: {question:?} behind {document:?}"
                    );
                }
            }
        }
    }
}

/// A state file whose header was changed.
fn with_header(bytes: &[u8], change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    change(&mut header);
    let mut text = serde_json::to_vec(&header).unwrap();
    text.resize(text.len().next_multiple_of(8), b' ');
    let mut file = (text.len() as u64).to_le_bytes().to_vec();
    file.extend(text);
    file.extend(&bytes[8 + length..]);
    file
}

#[test]
fn hostile_states_are_refused_in_clear_words() {
    let folder = Folder::new("doc-hostile");
    folder.write("notes.md", sample());
    assert_eq!(
        run(&["doc", "read", "notes.md", "-o", "n.state"], &folder.0).status,
        0
    );
    let good = fs::read(folder.0.join("n.state")).unwrap();
    let meta = |key: &'static str, value: &'static str| {
        with_header(&good, |h| h["__metadata__"][key] = json!(value))
    };
    let first = |h: &Value| {
        h.as_object()
            .unwrap()
            .keys()
            .find(|k| k.contains("keys"))
            .unwrap()
            .clone()
    };
    let keys = {
        let length = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
        first(&serde_json::from_slice(&good[8..8 + length]).unwrap())
    };
    let noted = |change: &dyn Fn(&mut Value)| {
        with_header(&good, |h| {
            let text = h["__metadata__"]["document"].as_str().unwrap();
            let mut notes: Value = serde_json::from_str(text).unwrap();
            change(&mut notes);
            h["__metadata__"]["document"] = json!(notes.to_string());
        })
    };
    let mut huge = good.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("empty", Vec::new(), "the file has 0 bytes only"),
        (
            "text",
            b"This is a text and no state at all.".to_vec(),
            "a header of",
        ),
        (
            "huge header",
            huge,
            "a header of 18446744073709551615 bytes",
        ),
        (
            "half",
            good[..good.len() / 2].to_vec(),
            "the file was cut off",
        ),
        (
            "a byte short",
            good[..good.len() - 1].to_vec(),
            "the file was cut off",
        ),
        (
            "a byte more",
            [&good[..], b"x"].concat(),
            "1 bytes at its end belong to nothing",
        ),
        (
            "older",
            meta("format", "strata-state 1"),
            "its format is \"strata-state 1\", this program reads \"strata-state 2\"",
        ),
        (
            "newer",
            meta("format", "strata-state 99"),
            "its format is \"strata-state 99\"",
        ),
        (
            "other plan",
            meta("plan", "abc"),
            "belongs to another plan: it has abc",
        ),
        (
            "other weights",
            meta("weights", "abc"),
            "belongs to another set of weights",
        ),
        (
            "other type",
            meta("activations", "F32"),
            "belongs to another compute type",
        ),
        (
            "no snapshots",
            meta("snapshots", ""),
            "its snapshots are \"\"",
        ),
        (
            "wrong snapshots",
            meta("snapshots", "5,4,1332"),
            "expected ascending numbers up to 1332",
        ),
        (
            "huge snapshots",
            meta("snapshots", "99999999999999999999"),
            "expected ascending numbers",
        ),
        (
            "more snapshots",
            meta("snapshots", "1,2,3,1332"),
            "expected F32 [4,",
        ),
        (
            "no notes",
            with_header(&good, |h| {
                h["__metadata__"]
                    .as_object_mut()
                    .unwrap()
                    .remove("document");
            }),
            "holds a state, but no document",
        ),
        (
            "bad notes",
            meta("document", "{\"parts\": 3}"),
            "cannot be read",
        ),
        (
            "a long anchor",
            noted(&|n| n["anchor_tokens"] = json!(u32::MAX)),
            "4294967295 tokens of",
        ),
        (
            "not finished",
            noted(&|n| n["tokens"] = json!(u32::MAX)),
            "1332 of 4294967295 tokens are read",
        ),
        (
            "another model",
            noted(&|n| n["source"]["model"] = json!("/no/such/model")),
            "/no/such/model: there is no such folder or file",
        ),
        (
            "a wrong shape",
            with_header(&good, |h| h[&keys]["shape"] = json!([u64::MAX, 2])),
            "is beyond all sizes",
        ),
        (
            "a large shape",
            with_header(&good, |h| h[&keys]["shape"] = json!([1u64 << 40, 64])),
            "expected 140737488355328 bytes",
        ),
        (
            "another layer",
            with_header(&good, |h| {
                let entry = h.as_object_mut().unwrap().remove(&keys).unwrap();
                h["x.keys"] = entry;
            }),
            "is missing",
        ),
        (
            "no tokens",
            with_header(&good, |h| {
                h["tokens"]["dtype"] = json!("I32");
            }),
            "its tokens are no list of U32",
        ),
    ];
    let mut wrong = Vec::new();
    for (name, bytes, said) in cases {
        folder.write("bad.state", bytes);
        let done = run(&["doc", "ask", "bad.state", QUESTION], &folder.0);
        if done.status != 1 || !done.err.contains(said) {
            wrong.push(format!("{name}: {said:?} is not what was said: {done:?}"));
        }
        let shown = run(&["doc", "show", "bad.state"], &folder.0);
        if shown.status > 1 {
            wrong.push(format!("{name}: {shown:?}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    check(
        &[
            (&["doc", "ask", "none.state", "q"], 1, "none.state"),
            (&["doc", "ask", ".", "q"], 1, "is no regular file"),
            (
                &["doc", "ask", "n.state", "q", "--dtype", "f32"],
                1,
                "belongs to another",
            ),
            (
                &["doc", "ask", "n.state", "q", "--quantize", "q8_0"],
                1,
                "belongs to another set of weights",
            ),
            (
                &[
                    "doc",
                    "ask",
                    "n.state",
                    "q",
                    "--model",
                    &text(&golden("jamba").join("dense-tied-bf16")),
                ],
                1,
                "belongs to another",
            ),
        ],
        &folder.0,
    );
    // Reading again replaces what is of an older version, and reads anew what is another model's.
    for bytes in [meta("format", "strata-state 1"), meta("weights", "abc")] {
        folder.write("n.state", bytes);
        let again = run(&["doc", "read", "notes.md", "-o", "n.state"], &folder.0);
        assert!(
            again.status == 0 && again.err.contains("0 of them known already"),
            "{again:?}"
        );
        assert_eq!(
            run(&["doc", "ask", "n.state", QUESTION], &folder.0).out,
            " Greyford.\n"
        );
    }
}

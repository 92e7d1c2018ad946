//! Evidence on conversions: `strata perplexity` and `strata verify --against` beside what transformers says.

#![cfg(target_os = "linux")]

use std::fs;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use strata_tests::{Done, Folder, Row, check, golden, root, run, text};

fn object(done: &Done) -> Value {
    assert_eq!(done.status, 0, "{done:?}");
    serde_json::from_str(done.out.trim()).unwrap_or_else(|e| panic!("{e}: {done:?}"))
}

fn number(value: &Value, path: &str) -> f64 {
    let found = value.pointer(path).and_then(Value::as_f64);
    found.unwrap_or_else(|| panic!("{path} is no number in {value}"))
}

/// What `make_perplexity.py` wrote.
fn expected() -> (String, Value) {
    let file = fs::read_to_string(golden("perplexity.json")).unwrap();
    let value: Value = serde_json::from_str(&file).unwrap();
    (text(&root().join(value["text"].as_str().unwrap())), value)
}

fn close(found: f64, expected: f64, within: f64, what: &str) {
    assert!(
        (found - expected).abs() <= within * expected.abs(),
        "{what}: {found}, the reference says {expected}"
    );
}

#[test]
fn perplexity_in_windows_is_that_of_transformers() {
    let (folder, (file, golden)) = (Folder::new("perplexity"), expected());
    for window in golden["windows"].as_array().unwrap() {
        let (context, stride) = (window["context"].to_string(), window["stride"].to_string());
        let args = [
            "perplexity",
            "--file",
            &file,
            "--dtype",
            "f32",
            "--json",
            "--context",
            &context,
            "--stride",
            &stride,
        ];
        let found = object(&run(&args, &folder.0));
        let what = format!("context {context}, stride {stride}");
        for count in ["/tokens", "/scored_tokens"] {
            let expected = window.pointer(count).or(golden.pointer(count));
            assert_eq!(found.pointer(count), expected, "{what}");
        }
        let nll = number(window, "/nll");
        close(number(&found, "/nll/mean"), nll, 1e-4, &what);
        close(number(&found, "/perplexity/mean"), nll.exp(), 1e-4, &what);
        // A token is a byte here.
        close(
            number(&found, "/bits_per_byte"),
            nll / 2_f64.ln(),
            1e-4,
            &what,
        );
        let ranges = found["positions"].as_array().unwrap();
        let tokens: f64 = ranges.iter().map(|r| number(r, "/tokens")).sum();
        assert!(ranges.len() == 10 && tokens == number(&found, "/scored_tokens"));
    }
    // The default is one pass; --context 0 asks for it.
    let nll = number(&golden, "/windows/0/nll");
    for more in [&["--threads", "1"][..], &["--context", "0"]] {
        let args = [
            "perplexity",
            "demo",
            "--file",
            &file,
            "--dtype",
            "f32",
            "--json",
        ];
        let found = object(&run(&[&args[..], more].concat(), &folder.0));
        assert_eq!(found["windows"], 1);
        close(number(&found, "/nll/mean"), nll, 1e-4, "one pass");
    }
}

#[test]
fn a_quantised_model_is_compared_with_what_it_was() {
    let (folder, (file, _)) = (Folder::new("quantised"), expected());
    let written = run(
        &["convert", "demo", "small.gguf", "--quantize", "q4_0"],
        &folder.0,
    );
    assert_eq!(written.status, 0, "{written:?}");
    let compare = |model: &[&str]| {
        let args = ["perplexity", "--compare", "demo", "--file", &file, "--json"];
        object(&run(&[&args[..], model].concat(), &folder.0))
    };
    let found = compare(&["demo", "--quantize", "q4_0"]);
    assert_eq!(found["model"], "demo as q4_0");
    assert_eq!(found["compared_with"], "demo");
    let kl = number(&found, "/compared/kl_divergence/mean");
    assert!(kl > 1e-4 && kl < 0.5, "{found}");
    // While loading or in a file, it is the same model.
    let filed = compare(&["small.gguf"]);
    assert_eq!(found["nll"], filed["nll"]);
    assert_eq!(
        found["compared"]["kl_divergence"],
        filed["compared"]["kl_divergence"]
    );
}

#[test]
fn two_forms_are_compared_token_by_token() {
    let (folder, (file, golden)) = (Folder::new("compare"), expected());
    let plan = run(&["plan", "show", "demo"], &folder.0).out;
    let left_out = format!("-moe@{}\n", golden.pointer("/compared/left_out").unwrap());
    let at = plan.find(&left_out).expect("the block is in the plan");
    let line = plan[..at].rfind('\n').unwrap();
    let edited = format!("{}\n{}", &plan[..line], &plan[at + left_out.len()..]);
    let plan = folder.write("edited.yaml", edited);
    let args = [
        "perplexity",
        "demo",
        "--plan",
        &plan,
        "--compare",
        "demo",
        "--file",
        &file,
        "--dtype",
        "f32",
        "--plot",
        "plot.svg",
    ];
    let found = object(&run(&[&args[..], &["--json"]].concat(), &folder.0));
    let (kl, expected) = (&found["compared"]["kl_divergence"], &golden["compared"]);
    for key in ["mean", "standard_error", "median", "p99", "max"] {
        let expected = expected["kl_divergence"][key].as_f64().unwrap();
        close(kl[key].as_f64().unwrap(), expected, 1e-3, key);
    }
    assert_eq!(
        kl["max_position"],
        expected["kl_divergence"]["max_position"]
    );
    let compared = &found["compared"];
    close(
        number(compared, "/reverse_kl_divergence/mean"),
        number(expected, "/reverse_kl_divergence"),
        1e-3,
        "reverse",
    );
    close(
        number(compared, "/top1_agreement/mean"),
        number(expected, "/top1_agreement"),
        1e-9,
        "top 1",
    );
    close(
        number(&found, "/nll/mean"),
        number(expected, "/nll"),
        1e-4,
        "the first's",
    );
    let nll = number(&golden, "/windows/0/nll");
    close(number(compared, "/nll/mean"), nll, 1e-4, "the second's");
    let ratio = (nll - number(expected, "/nll")).exp();
    close(
        number(compared, "/perplexity_ratio/mean"),
        ratio,
        1e-4,
        "ratio",
    );

    let svg = fs::read_to_string(folder.0.join("plot.svg")).unwrap();
    for part in [
        "<svg ",
        "KL divergence, nats a token",
        "same likeliest token, %",
        "position in the text, tokens",
        "prefers-color-scheme:dark",
        "</svg>",
    ] {
        assert!(svg.contains(part), "{part}");
    }
    let said = run(&args, &folder.0);
    for part in [
        "KL divergence, nats        1.940e0",
        "same likeliest token       75.678",
        "positions   tokens",
    ] {
        assert!(said.out.contains(part), "{part:?}: {}", said.out);
    }

    // A model beside itself: nothing differs, in windows and whatever the chunks.
    let same = run(
        &[
            "perplexity",
            "--compare",
            "demo",
            "--file",
            &file,
            "--context",
            "90",
            "--json",
        ],
        &folder.0,
    );
    let same = object(&same);
    assert_eq!(number(&same, "/compared/kl_divergence/max"), 0.0);
    assert_eq!(number(&same, "/compared/top1_agreement/mean"), 1.0);
    assert_eq!(number(&same, "/compared/perplexity_ratio/mean"), 1.0);
}

#[test]
fn texts_and_models_that_give_no_perplexity_are_refused() {
    let folder = Folder::new("no-perplexity");
    folder.write("empty", "");
    folder.write("one", "a");
    folder.write("text", "about a sea");
    folder.write("latin", b"ab\xff");
    folder.write("ids", "1, 2\n3 4");
    folder.write("far", "1 2 9999");
    folder.write("words", "1 two");
    let demo = root().join("model-cards/demo");
    let other = folder.copy(&demo, "other");
    let tokenizer = fs::read_to_string(other.join("tokenizer.json")).unwrap();
    let swapped = tokenizer
        .replace("\"b\": 101", "\"b\": 200")
        .replace("\"Å\": 200", "\"Å\": 101");
    assert_ne!(swapped, tokenizer);
    fs::write(other.join("tokenizer.json"), swapped).unwrap();
    // The last element of the file, which is F32, is made none.
    let bad = folder.copy(&golden("falcon-mamba/eps"), "bad");
    let mut weights = fs::read(bad.join("model.safetensors")).unwrap();
    let end = weights.len() - 4;
    weights[end..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(bad.join("model.safetensors"), weights).unwrap();
    let jamba = text(&golden("jamba/dense-tied-bf16"));
    let rows: [Row<'_>; 19] = [
        (&["perplexity", "--help"], 0, "D(MODEL || MODEL2) in nats"),
        (
            &["verify", "--help"],
            0,
            "tests/make_reference.py writes them",
        ),
        (&["perplexity"], 2, "--file"),
        (
            &["perplexity", "--file", "text", "--token-ids-file", "ids"],
            2,
            "cannot be used with",
        ),
        (
            &["perplexity", "--file", "text", "--stride", "0"],
            2,
            "--stride",
        ),
        (&["perplexity", "--file", "gone"], 1, "gone"),
        (
            &["perplexity", "--file", "empty"],
            1,
            "empty: 0 tokens make nothing to predict",
        ),
        (&["perplexity", "--file", "one"], 1, "one: 1 token make"),
        (&["perplexity", "--file", "latin"], 1, "byte 2 is no UTF-8"),
        (
            &["perplexity", "--file", "text", "--context", "1"],
            1,
            "fewer than 2 tokens",
        ),
        (
            &[
                "perplexity",
                "--file",
                "text",
                "--context",
                "4",
                "--stride",
                "5",
            ],
            1,
            "would not be scored",
        ),
        (
            &["perplexity", "--token-ids-file", "far"],
            1,
            "token id 9999 at position 2 is outside the vocabulary of 260",
        ),
        (
            &["perplexity", "--token-ids-file", "words"],
            1,
            "\"two\" at position 1",
        ),
        (
            &["perplexity", &jamba, "--file", "text"],
            1,
            "has no tokenizer.json",
        ),
        (
            &["perplexity", "--file", "text", "--compare", &jamba],
            1,
            "a vocabulary of 260 tokens and dense-tied-bf16 one of 150",
        ),
        (
            &["perplexity", "--file", "text", "--compare", "other"],
            1,
            "the tokenizers do not agree: at position 1 demo has token 101 and other has token 200",
        ),
        (
            &["perplexity", "--file", "text", "--compare", "nowhere"],
            1,
            "--compare nowhere: nowhere: there is no such",
        ),
        (
            &["perplexity", "bad", "--token-ids-file", "ids"],
            1,
            "bad: at position 0 the logit of token 0 is NaN",
        ),
        (
            &["perplexity", "--token-ids-file", "ids"],
            0,
            "4 tokens, 3 scored, in 1 window",
        ),
    ];
    check(&rows, &folder.0);
    let none = run(&["perplexity", "bad", "--token-ids-file", "ids"], &folder.0);
    assert!(none.err.contains("are not finite"), "{none:?}");
}

/// The reference's run of a golden.
fn reference(name: &str) -> (String, String) {
    let folder = golden(name);
    (text(&folder), text(&folder.join("reference.safetensors")))
}

#[test]
fn a_right_model_is_within_the_reference_at_every_block() {
    let folder = Folder::new("against");
    for (name, blocks) in [("jamba/dense-tied-bf16", 6), ("mamba2/tied", 4)] {
        let (model, file) = reference(name);
        let args = ["verify", &model, "--dtype", "f32", "--against", &file];
        let found = object(&run(&[&args[..], &["--json"]].concat(), &folder.0));
        assert_eq!(
            (&found["within"], &found["first"]),
            (&Value::Bool(true), &Value::Null)
        );
        let rows = found["compared"].as_array().unwrap();
        assert_eq!(rows.len(), blocks + 3, "embedding, blocks, norm, logits");
        assert_eq!(
            (&rows[0]["what"], number(&rows[0], "/largest")),
            (&"embedding".into(), 0.0)
        );
        for row in rows {
            let worst = number(row, "/worst_row");
            assert!(worst < 2e-5 && worst <= number(row, "/largest"), "{row}");
        }
        // By default the ends, with -v every block.
        let short = run(&args, &folder.0);
        assert!(
            short.out.contains("more; -v lists all") && !short.out.contains("block 1 "),
            "{short:?}"
        );
        assert!(
            short.out.contains("are within 0.001 at all 16 positions"),
            "{short:?}"
        );
        let all = run(&[&args[..], &["-v"]].concat(), &folder.0);
        for block in 0..blocks {
            assert!(all.out.contains(&format!("block {block} (")), "{all:?}");
        }
        // In BF16 within what BF16 is allowed, and not within what F32 is.
        let bf16 = ["verify", &model, "--dtype", "bf16", "--against", &file];
        assert_eq!(run(&bf16, &folder.0).status, 0);
        let strict = run(&[&bf16[..], &["--tolerance", "1e-5"]].concat(), &folder.0);
        assert!(
            strict.status == 1 && strict.err.contains("is the first to differ"),
            "{strict:?}"
        );
    }
}

/// A plan in which place `i` of the stack runs a copy of its block that `change` has been made to.
fn broken(model: &str, i: usize, change: (&str, &str), folder: &Folder) -> String {
    let plan = run(&["plan", "show", model], &folder.0).out;
    let (head, stack) = plan.split_once("\nstack:\n").unwrap();
    let mut places: Vec<String> = stack.lines().map(String::from).collect();
    let (name, _) = places[i]
        .trim_start_matches("  - ")
        .split_once('@')
        .unwrap();
    let begin = head.find(&format!("\n  {name}:\n")).unwrap() + 1;
    let block: Vec<&str> = head[begin..]
        .lines()
        .skip(1)
        .take_while(|l| l.starts_with("    "))
        .collect();
    let copy = block.join("\n");
    assert!(copy.contains(change.0), "{copy}");
    let copy = copy.replacen(change.0, change.1, 1);
    let name = name.to_string();
    places[i] = places[i].replace(&name, "changed");
    let used = places.iter().any(|p| p.contains(&format!(" {name}@")));
    // A block that is nowhere in the stack is a fault.
    let head = match used {
        true => head.to_string(),
        false => head.replace(&format!("\n  {name}:\n{}", block.join("\n")), ""),
    };
    let text = format!(
        "{head}\n  changed:\n{copy}\nstack:\n{}\n",
        places.join("\n")
    );
    folder.write(&format!("broken-{i}.yaml"), text)
}

#[test]
fn the_first_wrong_block_is_named() {
    let folder = Folder::new("wrong-block");
    let scaled = (
        "- residual:\n        - norm:",
        "- residual:\n        - scale: {by: 1.1}\n        - norm:",
    );
    let cases = [
        // What the norm hides but for its eps.
        (
            "jamba/dense-tied-bf16",
            2,
            ("norm: {eps: 1.0e-6}", "norm: {eps: 1.0e-2}"),
        ),
        ("jamba/dense-tied-bf16", 3, ("act: silu", "act: gelu")),
        (
            "jamba/dense-tied-bf16",
            0,
            ("inner_norm: {eps: 1.0e-6", "inner_norm: {eps: 1.0e-1"),
        ),
        ("jamba/dense-tied-bf16", 5, ("act: silu", "act: gelu")),
        (
            "mamba2/tied",
            1,
            ("norm: {eps: 1.0e-5}", "norm: {eps: 0.05}"),
        ),
        (
            "mamba2/tied",
            3,
            (
                "d_conv: 4, norm: {eps: 1.0e-5}",
                "d_conv: 4, norm: {eps: 0.5}",
            ),
        ),
    ];
    for (name, block, change) in cases {
        let (model, file) = reference(name);
        let plan = broken(&model, block, change, &folder);
        let args = [
            "verify",
            &model,
            "--plan",
            &plan,
            "--dtype",
            "f32",
            "--against",
            &file,
        ];
        let found = run(&args, &folder.0);
        let says = format!("block {block} (changed@{block}) is the first to differ from ");
        assert!(
            found.status == 1 && found.err.contains(&says),
            "{says} {found:?}"
        );
        assert!(found.out.contains("  differs\n"), "{found:?}");
        let json = run(&[&args[..], &["--json"]].concat(), &folder.0);
        let json: Value = serde_json::from_str(&json.out).unwrap();
        assert_eq!(json["first"], format!("hidden.{}", block + 1));
    }
    // A scale before a norm changes nothing that the norm would not take out again but for its eps.
    let (model, file) = reference("mamba2/tied");
    let plan = broken(&model, 2, scaled, &folder);
    let same = run(
        &[
            "verify",
            &model,
            "--plan",
            &plan,
            "--dtype",
            "f32",
            "--against",
            &file,
        ],
        &folder.0,
    );
    assert_eq!(same.status, 0, "{same:?}");
}

/// A reference's file with some tensors changed.
fn rewritten(
    file: &str,
    folder: &Folder,
    name: &str,
    change: impl Fn(&str, Dtype, Vec<usize>, Vec<u8>) -> Option<(String, Dtype, Vec<usize>, Vec<u8>)>,
) -> String {
    let bytes = fs::read(file).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let owned: Vec<_> = tensors
        .iter()
        .filter_map(|(n, t)| change(n, t.dtype(), t.shape().to_vec(), t.data().to_vec()))
        .collect();
    let views = owned.iter().map(|(n, dtype, shape, data)| {
        (
            n.clone(),
            TensorView::new(*dtype, shape.clone(), data).unwrap(),
        )
    });
    folder.write(name, safetensors::serialize(views, None).unwrap())
}

#[test]
fn reference_files_are_not_trusted() {
    let folder = Folder::new("hostile-reference");
    let (model, file) = reference("mamba2/tied");
    let whole = fs::read(&file).unwrap();
    let keep = |n: &str, d, s, b| Some((n.to_string(), d, s, b));
    let mut rows: Vec<(String, &str)> = Vec::new();
    let mut put = |name: &str, content: &[u8], says| rows.push((folder.write(name, content), says));
    put("short", b"abc", "is no safetensors file: it has 3 bytes");
    put("text", b"this is no such file at all", "a header of ");
    put(
        "cut",
        &whole[..whole.len() - 5],
        "the file was cut, or is damaged",
    );
    let header = |text: &str, data: usize| {
        let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
        bytes.extend(text.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    };
    put("words", &header("[1, 2]", 0), "is no safetensors file");
    put(
        "absurd",
        &header(
            r#"{"token_ids": {"dtype": "I64", "shape": [9223372036854775807, 4], "data_offsets": [0, 8]}}"#,
            8,
        ),
        "does not fit its 8 bytes",
    );
    put(
        "backwards",
        &header(
            r#"{"token_ids": {"dtype": "I64", "shape": [1], "data_offsets": [8, 0]}}"#,
            8,
        ),
        "bytes 8 to 0 of 8",
    );
    put(
        "alone",
        &header(
            r#"{"token_ids": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}"#,
            8,
        ),
        "nothing to compare beside",
    );
    put(
        "floats",
        &header(
            r#"{"token_ids": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}"#,
            8,
        ),
        "`token_ids` is F32, expected I64 or I32",
    );
    let none = rewritten(&file, &folder, "none", |n, d, s, b| {
        keep(n, d, s, b).filter(|_| n != "token_ids")
    });
    let deep = rewritten(&file, &folder, "deep", |n, d, s, b| {
        keep(&n.replace("hidden.4", "hidden.9"), d, s, b)
    });
    let extra = rewritten(&file, &folder, "extra", |n, d, s, b| {
        keep(&n.replace("final_norm", "norms"), d, s, b)
    });
    let far = rewritten(&file, &folder, "far", |n, d, s, b| {
        let bytes = if n == "token_ids" {
            [&[0xff, 0xff, 0, 0, 0, 0, 0, 0], &b[8..]].concat()
        } else {
            b
        };
        keep(n, d, s, bytes)
    });
    let narrow = rewritten(&file, &folder, "narrow", |n, d, s, b| {
        let shape = if n == "hidden.2" {
            vec![s[0] / 2, s[1] * 2]
        } else {
            s
        };
        keep(n, d, shape, b)
    });
    rows.extend([
        (none, "`token_ids` is missing"),
        (deep, "has at least 9 blocks, the plan 4"),
        (
            extra,
            "`norms` is none of token_ids, hidden.0 to hidden.4, final_norm and logits",
        ),
        (
            far,
            "token id 65535 at position 0 is outside the vocabulary of 131",
        ),
        (
            narrow,
            "`hidden.2` is F32 [8, 80], expected F32 [16, 40]: (tokens, d_model)",
        ),
        (text(&folder.0), "is no regular file"),
        (text(&folder.0.join("gone")), "No such file"),
    ]);
    let list: Vec<_> = rows
        .iter()
        .map(|(file, says)| (["verify", &model, "--against", file], *says))
        .collect();
    let table: Vec<Row<'_>> = list
        .iter()
        .map(|(args, says)| (&args[..], 1, *says))
        .collect();
    check(&table, &folder.0);

    // A part of the tensors is compared as it is; numbers that are none are far from everything.
    let part = rewritten(&file, &folder, "part", |n, d, s, b| {
        keep(n, d, s, b).filter(|_| ["token_ids", "hidden.3"].contains(&n))
    });
    let done = run(
        &["verify", &model, "--dtype", "f32", "--against", &part],
        &folder.0,
    );
    assert!(
        done.status == 0 && done.out.contains("all 1 values"),
        "{done:?}"
    );
    let nan = rewritten(&file, &folder, "nan", |n, d, s, b| {
        let bytes = if n == "hidden.3" {
            [&b[..4 * 45], &f32::NAN.to_le_bytes(), &b[4 * 46..]].concat()
        } else {
            b
        };
        keep(n, d, s, bytes)
    });
    let done = run(
        &["verify", &model, "--dtype", "f32", "--against", &nan],
        &folder.0,
    );
    assert!(
        done.status == 1
            && done
                .err
                .contains("block 2 (mamba@2) is the first to differ")
            && done.err.contains("position 1 has a number that is none"),
        "{done:?}"
    );
    check(
        &[
            (
                &["verify", "--against", "x", "--prompt", "3"],
                2,
                "cannot be used with",
            ),
            (&["verify", "--tolerance", "1"], 2, "--against"),
            (
                &["verify", "--against", "x", "--tolerance=-1"],
                2,
                "is no tolerance",
            ),
        ],
        &folder.0,
    );
}

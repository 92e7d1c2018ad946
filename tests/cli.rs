//! The `strata` command as its users meet it: what it prints, what it writes, and how it ends. Status
//! 0 is done, 1 the input or the machine is at fault, 2 the command line is.

#![cfg(target_os = "linux")]

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use safetensors::SafeTensors;
use serde_json::{Value, json};
use strata_tests::{Done, Folder, Row, check, command, finish, golden, root, run, strata, text};

fn goldens() -> Vec<PathBuf> {
    let families = ["jamba", "mamba", "falcon-mamba"].map(golden);
    let variants = families.iter().flat_map(|f| fs::read_dir(f).unwrap());
    let mut found: Vec<PathBuf> = variants.map(|v| v.unwrap().path()).collect();
    found.sort();
    assert!(found.len() >= 9, "{found:?}");
    found
}

fn object(done: &Done) -> Value {
    assert_eq!(done.status, 0, "{done:?}");
    serde_json::from_str(done.out.trim()).unwrap_or_else(|e| panic!("{e}: {done:?}"))
}

fn keys(value: &Value) -> Vec<&str> {
    value
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect()
}

/// The tensor `name` of a file as f32.
fn tensor(file: &Path, name: &str) -> (Vec<usize>, Vec<f32>) {
    let bytes = fs::read(file).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let view = file.tensor(name).unwrap();
    let values = view
        .data()
        .as_chunks()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b));
    (view.shape().to_vec(), values.collect())
}

/// The first sequence of a golden, as `--token-ids` wants it.
fn sequence(folder: &Path) -> (String, usize) {
    let bytes = fs::read(folder.join("golden.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let view = file.tensor("token_ids").unwrap();
    let length = view.shape()[1];
    let ids = view.data().as_chunks().0.iter().take(length);
    let ids: Vec<String> = ids.map(|b| i64::from_le_bytes(*b).to_string()).collect();
    (ids.join(","), length)
}

const GENERATE_KEYS: [&str; 10] = [
    "text",
    "token_ids",
    "stop_reason",
    "prompt_tokens",
    "generated_tokens",
    "load_seconds",
    "prefill_seconds",
    "decode_seconds",
    "prefill_tokens_per_second",
    "decode_tokens_per_second",
];

#[test]
fn help_teaches_and_a_wrong_command_line_is_status_2() {
    let folder = Folder::new("help");
    check(
        &[
            (
                &["--help"],
                0,
                "strata generate --chat --prompt-file notes.md",
            ),
            (
                &["generate", "--help"],
                0,
                "the file, an empty line, the prompt",
            ),
            (&["chat", "--help"], 0, "each costs its own tokens only"),
            (&["logits", "--help"], 0, "F32 (tokens, vocab)"),
            (&["plan", "--help"], 0, "with line and column"),
            (&["inspect", "--help"], 0, "Only headers are read"),
            (&["bench", "--help"], 0, "any size can be timed"),
            (&["verify", "--help"], 0, "batched equals single"),
            (&[], 2, "Usage: strata"),
            (&["run"], 2, "unrecognized subcommand"),
            (&["generate", "--promt", "x"], 2, "--prompt"),
            (
                &["generate", "--token-ids", "-1"],
                2,
                "\"-1\" is no token id",
            ),
            (&["generate", "--token-ids", ""], 2, "there is no token id"),
            (
                &["generate", "--token-ids", "1,,2"],
                2,
                "\"\" is no token id",
            ),
            (
                &["generate", "--token-ids", "99999999999"],
                2,
                "is no token id",
            ),
            (
                &["generate", "--token-ids", "1", "--chat"],
                2,
                "cannot be used with",
            ),
            (&["generate", "--threads", "0"], 2, "1..=1024"),
            (&["generate", "--threads", "100000"], 2, "1..=1024"),
            (&["generate", "--chunk", "0"], 2, "1..=65536"),
            (&["generate", "--chunk", "99999999"], 2, "1..=65536"),
            (&["generate", "--dtype", "f64"], 2, "auto, f32, bf16, f16"),
            (&["generate", "--logit-bias", "x"], 2, "ID=VALUE"),
            (&["bench", "--batch", "70000"], 2, "1..=65535"),
            (&["logits", "demo", "--output", "x"], 2, "--token-ids"),
            (&["plan", "show", "--threads", "2"], 2, "--threads"),
        ],
        &folder.0,
    );
    let help = run(&["generate", "--help"], &folder.0).out;
    let sampling = help
        .split("Sampling:")
        .nth(1)
        .unwrap()
        .split("Model:")
        .next();
    assert!(!sampling.unwrap().contains("--stop"), "{help}");
}

#[test]
fn generate_takes_every_kind_of_prompt() {
    let folder = Folder::new("generate");
    folder.write("notes.md", "Mara lives in Oslo. Ivo has a red boat.\n");
    let base = ["generate", "--max-tokens", "12", "--threads", "2", "--json"];
    let generate = |more: &[&str], input: &str| {
        let mut args = base.to_vec();
        args.extend(more);
        object(&finish(command(&args, &folder.0), input.as_bytes()))
    };
    let first = generate(&["--prompt", "Hello"], "");
    assert_eq!(keys(&first), GENERATE_KEYS);
    assert_eq!(first["prompt_tokens"], 5);
    assert_eq!(first["text"], generate(&[], "Hello")["text"]);
    assert_eq!(
        first["text"],
        generate(&["--prompt-file", "-"], "Hello")["text"]
    );
    for chunk in ["1", "2", "3", "65536"] {
        let chunked = generate(&["--prompt", "Hello", "--chunk", chunk], "");
        assert_eq!(chunked["token_ids"], first["token_ids"], "chunk {chunk}");
    }
    let both = generate(&["--prompt-file", "notes.md", "--prompt", "Where"], "");
    assert_eq!(both["prompt_tokens"], 39 + 2 + 5);
    let chat = [
        "--chat",
        "--prompt-file",
        "notes.md",
        "--prompt",
        "Where does Mara live?",
    ];
    let answer = generate(&chat, "");
    assert_eq!(
        (&answer["text"], &answer["stop_reason"]),
        (&json!(" Oslo."), &json!("eos"))
    );
    let mut on = chat.to_vec();
    on.push("--ignore-eos");
    assert_eq!(generate(&on, "")["stop_reason"], "length");
    // Bytes are tokens here, so every stop of two letters crosses a border.
    on.extend(["--stop", "xyz", "--stop", "lo"]);
    let stopped = generate(&on, "");
    assert_eq!(
        (&stopped["text"], &stopped["stop_reason"]),
        (&json!(" Os"), &json!("stop"))
    );

    let warm = ["--prompt", "Hello", "--temperature", "0.9", "--seed"];
    let seeded = |seed| generate(&[&warm[..], &[seed]].concat(), "")["token_ids"].clone();
    assert_eq!(seeded("7"), seeded("7"));
    assert_ne!(seeded("7"), seeded("8"));
    let probable = generate(&["--prompt", "Hello", "--logprobs", "3"], "");
    let logprobs = probable["logprobs"].as_array().unwrap();
    assert_eq!(logprobs.len(), 12);
    assert_eq!(
        keys(&logprobs[0]),
        ["token_id", "token", "logprob", "top_logprobs"]
    );
    assert_eq!(logprobs[0]["top_logprobs"].as_array().unwrap().len(), 3);
    let none = [
        "generate",
        "--prompt",
        "Hello",
        "--max-tokens",
        "0",
        "--json",
    ];
    assert_eq!(object(&run(&none, &folder.0))["generated_tokens"], 0);
}

#[test]
fn beyond_the_context_attention_sees_the_last_tokens_and_says_so() {
    let folder = Folder::new("beyond");
    let prompt: Vec<String> = (0..100).map(|i| (3 + i % 90).to_string()).collect();
    let ids = prompt.join(",");
    let long = [
        "generate",
        "--token-ids",
        &ids,
        "--max-tokens",
        "5",
        "--ignore-eos",
        "--context",
        "64",
    ];
    let refused = run(&long, &folder.0);
    assert_eq!(refused.status, 1);
    let says = "100 prompt tokens and 5 to generate do not fit the context of 64 tokens";
    assert!(refused.err.contains(says), "{refused:?}");
    let policy = ["--beyond-context", "attend-last", "--json"];
    let done = run(&[&long[..], &policy].concat(), &folder.0);
    assert_eq!(done.status, 0, "{done:?}");
    let says =
        "of 100 tokens attention sees tokens 36 to 99 only; tokens 0 to 35 live only in the state";
    assert!(done.err.contains(says), "{done:?}");
    let found: Value = serde_json::from_str(&done.out).unwrap();
    // The last token that was generated is not fed again.
    let attention = &found["sight"];
    assert_eq!(attention["tokens"], 104);
    assert_eq!(attention["attention_sees"], json!([[40, 104]]));
    assert_eq!(attention["only_in_state"], 40);
    // As a plan with the window does.
    let plan = run(&["plan", "show"], &folder.0).out;
    let windows = plan.replace("head_dim:", "window: 64, head_dim:");
    assert_ne!(plan, windows);
    folder.write("windows.yaml", &windows);
    let wide = [&long[..7], &["1000", "--plan", "windows.yaml", "--json"]].concat();
    let same = run(&wide, &folder.0);
    let same: Value = serde_json::from_str(&same.out).unwrap_or_else(|_| panic!("{same:?}"));
    assert_eq!(same["token_ids"], found["token_ids"]);
    // What is short is as it was, and nothing is said.
    let short = ["generate", "--prompt", "Hi", "--max-tokens", "5", "--json"];
    let told = run(&[&short[..], &policy[..2]].concat(), &folder.0);
    assert_eq!(told.err, run(&short, &folder.0).err);
}

#[test]
fn keys_and_values_in_bytes_are_an_option_of_what_runs() {
    let folder = Folder::new("kv");
    let json = |args: &[&str]| -> Value {
        let done = run(args, &folder.0);
        serde_json::from_str(&done.out).unwrap_or_else(|_| panic!("{done:?}"))
    };
    let bytes = |kv| {
        json(&["plan", "estimate", "--dtype", "bf16", "--kv", kv, "--json"])["kv_bytes_per_token"]
            .as_u64()
            .unwrap()
    };
    let graph = run(&["plan", "graph"], &folder.0).out;
    let rows = graph.matches("pages(2, ").count();
    assert!(rows > 0, "{graph}");
    assert!(
        bytes("int8") < bytes("bf16") * 6 / 10,
        "{} and {}",
        bytes("int8"),
        bytes("bf16")
    );
    assert_eq!(bytes("auto"), bytes("bf16"));
    assert_eq!(bytes("f32"), 2 * bytes("bf16"));
    folder.write(
        "a.txt",
        "Mara Tolvin lives in Greyford, by the river.\n".repeat(20),
    );
    let found = json(&[
        "perplexity",
        "--file",
        "a.txt",
        "--kv",
        "int8",
        "--compare",
        "demo",
        "--json",
    ]);
    let kl = found["compared"]["kl_divergence"]["mean"].as_f64().unwrap();
    assert!(kl > 0.0 && kl < 1e-3, "{kl}");
    // What does not fit in 16 bits, and does in 8.
    let device = |kv| {
        json(&[
            "plan",
            "estimate",
            "--dtype",
            "bf16",
            "--context",
            "20000000",
            "--device",
            "8GB",
            "--kv",
            kv,
            "--json",
        ])
    };
    let (wide, narrow) = (device("bf16"), device("int8"));
    assert_eq!(
        (wide["fits"].as_bool(), narrow["fits"].as_bool()),
        (Some(false), Some(true))
    );
    let ways = wide["would_fit_with"].to_string();
    assert!(
        ways.contains("keys and values in 8 bits: --kv int8"),
        "{ways}"
    );
}

#[test]
fn generate_refuses_what_cannot_be() {
    let folder = Folder::new("refuse");
    folder.write("bad.txt", b"ab\xff");
    folder.write("empty.txt", "");
    folder.write("x.gguf", "x");
    fs::create_dir(folder.0.join("nothing")).unwrap();
    let huge = "18446744073709551615";
    let hi: &[&str] = &["generate", "--prompt", "Hi", "--max-tokens"];
    let rows: Vec<(Vec<&str>, &str)> = vec![
        ([hi, &[huge]].concat(), "do not fit the context"),
        (
            [hi, &[huge, "--context", huge]].concat(),
            "more than this machine can address",
        ),
        ([hi, &["4", "--context", "0"]].concat(), "raise --context"),
        (
            [hi, &["4", "--context", "3"]].concat(),
            "2 prompt tokens and 4 to generate",
        ),
        (
            [hi, &["4", "--temperature", "-1"]].concat(),
            "expected 0 (greedy) or more, found -1",
        ),
        ([hi, &["4", "--temperature", "nan"]].concat(), "NaN"),
        (
            [hi, &["4", "--top-p", "2", "--min-p", "-1"]].concat(),
            "min_p",
        ),
        (
            [hi, &["4", "--logit-bias", "9999=1"]].concat(),
            "outside the vocabulary of 260",
        ),
        (
            [hi, &["4", "--logprobs", huge]].concat(),
            "at most the vocabulary of 260",
        ),
        (
            [hi, &["4", "--stop", ""]].concat(),
            "stop string 0 is empty",
        ),
        (
            [hi, &["4", "--device", "cuda:first"]].concat(),
            "devices are cpu, cuda, cuda:N and reference",
        ),
        (
            vec!["generate", "--token-ids", "999999999"],
            "outside the vocabulary of 260",
        ),
        (vec!["generate", "--prompt", ""], "the prompt is empty"),
        (
            vec!["generate", "--prompt-file", "empty.txt"],
            "the prompt is empty",
        ),
        (
            vec!["generate", "--prompt-file", "bad.txt"],
            "bad.txt: byte 2 is no UTF-8",
        ),
        (
            vec!["generate", "--prompt-file", "none.txt"],
            "none.txt: No such file",
        ),
        (vec!["generate", "--prompt-file", "."], ".: Is a directory"),
        (
            vec!["generate", "a/b/c", "--prompt", "x"],
            "Hub ids have the form owner/name",
        ),
        (
            vec!["generate", "../none", "--prompt", "x"],
            "no such folder or file",
        ),
        (
            vec!["generate", "nothing", "--prompt", "x"],
            "nothing: there is no config.json",
        ),
        (
            vec!["generate", "x.gguf", "--prompt", "x"],
            "no GGUF is so small",
        ),
        (
            vec!["generate", "empty.txt", "--prompt", "x"],
            "a model is a folder",
        ),
        (
            vec!["generate", "a/b", "--prompt", "x", "--offline"],
            "downloads are off",
        ),
        (
            vec!["bench", "--depth", "4294967295"],
            "do not fit the context",
        ),
        (
            vec!["bench", "--prompt", "4294967295"],
            "do not fit the context",
        ),
        (
            vec!["generate", "--plan", "none.yaml", "--prompt", "x"],
            "none.yaml: No such file",
        ),
    ];
    let rows: Vec<Row<'_>> = rows.iter().map(|(a, says)| (&a[..], 1, *says)).collect();
    check(&rows, &folder.0);

    let done = finish(command(&["generate"], &folder.0), b"a\xff");
    assert!(
        done.status == 1 && done.err.contains("standard input: byte 1 is no UTF-8"),
        "{done:?}"
    );
    let done = run(
        &["generate", "--plan", "none.yaml", "--prompt", "x"],
        &folder.0,
    );
    assert_eq!(done.err.matches("No such file").count(), 1, "{done:?}");
    let mut refused = command(&["generate", "a/b", "--prompt", "x"], &folder.0);
    refused.env("HF_ENDPOINT", "http://127.0.0.1:9");
    let done = finish(refused, b"");
    assert!(
        done.status == 1 && done.err.contains("127.0.0.1:9"),
        "{done:?}"
    );
}

#[test]
fn logits_equal_the_goldens_however_they_are_chunked_and_under_the_shown_plan() {
    let folder = Folder::new("logits");
    for model in goldens() {
        let (name, (ids, length)) = (text(&model), sequence(&model));
        let logits = |more: &[&str]| {
            let mut args = vec!["logits", &name, "--token-ids", &ids, "--output", "l"];
            args.extend(["--dtype", "f32", "--threads", "2", "--json"]);
            args.extend(more);
            let said = object(&run(&args, &folder.0));
            assert_eq!(keys(&said), ["output", "tokens", "vocab"]);
            tensor(&folder.0.join("l"), "logits")
        };
        let (shape, whole) = logits(&[]);
        assert_eq!(shape[0], length, "{name}");
        let (_, expected) = tensor(&model.join("golden.safetensors"), "logits");
        let expected = &expected[..whole.len()];
        let mean = expected.iter().sum::<f32>() / expected.len() as f32;
        let square = expected.iter().map(|v| (v - mean).powi(2)).sum::<f32>();
        let deviation = (square / expected.len() as f32).sqrt();
        for (found, expected) in whole.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-3 * deviation, "{name}");
        }
        assert!(
            logits(&["--chunk", "7"]).1 == whole,
            "{name}: chunked differs"
        );
        let plan = run(&["plan", "show", &name], &folder.0);
        let plan = folder.write("p.yaml", plan.out);
        assert!(
            logits(&["--plan", &plan]).1 == whole,
            "{name}: its plan differs"
        );

        let args = [
            "generate",
            &name,
            "--token-ids",
            &ids,
            "--max-tokens",
            "3",
            "--json",
        ];
        let generated = object(&run(&args, &folder.0));
        assert_eq!(
            (keys(&generated), &generated["text"]),
            (GENERATE_KEYS.to_vec(), &json!(""))
        );
    }
    let plan = folder.write("demo.yaml", run(&["plan", "show"], &folder.0).out);
    let of = |more: &[&str]| {
        let args = [
            &[
                "logits",
                "demo",
                "--token-ids",
                "72,101,108",
                "--output",
                "l",
            ],
            more,
        ]
        .concat();
        assert_eq!(run(&args, &folder.0).status, 0);
        tensor(&folder.0.join("l"), "logits")
    };
    assert!(of(&[]) == of(&["--plan", &plan]));
}

#[test]
fn logits_take_their_place_when_they_are_whole() {
    let folder = Folder::new("output");
    let model = text(&golden("jamba/odd"));
    let to =
        |output| ["logits", &model, "--token-ids", "1,2", "--output", output].map(String::from);
    let run_to = |output: &str| {
        let args = to(output.to_string().leak());
        run(
            &args.iter().map(String::as_str).collect::<Vec<_>>(),
            &folder.0,
        )
    };
    for (output, says) in [("none/x", "none/x: No such file"), (".", "Is a directory")] {
        let done = run_to(output);
        assert!(done.status == 1 && done.err.contains(says), "{done:?}");
    }
    // A device is written to, not replaced.
    let done = run_to("/dev/full");
    assert!(
        done.status == 1 && done.err.contains("/dev/full: No space left"),
        "{done:?}"
    );
    assert!(!fs::metadata("/dev/full").unwrap().is_file());
    folder.write("kept", "before");
    std::os::unix::fs::symlink("kept", folder.0.join("link")).unwrap();
    let done = run(
        &["logits", &model, "--token-ids", "1,999", "--output", "kept"],
        &folder.0,
    );
    assert_eq!(done.status, 1);
    assert_eq!(fs::read(folder.0.join("kept")).unwrap(), b"before");
    assert_eq!(run_to("link").status, 0);
    assert!(folder.0.join("link").is_symlink());
    assert_eq!(tensor(&folder.0.join("kept"), "logits").0, [2, 97]);
    let left = fs::read_dir(&folder.0).unwrap().count();
    assert_eq!(left, 2, "something was left behind");
}

#[test]
fn chat_keeps_its_state_between_turns() {
    let folder = Folder::new("chat");
    let sample = text(&root().join("model-cards/demo/sample.md"));
    let args = [
        "chat",
        "--document",
        &sample,
        "--json",
        "--threads",
        "2",
        "--max-tokens",
        "20",
    ];
    let lines = "Who is there?\n\n/stats\n/history\nWho else?\n/undo\nWho else?\n/save s\n/load s\n/quit\nlost\n";
    let done = finish(command(&args, &folder.0), lines.as_bytes());
    assert_eq!(done.status, 0, "{done:?}");
    let turns: Vec<Value> = done
        .out
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(turns.len(), 3, "{done:?}");
    assert_eq!(
        keys(&turns[0]),
        [
            "text",
            "stop_reason",
            "prompt_tokens",
            "reused_tokens",
            "generated_tokens"
        ]
    );
    let count = |turn: &Value, key: &str| turn[key].as_u64().unwrap();
    assert_eq!(count(&turns[0], "reused_tokens"), 0);
    let first = count(&turns[0], "prompt_tokens");
    assert!(count(&turns[1], "reused_tokens") >= first - 1, "{done:?}");
    assert_eq!(turns[1]["text"], turns[2]["text"]);
    for says in [
        "tok/s",
        "user: Who is there?",
        "tokens are kept in s",
        "are known",
    ] {
        assert!(done.err.contains(says), "{says}: {done:?}");
    }
    for (lines, says) in [
        (&b"/nope\n"[..], "there is no command /nope"),
        (b"/undo\n", "nothing was said yet"),
        (b"/load none\n", "none: No such file"),
        (b"/system\n", "/system needs a text"),
        (b"a\xff\n", "standard input: byte 1 is no UTF-8"),
    ] {
        let done = finish(command(&["chat"], &folder.0), lines);
        assert!(done.status == 1 && done.err.contains(says), "{done:?}");
        assert!(done.err.matches("No such file").count() < 2, "{done:?}");
    }
}

#[test]
fn plans_are_edited_and_run_or_say_what_is_wrong() {
    let folder = Folder::new("plans");
    let model = text(&golden("jamba/odd"));
    let plan = run(&["plan", "show", &model], &folder.0).out;
    // An edit, then a part of the fault, if it does not run.
    type Edit<'a> = (&'a [(&'a str, &'a str)], Option<&'a str>);
    let edits: [Edit<'_>; 15] = [
        (&[("  - mamba-mlp@2\n", "")], None),
        (
            &[
                ("  - mamba-mlp@0\n", ""),
                ("  - mamba-mlp@6\n", "  - mamba-mlp@6\n  - mamba-mlp@0\n"),
            ],
            None,
        ),
        (
            &[("  - mamba-mlp@2\n", "  - mamba-mlp@2\n  - mamba-mlp@2\n")],
            None,
        ),
        (&[("kv_heads: 1", "kv_heads: 1, window: 2")], None),
        (&[("top_k: 3", "top_k: 2")], None),
        (
            &[("experts: 5", "experts: 4")],
            Some("the router chooses among 5 experts, the plan has 4"),
        ),
        (
            &[("kv_heads: 1", "kv_heads: 1, window: 0")],
            Some("e.yaml:26:54: a `window` must hold"),
        ),
        (
            &[("d_model:", "d_modl:")],
            Some("e.yaml:4:1: a plan has no `d_modl`; it takes plan,"),
        ),
        (
            &[("heads: 5", "heads: 0"), ("d_state: 5", "d_state: x")],
            Some("e.yaml:14:22: found \"x\""),
        ),
        (
            &[("heads: 5", "heads: 0"), ("d_state: 5", "d_state: x")],
            Some("e.yaml:26:30: attention: `heads`"),
        ),
        (
            &[("mamba-mlp@6", "mamba@6")],
            Some("there is no block `mamba`; there are mamba-mlp"),
        ),
        (&[("mamba-mlp@6", "mamba-mlp@60")], Some("blocks.60")),
        (&[("init_std: 0.02", "init_std: -1")], Some("e.yaml:6:1")),
        (
            &[("plan: 1", "plan: 2")],
            Some("this program reads version 1"),
        ),
        (
            &[
                (
                    "        - norm: {name: ff_norm",
                    "        - use: s\n        - norm: {name: ff_norm",
                ),
                ("blocks:", "shared: {s: [use: s]}\nblocks:"),
            ],
            Some("`s` uses itself: s → s"),
        ),
    ];
    for (edits, fault) in edits {
        let mut edited = plan.clone();
        for (from, to) in edits {
            assert!(edited.contains(from), "{from}\n{plan}");
            edited = edited.replacen(from, to, 1);
        }
        folder.write("e.yaml", edited);
        let args = [
            "generate",
            &model,
            "--plan",
            "e.yaml",
            "--token-ids",
            "1,2,3",
            "--max-tokens",
            "3",
        ];
        let done = run(&args, &folder.0);
        match fault {
            None => assert_eq!(done.status, 0, "{edits:?}: {done:?}"),
            Some(fault) => assert!(
                done.status == 1 && done.err.contains(fault),
                "{edits:?} should say {fault:?}: {done:?}"
            ),
        }
    }
    folder.write("p.yaml", &plan);
    let config = text(&golden("jamba/odd/config.json"));
    let few = ["--token-ids", "1,2", "--max-tokens", "2"];
    let with = |args: &[&'static str]| -> Vec<&str> { [args, &few].concat() };
    check(
        &[
            (&["plan", "check", "p.yaml"], 0, "7 blocks, 43 nodes"),
            (
                &["plan", "check", "p.yaml", "--json"],
                0,
                "\"parameters\":209105",
            ),
            (&["plan", "show", "p.yaml"], 0, "plan: 1"),
            (&["plan", "graph", "p.yaml"], 0, "weights=blocks.0.mamba1"),
            (&["plan", "graph", "--json"], 0, "{\"nodes\":["),
            (&["plan", "check", "."], 1, ".: Is a directory"),
            (&with(&["generate", "p.yaml", "--random", "1"]), 0, ","),
            (&with(&["generate", "p.yaml"]), 1, "--random SEED"),
            (
                &[&["generate", &config, "--random", "1"], &few[..]].concat(),
                0,
                ",",
            ),
            (
                &[&["generate", &config], &few[..]].concat(),
                1,
                "--random SEED",
            ),
        ],
        &folder.0,
    );
}

#[test]
fn hostile_plans_end_in_a_fault() {
    let folder = Folder::new("hostile-plans");
    let plan = |vocab: &str, d_model: &str, rest: &str, block: &str| {
        format!(
            "plan: 1\nname: x\nvocab: {vocab}\nd_model: {d_model}\ncontext: 64\n{rest}blocks: {{a: [{block}]}}\nstack: [a*100]\nhead: {{norm: {{eps: 1.0e-5}}, tie: true}}\n"
        )
    };
    let norm = "norm: {eps: 1.0e-5}";
    let mut bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n".to_string();
    let mut chains = "shared:\n".to_string();
    let mut wide = String::new();
    for i in 1..12 {
        bomb += &format!(
            "a{i}: &a{i} [{}]\n",
            vec![format!("*a{}", i - 1); 9].join(", ")
        );
        let uses = vec![format!("use: s{}", i + 1); 9].join(", ");
        chains += &format!("  s{i}: [{uses}]\n");
    }
    chains += &format!("  s12: [{norm}]\n");
    for i in 1..70 {
        wide += &format!("let: {{t{i}: [concat: [t{0}, t{0}]]}}, ", i - 1);
    }
    let wide = format!("let: {{t0: [{norm}]}}, {wide}scale: {{by: 1.0}}");
    let big = "1000000000";
    let mamba =
        format!("residual: [mamba1: {{d_inner: {big}, d_state: {big}, d_conv: 4, dt_rank: 3}}]");
    let heads =
        format!("residual: [attention: {{heads: {big}, kv_heads: {big}, head_dim: {big}}}]");
    let mlp = format!("residual: [mlp: {{d_ff: {big}, act: silu}}]");
    let files: [(&str, String, &str); 14] = [
        ("bomb", bomb, "unfolds to more than is read"),
        ("deep", "[".repeat(100_000), "recursion limit"),
        ("documents", "---\n".repeat(100_000), "in one document"),
        (
            "big",
            format!("a: {}", "x".repeat(9 << 20)),
            "more than the 8388608",
        ),
        ("itself", "a: &a [*a]\n".into(), "recursive references"),
        ("nul", "plan: 1\0".into(), "nul.yaml:1:8"),
        ("empty", String::new(), "a plan needs `vocab`"),
        ("table", plan(big, big, "", norm), "too large together"),
        (
            "mamba",
            plan("9", "9", "", &mamba),
            "more than 1099511627776",
        ),
        (
            "heads",
            plan("9", "9", "", &heads),
            "more than 1099511627776",
        ),
        (
            "experts",
            plan(
                "9",
                "9",
                "",
                "residual: [moe: {experts: 1000000, top_k: 1, d_ff: 1, act: silu, router: {score: softmax, normalize: false}}]",
            ),
            "1000000 experts",
        ),
        (
            "chains",
            plan("9", "9", &chains, "use: s1"),
            "passes 200000 layers",
        ),
        ("wide", plan("9", "9", "", &wide), "more than 1073741824"),
        (
            "number",
            plan("9", "1.0e+18", "", norm),
            "found 1.0e18, expected a whole number",
        ),
    ];
    for (name, text, says) in files {
        let file = format!("{name}.yaml");
        folder.write(&file, text);
        let random = [
            "bench",
            &file,
            "--random",
            "1",
            "--prompt",
            "1",
            "--generate",
            "1",
        ];
        check(
            &[(&["plan", "check", &file], 1, says), (&random, 1, says)],
            &folder.0,
        );
        let done = run(&["generate", "--card", &file, "--prompt", "x"], &folder.0);
        assert_eq!(done.status, 1, "{name} as a card: {done:?}");
    }
    folder.write("mlp.yaml", plan("9", "9", "", &mlp));
    let args = ["bench", "mlp.yaml", "--random", "1"];
    check(
        &[(
            &args,
            1,
            "the weights need 10800.0 GB and this process may have 4.3 GB",
        )],
        &folder.0,
    );
}

/// A copy of a golden whose config says something else under one key.
fn spoilt(folder: &Folder, from: &str, key: &str, value: &str) -> PathBuf {
    let model = folder.copy(&golden(from), "m");
    let config = fs::read_to_string(model.join("config.json")).unwrap();
    let mut config: serde_json::Map<String, Value> = serde_json::from_str(&config).unwrap();
    config.remove(key);
    let rest = serde_json::to_string(&config).unwrap();
    let config = format!("{{\"{key}\":{value},{}", &rest[1..]);
    fs::write(model.join("config.json"), config).unwrap();
    model
}

#[test]
fn absurd_configs_are_named_with_their_key() {
    let folder = Folder::new("configs");
    let huge = "9223372036854775807";
    let rows = [
        ("hidden_size", "0", "`d_model` must be at least 1"),
        ("hidden_size", "-5", "-5 is outside"),
        ("hidden_size", "1e18", "is outside"),
        (
            "hidden_size",
            "\"x\"",
            "found \"x\", expected a whole number",
        ),
        ("hidden_size", "null", "hidden_size = nothing"),
        ("hidden_size", huge, "is outside"),
        ("num_hidden_layers", "1000000000", "there may be 1 to 10000"),
        ("num_experts", "1000000", "1000000 experts are more than"),
        (
            "num_experts_per_tok",
            "99",
            "`top_k` is 99, but there are 5 experts",
        ),
        ("max_position_embeddings", "1000000000000000", "is outside"),
        ("vocab_size", "1e15", "is outside"),
        ("num_attention_heads", "0", "unable to calculate 35 // 0"),
        (
            "num_key_value_heads",
            "3",
            "no multiple of the 3 `kv_heads`",
        ),
        ("mamba_d_conv", "0", "`d_conv` must be at least 1"),
        ("mamba_d_state", huge, "is outside"),
        ("mamba_expand", "1e300", "expected a whole number"),
        ("rms_norm_eps", "-1", "from 0 to below 1"),
        ("attn_layer_period", "0", "a period must be at least 1"),
        ("initializer_range", "-1", "a standard deviation"),
        ("hidden_act", "\"relu\"", "this model cannot be run"),
        ("tie_word_embeddings", "\"yes\"", "expected true or false"),
        ("intermediate_size", "4611686018427387904", "is outside"),
        ("intermediate_size", "900000000", "(900000000, 35)"),
    ];
    for (key, value, says) in rows {
        let model = text(&spoilt(&folder, "jamba/odd", key, value));
        let done = run(
            &["generate", &model, "--token-ids", "1", "--max-tokens", "2"],
            &folder.0,
        );
        assert!(
            done.status == 1 && done.err.contains(says),
            "{key}: {value} should say {says:?}: {done:?}"
        );
        let config = format!("{model}/config.json");
        let done = run(
            &["bench", &config, "--random", "1", "--prompt", "1"],
            &folder.0,
        );
        assert_eq!(done.status, 1, "{key}: {value}: {done:?}");
    }
    for (key, value, status) in [
        ("time_step_limit", "[0.0, Infinity]", 0),
        ("note", "\"a \\\" Infinity\"", 0),
        ("eos_token_id", "4000000", 0),
        ("eos_token_id", "99999999999", 1),
        ("eos_token_id", "\"x\"", 1),
    ] {
        let model = text(&spoilt(&folder, "jamba/odd", key, value));
        let args = ["generate", &model, "--token-ids", "1", "--max-tokens", "2"];
        let done = run(&args, &folder.0);
        assert_eq!(done.status, status, "{key}: {value}: {done:?}");
        assert!(status == 0 || done.err.contains(key), "{done:?}");
    }
}

/// A safetensors file with its header rewritten.
fn rewrite(file: &Path, change: impl FnOnce(&mut serde_json::Map<String, Value>)) {
    let bytes = fs::read(file).unwrap();
    let (length, rest) = bytes.split_at(8);
    let length = u64::from_le_bytes(length.try_into().unwrap()) as usize;
    let mut header = serde_json::from_slice(&rest[..length]).unwrap();
    change(&mut header);
    let text = serde_json::to_vec(&header).unwrap();
    let mut out = (text.len() as u64).to_le_bytes().to_vec();
    out.extend(text);
    out.extend(&rest[length..]);
    fs::write(file, out).unwrap();
}

#[test]
fn damaged_checkpoints_are_named_to_the_tensor() {
    let folder = Folder::new("checkpoints");
    let generate = |model: &Path| {
        let model = text(model);
        run(
            &["generate", &model, "--token-ids", "1", "--max-tokens", "2"],
            &folder.0,
        )
    };
    let head = "lm_head.weight";
    let one = |spoil: &dyn Fn(&Path), says: &str| {
        let model = folder.copy(&golden("jamba/odd"), "m");
        // Else it would be taken for the weights of a model that lacks them.
        fs::remove_file(model.join("golden.safetensors")).unwrap();
        spoil(&model.join("model.safetensors"));
        let done = generate(&model);
        assert!(
            done.status == 1 && done.err.contains(says),
            "{says:?}: {done:?}"
        );
    };
    let cut = |bytes: usize| {
        move |f: &Path| {
            let whole = fs::read(f).unwrap();
            fs::write(f, &whole[..bytes]).unwrap();
        }
    };
    one(&cut(0), "at least 8");
    one(&cut(2000), "only a part of one");
    one(&cut(300_000), "lie outside");
    one(
        &|f| fs::write(f, b"\xff\xff\xff\xff\xff\xff\xff\x7f{}").unwrap(),
        "9223372036854775807",
    );
    one(
        &|f| fs::remove_file(f).unwrap(),
        "neither model.safetensors nor",
    );
    type Change = (&'static str, Value, &'static str);
    let changes: [Change; 5] = [
        ("data_offsets", json!([6790, 13580]), "overlap another's"),
        (
            "data_offsets",
            json!([0, 1_000_000_000_000_000_000_u64]),
            "lie outside",
        ),
        ("dtype", json!("F4_ODD"), "no element type \"F4_ODD\""),
        (
            "shape",
            json!([1_000_000_000_000_u64, 1_000_000_000_000_u64]),
            "overflows",
        ),
        ("shape", json!([-1]), "expected usize"),
    ];
    for (key, value, says) in changes {
        one(&|f| rewrite(f, |h| h[head][key] = value.clone()), says);
    }
    one(
        &|f| {
            rewrite(f, |h| {
                let moved = h.remove(head).unwrap();
                h.insert("other".into(), moved);
            });
        },
        "tensor \"other\"",
    );
    let shards = |name: &str, content: Option<&str>, says: &str| {
        let model = folder.copy(&golden("jamba/moe-shards"), "m");
        match content {
            Some(content) => fs::write(model.join(name), content).unwrap(),
            None => fs::remove_file(model.join(name)).unwrap(),
        }
        let done = generate(&model);
        assert!(
            done.status == 1 && done.err.contains(says),
            "{says:?}: {done:?}"
        );
    };
    let index = "model.safetensors.index.json";
    shards(
        "model-00002-of-00004.safetensors",
        None,
        "which is not there",
    );
    shards(index, Some("{"), index);
    shards(
        index,
        Some("{\"weight_map\":{\"a\":5}}"),
        "expected a string",
    );
    shards(
        index,
        Some("{\"weight_map\":{\"a\":\"../x\"}}"),
        "is no plain file name",
    );
    for file in ["pytorch_model.bin", "model.gguf"] {
        let model = folder.copy(&golden("jamba/odd"), "m");
        fs::remove_file(model.join("golden.safetensors")).unwrap();
        fs::rename(model.join("model.safetensors"), model.join(file)).unwrap();
        let done = generate(&model);
        assert!(done.status == 1 && done.err.contains(file), "{done:?}");
    }

    // Numbers that are none: a warning, and the tensor is named when they reach a logit.
    let model = folder.copy(&golden("jamba/odd"), "m");
    let file = model.join("model.safetensors");
    let mut bytes = fs::read(&file).unwrap();
    let end = bytes.len();
    bytes[end - 100_000..].fill(0xff);
    fs::write(&file, bytes).unwrap();
    let done = generate(&model);
    let (warned, failed) = done.err.split_once("error:").unwrap();
    assert!(
        done.status == 1 && warned.contains("are not finite"),
        "{done:?}"
    );
    assert!(
        failed.contains("NaN") && failed.contains("(model.layers."),
        "{done:?}"
    );
}

#[test]
fn damaged_text_files_are_named() {
    let folder = Folder::new("texts");
    let template = |text: &str| {
        let path = root().join("model-cards/demo/tokenizer_config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        config["chat_template"] = json!(text);
        config.to_string()
    };
    let rows = [
        ("tokenizer.json", "{bad".to_string(), "m/tokenizer.json"),
        (
            "tokenizer_config.json",
            "[]".into(),
            "m/tokenizer_config.json",
        ),
        (
            "tokenizer_config.json",
            template("{% for x in y %}"),
            "chat template, line 1",
        ),
        (
            "tokenizer_config.json",
            template("{{ raise_exception('why') }}"),
            "why",
        ),
        (
            "tokenizer_config.json",
            template(
                "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
            ),
            "chat template",
        ),
        (
            "tokenizer_config.json",
            "{\"tokenizer_class\": \"x\"}".into(),
            "no chat template",
        ),
        (
            "generation_config.json",
            "{\"temperature\": \"hot\", \"top_k\": -4}".into(),
            "top_k: expected a whole number",
        ),
        (
            "generation_config.json",
            "nonsense".into(),
            "m/generation_config.json",
        ),
        ("config.json", "{\"a\":".into(), "m/config.json:1:6"),
    ];
    for (file, content, says) in rows {
        let model = folder.copy(&root().join("model-cards/demo"), "m");
        fs::write(model.join(file), content).unwrap();
        let args = [
            "generate",
            "m",
            "--chat",
            "--prompt",
            "Hi",
            "--max-tokens",
            "2",
        ];
        check(&[(&args, 1, says), (&["chat", "m"], 1, says)], &folder.0);
    }
    let model = text(&golden("jamba/odd"));
    let rows: [Row<'_>; 2] = [
        (
            &["generate", &model, "--prompt", "Hi"],
            1,
            "give --token-ids",
        ),
        (&["chat", &model], 1, "has no tokenizer.json"),
    ];
    check(&rows, &folder.0);
}

#[test]
fn an_output_that_fails_is_an_error_and_a_closed_one_is_no_panic() {
    let folder = Folder::new("outputs");
    let generate: &[&str] = &[
        "generate",
        "--prompt",
        "Hi",
        "--ignore-eos",
        "--max-tokens",
        "400",
    ];
    let commands = [
        generate,
        &["plan", "show"],
        &["plan", "graph"],
        &["inspect"],
        &["inspect", "--json"],
    ];
    for args in commands {
        let full = || {
            fs::OpenOptions::new()
                .write(true)
                .open("/dev/full")
                .unwrap()
        };
        let mut to_full = command(args, &folder.0);
        to_full.stdout(full());
        let done = finish(to_full, b"");
        assert!(
            done.status == 1 && done.err.contains("standard output: No space left"),
            "{done:?}"
        );
        assert_eq!(done.err.matches("No space left").count(), 1, "{done:?}");

        let mut child = command(args, &folder.0).spawn().unwrap();
        drop(child.stdout.take());
        let mut err = String::new();
        child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut err)
            .unwrap();
        // A short text may be written before the reader is gone.
        let status = child.wait().unwrap().code();
        assert!(
            status == Some(1) && err.contains("Broken pipe"),
            "{args:?}: {status:?} {err}"
        );
    }
    // Nobody listens at all.
    let bench = [
        "bench",
        "--prompt",
        "2",
        "--generate",
        "1",
        "--repeat",
        "1",
        "--json",
    ];
    for args in [generate, &bench, &["generate", "--prompt", ""]] {
        let mut shell = Command::new("sh");
        shell
            .args(["-c", "exec \"$0\" \"$@\" >&- 2>&-"])
            .arg(strata())
            .args(args);
        let status = shell
            .current_dir(&folder.0)
            .stdin(Stdio::null())
            .status()
            .unwrap();
        assert!(matches!(status.code(), Some(0 | 1)), "{args:?}: {status}");
    }
    let done = run(
        &["generate", "--prompt", "Hi", "--max-tokens", "2"],
        Path::new("/proc"),
    );
    assert_eq!(
        done.status, 0,
        "a folder that cannot be written to: {done:?}"
    );
}

/// Runs a command and presses Ctrl-C after a while.
fn interrupt(args: &[&str], folder: &Path, after: Duration) -> Done {
    let child = command(args, folder).spawn().unwrap();
    std::thread::sleep(after);
    let pid = child.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-INT", &pid])
            .status()
            .unwrap()
            .success()
    );
    let pressed = Instant::now();
    let output = child.wait_with_output().unwrap();
    assert!(
        pressed.elapsed() < Duration::from_secs(10),
        "{args:?} did not end"
    );
    Done {
        status: output.status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&output.stdout).into(),
        err: String::from_utf8_lossy(&output.stderr).into(),
    }
}

#[test]
fn ctrl_c_ends_a_generation_and_keeps_what_was_printed() {
    let folder = Folder::new("interrupt");
    let wait = Duration::from_secs(1);
    let long = [
        "generate",
        "--prompt",
        "Hi",
        "--ignore-eos",
        "--max-tokens",
        "200000",
    ];
    let done = interrupt(&long, &folder.0, wait);
    assert!(
        done.status == 0 && done.out.len() > 20 && done.out.ends_with('\n'),
        "{done:?}"
    );
    let object_of =
        |args: &[&str]| object(&interrupt(&[args, &["--json"]].concat(), &folder.0, wait));
    let during = object_of(&long);
    assert_eq!(during["stop_reason"], "interrupted");
    assert!(during["generated_tokens"].as_u64().unwrap() > 10);
    folder.write("long.txt", "Hello world. ".repeat(19_000));
    let before = object_of(&["generate", "--prompt-file", "long.txt"]);
    assert_eq!(before["stop_reason"], "interrupted");
    assert_eq!(before["generated_tokens"], 0);
}

#[test]
fn progress_and_colour_are_for_terminals() {
    let folder = Folder::new("terminal");
    folder.write("long.txt", "Hello world. ".repeat(400));
    let found = Command::new("script").arg("--version").output();
    if found.is_err() {
        eprintln!("there is no `script` here to make a terminal with");
        return;
    }
    let on_terminal = |color: &str, prompt: &str| {
        let line = format!("{} generate {prompt} --max-tokens 2", strata().display());
        let mut script = Command::new("script");
        script
            .args(["-qec", &line, "/dev/null"])
            .current_dir(&folder.0);
        script
            .env("NO_COLOR", color)
            .env("TERM", "xterm")
            .stdin(Stdio::null());
        let output = script.output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let shown = on_terminal("", "--prompt-file long.txt");
    for says in [
        "reading",
        "/5200 tok",
        "tok/s",
        " left",
        "\x1b[2m",
        "ended by length",
    ] {
        assert!(shown.contains(says), "{says:?}: {shown:?}");
    }
    assert!(!on_terminal("1", "--prompt Hi").contains("\x1b["));
    let piped = run(
        &[
            "generate",
            "--prompt-file",
            "long.txt",
            "--max-tokens",
            "2",
            "-v",
        ],
        &folder.0,
    );
    assert!(
        !piped.err.contains('\x1b') && !piped.err.contains("reading"),
        "{piped:?}"
    );
    assert!(
        piped.err.contains("parameters") && piped.err.contains("tok/s"),
        "{piped:?}"
    );
}

#[test]
fn inspect_bench_and_verify_tell_scripts_what_they_found() {
    let folder = Folder::new("tell");
    let model = text(&golden("jamba/moe-shards"));
    let done = run(&["inspect", &model, "--json"], &folder.0);
    for line in done.out.lines() {
        let row: Value = serde_json::from_str(line).unwrap();
        assert_eq!(
            keys(&row),
            [
                "weight", "tensor", "how", "dtype", "shape", "bytes", "shard"
            ]
        );
        assert!(row["weight"].is_string(), "left over: {row}");
    }
    check(&[(&["inspect"], 0, "0 are left over")], &folder.0);

    let config = text(&golden("jamba/odd/config.json"));
    let sizes = [
        "--prompt",
        "8",
        "--generate",
        "2",
        "--depth",
        "4",
        "--batch",
        "2",
        "--repeat",
        "1",
    ];
    let bench = [&["bench", &config, "--random", "1", "--json"], &sizes[..]].concat();
    let benched = object(&run(&bench, &folder.0));
    let expected = [
        "model",
        "device",
        "dtype",
        "threads",
        "weights_bytes",
        "state_bytes_per_sequence",
        "kv_bytes_per_token",
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "decode_bytes_per_second",
        "limit",
    ];
    for key in expected {
        assert!(benched.get(key).is_some(), "{key}: {benched}");
    }
    assert_eq!(
        keys(&benched["decode_tokens_per_second"]),
        ["median", "min", "max"]
    );
    assert_eq!(
        keys(&benched["limit"]),
        ["bytes_per_second", "flops_per_second"]
    );

    let cold = object(&run(&[&bench[..], &["--cold"]].concat(), &folder.0));
    let timed = cold["prefill_tokens_per_second"]["median"].as_f64();
    assert!(timed.is_some_and(|rate| rate > 0.0), "{cold}");

    let verify = [
        "verify",
        &model,
        "--prompt",
        "12",
        "--generate",
        "2",
        "--json",
        "--verbose",
    ];
    let done = run(&verify, &folder.0);
    assert!(
        done.status == 0 && done.out.lines().count() > 10,
        "{done:?}"
    );
    assert!(
        done.err.contains(" held, ") && !done.err.contains("estimate of memory"),
        "{done:?}"
    );
    for line in done.out.lines() {
        let check: Value = serde_json::from_str(line).unwrap();
        assert_eq!(
            (&check["passed"], &check["fault"]),
            (&json!(true), &Value::Null)
        );
    }
}

#[test]
fn threads_are_those_that_the_process_may_use() {
    let folder = Folder::new("threads");
    let allowed = fs::read_to_string("/proc/self/status").unwrap();
    let allowed = allowed
        .lines()
        .find_map(|l| l.strip_prefix("Cpus_allowed_list:"))
        .unwrap();
    let first = allowed.trim().split([',', '-']).next().unwrap();
    let bench = [
        "bench",
        "--prompt",
        "2",
        "--generate",
        "1",
        "--repeat",
        "1",
        "--json",
    ];
    let threads = |words: &[&str]| {
        let mut command = Command::new("taskset");
        command
            .args(["-c", first])
            .arg(strata())
            .args(bench)
            .args(words);
        command
            .current_dir(&folder.0)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        object(&finish(command, b""))["threads"].clone()
    };
    assert_eq!(threads(&[]), json!(1), "one processor, one thread");
    assert_eq!(
        threads(&["--threads", "3"]),
        json!(3),
        "as many as are asked for"
    );
}

#[test]
fn guesses_are_counted_and_change_no_token() {
    let folder = Folder::new("lookup");
    let page = fs::read_to_string(root().join("model-cards/demo/sample.md")).unwrap();
    let file = folder.write(
        "p.txt",
        format!("{page}\n\nQ: Where does Mara Tolvin live?\nA:"),
    );
    let args = |more: &'static [&'static str]| {
        let fixed = [
            "generate",
            "--prompt-file",
            &file,
            "--ignore-eos",
            "--max-tokens",
            "90",
            "--json",
        ];
        let words: Vec<&str> = fixed.iter().copied().chain(more.iter().copied()).collect();
        object(&run(&words, &folder.0))
    };
    let plain = args(&[]);
    let guessed = args(&["--lookup", "16"]);
    assert_eq!(plain["token_ids"], guessed["token_ids"]);
    assert_eq!(plain.get("lookup"), None);
    assert_eq!(
        keys(&guessed["lookup"]),
        ["most", "guessed_tokens", "right_tokens", "steps"]
    );
    let count = |key: &str| guessed["lookup"][key].as_u64().unwrap();
    assert!(
        count("right_tokens") > 10 && count("right_tokens") < count("guessed_tokens"),
        "{guessed}"
    );
    assert!(count("steps") > 2, "{guessed}");
    let mut chat = command(&["chat", "--lookup", "8", "--json"], &folder.0);
    chat.arg("--document")
        .arg(root().join("model-cards/demo/sample.md"));
    let done = finish(chat, b"What is the favourite dish of Ines Quill?\n/stats\n");
    assert_eq!(object(&done)["lookup"]["most"], json!(8), "{done:?}");
    assert!(done.err.contains("guessed tokens were right"), "{done:?}");
    let rows: &[Row<'_>] = &[
        (&["generate", "--lookup", "257", "--prompt", "a"], 2, "257"),
        (
            &["generate", "--lookup", "x", "--prompt", "a"],
            2,
            "--lookup",
        ),
    ];
    check(rows, &folder.0);
}

#[test]
fn a_trace_tells_of_every_node() {
    let folder = Folder::new("trace");
    let args = [
        "generate",
        "--token-ids",
        "5,6,7,8",
        "--max-tokens",
        "4",
        "--ignore-eos",
        "--json",
    ];
    assert_eq!(object(&run(&args, &folder.0)).get("trace"), None);
    let mut by_variable = command(&args, &folder.0);
    by_variable.env("STRATA_LOG", "time");
    let by_option = [&args[..], &["--trace", "time"]].concat();
    for done in [finish(by_variable, b""), run(&by_option, &folder.0)] {
        let trace = object(&done)["trace"].clone();
        assert_eq!(keys(&trace), ["limit", "prefill", "decode"]);
        for (name, steps, rows) in [("prefill", 1, 4), ("decode", 3, 3)] {
            let phase = &trace[name];
            assert_eq!(
                (phase["steps"].as_u64(), phase["rows"].as_u64()),
                (Some(steps), Some(rows))
            );
            let nodes = phase["nodes"].as_array().unwrap();
            let seconds: Vec<f64> = nodes
                .iter()
                .map(|n| n["seconds"].as_f64().unwrap())
                .collect();
            assert!(seconds.is_sorted_by(|a, b| a >= b), "the longest first");
            let total = phase["seconds"].as_f64().unwrap();
            assert!((seconds.iter().sum::<f64>() / total - 1.0).abs() < 1e-6);
            let scan = nodes
                .iter()
                .find(|n| n["name"] == "blocks.0.mamba1")
                .unwrap();
            for key in ["seconds", "bytes", "flops", "share_of_limit"] {
                assert!(scan[key].as_f64().unwrap() > 0.0, "{key}: {scan}");
            }
            let kinds = phase["kinds"].as_array().unwrap();
            let scans = kinds.iter().find(|n| n["name"] == "mamba1").unwrap();
            assert_eq!(scans["parts"], json!(6));
        }
    }
    let done = run(
        &[
            "generate",
            "--token-ids",
            "5,6",
            "--max-tokens",
            "2",
            "--trace",
            "time",
            "-v",
        ],
        &folder.0,
    );
    assert!(
        done.err.contains("decode: ") && done.err.contains("blocks.7."),
        "{done:?}"
    );
    let done = run(
        &[
            "bench",
            "--prompt",
            "4",
            "--generate",
            "2",
            "--repeat",
            "1",
            "--trace",
            "time",
        ],
        &folder.0,
    );
    assert!(
        done.status == 0 && done.err.contains("prefill: "),
        "{done:?}"
    );
    let mut unknown = command(&args, &folder.0);
    unknown.env("STRATA_LOG", "everything");
    let done = finish(unknown, b"");
    assert!(
        done.status == 1 && done.err.contains("STRATA_LOG"),
        "{done:?}"
    );
}

#[test]
fn a_shape_becomes_a_checkpoint_of_the_weights_that_a_run_draws() {
    let folder = Folder::new("random");
    let token_ids = "1,2,3,4,5,6,7";
    for name in [
        "jamba/moe-shards",
        "mamba2/tied",
        "granite-moe-hybrid/moe-rope-shards",
        "falcon-h1/plain-gate",
    ] {
        let config = text(&golden(name).join("config.json"));
        let _ = fs::remove_dir_all(folder.0.join("drawn"));
        let convert = [
            "convert", &config, "drawn", "--random", "7", "--dtype", "f32", "--json",
        ];
        let done = run(&convert, &folder.0);
        assert!(object(&done)["tensors"].as_u64().unwrap() > 5, "{name}");
        let again = run(
            &[
                "convert", &config, "again", "--random", "7", "--dtype", "f32", "--force",
            ],
            &folder.0,
        );
        assert_eq!(again.status, 0, "{again:?}");
        let file = |f: &str| fs::read(folder.0.join(f).join("model.safetensors")).unwrap();
        assert!(file("drawn") == file("again"), "{name}: not the same twice");
        let logits = |model: &[&str], out: &str| {
            let tail = ["--token-ids", token_ids, "--output", out, "--dtype", "f32"];
            let words = [&["logits"], model, &tail[..]].concat();
            assert_eq!(run(&words, &folder.0).status, 0, "{name} {model:?}");
            tensor(&folder.0.join(out), "logits").1
        };
        let drawn = logits(&[&config, "--random", "7"], "a.safetensors");
        let read = logits(&["drawn"], "b.safetensors");
        let scale = drawn.iter().map(|l| l.abs()).fold(0.0, f32::max);
        let apart = drawn
            .iter()
            .zip(&read)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        // A_log = ln(-A) is rounded on the way.
        assert!(apart < 1e-4 * scale, "{name}: {apart} of {scale}");
    }
    let config = text(&golden("jamba/moe-shards").join("config.json"));
    folder.write("p.yaml", run(&["plan", "show", &config], &folder.0).out);
    let rows: &[Row<'_>] = &[
        (
            &["convert", &config, "x.gguf", "--random", "1"],
            1,
            "folder",
        ),
        (
            &["convert", "p.yaml", "x", "--random", "1"],
            1,
            "config.json",
        ),
        (&["convert", &config, "x"], 1, "--random"),
    ];
    check(rows, &folder.0);
    assert!(!folder.0.join("x").exists());
}

#[test]
fn classify_names_classes_and_says_what_is_no_image() {
    let folder = Folder::new("classify");
    let model = golden("vision-mamba/middle");
    let (image, config) = (text(&model.join("1.png")), text(&model.join("config.json")));
    let model = text(&model);
    let strata = |args: &[&str]| run(args, &folder.0);

    let done = strata(&["classify", &model, &image, "--top", "2", "--verbose"]);
    assert_eq!(done.status, 0, "{done:?}");
    assert!(
        done.err.contains(" held, ") && !done.err.contains("estimate of memory"),
        "{done:?}"
    );
    assert!(
        done.out.lines().count() == 3 && done.out.contains("thing "),
        "{done:?}"
    );
    // One file that is none does not lose the others.
    let done = strata(&["classify", &model, &image, &config, &image, "--json"]);
    assert!(
        done.status == 1 && done.err.contains("1 of 3 images"),
        "{done:?}"
    );
    let json = |l: &str| serde_json::from_str::<serde_json::Value>(l).unwrap();
    let lines: Vec<_> = done.out.lines().map(json).collect();
    assert_eq!(lines.len(), 2);
    let odds = lines[0]["classes"].as_array().unwrap();
    assert!(odds[0]["probability"].as_f64() >= odds[1]["probability"].as_f64());
    for (args, says) in [
        (
            &["classify", &model, &config][..],
            "it begins like no image",
        ),
        (&["classify", &model, "nowhere.png"], "nowhere.png"),
        (&["classify", "demo", &image], "reads text, not images"),
        (
            &["classify", &model, &image, "--labels", &config],
            "has 11 classes",
        ),
        (&["generate", &model, "--token-ids", "1"], "strata classify"),
    ] {
        let done = strata(args);
        assert!(
            done.status == 1 && done.err.contains(says),
            "{args:?}: {done:?}"
        );
    }
}

#[test]
fn a_published_models_cost_is_told_with_what_of_it_does_not_run() {
    let folder = Folder::new("published");
    let config = |name: &str| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        text(&root.join(format!("../model-cards/configs/{name}.json")))
    };
    let (with, without) = (
        config("nemotron-3.5-lightning-30b-a3b"),
        config("nemotron-3-nano-30b-a3b"),
    );
    let done = run(&["plan", "estimate", &with], &folder.0);
    let mut lines = done.out.lines();
    assert_eq!(
        lines.next(),
        Some("nemotron-3.5-lightning-30b-a3b"),
        "{done:?}"
    );
    assert!(
        lines
            .next()
            .is_some_and(|l| l.contains("31,577,940,288 parameters"))
    );
    let unused = lines.next().map(str::trim);
    let expected = "and 1,335,325,952 parameters in 270 tensors that are not run";
    assert_eq!(unused, Some(expected), "{done:?}");
    let done = run(&["plan", "estimate", &without], &folder.0);
    assert!(
        done.status == 0 && !done.out.contains("not run"),
        "{done:?}"
    );
    let done = run(&["plan", "estimate", &with, "--json"], &folder.0);
    let found: serde_json::Value = serde_json::from_str(&done.out).unwrap();
    assert_eq!(found["unused_tensors"], 270);

    // What nobody has a card for is told what it is like.
    let other = folder.write(
        "config.json",
        r#"{"model_type": "mamba4", "state_size": 16}"#,
    );
    let done = run(&["plan", "estimate", &other], &folder.0);
    assert_eq!(done.status, 1);
    for says in [
        "no model card is for model_type mamba4",
        "nearest: mamba",
        "--card FILE",
    ] {
        assert!(done.err.contains(says), "{says}: {done:?}");
    }
}

//! Documents that are read once: `strata doc` as its users meet it.

#![cfg(target_os = "linux")]

use std::fs;
use std::process::Command;
use std::thread::sleep;
use std::time::Duration;

use serde_json::{Value, json};
use strata_tests::{Done, Folder, check, command, finish, root, run};

const QUESTION: &str = "Where does Mara Tolvin live?";

fn sample() -> String {
    fs::read_to_string(root().join("model-cards/demo/sample.md")).unwrap()
}

fn object(done: &Done) -> Value {
    assert_eq!(done.status, 0, "{done:?}");
    serde_json::from_str(done.out.trim()).unwrap_or_else(|e| panic!("{e}: {done:?}"))
}

fn lines(out: &str) -> Vec<Value> {
    out.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn help_teaches_and_a_wrong_command_line_is_status_2() {
    let folder = Folder::new("doc-help");
    check(
        &[
            (&["doc", "--help"], 0, "ask about them for ever"),
            (&["doc", "read", "--help"], 0, "goes on from there"),
            (
                &["doc", "ask", "--help"],
                0,
                "Each question costs its own tokens only",
            ),
            (&["doc", "show", "--help"], 0, "no model is needed"),
            (&["doc", "read", "a.md"], 2, "--output"),
            (&["doc", "read", "-o", "a"], 2, "FILE"),
            (&["doc", "ask", "a.state"], 2, "QUESTION"),
            (
                &["doc", "ask", "a.state", "q", "--questions", "f"],
                2,
                "cannot be used with",
            ),
            (
                &[
                    "doc",
                    "read",
                    "a.md",
                    "-o",
                    "a",
                    "--snapshots",
                    "every=0; x",
                ],
                2,
                "a policy has no `x`",
            ),
        ],
        &folder.0,
    );
}

#[test]
fn a_document_is_read_once_and_asked_about() {
    let folder = Folder::new("doc");
    folder.write("notes.md", sample());
    let read = [
        "doc",
        "read",
        "notes.md",
        "-o",
        "notes.state",
        "--snapshots",
        "every=500",
        "--json",
    ];
    let done = object(&run(&read, &folder.0));
    assert_eq!(
        (&done["tokens"], &done["resumed_at"]),
        (&json!(1332), &json!(0))
    );
    assert_eq!(done["documents"], json!(["notes.md"]));
    let again = run(&read, &folder.0);
    assert!(again.err.contains("is read already"), "{again:?}");

    let ask = ["doc", "ask", "notes.state", QUESTION];
    assert_eq!(run(&ask, &folder.0).out, " Greyford.\n");
    let answer = object(&run(&[&ask[..], &["--json"]].concat(), &folder.0));
    let generate = [
        "generate",
        "--chat",
        "--prompt-file",
        "notes.md",
        "--prompt",
        QUESTION,
        "--json",
    ];
    let whole = object(&run(&generate, &folder.0));
    for key in ["token_ids", "prompt_tokens", "stop_reason"] {
        assert_eq!(answer[key], whole[key], "{key}");
    }
    assert_eq!(
        (&answer["resumed_at"], &answer["replayed_tokens"]),
        (&json!(1332), &json!(0))
    );
    let verbose = run(&[&ask[..], &["-v"]].concat(), &folder.0);
    assert!(
        verbose
            .err
            .contains("1,332 of 1,364 tokens were known, 32 read"),
        "{verbose:?}"
    );
    let two = run(
        &[
            "doc",
            "ask",
            "notes.state",
            QUESTION,
            "How old is Captain Bren?",
        ],
        &folder.0,
    );
    assert_eq!(two.out, "Greyford.\n61.\n");

    let shown = run(&["doc", "show", "notes.state"], &folder.0).out;
    for said in [
        "tokens      1,332\n",
        "document    notes.md (1.33 kB), to token 1,328\n",
        "the system message of the model's chat template",
        "model       demo in bf16",
        "snapshots   4, after 500; 1,000; 1,328; 1,332 tokens",
    ] {
        assert!(shown.contains(said), "{said:?} is missing from {shown}");
    }
    let shown = object(&run(&["doc", "show", "notes.state", "--json"], &folder.0));
    assert_eq!(shown["snapshots"], json!([500, 1000, 1328, 1332]));
    assert_eq!(shown["complete"], json!(true));

    // A document that grew is read from where it grew; one that changed from the state before.
    folder.write(
        "notes.md",
        format!("{}\n\nOda Renn has a red boat.\n", sample()),
    );
    let grown = object(&run(&read, &folder.0));
    assert_eq!(grown["resumed_at"], json!(1328));
    let asked = run(&["doc", "ask", "notes.state", QUESTION], &folder.0);
    assert_eq!(asked.out, " Greyford.\n");
    let mut changed = sample().into_bytes();
    changed[700] ^= 1;
    folder.write("notes.md", changed);
    assert_eq!(object(&run(&read, &folder.0))["resumed_at"], json!(500));
}

#[test]
fn documents_come_from_files_and_from_standard_input() {
    let folder = Folder::new("doc-inputs");
    folder.write("a.md", "Mara lives in Oslo.\n");
    folder.write("b.txt", "Ivo has a red boat.\n");
    // The two as one, the model named; the same from standard input.
    let both = ["doc", "read", "demo", "a.md", "b.txt", "-o", "both.state"];
    assert_eq!(run(&both, &folder.0).status, 0);
    let input = b"Mara lives in Oslo.\n\nIvo has a red boat.\n";
    let piped = finish(
        command(&["doc", "read", "-", "-o", "piped.state"], &folder.0),
        input,
    );
    assert_eq!(piped.status, 0, "{piped:?}");
    let parts = |state: &str| {
        let shown = object(&run(&["doc", "show", state, "--json"], &folder.0));
        (shown["tokens"].clone(), shown["document"]["parts"].clone())
    };
    let ((joined, two), (same, one)) = (parts("both.state"), parts("piped.state"));
    assert_eq!(joined, same);
    assert_eq!(
        (two[0]["end"].clone(), two[1]["end"].clone()),
        (json!(19), json!(40))
    );
    assert_eq!(one[0]["name"], json!("-"));
    // A state of each.
    let each = run(
        &["doc", "read", "a.md", "b.txt", "-o", "states/", "--json"],
        &folder.0,
    );
    assert_eq!(lines(&each.out).len(), 2, "{each:?}");
    let answer = run(
        &["doc", "ask", "states/a.state", "Where does Mara live?"],
        &folder.0,
    );
    assert_eq!(answer.out, " Oslo.\n");
    // Without the template.
    let plain = run(
        &["doc", "read", "a.md", "-o", "plain.state", "--plain"],
        &folder.0,
    );
    assert_eq!(plain.status, 0, "{plain:?}");
    let raw = run(
        &[
            "doc",
            "ask",
            "plain.state",
            "Q: Where does Mara live?\nA:",
            "--json",
        ],
        &folder.0,
    );
    let generate = [
        "generate",
        "--prompt-file",
        "a.md",
        "--prompt",
        "Q: Where does Mara live?\nA:",
        "--json",
    ];
    let expected = object(&run(&generate, &folder.0));
    assert_eq!(object(&raw)["token_ids"], expected["token_ids"]);

    folder.write("empty.md", " \n");
    folder.write("bytes.md", [0xff, 0xfe]);
    folder.write("other/a.md", "x");
    let faults = run(
        &[
            "doc", "read", "a.md", "empty.md", "bytes.md", "none.md", "-o", "a.md",
        ],
        &folder.0,
    );
    assert_eq!(faults.status, 1);
    for said in [
        "empty.md: is empty",
        "byte 0 is no UTF-8",
        "none.md",
        "a.md: exists and is no state file",
    ] {
        assert!(
            faults.err.contains(said),
            "{said:?} is missing from {faults:?}"
        );
    }
    check(
        &[
            (&["doc", "read", "none.md", "-o", "x"], 1, "none.md"),
            (
                &["doc", "read", "nix", "a.md", "-o", "x"],
                1,
                "bundled models are",
            ),
            (
                &["doc", "read", "a.md", "other/a.md", "-o", "states"],
                1,
                "two documents would be written there",
            ),
            (
                &["doc", "read", "a.md", "-o", "no/such/x.state"],
                1,
                "no/such/x.state",
            ),
            (
                &["doc", "read", "a.md", "-o", "x", "--context", "10"],
                1,
                "do not fit the context of 10 tokens",
            ),
            (
                &["doc", "ask", "both.state", "q", "--context", "60"],
                1,
                "question 1: 44 tokens of the document",
            ),
            (
                &["doc", "ask", "both.state", " "],
                1,
                "the question is empty",
            ),
        ],
        &folder.0,
    );
    assert_eq!(
        fs::read_to_string(folder.0.join("a.md")).unwrap(),
        "Mara lives in Oslo.\n"
    );
}

#[test]
fn many_questions_keep_their_order_and_a_run_goes_on() {
    let folder = Folder::new("doc-questions");
    folder.write("notes.md", sample());
    assert_eq!(
        run(&["doc", "read", "notes.md", "-o", "n.state"], &folder.0).status,
        0
    );
    let mut asked = String::new();
    for i in 0..6 {
        asked.push_str(&format!(
            "{{\"id\": {i}, \"question\": \"{QUESTION}\"}}\n\n"
        ));
        asked.push_str("\"How old is Captain Bren?\"\n");
    }
    folder.write("q.jsonl", &asked);
    let ask = ["doc", "ask", "n.state", "--questions", "q.jsonl"];
    let to = |file| [&ask[..], &["--output", file]].concat();
    let printed = run(&ask, &folder.0);
    assert_eq!(printed.status, 0, "{printed:?}");
    let answers = lines(&printed.out);
    assert_eq!(answers.len(), 12);
    for (i, answer) in answers.iter().enumerate() {
        let expected = if i % 2 == 0 { "Greyford." } else { "61." };
        assert_eq!(answer["answer"], json!(expected));
        assert_eq!(
            answer["id"],
            if i % 2 == 0 {
                json!(i / 2)
            } else {
                Value::Null
            }
        );
        assert_eq!(
            (&answer["resumed_at"], &answer["matched_tokens"]),
            (&json!(1332), &json!(1332))
        );
        assert_eq!(
            answer["why"],
            json!("goes on behind the 1,332 tokens known")
        );
    }
    // One at a time says the same.
    let bare = |answers: &[Value]| -> Vec<Value> {
        let keys = [
            "id",
            "question",
            "answer",
            "token_ids",
            "stop_reason",
            "prompt_tokens",
        ];
        let bare = |a: &Value| keys.iter().map(|k| a[*k].clone()).collect();
        answers.iter().map(bare).collect()
    };
    let single = run(&[&ask[..], &["--at-once", "1"]].concat(), &folder.0);
    assert_eq!(bare(&lines(&single.out)), bare(&answers));
    // Cut off within the fourth answer.
    let whole = &printed.out;
    let cut = whole.match_indices('\n').nth(2).unwrap().0 + 40;
    folder.write("a.jsonl", &whole[..cut]);
    assert_eq!(run(&to("a.jsonl"), &folder.0).status, 0);
    let resumed = fs::read_to_string(folder.0.join("a.jsonl")).unwrap();
    assert_eq!(bare(&lines(&resumed)), bare(&answers));
    let kept = whole.match_indices('\n').nth(2).unwrap().0;
    assert_eq!(resumed[..kept], whole[..kept]);
    let again = run(&to("a.jsonl"), &folder.0);
    assert!(
        again.err.contains("all questions are answered already"),
        "{again:?}"
    );
    assert_eq!(
        fs::read_to_string(folder.0.join("a.jsonl")).unwrap(),
        resumed
    );
    // What is no file of answers stays as it is.
    for file in ["q.jsonl", "notes.md", "n.state"] {
        let before = fs::read(folder.0.join(file)).unwrap();
        let refused = run(&to(file), &folder.0);
        assert!(
            refused.status == 1 && refused.err.contains("does not answer"),
            "{refused:?}"
        );
        assert_eq!(fs::read(folder.0.join(file)).unwrap(), before);
    }
    folder.write("bad.jsonl", "{\"q\": 1}\n\"fine?\"\n[1]\n{\n\" \"\n");
    let bad = run(
        &["doc", "ask", "n.state", "--questions", "bad.jsonl"],
        &folder.0,
    );
    assert_eq!(bad.status, 1);
    for said in [
        "line 1: there is no text",
        "line 3: neither",
        "line 4: no JSON",
        "line 5: the question is empty",
    ] {
        assert!(bad.err.contains(said), "{said:?} is missing from {bad:?}");
    }
}

#[test]
fn ctrl_c_keeps_what_was_read() {
    let folder = Folder::new("doc-interrupt");
    let long = vec![sample(); 60].join("\n");
    folder.write("long.md", &long);
    let read = [
        "doc",
        "read",
        "long.md",
        "-o",
        "long.state",
        "--snapshots",
        "every=1024",
    ];
    let child = command(&read, &folder.0).spawn().unwrap();
    let pid = child.id().to_string();
    // What comes before the first snapshot would keep little; what comes too late finds all done.
    std::thread::sleep(Duration::from_millis(1500));
    let killed = Command::new("kill").args(["-INT", &pid]).status().unwrap();
    assert!(killed.success());
    let done = child.wait_with_output().unwrap();
    let err = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(1), "{err}");
    assert!(
        err.contains("interrupted: ") && err.contains("goes on from there"),
        "{err}"
    );
    let shown = object(&run(&["doc", "show", "long.state", "--json"], &folder.0));
    let read_tokens = shown["tokens"].as_u64().unwrap();
    assert!(
        read_tokens > 0 && shown["complete"] == json!(false),
        "{shown}"
    );
    let text = run(&["doc", "show", "long.state"], &folder.0).out;
    assert!(text.contains("not read to its end"), "{text}");
    let asked = run(&["doc", "ask", "long.state", QUESTION], &folder.0);
    assert!(
        asked.status == 1 && asked.err.contains("run the same `strata doc read` again"),
        "{asked:?}"
    );
    // A shorter one of the same beginning, so that the test is not long.
    let (end, _) = long
        .match_indices("\n\n")
        .find(|(at, _)| *at as u64 > read_tokens + 500)
        .unwrap();
    folder.write("long.md", &long[..end]);
    let again = object(&run(&[&read[..], &["--json"]].concat(), &folder.0));
    let resumed = again["resumed_at"].as_u64().unwrap();
    assert!(resumed + 8 >= read_tokens, "{resumed} of {read_tokens}");
    let asked = run(&["doc", "ask", "long.state", QUESTION], &folder.0);
    assert_eq!(asked.out, " Greyford.\n", "{asked:?}");
}

#[test]
fn a_write_that_ends_in_the_middle_leaves_the_old_file() {
    let folder = Folder::new("doc-kill");
    folder.write("notes.md", sample());
    assert_eq!(
        run(&["doc", "read", "notes.md", "-o", "n.state"], &folder.0).status,
        0
    );
    let before = fs::read(folder.0.join("n.state")).unwrap();
    folder.write("notes.md", format!("Changed.\n\n{}", sample()));
    // The system kills who writes more than 100 KiB into a file.
    let script = "ulimit -f 200; exec \"$0\" doc read notes.md -o n.state";
    let mut limited = Command::new("sh");
    limited
        .args(["-c", script])
        .arg(strata_tests::strata())
        .current_dir(&folder.0);
    assert!(!limited.output().unwrap().status.success());
    assert_eq!(fs::read(folder.0.join("n.state")).unwrap(), before);
    assert_eq!(
        run(&["doc", "ask", "n.state", QUESTION], &folder.0).out,
        " Greyford.\n"
    );
    // A place that cannot be written is told, and nothing is left beside it.
    fs::create_dir(folder.0.join("folder.state")).unwrap();
    let full = run(
        &["doc", "read", "notes.md", "-o", "/dev/full/x.state"],
        &folder.0,
    );
    assert!(
        full.status == 1 && full.err.contains("/dev/full/x.state"),
        "{full:?}"
    );
}

#[test]
fn a_model_that_was_named_is_found_again() {
    let folder = Folder::new("doc-model");
    folder.copy(&root().join("model-cards/demo"), "here");
    folder.write("a.md", "Mara lives in Oslo.\n");
    let read = [
        "doc",
        "read",
        "here",
        "a.md",
        "-o",
        "a.state",
        "--quantize",
        "q8_0",
    ];
    assert_eq!(run(&read, &folder.0).status, 0);
    let shown = run(&["doc", "show", "a.state"], &folder.0).out;
    assert!(
        shown.contains("/here in bf16, quantised by q8_0"),
        "{shown}"
    );
    // From another folder, and with the recipe, which nobody names again.
    fs::create_dir(folder.0.join("away")).unwrap();
    let asked = run(
        &["doc", "ask", "../a.state", "Where does Mara live?"],
        &folder.0.join("away"),
    );
    assert_eq!(asked.out, " Oslo.\n", "{asked:?}");
    fs::rename(folder.0.join("here"), folder.0.join("there")).unwrap();
    let lost = run(
        &["doc", "ask", "a.state", "Where does Mara live?"],
        &folder.0,
    );
    assert!(
        lost.status == 1 && lost.err.contains("there is no such folder or file"),
        "{lost:?}"
    );
    let found = [
        "doc",
        "ask",
        "a.state",
        "Where does Mara live?",
        "--model",
        "there",
        "--quantize",
        "q8_0",
    ];
    assert_eq!(run(&found, &folder.0).out, " Oslo.\n");
}

#[test]
fn the_probe_finds_facts_and_draws_its_map() {
    let folder = Folder::new("doc-probe");
    let probe = [
        "doc",
        "probe",
        "--lengths",
        "512,1K",
        "--depths",
        "3",
        "--trials",
        "2",
    ];
    let table = run(&[&probe[..], &["--svg", "map.svg"]].concat(), &folder.0);
    assert_eq!(table.status, 0, "{table:?}");
    assert!(
        table.out.contains("0 %   50 %  100 %") && table.out.lines().count() == 3,
        "{table:?}"
    );
    let rows = lines(&run(&[&probe[..], &["--json"]].concat(), &folder.0).out);
    for (row, length) in rows.iter().zip([512.0, 1024.0]) {
        assert!(
            (row["tokens"].as_f64().unwrap() / length - 1.0).abs() < 0.2,
            "{row}"
        );
        let found: f64 = row["found"]
            .as_array()
            .unwrap()
            .iter()
            .map(|f| f.as_f64().unwrap())
            .sum();
        assert!(
            found >= 2.0,
            "the demonstration model finds what it was trained on: {row}"
        );
    }
    let map = fs::read_to_string(folder.0.join("map.svg")).unwrap();
    assert_eq!(map.matches("class=\"cell\"").count(), 6, "{map}");
    assert!(map.starts_with("<svg ") && map.ends_with("</svg>\n"));
    check(
        &[
            (&["doc", "probe", "--lengths", "1M"], 2, "is no length"),
            (
                &["doc", "probe", "--lengths", "9"],
                2,
                "expected 256 or more tokens",
            ),
            (&["doc", "probe", "--depths", "0"], 2, "1..=64"),
        ],
        &folder.0,
    );
}

/// The hash of weights is kept, so that they need not be read for each question; files that changed have another, though
/// they are as long and as old as before.
#[test]
fn weights_that_changed_are_refused_whatever_was_known_of_them() {
    let folder = Folder::new("doc-hash");
    let model = folder.copy(&root().join("model-cards/demo"), "model");
    folder.write("a.md", "Mara lives in Oslo.\n");
    let cache = folder.0.join("cache");
    let run = |args: &[&str]| {
        let mut command = command(args, &folder.0);
        command.env("XDG_CACHE_HOME", &cache);
        finish(command, b"")
    };
    let hashes = || fs::read_dir(cache.join("strata/weights")).map_or(0, |files| files.count());
    let read = ["doc", "read", "model", "a.md", "-o", "a.state"];
    let ask = ["doc", "ask", "a.state", "Where does Mara live?"];
    assert_eq!(run(&read).status, 0);
    // Files that were made just now may change again unseen: of them nothing is known.
    sleep(Duration::from_secs(5));
    assert_eq!(run(&ask).out, " Oslo.\n");
    let known = hashes();
    assert!(known > 0);
    assert_eq!(run(&ask).out, " Oslo.\n");
    assert_eq!(hashes(), known);
    let weights = model.join("model.safetensors");
    let modified = fs::metadata(&weights).unwrap().modified().unwrap();
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 2;
    bytes[last] ^= 1;
    fs::write(&weights, bytes).unwrap();
    let file = fs::File::options().write(true).open(&weights).unwrap();
    file.set_modified(modified).unwrap();
    drop(file);
    for seconds in [0, 5] {
        sleep(Duration::from_secs(seconds));
        let refused = run(&ask);
        assert_eq!(refused.status, 1, "{refused:?}");
        assert!(
            refused.err.contains("another set of weights"),
            "{refused:?}"
        );
    }
    assert_eq!(hashes(), known + 1);
}

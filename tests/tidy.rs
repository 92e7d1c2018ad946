//! The invariants of ARCHITECTURE.md that a compiler does not keep, as tests over the project's files.
//!
//! Each says what to do when it fails. An exception is a line of a list here, with its reason.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use strata_converters::cards;
use strata_layers::graph::Run;
use strata_layers::plan::layer_kinds;
use strata_layers::{Graph, Plan};

// ---------------------------------------------------------------- the files

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// All files of the project by their paths from its root: those that git knows, else
/// those of the folder.
fn files() -> Vec<String> {
    let listed = Command::new("git")
        .args(["ls-files", "-z"])
        .current_dir(root())
        .output();
    let mut files = match listed {
        Ok(output) if output.status.success() && root().join(".git").exists() => {
            String::from_utf8(output.stdout)
                .expect("names in UTF-8")
                .split_terminator('\0')
                .map(String::from)
                .collect()
        }
        _ => {
            let mut files = Vec::new();
            walk(&root(), "", &mut files);
            files
        }
    };
    files.retain(|f| root().join(f).is_file());
    files.sort();
    files.dedup();
    assert!(files.len() > 100, "only {} files were found", files.len());
    files
}

fn walk(folder: &Path, prefix: &str, files: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let entry = entry.expect("an entry");
        let name = entry.file_name().into_string().expect("a name in UTF-8");
        let ignored = ["target", "__pycache__", ".git"].contains(&name.as_str());
        if entry.path().is_dir() && !ignored {
            walk(&entry.path(), &format!("{prefix}{name}/"), files);
        } else if entry.path().is_file() {
            files.push(format!("{prefix}{name}"));
        }
    }
}

/// A file of Rust.
struct Source {
    path: String,
    text: String,
}

impl Source {
    /// The lines above the tests at the foot, with their numbers.
    fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        numbered(&self.text[..self.foot()])
    }

    /// The same without comments and without what stands in quotes.
    fn code(&self) -> String {
        code(&self.text[..self.foot()])
    }

    fn foot(&self) -> usize {
        let tests = self.text.find("\n#[cfg(test)]\nmod tests");
        tests.map_or(self.text.len(), |at| at + 1)
    }
}

fn numbered(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines().enumerate().map(|(i, line)| (i + 1, line))
}

/// All Rust of some folders, less files that are tests as a whole.
fn sources(folders: &[&str]) -> Vec<Source> {
    let wanted = |path: &String| {
        let within = folders.iter().any(|f| path.starts_with(&format!("{f}/")));
        let tests = path.contains("/tests/") || path.ends_with("/tests.rs");
        within && path.ends_with(".rs") && !tests && !path.ends_with("/testing.rs")
    };
    let read = |path: String| {
        let text = std::fs::read_to_string(root().join(&path)).expect("a text");
        Source { path, text }
    };
    let sources: Vec<Source> = files().into_iter().filter(wanted).map(read).collect();
    assert!(!sources.is_empty(), "{folders:?}");
    sources
}

const CRATES: [&str; 4] = ["kernels", "layers", "converters", "engine"];

/// Blanks comments, texts and characters; lines stay where they are.
fn code(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = bytes.to_vec();
    let mut i = 0;
    let starts = |i: usize, what: &str| text.get(i..).is_some_and(|t| t.starts_with(what));
    while i < bytes.len() {
        let after_word = i > 0 && (bytes[i - 1].is_ascii_alphanumeric() || bytes[i - 1] == b'_');
        let raw = bytes[i] == b'r' && !(after_word && bytes[i - 1] != b'b');
        let hashes = text[i..].bytes().skip(1).take_while(|b| *b == b'#').count();
        let end = if starts(i, "//") {
            text[i..].find('\n').map_or(bytes.len(), |n| i + n)
        } else if starts(i, "/*") {
            text[i..].find("*/").map_or(bytes.len(), |n| i + n + 2)
        } else if raw && bytes.get(i + 1 + hashes) == Some(&b'"') {
            let close = format!("\"{}", "#".repeat(hashes));
            let from = i + hashes + 2;
            text[from..]
                .find(&close)
                .map_or(bytes.len(), |n| from + n + close.len())
        } else if bytes[i] == b'"' {
            let mut end = i + 1;
            while end < bytes.len() && bytes[end] != b'"' {
                end += if bytes[end] == b'\\' { 2 } else { 1 };
            }
            (end + 1).min(bytes.len())
        } else if bytes[i] == b'\'' {
            // A character, unless it is a lifetime.
            let mut inside = text[i + 1..].char_indices();
            match (inside.next(), inside.next()) {
                (Some((_, '\\')), _) => text[i + 3..].find('\'').map_or(i + 1, |n| i + 3 + n + 1),
                (_, Some((n, '\''))) => i + 1 + n + 1,
                _ => i + 1,
            }
        } else {
            i + 1
        };
        if end > i + 1 || bytes[i] >= 0x80 {
            for byte in &mut out[i..end] {
                if *byte != b'\n' {
                    *byte = b' ';
                }
            }
        }
        i = end;
        while !text.is_char_boundary(i) {
            out[i] = b' ';
            i += 1;
        }
    }
    String::from_utf8(out).expect("only ASCII is left")
}

/// Whether `word` stands in `text` by itself.
fn has_word(text: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    text.match_indices(word)
        .any(|(at, _)| !text[..at].ends_with(part) && !text[at + word.len()..].starts_with(part))
}

fn none(faults: Vec<String>, rule: &str) {
    assert!(faults.is_empty(), "{rule}\n  {}", faults.join("\n  "));
}

/// Lines of `sources` whose code holds one of `words`, less the files of `but`.
fn lines_with(sources: &[Source], words: &[&str], but: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    for source in sources.iter().filter(|s| !but.contains(&s.path.as_str())) {
        for (number, line) in numbered(&source.code()) {
            for word in words.iter().filter(|w| has_word(line, w)) {
                found.push(format!("{}:{number}: {word}", source.path));
            }
        }
    }
    found
}

#[test]
fn the_search_sees_code_and_nothing_else() {
    let text = "a // unsafe\nlet s = \"unsafe \\\" {\"; 'u'; '\\n'; fn f<'a>() {} /* File */ r#\"un\"safe\"# b\"x\" é b";
    let found = code(text);
    assert_eq!(found.lines().count(), 2);
    assert!(
        !found.contains("unsafe") && !found.contains("File") && !found.contains("safe"),
        "{found}"
    );
    assert!(
        found.contains("fn f<'a>() {}") && found.ends_with(" b"),
        "{found}"
    );
    assert!(has_word("x.unsafe_code unsafe{", "unsafe") && !has_word("unsafe_code", "unsafe"));
}

// ---------------------------------------------------------------- the workspace

#[test]
fn the_top_level_holds_what_the_map_shows() {
    let allowed = [
        "Cargo.toml",
        "Cargo.lock",
        "engine",
        "layers",
        "kernels",
        "converters",
        "model-cards",
        "tests",
        "README.md",
        "ARCHITECTURE.md",
        "BENCHMARKS.md",
        "LICENSE",
    ];
    let entries: BTreeSet<String> = files()
        .iter()
        .map(|f| f.split('/').next().unwrap_or_default().to_string())
        .filter(|e| !e.starts_with('.') && !allowed.contains(&e.as_str()))
        .collect();
    none(
        entries.into_iter().collect(),
        "these do not belong at the top: a guide lives in the folder it is about",
    );
}

#[test]
fn crates_depend_on_those_to_their_left_only() {
    // strata-kernels <- strata-layers <- strata-converters <- strata <- strata-tests
    let chain = [
        "strata-kernels",
        "strata-layers",
        "strata-converters",
        "strata",
    ];
    for (place, folder) in CRATES.into_iter().chain(["tests"]).enumerate() {
        let manifest = std::fs::read_to_string(root().join(folder).join("Cargo.toml")).unwrap();
        let name = |line: &str| {
            line.split(['.', ' ', '='])
                .next()
                .unwrap_or_default()
                .to_string()
        };
        let mut section = "";
        let mut faults = Vec::new();
        for line in manifest.lines() {
            if line.starts_with('[') {
                section = line;
            } else if section.contains("dependencies") && line.starts_with("strata") {
                let used = name(line);
                if !chain[..place].contains(&used.as_str()) {
                    faults.push(format!("{folder}/Cargo.toml: {used}"));
                }
            }
        }
        none(
            faults,
            "crates form a chain, kernels <- layers <- converters <- engine <- tests",
        );
    }
}

#[test]
fn kernels_know_no_file_and_no_text_format() {
    let found = lines_with(
        &sources(&["kernels"]),
        &[
            "fs",
            "File",
            "serde",
            "yaml",
            "json",
            "net",
            "SystemTime",
            "strata_layers",
        ],
        &[],
    );
    none(
        found,
        "`kernels` is about numbers and devices: files are read in `converters`",
    );
}

#[test]
fn layers_know_no_file_no_thread_and_no_clock() {
    let found = lines_with(
        &sources(&["layers"]),
        &[
            "fs",
            "File",
            "thread",
            "Instant",
            "SystemTime",
            "time",
            "net",
            "process",
            "io",
        ],
        &[],
    );
    none(
        found,
        "`layers` says what a model is made of; files, threads and clocks are others' work",
    );
}

// ---------------------------------------------------------------- families and layers

#[test]
fn no_family_is_named_in_code() {
    // A word is letters, digits, - and _: `AI21-Jamba2-3B`, a Hub id in a help text, is no family's name.
    let kinds: Vec<&str> = layer_kinds().chain(["mamba", "mamba2"]).collect();
    let mut names = BTreeSet::new();
    for card in cards::all() {
        names.insert(card.family().to_lowercase());
        names.extend(card.architectures().iter().map(|a| a.to_lowercase()));
        names.extend(card.model_types().iter().map(|t| t.to_lowercase()));
    }
    names.retain(|n| !kinds.contains(&n.as_str()));
    assert!(names.len() >= 5, "{names:?}");
    let models: Vec<&str> = strata_converters::bundled::names().collect();
    let mut faults = Vec::new();
    for source in sources(&CRATES) {
        for (number, line) in source.lines() {
            // What runs when nobody names a model, and the help that says so.
            let may_name_models = source.path.starts_with("engine/src/cli/")
                || source.path == "engine/src/load/locate.rs"
                    && line.starts_with("const DEFAULT_MODEL");
            let mut lower = line.to_lowercase().replace("llama.cpp", "");
            // GGUF calls SentencePiece's kind of tokenizer so.
            if source.path.starts_with("converters/src/gguf/") {
                lower = lower.replace("`llama`", "").replace("\"llama\"", "");
                lower = lower.replace("gpt2 and llama are read", "");
            }
            let mut words = lower.split(|c: char| !c.is_alphanumeric() && c != '-' && c != '_');
            let found =
                words.find(|w| names.contains(*w) || models.contains(w) && !may_name_models);
            if let Some(name) = found {
                faults.push(format!("{}:{number}: {name}", source.path));
            }
        }
    }
    none(
        faults,
        "families are data: what is special about one is said in its card, and comments name the paper or the quirk",
    );
}

#[test]
fn the_engine_knows_no_kind_of_layer() {
    let sources = sources(&["engine"]);
    let mut faults = lines_with(&sources, &["StepKind"], &[]);
    for source in &sources {
        let code = source.code();
        // `use strata_layers::{...}` may stand on several lines.
        for (at, _) in code.match_indices("strata_layers::") {
            let rest = &code[at + "strata_layers::".len()..];
            let named = rest.split(';').next().unwrap_or_default();
            let end = named.find('}').map_or(named.len(), |e| e + 1);
            let named = if named.starts_with('{') {
                &named[..end]
            } else {
                named.split(['(', ' ', ',', '<']).next().unwrap_or_default()
            };
            for kind in layer_kinds().filter(|k| has_word(named, k)) {
                faults.push(format!("{}: strata_layers::{kind}", source.path));
            }
        }
        for (number, line) in source.lines() {
            for kind in layer_kinds().filter(|k| line.contains(&format!("\"{k}\""))) {
                faults.push(format!("{}:{number}: \"{kind}\"", source.path));
            }
        }
    }
    none(
        faults,
        "the engine sees LayerSpec, Layer and StateSpec: what differs by kind is a method there",
    );
}

#[test]
fn converters_are_used_by_load_only() {
    let mut others = sources(&["engine"]);
    others.retain(|s| !s.path.starts_with("engine/src/load/"));
    none(
        lines_with(&others, &["strata_converters"], &[]),
        "only engine/src/load/ may name the converters: ask it for what you need",
    );
}

#[test]
fn every_kind_of_layer_is_used_by_a_card() {
    let unused = [("s4d", "for plans of one's own: no checkpoint is published")];
    let plans: Vec<Plan> = cards::all()
        .iter()
        .map(|card| {
            card.plan(card.tiny(), "tiny")
                .expect("a card's tiny config makes a plan")
        })
        .collect();
    for kind in layer_kinds() {
        let used = plans.iter().any(|plan| {
            let graph = Graph::lower(plan, "tiny").expect("a tiny plan");
            graph.nodes.iter().any(|node| match &node.run {
                Run::Layer { spec, .. } => spec.kind() == kind,
                Run::Add | Run::Concat => false,
            })
        });
        let listed = unused.iter().any(|(name, _)| *name == kind);
        assert!(
            used != listed,
            "layer kind `{kind}`: {}",
            if used {
                "a card uses it now; take it off the list"
            } else {
                "no card uses it: delete it, or list it with a reason"
            }
        );
    }
}

#[test]
fn every_card_has_a_golden_and_small_sizes() {
    for card in cards::all() {
        let family = card.family();
        let folder = root().join("tests/golden").join(family);
        let variants = std::fs::read_dir(&folder).map_or(0, |variants| {
            variants
                .filter(|v| {
                    v.as_ref().is_ok_and(|v| {
                        let holds = |name| v.path().join(name).is_file();
                        holds("golden.safetensors") || holds("vision.safetensors")
                    })
                })
                .count()
        });
        assert!(
            variants > 0,
            "{family} has no golden: make one with tests/make_golden.py into {}",
            folder.display()
        );
        assert!(
            !card.tiny().entries().is_empty(),
            "{family}: its card needs a `tiny` config"
        );
        assert_eq!(
            card.file(),
            format!("model-cards/{family}.yaml"),
            "a card's file is named for its family"
        );
    }
}

#[test]
fn model_cards_holds_cards_bundled_models_and_example_configs() {
    let listed = files();
    let mut faults = Vec::new();
    for path in listed.iter().filter_map(|f| f.strip_prefix("model-cards/")) {
        let good = match path.split_once('/') {
            None => path == "README.md" || path.ends_with(".yaml"),
            Some(("configs", name)) => name.ends_with(".json") && !name.contains('/'),
            // What the build script takes for a model.
            Some((model, _)) => listed.contains(&format!("model-cards/{model}/config.json")),
        };
        if !good {
            faults.push(format!("model-cards/{path}"));
        }
    }
    assert!(!strata_converters::bundled::names().any(|name| name == "configs"));
    none(
        faults,
        "model-cards/ holds its guide, a card a family, folders of bundled models, and in configs/ the configs of published models",
    );
}

#[test]
fn every_op_has_a_fast_version_and_rows_in_parity() {
    let parity = std::fs::read_to_string(root().join("tests/parity.rs")).unwrap();
    let mut count = 0;
    for file in files() {
        let Some(op) = file
            .strip_prefix("kernels/src/ops/")
            .and_then(|f| f.strip_suffix(".rs"))
        else {
            continue;
        };
        if op == "mod" {
            continue;
        }
        count += 1;
        let camel: String = op
            .split('_')
            .map(|word| word[..1].to_uppercase() + &word[1..])
            .collect();
        assert!(
            parity.contains(&format!("{camel} {{")),
            "op `{op}`: tests/parity.rs never builds a {camel}; add a row group"
        );
        assert!(
            root().join(format!("kernels/src/cpu/{op}.rs")).is_file(),
            "op `{op}` has no kernels/src/cpu/{op}.rs: names repeat, so that a thing is found by its name"
        );
    }
    assert!(count >= 14, "only {count} ops were found");
}

#[test]
fn plans_and_cards_carry_a_version_and_refuse_unknown_keys() {
    let plan = cards::all()[0]
        .plan(cards::all()[0].tiny(), "tiny")
        .unwrap()
        .print();
    for (broken, expected) in [
        (
            plan.replacen("plan: 1", "plan: 2", 1),
            "plan version 2; this program reads version 1",
        ),
        (plan.replacen("plan: 1\n", "", 1), "a plan needs `plan`"),
        (format!("{plan}more: 1\n"), "a plan has no `more`"),
        (plan.replacen("eps:", "epsilon:", 1), "has no `epsilon`"),
    ] {
        let faults = Plan::parse(&broken, "plan.yaml")
            .expect_err(expected)
            .to_string();
        assert!(
            faults.contains(expected),
            "{expected:?} is missing from\n{faults}"
        );
    }
    for file in files()
        .iter()
        .filter(|f| f.starts_with("model-cards/") && f.ends_with(".yaml"))
    {
        let card = std::fs::read_to_string(root().join(file)).unwrap();
        for (broken, expected) in [
            (
                card.replacen("card: 1", "card: 2", 1),
                "card version 2; this program reads version 1",
            ),
            (card.replacen("card: 1\n", "", 1), "a card needs `card`"),
            (format!("{card}\nmore: 1\n"), "a card has no `more`"),
        ] {
            let faults = strata_converters::Card::parse(&broken, file)
                .expect_err(expected)
                .to_string();
            assert!(
                faults.contains(expected),
                "{file}: {expected:?} is missing from\n{faults}"
            );
        }
    }
}

// ---------------------------------------------------------------- unsafe, globals, environment

#[test]
fn unsafe_is_in_kernels_and_where_files_are_mapped() {
    let mut faults = Vec::new();
    for source in sources(&["layers", "converters", "engine"]) {
        let count = source
            .code()
            .lines()
            .filter(|l| has_word(l, "unsafe"))
            .count();
        // The map of a file, whose shortening meanwhile ends the process, and giving its pages back.
        let allowed = 2 * usize::from(source.path == "converters/src/files.rs");
        if count != allowed {
            faults.push(format!("{}: {count} times, {allowed} allowed", source.path));
        }
    }
    none(
        faults,
        "`unsafe` belongs in `kernels`, and where `converters` maps files",
    );
    for (file, attribute) in [
        ("layers/src/lib.rs", "#![forbid(unsafe_code)]"),
        ("converters/src/lib.rs", "#![deny(unsafe_code)]"),
        ("engine/src/lib.rs", "#![deny(unsafe_code)]"),
    ] {
        let text = std::fs::read_to_string(root().join(file)).unwrap();
        assert!(text.contains(attribute), "{file} should say {attribute}");
    }
}

#[test]
fn every_unsafe_says_why_it_is_sound() {
    let mut faults = Vec::new();
    for source in sources(&["kernels", "converters"]) {
        let code = source.code();
        let code: Vec<&str> = code.lines().collect();
        let text: Vec<&str> = source.text.lines().collect();
        for (i, line) in code.iter().enumerate() {
            // What an `unsafe fn` asks for stands at its trait or in its section `# Safety`, by clippy.
            let opens = line.contains("unsafe {") || line.contains("unsafe impl");
            if !opens {
                continue;
            }
            // Up over attributes, comments and the beginning of the statement.
            let mut above = i;
            let says = |line: &str| line.contains("SAFETY:");
            let mut said = says(text[i]);
            while !said && above > 0 {
                above -= 1;
                said = says(text[above]);
                let ends = code[above].trim_end();
                let blank = text[above].trim().is_empty();
                if blank || ends.ends_with(';') || ends.ends_with('}') {
                    break;
                }
            }
            if !said {
                faults.push(format!("{}:{}: {}", source.path, i + 1, text[i].trim()));
            }
        }
    }
    none(
        faults,
        "each `unsafe` block and impl has a comment `SAFETY:` right above it",
    );
}

#[test]
fn the_environment_is_read_in_main_only() {
    let faults: Vec<String> = sources(&CRATES)
        .iter()
        .filter(|s| s.path != "engine/src/main.rs" && !s.path.ends_with("/build.rs"))
        // Examples are programs of their own.
        .filter(|s| !s.path.contains("/examples/"))
        .flat_map(|source| {
            let code = source.code();
            let lines = numbered(&code).filter(|(_, l)| {
                ["env::var", "env::vars", "env::set_var", "env::args"]
                    .iter()
                    .any(|w| l.contains(w))
            });
            lines
                .map(|(n, l)| format!("{}:{n}: {}", source.path, l.trim()))
                .collect::<Vec<_>>()
        })
        .collect();
    none(
        faults,
        "below engine/src/main.rs nothing reads the environment: pass it as an option",
    );
}

#[test]
fn no_global_changes() {
    // A global that is computed once, or that a signal handler must reach.
    let allowed = [
        (
            "converters/src/cards.rs",
            "static CARDS: LazyLock<",
            "read from the binary once",
        ),
        (
            "converters/src/gguf/pre.rs",
            "static CUTS: LazyLock<",
            "read from the binary once",
        ),
        (
            "engine/src/cli/mod.rs",
            "static INTERRUPTED: AtomicBool",
            "set by Ctrl-C",
        ),
        (
            "engine/src/runner/lane.rs",
            "static LANES: AtomicU64",
            "numbers lanes, so that none is taken for one that is gone",
        ),
        (
            "engine/src/text/",
            "static BYTES: OnceLock<",
            "a table of the byte-level alphabet, made once",
        ),
    ];
    let mut faults = Vec::new();
    for source in sources(&CRATES) {
        for (number, line) in numbered(&source.code()) {
            let line = line.trim_start();
            let line = line.strip_prefix("pub ").unwrap_or(line);
            let line = line.strip_prefix("pub(crate) ").unwrap_or(line);
            let changes = [
                "Cell", "Atomic", "Mutex", "RwLock", "OnceLock", "LazyLock", "mut ",
            ];
            let global = line.starts_with("static ") && changes.iter().any(|w| line.contains(w))
                || line.contains("thread_local!");
            let listed = allowed
                .iter()
                .any(|(path, start, _)| source.path.starts_with(path) && line.starts_with(start));
            if global && !listed {
                faults.push(format!("{}:{number}: {line}", source.path));
            }
        }
    }
    none(
        faults,
        "no global state: give it an owner, or list it here with a reason",
    );
}

// ---------------------------------------------------------------- size and leftovers

/// Most lines of a file, and of what stands in it above its tests.
const MAX_LINES: [usize; 2] = [1000, 700];

#[test]
fn files_have_one_purpose() {
    // A file past a limit is split, or stands here with what it holds and why that is one thing.
    let longer = [
        ("tests/parity.rs", "a row group for each op: one table"),
        (
            "tests/engine.rs",
            "a model of the scheduler and the traffic that tests it",
        ),
        (
            "tests/tidy.rs",
            "a test for each invariant, over one reader of the project's files",
        ),
        (
            "tests/cli.rs",
            "a table of invocations for each command, over one way to run them",
        ),
        (
            "engine/src/text/chat_template.rs",
            "Python's text methods and printing, as templates use them",
        ),
        (
            "tests/make_golden_authors.py",
            "a reference for each family of the authors' own code, over one way to write goldens",
        ),
        (
            "model-cards/demo/text.py",
            "the demonstration model's training text, all its sentences",
        ),
    ];
    let mut faults = Vec::new();
    for path in files() {
        if !path.ends_with(".rs") && !path.ends_with(".py") {
            continue;
        }
        let text = std::fs::read_to_string(root().join(&path)).unwrap();
        let source = Source { path, text };
        let path = &source.path;
        let found = [source.text.lines().count(), source.lines().count()];
        let over = found[0] > MAX_LINES[0] || found[1] > MAX_LINES[1];
        if over != longer.iter().any(|(p, _)| p == path) {
            let [all, above] = found;
            faults.push(format!("{path}: {all} lines, {above} above its tests"));
        }
    }
    none(
        faults,
        &format!(
            "{} lines and {} above the tests are the most: does the file have two purposes? Split it, or list it here with its reason; one that became shorter leaves the list",
            MAX_LINES[0], MAX_LINES[1]
        ),
    );
}

#[test]
fn nothing_is_left_for_later() {
    let words = [
        "TODO",
        "FIXME",
        "XXX",
        "HACK",
        "todo!",
        "unimplemented!",
        "dbg!",
    ];
    let mut faults = Vec::new();
    for path in files() {
        let known = [".rs", ".py", ".toml", ".yaml", ".md"]
            .iter()
            .any(|e| path.ends_with(e));
        if !known || path == "tests/tidy.rs" {
            continue;
        }
        let text = std::fs::read_to_string(root().join(&path)).unwrap();
        for (number, line) in numbered(&text) {
            for word in words.iter().filter(|w| has_word(line, w)) {
                faults.push(format!("{path}:{number}: {word}"));
            }
        }
    }
    none(faults, "finish it, or write an issue");
}

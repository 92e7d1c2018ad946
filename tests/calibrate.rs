//! Importance matrices: what is gathered is what a plain computation gives, and quantising by it errs less.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView, serialize};
use strata::importance::{Importance, Observer};
use strata::load::{Calibration, ConvertOptions, LoadOptions, Model, Silent, convert, load};
use strata::perplexity::{Scorer, Summary, score, windows};
use strata::random_weights::RandomWeights;
use strata::recipe::Recipe;
use strata::runner::{Network, Point};
use strata::session::{Engine, EngineConfig, Request};
use strata_converters::write::Quiet;
use strata_kernels::DType;
use strata_kernels::cpu::{Cpu, CpuOptions};
use strata_layers::{Graph, Plan};
use strata_tests::models::logits;
use strata_tests::{Folder, command, finish};

const PLAN: &str = "\
plan: 1
name: hybrid
vocab: 37
d_model: 24
context: 4096
init_std: 0.3
blocks:
  a:
    - residual: [norm: {eps: 1.0e-6}, attention: {heads: 4, kv_heads: 2, head_dim: 8}]
    - residual: [norm: {name: ff_norm, eps: 1.0e-6}, moe: {experts: 4, top_k: 2, d_ff: 20, act: silu, router: {score: softmax, normalize: false}}]
stack: [a]
head: {norm: {eps: 1.0e-6}, tie: true}
";
const TOKENS: usize = 90;

/// What was gathered over some tokens, and the rows behind the embedding and before the output matrix.
fn gathered(threads: usize, chunk: usize) -> (Importance, Vec<f32>, Vec<f32>) {
    let plan = Plan::parse(PLAN, "plan").unwrap();
    let graph = Graph::lower(&plan, "plan").unwrap();
    let matrices: Vec<(String, usize)> = graph
        .weights()
        .into_iter()
        .filter(|w| w.spec.shape.len() == 2)
        .map(|w| (w.path, w.spec.shape[1]))
        .collect();
    let backend = Arc::new(Cpu::new(CpuOptions {
        threads,
        ..CpuOptions::default()
    }));
    let weights = RandomWeights::new(5, plan.init_std, DType::F32, backend.clone());
    let network = Network::build(graph, &weights, backend, DType::F32).unwrap();
    let observer = Arc::new(Observer::new(&network));
    let observed = Arc::new(network.on(observer.clone()));
    let config = EngineConfig::new(1024, 1, DType::F32).with_chunk(chunk);
    let mut engine = Engine::new(observed, config).unwrap();
    engine
        .submit(Request {
            prompt: (0..TOKENS).map(|i| (i * i % 37) as u32).collect(),
            prompt_logits: true,
            ..Request::default()
        })
        .unwrap();
    let (mut embedding, mut norm) = (Vec::new(), Vec::new());
    while engine
        .step_watched(
            &mut |seen| match seen.point {
                Point::Embedding => embedding.extend_from_slice(seen.rows),
                Point::Norm => norm.extend_from_slice(seen.rows),
                Point::Block(_) => {}
            },
            &mut |_, _, _| {},
        )
        .unwrap()
    {}
    (observer.gathered(&matrices), embedding, norm)
}

fn mean_squares(rows: &[f32], cols: usize) -> Vec<f64> {
    let mut means = vec![0.0; cols];
    for row in rows.chunks(cols) {
        for (mean, x) in means.iter_mut().zip(row) {
            *mean += f64::from(*x).powi(2) / (rows.len() / cols) as f64;
        }
    }
    means
}

fn close(found: &[f32], expected: &[f64]) {
    assert_eq!(found.len(), expected.len());
    for (f, e) in found.iter().zip(expected) {
        assert!((f64::from(*f) - e).abs() <= 1e-5 * e.abs(), "{f} {e}");
    }
}

#[test]
fn gathered_squares_are_those_of_a_plain_computation() {
    let (found, embedding, norm) = gathered(2, 16);
    let columns = |path: &str| &found.columns[path];
    // The output matrix is the embedding, and multiplies what is behind the last norm.
    assert_eq!(columns("embed").rows, TOKENS as u64);
    close(&columns("embed").mean_squares, &mean_squares(&norm, 24));
    // The first product's inputs are the embedding's rows over their root mean square.
    let normed: Vec<f32> = embedding
        .chunks(24)
        .flat_map(|row| {
            let square = row.iter().map(|x| x * x).sum::<f32>() / 24.0;
            row.iter().map(move |x| x / (square + 1e-6).sqrt())
        })
        .collect();
    let q = columns("blocks.0.attention.q");
    close(&q.mean_squares, &mean_squares(&normed, 24));
    assert_eq!(q, columns("blocks.0.attention.v"));
    // Experts share out the rows that the router reads, each twice.
    let router = columns("blocks.0.moe.router");
    let mut rows = 0;
    let mut sums = vec![0.0; 24];
    for expert in 0..4 {
        let up = columns(&format!("blocks.0.moe.up.{expert}"));
        assert!(up.rows < TOKENS as u64);
        assert_eq!(up, columns(&format!("blocks.0.moe.gate.{expert}")));
        assert_eq!(
            up.rows,
            columns(&format!("blocks.0.moe.down.{expert}")).rows
        );
        rows += up.rows;
        for (sum, mean) in sums.iter_mut().zip(&up.mean_squares) {
            *sum += f64::from(*mean) * up.rows as f64 / (2 * TOKENS) as f64;
        }
    }
    assert_eq!(rows, 2 * TOKENS as u64);
    close(&router.mean_squares, &sums);
    // Neither threads nor chunks change a bit.
    for (threads, chunk) in [(1, 16), (3, 7), (2, 90)] {
        assert_eq!(gathered(threads, chunk).0, found, "{threads} {chunk}");
    }
}

/// A folder that vanishes with its owner.
struct Room(PathBuf);

impl Room {
    fn new(name: &str) -> Room {
        let path = std::env::temp_dir().join(format!("strata-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Room(path)
    }

    fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, content).unwrap();
        path
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// The demonstration model's sample document: its first half to calibrate with, its second to measure on.
fn halves() -> (String, String) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model-cards/demo/sample.md");
    let text = std::fs::read_to_string(path).unwrap();
    let half = text.len() / 2 + text[text.len() / 2..].find('\n').unwrap();
    (text[..half].into(), text[half..].into())
}

fn options(recipe: Option<&str>, calibrate: Option<&Path>, save: Option<PathBuf>) -> LoadOptions {
    LoadOptions {
        device: "cpu".into(),
        threads: Some(2),
        quantize: recipe.map(|r| Recipe::find(r).unwrap()),
        calibrate: calibrate.map(|file| Calibration {
            file: file.into(),
            save,
        }),
        ..LoadOptions::default()
    }
}

fn model(options: &LoadOptions) -> Model {
    load(options, &mut Silent::default()).unwrap_or_else(|e| panic!("{e}"))
}

fn scorer(model: &Model, tokens: usize) -> Scorer {
    let config = EngineConfig::new(tokens, 1, model.kv_dtype);
    let engine = Engine::new(model.network.clone(), config).unwrap();
    Scorer::new(&model.name, engine)
}

/// Mean D(the model as it is || quantised), in nats a token; perplexity; part of tokens that agree.
fn cost(plain: &Model, quantised: &Model, tokens: &[u32]) -> (f64, f64, f64) {
    let list = windows(tokens.len(), tokens.len(), tokens.len());
    let (mut a, mut b) = (scorer(plain, tokens.len()), scorer(quantised, tokens.len()));
    let scored = score(&mut a, Some(&mut b), tokens, &list, &mut |_| {}).unwrap();
    let compared = Summary::of(&scored).unwrap().compared.unwrap();
    let perplexity = compared.nll.exp().mean;
    (compared.kl.mean, perplexity, compared.agreement.mean)
}

#[test]
fn a_calibrated_model_is_nearer_to_the_one_it_is_made_from() {
    let room = Room::new("calibrate-kl");
    let (first, second) = halves();
    let text = room.file("text.txt", first.as_bytes());
    let plain = model(&options(None, None, None));
    let tokens = plain.tokenizer().unwrap().encode(&second, true).unwrap();
    for recipe in ["q4_0", "q2_k"] {
        let without = cost(&plain, &model(&options(Some(recipe), None, None)), &tokens);
        let with = model(&options(Some(recipe), Some(&text), None));
        assert!(
            with.notes.iter().any(|n| n.contains("tokens of")),
            "{:?}",
            with.notes
        );
        let with = cost(&plain, &with, &tokens);
        eprintln!("{recipe}: {without:?} without, {with:?} with");
        assert!(
            with.0 < without.0,
            "{recipe}: {without:?} without, {with:?} with"
        );
    }
}

/// Prints the table of `model-cards/demo/README.md`: with STRATA_CALIBRATE, a text.
#[test]
#[ignore = "prints figures"]
fn costs() {
    let text = PathBuf::from(std::env::var("STRATA_CALIBRATE").unwrap());
    let plain = model(&options(None, None, None));
    let (first, second) = halves();
    let all = first + &second;
    let tokens = plain.tokenizer().unwrap().encode(&all, true).unwrap();
    for recipe in [
        "int8", "fp8", "q8_0", "q5_k_m", "q4_k_m", "q4_0", "iq4_nl", "q3_k", "q2_k",
    ] {
        let without = cost(&plain, &model(&options(Some(recipe), None, None)), &tokens);
        let with = cost(
            &plain,
            &model(&options(Some(recipe), Some(&text), None)),
            &tokens,
        );
        println!("{recipe}: {without:?} without, {with:?} with");
    }
}

#[test]
fn a_saved_matrix_does_what_its_text_did_and_a_gguf_file_holds_the_same_blocks() {
    let room = Room::new("calibrate-saved");
    let text = room.file("text.txt", halves().0.as_bytes());
    let saved = room.0.join("importance.safetensors");
    let first = model(&options(Some("q4_k_m"), Some(&text), Some(saved.clone())));
    let tokens: Vec<u32> = (3..40).collect();
    let expected = logits(&first, &tokens);
    let again = room.0.join("again.safetensors");
    let one = LoadOptions {
        threads: Some(1),
        ..options(Some("q4_k_m"), Some(&text), Some(again.clone()))
    };
    model(&one);
    assert!(std::fs::read(&saved).unwrap() == std::fs::read(&again).unwrap());
    let read = model(&options(Some("q4_k_m"), Some(&saved), None));
    assert!(logits(&read, &tokens) == expected);
    assert!(logits(&model(&options(Some("q4_k_m"), None, None)), &tokens) != expected);

    for (calibrate, name) in [(&text, "a.gguf"), (&saved, "b.gguf")] {
        let file = room.0.join(name);
        let there = ConvertOptions {
            from: options(None, Some(calibrate), None),
            to: file.clone(),
            gguf: true,
            dtype: None,
            quantize: Some(Recipe::find("q4_k_m").unwrap()),
            shard_bytes: 5_000_000_000,
            force: false,
            threads: 2,
            seed: 0,
        };
        convert(&there, &mut Silent::default(), &mut Quiet).unwrap_or_else(|e| panic!("{e}"));
        let written = LoadOptions {
            model: Some(file.display().to_string()),
            ..options(None, None, None)
        };
        assert!(logits(&model(&written), &tokens) == expected, "{name}");
    }
}

/// A text from standard input is the text of a file.
#[test]
fn a_text_may_come_from_standard_input() {
    let folder = Folder::new("calibrate-stdin");
    let (text, _) = halves();
    folder.write("text.txt", &text);
    let mut saved = Vec::new();
    for (from, input) in [("text.txt", ""), ("-", text.as_str())] {
        let args = [
            "convert",
            "demo",
            "a.gguf",
            "--quantize",
            "q4_0",
            "--force",
            "--calibrate",
            from,
            "--save-importance",
            "a.safetensors",
        ];
        let done = finish(command(&args, &folder.0), input.as_bytes());
        assert_eq!(done.status, 0, "{done:?}");
        saved.push(std::fs::read(folder.0.join("a.safetensors")).unwrap());
        std::fs::remove_file(folder.0.join("a.safetensors")).unwrap();
    }
    assert!(saved[0] == saved[1]);
}

fn refused(options: &LoadOptions) -> String {
    match load(options, &mut Silent::default()) {
        Ok(_) => panic!("nothing was refused"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn texts_that_say_nothing_are_refused() {
    let room = Room::new("calibrate-texts");
    let check = |content: &[u8], expected: &str| {
        let text = room.file("text.txt", content);
        let save = room.0.join("kept.safetensors");
        let error = refused(&options(Some("q4_0"), Some(&text), Some(save.clone())));
        assert!(
            error.contains("text.txt") && error.contains(expected),
            "{error}"
        );
        assert!(!save.exists());
    };
    check(b"", "0 tokens are too few");
    check(
        b"Mara lives in Oslo.",
        "19 tokens are too few to tell which columns count: at least 256",
    );
    check(b"ab\xff", "byte 2 is not UTF-8");
    let missing = room.0.join("missing.txt");
    assert!(refused(&options(Some("q4_0"), Some(&missing), None)).contains("missing.txt"));
    let text = room.file("text.txt", halves().0.as_bytes());
    let error = refused(&options(None, Some(&text), None));
    assert!(error.contains("--quantize"), "{error}");
}

type Entry = (String, (Dtype, Vec<usize>, Vec<u8>));

#[test]
fn matrices_of_another_model_and_damaged_ones_are_refused_by_name() {
    let room = Room::new("calibrate-files");
    let text = room.file("text.txt", halves().0.as_bytes());
    let saved = room.0.join("good.safetensors");
    model(&options(Some("q4_0"), Some(&text), Some(saved.clone())));
    let bytes = std::fs::read(&saved).unwrap();
    let good: Vec<Entry> = SafeTensors::deserialize(&bytes)
        .unwrap()
        .tensors()
        .into_iter()
        .map(|(name, v)| (name, (v.dtype(), v.shape().to_vec(), v.data().to_vec())))
        .collect();
    let check = |change: &dyn Fn(&mut Vec<Entry>), expected: &[&str]| {
        let mut entries = good.clone();
        change(&mut entries);
        let views = entries.iter().map(|(name, (dtype, shape, data))| {
            (
                name.clone(),
                TensorView::new(*dtype, shape.clone(), data).unwrap(),
            )
        });
        let file = room.file("bad.safetensors", &serialize(views, None).unwrap());
        let error = refused(&options(Some("q4_0"), Some(&file), None));
        for expected in ["bad.safetensors"].iter().chain(expected) {
            assert!(error.contains(expected), "{expected}: {error}");
        }
    };
    let entry = |entries: &mut Vec<Entry>, name: &str| -> usize {
        entries.iter().position(|(n, _)| n == name).unwrap()
    };
    let means = "embed.mean_squares";
    check(
        &|e| {
            let at = entry(e, means);
            e[at].1.2[4..8].copy_from_slice(&f32::NAN.to_le_bytes());
            let at = entry(e, "embed.rows");
            e[at].1 = (Dtype::F32, vec![1], vec![0; 4]);
        },
        &["\"embed.mean_squares\" holds NaN for column 1"],
    );
    check(
        &|e| {
            let at = entry(e, means);
            e[at].1.2[..4].copy_from_slice(&(-1.0f32).to_le_bytes());
        },
        &["holds -1 for column 0"],
    );
    check(
        &|e| {
            let at = entry(e, "embed.rows");
            e[at].1 = (Dtype::F32, vec![1], vec![0; 4]);
        },
        &["\"embed.rows\" should be one number of rows, I64"],
    );
    check(
        &|e| {
            let at = entry(e, means);
            e[at].1 = (Dtype::F32, vec![8, 16], vec![0; 512]);
        },
        &["is F32 of shape [8, 16], expected F32 of one dimension"],
    );
    // All that does not fit is told together.
    check(
        &|e| {
            let at = entry(e, means);
            e[at].1 = (Dtype::F32, vec![64], vec![0; 256]);
            e.retain(|(name, _)| !name.starts_with("blocks.2.attention.q."));
            let other = (Dtype::F32, vec![2], vec![0; 8]);
            e.push(("blocks.99.mlp.up.mean_squares".into(), other));
            let rows = (Dtype::I64, vec![1], vec![0; 8]);
            e.push(("blocks.99.mlp.up.rows".into(), rows));
        },
        &[
            "gathered with another model or plan",
            "embed has 64 columns, expected 128",
            "blocks.2.attention.q is missing",
            "blocks.99.mlp.up is no matrix of the plan",
        ],
    );
    check(&|e| e.clear(), &["holds no importance matrix"]);
    check(
        &|e| e.push(("model.weight".into(), (Dtype::F32, vec![1], vec![0; 4]))),
        &["\"model.weight\" is no part of an importance matrix"],
    );
    for cut in [0, 7, 100, bytes.len() / 2, bytes.len() - 1] {
        let file = room.file("cut.safetensors", &bytes[..cut]);
        let error = refused(&options(Some("q4_0"), Some(&file), None));
        assert!(error.contains("cut.safetensors"), "{error}");
    }
}

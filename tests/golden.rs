//! Every golden: a tiny checkpoint and what the reference implementation says of it.
//!
//! f32 logits are within a thousandth of their standard deviation at every position, on every path of
//! the CPU; the reference itself, summed in another order, moves by 8e-5 of it. Thirty-two greedy
//! tokens are equal; the goldens hold no near ties.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::SafeTensors;
use strata::load::{CudaPlaces, LoadOptions, Model, Silent, load};
use strata::sampler::SamplingParams;
use strata::session::{Engine, EngineConfig, Output, Request};
use strata::verify::{VerifyOptions, verify};
use strata_kernels::{DType, KvType};

/// Largest error, in standard deviations of the logits.
const TOLERANCE: f32 = 1e-3;

/// Where the goldens are: in the repository, unless STRATA_GOLDEN names another folder, which a test
/// binary that was carried to another machine needs.
fn root() -> PathBuf {
    let carried = std::env::var_os("STRATA_GOLDEN").map(PathBuf::from);
    carried.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("golden"))
}

fn goldens() -> Vec<PathBuf> {
    let root = root();
    let mut found = Vec::new();
    for family in std::fs::read_dir(root).unwrap() {
        let family = family.unwrap().path();
        if family.is_dir() {
            let variants = std::fs::read_dir(family)
                .unwrap()
                .map(|v| v.unwrap().path());
            found.extend(variants.filter(|v| v.join("golden.safetensors").is_file()));
        }
    }
    found.sort();
    assert!(found.len() >= 9, "goldens are missing: {found:?}");
    found
}

fn open(folder: &Path, device: &str, threads: usize) -> Model {
    // A family without a card is a plan.
    let plan = Some(folder.join("plan.yaml")).filter(|p| p.is_file());
    open_with(folder, plan, device, threads)
}

fn open_with(folder: &Path, plan: Option<PathBuf>, device: &str, threads: usize) -> Model {
    let options = LoadOptions {
        model: Some(folder.display().to_string()),
        plan,
        device: device.into(),
        dtype: Some(DType::F32),
        threads: Some(threads),
        cuda: CudaPlaces {
            kernels: Some(std::env::temp_dir().join("strata-golden-kernels")),
            ..CudaPlaces::default()
        },
        ..LoadOptions::default()
    };
    load(&options, &mut Silent::default()).unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
}

/// What the reference says.
struct Golden {
    tokens: Vec<Vec<u32>>,
    logits: Vec<Vec<f32>>,
    prompt: Vec<u32>,
    greedy: Vec<u32>,
}

fn golden(folder: &Path) -> Golden {
    let bytes = std::fs::read(folder.join("golden.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let ids = |name: &str| -> Vec<u32> {
        let data = file.tensor(name).unwrap();
        data.data()
            .as_chunks()
            .0
            .iter()
            .map(|b| i64::from_le_bytes(*b) as u32)
            .collect()
    };
    let shape = file.tensor("token_ids").unwrap().shape().to_vec();
    let logits: Vec<f32> = {
        let data = file.tensor("logits").unwrap();
        data.data()
            .as_chunks()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect()
    };
    Golden {
        tokens: ids("token_ids")
            .chunks(shape[1])
            .map(<[u32]>::to_vec)
            .collect(),
        logits: logits
            .chunks(logits.len() / shape[0])
            .map(<[f32]>::to_vec)
            .collect(),
        prompt: ids("greedy_prompt"),
        greedy: ids("greedy_tokens"),
    }
}

fn std_of(values: &[f32]) -> f32 {
    let mean = values.iter().sum::<f32>() / values.len() as f32;
    (values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / values.len() as f32).sqrt()
}

/// The logits of all sequences, in chunks of `chunk` and together in one batch.
fn logits(model: &Model, sequences: &[Vec<u32>], chunk: usize) -> Vec<Vec<f32>> {
    let config = EngineConfig::new(256, sequences.len(), DType::F32).with_chunk(chunk);
    let mut engine = Engine::new(model.network.clone(), config).unwrap();
    let mut rows = vec![Vec::new(); sequences.len()];
    let ids: Vec<_> = sequences
        .iter()
        .map(|tokens| {
            let prompt = tokens.clone();
            engine
                .submit(Request {
                    prompt,
                    prompt_logits: true,
                    ..Request::default()
                })
                .unwrap()
        })
        .collect();
    while engine
        .step(&mut |id, _, logits| {
            let at = ids.iter().position(|i| *i == id).unwrap();
            rows[at].extend_from_slice(logits);
        })
        .unwrap()
    {}
    rows
}

fn greedy(model: &Model, golden: &Golden) -> Vec<u32> {
    let mut engine =
        Engine::new(model.network.clone(), EngineConfig::new(256, 1, DType::F32)).unwrap();
    let request = Request {
        prompt: golden.prompt.clone(),
        max_tokens: golden.greedy.len(),
        sampling: SamplingParams::greedy(),
        ..Request::default()
    };
    engine.submit(request).unwrap();
    let mut tokens = Vec::new();
    while engine.advance().unwrap() {
        for output in engine.outputs() {
            if let Output::Token { sampled, .. } = output {
                tokens.push(sampled.token);
            }
        }
    }
    tokens
}

/// The largest error of a model's logits in standard deviations, and what is wrong with it.
fn compare(model: &Model, golden: &Golden, name: &str) -> (f32, Vec<String>) {
    let (mut worst_of_all, mut faults) = (0.0f32, Vec::new());
    for chunk in [golden.tokens[0].len(), 7] {
        let found = logits(model, &golden.tokens, chunk);
        for (s, (found, expected)) in found.iter().zip(&golden.logits).enumerate() {
            assert_eq!(found.len(), expected.len());
            let worst =
                found
                    .iter()
                    .zip(expected)
                    .map(|(a, b)| (a - b).abs())
                    .fold(
                        0.0,
                        |a: f32, b| if b.is_nan() { f32::INFINITY } else { a.max(b) },
                    );
            let error = worst / std_of(expected);
            worst_of_all = worst_of_all.max(error);
            if error >= TOLERANCE {
                faults.push(format!(
                    "{name}, sequence {s}, chunk {chunk}: {error:.2e} standard deviations"
                ));
            }
        }
    }
    if greedy(model, golden) != golden.greedy {
        faults.push(format!("{name}: greedy tokens differ"));
    }
    (worst_of_all, faults)
}

#[test]
fn logits_and_greedy_tokens_equal_the_references() {
    check(&["reference", "cpu"]);
}

#[test]
#[ignore = "needs a GPU"]
fn cuda_logits_and_greedy_tokens_equal_the_references() {
    check(&["cuda"]);
}

fn check(devices: &[&str]) {
    let mut faults = Vec::new();
    for folder in goldens() {
        let golden = golden(&folder);
        let name = folder.display();
        let mut worst_of_all: f32 = 0.0;
        for device in devices {
            let model = open(&folder, device, 2);
            let (worst, wrong) = compare(&model, &golden, &format!("{name}, {device}"));
            worst_of_all = worst_of_all.max(worst);
            faults.extend(wrong);
        }
        println!("{name}: within {worst_of_all:.1e} standard deviations");
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// A file with the model's plan in which every scan of Mamba-2 goes by chunks of `size`; none if it has
/// no such scan.
fn by_chunks(model: &Model, name: &str, size: usize) -> Option<PathBuf> {
    let plan = model.plan.print();
    let mut edited = plan.clone();
    for kind in ["mamba2", "ssd_scan"] {
        edited = edited.replace(
            &format!("{kind}: {{"),
            &format!("{kind}: {{chunk_size: {size}, "),
        );
        // A step with more parameters than fit in a line.
        let step = format!("- {kind}:\n");
        let mut parts = edited.split(&step);
        let mut longer = parts.next().unwrap().to_string();
        for part in parts {
            let indent = &part[..part.len() - part.trim_start().len()];
            longer += &format!("{step}{indent}chunk_size: {size}\n{part}");
        }
        edited = longer;
    }
    let file = format!("{}-{size}.yaml", name.replace('/', "-"));
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join(file);
    std::fs::write(&file, &edited).unwrap();
    (edited != plan).then_some(file)
}

#[test]
fn scans_by_chunks_say_the_same_and_keep_the_contract() {
    let (mut faults, mut seen) = (Vec::new(), Vec::new());
    for folder in goldens() {
        let name = format!("{}", folder.display());
        let name = name.split("golden/").last().unwrap();
        let model = open(&folder, "cpu", 2);
        let golden = golden(&folder);
        for size in [4, 16, 256] {
            let Some(plan) = by_chunks(&model, name, size) else {
                continue;
            };
            seen.push(name.split('/').next().unwrap().to_string());
            for device in ["reference", "cpu"] {
                let model = open_with(&folder, Some(plan.clone()), device, 2);
                let what = format!("{name}, {device}, scans by chunks of {size}");
                let parts = model.network.graph.nodes.iter().flat_map(|n| &n.state.slot);
                let kept = parts.filter(|p| p.name == "chunk_inputs").count();
                assert!(kept > 0, "{what}: none does");
                faults.extend(compare(&model, &golden, &what).1);
                if device == "cpu" {
                    let temporary = Path::new(env!("CARGO_TARGET_TMPDIR"));
                    let cpu = (device, &[1, 3][..]);
                    let types = (DType::F32, KvType::F32);
                    keeps_the_contract(&model, cpu, types, size as u64, &what, temporary);
                }
            }
        }
    }
    for family in [
        "mamba2",
        "granite-moe-hybrid",
        "nemotron-h",
        "zamba2",
        "plamo2",
    ] {
        assert!(seen.iter().any(|f| f == family), "{family} among {seen:?}");
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

/// The exactness contract of a model on a device, and with other numbers of threads. Tests that run at
/// once have folders of their own.
fn keeps_the_contract(
    model: &Model,
    (device, threads): (&str, &[usize]),
    (dtype, kv): (DType, KvType),
    seed: u64,
    name: &str,
    temporary: &Path,
) {
    let others: Vec<_> = threads
        .iter()
        .map(|t| (*t, strata::load::backend(device, Some(*t)).unwrap().0))
        .collect();
    let mut network = (*model.network).clone();
    network.activations = dtype;
    let options = VerifyOptions {
        prompt: 45,
        generate: 6,
        chunks: vec![1, 2, 16],
        kv_dtype: kv,
        seed,
    };
    let network = Arc::new(network);
    let checks = verify(&network, &options, &others, temporary, &mut |_| {}).unwrap();
    for check in &checks {
        assert_eq!(check.fault, None, "{name}, {dtype}, {kv}: {}", check.name);
    }
}

#[test]
fn every_golden_keeps_the_exactness_contract() {
    all_keep_the_contract("cpu", &[1, 3]);
}

#[test]
#[ignore = "needs a GPU"]
fn cuda_every_golden_keeps_the_exactness_contract() {
    all_keep_the_contract("cuda", &[]);
}

fn all_keep_the_contract(device: &str, threads: &[usize]) {
    for folder in goldens() {
        let model = open(&folder, device, 2);
        let name = format!("{}", folder.display());
        // Where sums depend on the batch, a rounding may turn a router's choice.
        let turns = model
            .network
            .backend
            .tolerance(DType::BF16, strata_kernels::Format::BF16)
            > 0.0
            && model.plan.print().contains("moe");
        let types = [
            (DType::F32, KvType::F32, 1),
            (DType::BF16, KvType::BF16, 2),
            (DType::F32, KvType::Int8, 3),
        ];
        let keeps_keys = model.network.graph.page_elements_per_token() > 0;
        for (dtype, kv, seed) in types {
            if turns && dtype == DType::BF16 || !keeps_keys && kv == KvType::Int8 {
                continue;
            }
            keeps_the_contract(
                &model,
                (device, threads),
                (dtype, kv),
                seed,
                &name,
                &std::env::temp_dir(),
            );
        }
    }
}

#[test]
fn a_vocabulary_of_256_without_files_on_tokens_is_bytes() {
    let root = root();
    let model = open(&root.join("mamba-ssm/bytes"), "cpu", 1);
    let tokenizer = model.tokenizer.expect("bytes need no file");
    let text = "né\u{0}";
    let ids = tokenizer.encode(text, true).unwrap();
    assert_eq!(ids, [110, 195, 169, 0]);
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
    assert!(open(&root.join("mamba/tied"), "cpu", 1).tokenizer.is_none());
}

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
use strata_kernels::DType;

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
    while engine.step(&mut |_, _, _| {}).unwrap() {
        for output in engine.outputs() {
            if let Output::Token { sampled, .. } = output {
                tokens.push(sampled.token);
            }
        }
    }
    tokens
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
            for chunk in [golden.tokens[0].len(), 7] {
                let found = logits(&model, &golden.tokens, chunk);
                for (s, (found, expected)) in found.iter().zip(&golden.logits).enumerate() {
                    assert_eq!(found.len(), expected.len());
                    let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(
                        0.0,
                        |a: f32, b| if b.is_nan() { f32::INFINITY } else { a.max(b) },
                    );
                    let error = worst / std_of(expected);
                    worst_of_all = worst_of_all.max(error);
                    if error >= TOLERANCE {
                        faults.push(format!(
                            "{name}, sequence {s}, {device}, chunk {chunk}: {error:.2e} standard deviations"
                        ));
                    }
                }
            }
            if greedy(&model, &golden) != golden.greedy {
                faults.push(format!("{name}, {device}: greedy tokens differ"));
            }
        }
        println!("{name}: within {worst_of_all:.1e} standard deviations");
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn every_golden_keeps_the_exactness_contract() {
    keep_the_contract("cpu", &[1, 3]);
}

#[test]
#[ignore = "needs a GPU"]
fn cuda_every_golden_keeps_the_exactness_contract() {
    keep_the_contract("cuda", &[]);
}

fn keep_the_contract(device: &str, threads: &[usize]) {
    for folder in goldens() {
        let model = open(&folder, device, 2);
        let others: Vec<_> = threads
            .iter()
            .map(|t| (*t, strata::load::backend(device, Some(*t)).unwrap().0))
            .collect();
        // Where sums depend on the batch, a rounding may turn a router's choice.
        let routed = model.plan.print().contains("moe");
        for (dtype, seed) in [(DType::F32, 1), (DType::BF16, 2)] {
            if routed && dtype == DType::BF16 && model.network.backend.tolerance(dtype) > 0.0 {
                continue;
            }
            let mut network = (*model.network).clone();
            network.activations = dtype;
            let options = VerifyOptions {
                prompt: 45,
                generate: 6,
                chunks: vec![1, 2, 16],
                kv_dtype: dtype,
                seed,
            };
            let folder_name = folder.display();
            let temporary = std::env::temp_dir();
            let checks = verify(
                &Arc::new(network),
                &options,
                &others,
                &temporary,
                &mut |_| {},
            )
            .unwrap();
            for check in &checks {
                assert_eq!(check.fault, None, "{folder_name}, {dtype}: {}", check.name);
            }
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

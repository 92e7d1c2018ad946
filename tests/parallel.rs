//! Several devices give what one gives: two CPUs that are one in truth, and a GPU named twice.
//!
//! Stages of a pipeline do the same operations in the same order: the same bits. Ranks add parts of sums that one
//! device adds in one go: logits within 1e-4 of their standard deviation.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use strata::load::{CudaPlaces, LoadOptions, Model, Silent, load};
use strata::placement::Parallel;
use strata::sampler::SamplingParams;
use strata::session::{Engine, EngineConfig, Request};
use strata::state_file;
use strata::verify::{VerifyOptions, verify};
use strata_kernels::DType;

/// Where the goldens are: in the repository, unless STRATA_GOLDEN names another folder.
fn root() -> PathBuf {
    let carried = std::env::var_os("STRATA_GOLDEN").map(PathBuf::from);
    carried.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("golden"))
}

fn goldens() -> Vec<PathBuf> {
    let folders = |of: &Path| std::fs::read_dir(of).unwrap().map(|f| f.unwrap().path());
    let families: Vec<PathBuf> = folders(&root()).filter(|f| f.is_dir()).collect();
    let variants = families.iter().flat_map(|f| folders(f));
    let mut found: Vec<PathBuf> = variants
        .filter(|v| v.join("golden.safetensors").is_file())
        .collect();
    found.sort();
    assert!(found.len() >= 9, "goldens are missing: {found:?}");
    found
}

fn options(folder: &Path, device: &str) -> LoadOptions {
    LoadOptions {
        model: Some(folder.display().to_string()),
        plan: Some(folder.join("plan.yaml")).filter(|p| p.is_file()),
        device: device.into(),
        dtype: Some(DType::F32),
        threads: Some(1),
        cuda: CudaPlaces {
            kernels: Some(std::env::temp_dir().join("strata-golden-kernels")),
            ..CudaPlaces::default()
        },
        ..LoadOptions::default()
    }
}

fn open(options: &LoadOptions) -> Result<Model, String> {
    load(options, &mut Silent::default()).map_err(|e| e.to_string())
}

/// The sequences of a golden.
fn sequences(folder: &Path) -> Vec<Vec<u32>> {
    let bytes = std::fs::read(folder.join("golden.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let ids = file.tensor("token_ids").unwrap();
    let (numbers, len) = (ids.data().as_chunks().0.iter(), ids.shape()[1]);
    let numbers: Vec<u32> = numbers.map(|b| i64::from_le_bytes(*b) as u32).collect();
    numbers.chunks(len).map(<[u32]>::to_vec).collect()
}

/// The logits of all positions of all sequences, in one batch and chunks of `chunk`, and of a few tokens that are
/// generated after each.
fn logits(model: &Model, sequences: &[Vec<u32>], chunk: usize) -> Vec<Vec<f32>> {
    let config = EngineConfig::new(256, sequences.len(), DType::F32).with_chunk(chunk);
    let mut engine = Engine::new(model.network.clone(), config).unwrap();
    let submit = |tokens: &Vec<u32>| {
        let request = Request {
            prompt: tokens.clone(),
            prompt_logits: true,
            max_tokens: 6,
            sampling: SamplingParams::greedy(),
            ..Request::default()
        };
        engine.submit(request).unwrap()
    };
    let ids: Vec<_> = sequences.iter().map(submit).collect();
    let mut rows = vec![Vec::new(); ids.len()];
    let mut keep = |id, _, logits: &[f32]| {
        let at = ids.iter().position(|i| *i == id).unwrap();
        rows[at].extend_from_slice(logits);
    };
    while engine.step(&mut keep).unwrap() {}
    rows
}

/// The tokens that are generated when nobody looks at logits.
fn tokens(model: &Model, prompt: &[u32]) -> Vec<u32> {
    let mut engine =
        Engine::new(model.network.clone(), EngineConfig::new(256, 1, DType::F32)).unwrap();
    let request = Request {
        prompt: prompt.to_vec(),
        max_tokens: 12,
        sampling: SamplingParams::greedy(),
        ..Request::default()
    };
    let id = engine.submit(request).unwrap();
    let mut said = Vec::new();
    while engine.advance().unwrap() {
        said = engine
            .sequence(id)
            .map(|s| s.tokens.clone())
            .unwrap_or(said);
    }
    said
}

/// The state after a prompt, saved from one model and gone on from in another.
fn handed_over(from: &Model, to: &Model, prompt: &[u32], file: &Path) -> Vec<f32> {
    let config = EngineConfig::new(256, 1, DType::F32);
    let mut engine = Engine::new(from.network.clone(), config.clone()).unwrap();
    let request = |prompt: &[u32]| Request {
        prompt: prompt.to_vec(),
        prompt_logits: true,
        ..Request::default()
    };
    let half = prompt.len() / 2;
    let id = engine.submit(request(&prompt[..half])).unwrap();
    while engine.step(&mut |_, _, _| {}).unwrap() {}
    let snapshot = engine.snapshot(id).unwrap();
    let fingerprint = from.fingerprint().unwrap();
    state_file::save(&engine, snapshot, &fingerprint, file).unwrap();

    let mut engine = Engine::new(to.network.clone(), config).unwrap();
    let snapshot = state_file::load(&mut engine, &fingerprint, file).unwrap();
    engine.restore(snapshot, request(prompt)).unwrap();
    let mut rows = Vec::new();
    let mut keep = |_, _, logits: &[f32]| rows.extend_from_slice(logits);
    while engine.step(&mut keep).unwrap() {}
    rows
}

fn pipelines_are_one_device(one: &str, several: &[&str]) {
    let mut cut = 0;
    for folder in goldens() {
        let name = folder.display();
        let whole = open(&options(&folder, one)).unwrap_or_else(|e| panic!("{name}: {e}"));
        let sequences = sequences(&folder);
        let expected = [5, 64].map(|chunk| logits(&whole, &sequences, chunk));
        for devices in several {
            let staged = match open(&options(&folder, devices)) {
                Ok(staged) => staged,
                // Shallow as goldens are, some cannot be cut so often.
                Err(e) if e.contains("cannot be cut") || e.contains("too few") => continue,
                Err(e) => panic!("{name} on {devices}: {e}"),
            };
            cut += 1;
            assert_eq!(staged.network.stages.len(), devices.split(',').count());
            let found = [5, 64].map(|chunk| logits(&staged, &sequences, chunk));
            assert!(found == expected, "{name} on {devices}");
            let prompt = &sequences[0];
            assert_eq!(tokens(&staged, prompt), tokens(&whole, prompt), "{name}");
            let file = std::env::temp_dir().join(format!(
                "strata-parallel-{}-{cut}.state",
                std::process::id()
            ));
            let same = handed_over(&whole, &whole, prompt, &file);
            assert!(
                same == handed_over(&whole, &staged, prompt, &file),
                "{name}"
            );
            assert!(
                same == handed_over(&staged, &whole, prompt, &file),
                "{name}"
            );
            std::fs::remove_file(file).unwrap();
        }
    }
    assert!(cut >= 2 * several.len(), "{cut}");
}

#[test]
fn a_pipeline_is_one_device() {
    pipelines_are_one_device("cpu", &["cpu,cpu", "cpu,cpu,cpu"]);
}

#[test]
#[ignore = "needs a GPU"]
fn cuda_a_pipeline_is_one_device() {
    pipelines_are_one_device("cuda", &["cuda:0,cuda:0"]);
}

fn pipelines_keep_the_contract(devices: &str) {
    let mut kept = 0;
    for folder in goldens() {
        let Ok(model) = open(&options(&folder, devices)) else {
            continue;
        };
        let options = VerifyOptions {
            prompt: 45,
            generate: 6,
            chunks: vec![1, 16],
            kv_dtype: DType::F32.into(),
            seed: 1,
        };
        let folder = std::env::temp_dir();
        let checks = verify(&model.network, &options, &[], &folder, &mut |_| {}).unwrap();
        for check in &checks {
            assert_eq!(check.fault, None, "{}: {}", model.name, check.name);
        }
        kept += 1;
    }
    assert!(kept >= 9, "{kept}");
}

#[test]
fn a_pipeline_keeps_the_exactness_contract() {
    pipelines_keep_the_contract("cpu,cpu");
}

#[test]
#[ignore = "needs a GPU"]
fn cuda_a_pipeline_keeps_the_exactness_contract() {
    pipelines_keep_the_contract("cuda:0,cuda:0");
}

/// How far logits of ranks may be from one device's, in standard deviations of the logits.
const TOLERANCE: f32 = 1e-4;

fn std_of(values: &[f32]) -> f32 {
    let mean = values.iter().sum::<f32>() / values.len() as f32;
    (values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / values.len() as f32).sqrt()
}

/// The logits of every position that the golden has, beside one device's; tokens that are generated, a state file and
/// the contract beside the same ranks'.
fn ranks_are_nearly_one_device(one: &str, several: &[&str], parallel: Parallel, tolerance: f32) {
    let (mut shared, mut refused, mut worst) = (0, Vec::new(), 0.0_f32);
    for folder in goldens() {
        let name = folder.display();
        let whole = open(&options(&folder, one)).unwrap_or_else(|e| panic!("{name}: {e}"));
        let sequences = sequences(&folder);
        let expected = logits(&whole, &sequences, 64);
        for devices in several {
            let options = LoadOptions {
                parallel,
                ..options(&folder, devices)
            };
            let ranks = match open(&options) {
                Ok(ranks) => ranks,
                Err(e) => {
                    let known = ["too few", "cannot be cut out", "no experts"];
                    assert!(known.iter().any(|k| e.contains(k)), "{name}: {e}");
                    assert!(
                        e.contains("--parallel") || e.contains("use tensor"),
                        "{name}: {e}"
                    );
                    refused.push(format!("{name} on {devices}: {e}"));
                    continue;
                }
            };
            shared += 1;
            assert!(ranks.network.is_split());
            let found = logits(&ranks, &sequences, 64);
            for (found, expected) in found.iter().zip(&expected) {
                let std = std_of(expected);
                // What is generated may part at a near tie, and does not here.
                assert_eq!(found.len(), expected.len(), "{name} on {devices}");
                let off = found.iter().zip(expected).map(|(f, e)| (f - e).abs());
                worst = worst.max(off.fold(0.0, f32::max) / std);
                assert!(worst <= tolerance, "{name} on {devices}: {worst}");
            }
            // Sums of a row do not depend on its neighbours: other chunks, the same bits, where one device has them.
            if one == "cpu" {
                assert!(
                    logits(&ranks, &sequences, 5) == found,
                    "{name} on {devices}"
                );
            }
            let prompt = &sequences[0];
            let file = std::env::temp_dir().join(format!(
                "strata-parallel-{parallel:?}-{}-{shared}.state",
                std::process::id()
            ));
            let same = handed_over(&ranks, &ranks, prompt, &file);
            assert!(same.iter().all(|l| l.is_finite()));
            if whole.network.graph.slot_bytes() > 0 {
                let config = EngineConfig::new(256, 1, DType::F32);
                let mut engine = Engine::new(whole.network.clone(), config).unwrap();
                let fingerprint = whole.fingerprint().unwrap();
                let error = state_file::load(&mut engine, &fingerprint, &file);
                // Parts of a state are no state; but that of layers which ranks have whole is.
                if let Err(error) = error {
                    assert!(error.to_string().contains("missing"), "{error}");
                }
            }
            std::fs::remove_file(file).unwrap();
        }
    }
    println!(
        "{shared} shared, worst {worst:.1e}; refused:\n{}",
        refused.join("\n")
    );
    assert!(shared >= 3, "{shared}");
}

#[test]
fn ranks_give_one_devices_logits() {
    let several = ["cpu,cpu", "cpu,cpu,cpu"];
    ranks_are_nearly_one_device("cpu", &several, Parallel::Tensor, TOLERANCE);
}

#[test]
fn ranks_with_whole_experts_give_one_devices_logits() {
    let several = ["cpu,cpu", "cpu,cpu,cpu"];
    ranks_are_nearly_one_device("cpu", &several, Parallel::Expert, TOLERANCE);
}

#[test]
#[ignore = "needs a GPU"]
fn cuda_ranks_give_one_devices_logits() {
    for parallel in [Parallel::Tensor, Parallel::Expert] {
        ranks_are_nearly_one_device("cuda", &["cuda:0,cuda:0"], parallel, 1e-3);
    }
}

/// A model of experts on a device that has no room for them.
fn experts_stay_with_the_host(device: &str, tolerance: f32) {
    let mut with_experts = 0;
    for folder in goldens() {
        let whole = open(&options(&folder, device)).unwrap();
        let hosted = LoadOptions {
            experts_on_host: true,
            ..options(&folder, device)
        };
        let hosted = open(&hosted).unwrap();
        let said = |what: &str| hosted.notes.iter().any(|n| n.contains(what));
        if said("the model has no experts") {
            continue;
        }
        with_experts += 1;
        assert_eq!(said("the model is in the host's memory"), device == "cpu");
        let sequences = sequences(&folder);
        let [found, expected] = [&hosted, &whole].map(|m| logits(m, &sequences, 64));
        for (found, expected) in found.iter().zip(&expected) {
            let off = found.iter().zip(expected).map(|(f, e)| (f - e).abs());
            let off = off.fold(0.0, f32::max) / std_of(expected);
            assert!(off <= tolerance, "{}: {off}", folder.display());
        }
    }
    assert!(with_experts >= 2, "{with_experts}");
}

#[test]
fn experts_on_the_host_change_nothing_there() {
    experts_stay_with_the_host("cpu", 0.0);
}

#[test]
#[ignore = "needs a GPU"]
fn cuda_experts_on_the_host_give_the_same() {
    experts_stay_with_the_host("cuda", 1e-3);
}

#[test]
fn what_does_not_fit_is_refused_before_it_is_read() {
    let folder = root().join("jamba");
    let jamba = goldens()
        .into_iter()
        .find(|g| g.starts_with(&folder))
        .unwrap();
    let open_on = |devices: &str| open(&options(&jamba, devices)).err();
    assert_eq!(open_on("cpu=1GB"), None);
    let error = open_on("cpu=100KB").unwrap();
    for said in [
        "does not fit",
        "cpu=100KB: all",
        "of weights",
        "would make it fit",
    ] {
        assert!(error.contains(said), "{said}: {error}");
    }
    // Each has room for half.
    let whole = open(&options(&jamba, "cpu")).unwrap();
    let (weights, buffers) = (whole.weights_bytes, whole.footprint.bytes(16, 16));
    let most = whole
        .estimate(&EngineConfig::new(1, 1, DType::F32), 512)
        .total_bytes();
    let half = most - weights / 3;
    assert!(
        open_on(&format!("cpu={half}")).is_some(),
        "{weights} {buffers}"
    );
    assert_eq!(open_on(&format!("cpu={half},cpu={half}")), None);
}

#[test]
fn devices_that_are_not_there_are_named() {
    let folder = &goldens()[0];
    for (devices, said) in [
        ("cpu,gpu", "--device gpu"),
        ("cpu,", "devices are cpu"),
        (
            "cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu,cpu",
            "name fewer",
        ),
    ] {
        let error = open(&options(folder, devices)).err().unwrap();
        assert!(error.contains(said), "{devices}: {error}");
    }
}

//! PyTorch's files beside their twins in safetensors: the same tensors, bit for bit, and the same logits.
//!
//! `make_pytorch_files.py` writes them with torch; the twins are read by the `safetensors` crate.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use strata::load::{LoadOptions, Silent, load};
use strata_converters::{Checkpoint, ModelFiles};
use strata_kernels::DType;
use strata_tests::models::on_cpu;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("pytorch")
}

fn names(folder: &Path, ending: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut found: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).collect();
    found.retain(|p| p.to_string_lossy().ends_with(ending));
    found.sort();
    found
}

/// Every tensor of a checkpoint is its twin's, and there are no others.
fn check_twins(checkpoint: &Checkpoint, twin: &Path) {
    let bytes = std::fs::read(twin).unwrap();
    let twin = SafeTensors::deserialize(&bytes).unwrap();
    let found: Vec<&str> = checkpoint.tensors().map(|(name, _)| name).collect();
    let mut expected: Vec<&str> = twin.names();
    expected.sort_unstable();
    assert_eq!(found, expected);
    for (name, info) in checkpoint.tensors() {
        let other = twin.tensor(name).unwrap();
        assert_eq!(info.dtype, other.dtype().to_string(), "{name}");
        assert_eq!(info.shape, other.shape(), "{name}");
        let contents = checkpoint.contents(name).unwrap();
        assert_eq!(contents.bytes(), other.data(), "{name}");
    }
}

#[test]
fn every_tensor_equals_its_twin() {
    let files = names(&folder().join("tensors"), ".pt");
    assert!(files.len() >= 14, "{files:?}");
    for file in files {
        println!("{}", file.display());
        let checkpoint = Checkpoint::open(&ModelFiles::beside(&file).unwrap()).unwrap();
        check_twins(&checkpoint, &file.with_extension("safetensors"));
    }
}

#[test]
fn views_are_views_of_the_file_unless_they_are_strided() {
    for form in ["zip", "legacy"] {
        let file = folder().join(format!("tensors/views-{form}.pt"));
        let checkpoint = Checkpoint::open(&ModelFiles::beside(&file).unwrap()).unwrap();
        let info = |name: &str| checkpoint.get(name).unwrap().clone();
        assert_eq!(info("tied.a"), info("tied.b"));
        assert!(info("whole").range.start < info("rows").range.start);
        assert!(info("whole").range.end > info("rows").range.end);
        let address = |name: &str| checkpoint.contents(name).unwrap().bytes().as_ptr();
        assert_eq!(address("tied.a"), address("tied.b"));
        assert_eq!(info("transposed").strides, Some(vec![1, 8]));
        assert_eq!(info("rows").strides, None);
    }
}

#[test]
fn what_is_around_the_weights_is_told() {
    let note = |name: &str| {
        let file = folder().join("tensors").join(name);
        let checkpoint = Checkpoint::open(&ModelFiles::beside(&file).unwrap()).unwrap();
        checkpoint.notes().join("; ")
    };
    let check = |name: &str, expected: &str| {
        let found = note(name);
        assert!(found.contains(expected), "{name}: {found}");
    };
    check(
        "checkpoint-zip.pt",
        "checkpoint-zip.pt: the weights are in its \"model\"; optimizer, epoch, best",
    );
    check(
        "two-deep.pt",
        "in its \"payload\" in its \"model_state_dict\"",
    );
    check("state-dict.pt", "in its \"state_dict\"");
    assert_eq!(note("protocol-2.pt"), "");
}

#[test]
fn what_is_no_dictionary_of_tensors_is_refused() {
    let check = |name: &str, expected: &[&str]| {
        let file = folder().join("refused").join(name);
        let files = ModelFiles::beside(&file).unwrap();
        let error = Checkpoint::open(&files).expect_err(name).to_string();
        for expected in [&[name], expected].concat() {
            assert!(error.contains(expected), "{expected}: {error}");
        }
    };
    check("one-tensor.pt", &["holds one tensor; a dictionary"]);
    check("quantised.pt", &["tensor \"q\" is quantised by torch"]);
    check("sparse.pt", &["tensor \"s\" is sparse"]);
    check("meta.pt", &["tensor \"m\" is on the meta device"]);
    check("conjugated.pt", &["tensor \"a\" is a conjugated"]);
    check(
        "module.pt",
        &[
            "calls torch.nn.modules.linear.Linear at byte",
            "nothing in a file is run",
        ],
    );
    check(
        "two.pt",
        &["several dictionaries of tensors, left and right"],
    );
    check("no-tensors.pt", &["holds no tensors, only step and name"]);
    check("system.pt", &["calls posix.system at byte"]);
    check("script.pt", &["TorchScript"]);
}

fn options(model: &Path) -> LoadOptions {
    LoadOptions {
        dtype: Some(DType::F32),
        ..on_cpu(model)
    }
}

/// The logits of a few tokens, as bits.
fn logits(model: &Path) -> Vec<u32> {
    let model = load(&options(model), &mut Silent::default())
        .unwrap_or_else(|e| panic!("{}: {e}", model.display()));
    let logits = strata_tests::models::logits(&model, &[1, 5, 28, 3, 3, 17, 0, 9]);
    logits.into_iter().map(f32::to_bits).collect()
}

/// A hash of the plan and of every weight.
fn fingerprint(model: &Path) -> String {
    let model = load(&options(model), &mut Silent::default())
        .unwrap_or_else(|e| panic!("{}: {e}", model.display()));
    format!("{:?}", model.fingerprint().unwrap())
}

#[test]
fn models_in_both_forms_are_one() {
    let mut models = names(&folder(), "");
    models.retain(|m| m.join("torch").is_dir());
    assert!(models.len() >= 6, "{models:?}");
    for model in models {
        println!("{}", model.display());
        let torch = model.join("torch");
        let twin = model.join("safetensors");
        let checkpoint = Checkpoint::open(&ModelFiles::open(&torch).unwrap()).unwrap();
        // Megatron has names and a layout of its own for the same weights.
        if !model.ends_with("megatron") {
            check_twins(&checkpoint, &twin.join("model.safetensors"));
        }
        assert_eq!(fingerprint(&torch), fingerprint(&twin));
        // A model of images reads no tokens.
        if model.ends_with("vision-mamba") {
            continue;
        }
        let expected = logits(&twin);
        assert!(logits(&torch) == expected, "{}", torch.display());
        // The file itself, where there is only one.
        let files = [".bin", ".pt", ".pth"].map(|ending| names(&torch, ending));
        if let [only] = &files.concat()[..] {
            assert!(logits(only) == expected, "{}", only.display());
        }
    }
}

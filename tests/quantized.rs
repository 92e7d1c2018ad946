//! Quantised releases: weights beside what torch makes of the same numbers and scales.
//!
//! `make_quantized_files.py` writes the folders of `quantized/`.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView, serialize};
use strata_converters::{Checkpoint, ModelFiles};

fn folder(name: &str) -> PathBuf {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("quantized");
    folder.join(name)
}

const RELEASES: [&str; 6] = [
    "compressed-fp8",
    "compressed-int",
    "compressed-nvfp4",
    "modelopt-fp8",
    "modelopt-nvfp4",
    "fine-grained",
];

/// The files of a folder, of which only one holds weights.
fn open(folder: &Path) -> Result<Checkpoint, String> {
    let files = ModelFiles::beside(&folder.join("model.safetensors")).unwrap();
    Checkpoint::open(&files).map_err(|e| e.to_string())
}

#[test]
fn every_weight_is_what_torch_makes_of_it() {
    for release in RELEASES {
        let bytes = std::fs::read(folder(release).join("widened.safetensors")).unwrap();
        let expected = SafeTensors::deserialize(&bytes).unwrap();
        let mut names: Vec<&str> = expected.names();
        names.retain(|n| !n.ends_with(".f32"));
        names.sort_unstable();
        let mut checkpoint = open(&folder(release)).unwrap();
        let found: Vec<&str> = checkpoint.tensors().map(|(n, _)| n).collect();
        assert_eq!(found, names, "{release}");
        for name in &names {
            let view = expected.tensor(name).unwrap();
            assert_eq!(checkpoint.get(name).unwrap().shape, view.shape());
            let tensor = checkpoint.tensor(name).unwrap();
            assert_eq!(tensor.bytes(), view.data(), "{release}: {name}");
        }
        checkpoint.widen_to_f32();
        for name in names.iter().filter(|n| **n != "norm.weight") {
            let view = expected.tensor(&format!("{name}.f32")).unwrap();
            let tensor = checkpoint.tensor(name).unwrap();
            assert_eq!(tensor.bytes(), view.data(), "{release}: {name} in F32");
            // A piece at a time it is the same.
            let (mut pieces, all) = (Vec::new(), tensor.len());
            for start in (0..all).step_by(7) {
                let piece = start..(start + 7).min(all);
                checkpoint.widen(name, piece, &mut pieces).unwrap();
            }
            assert_eq!(pieces, view.data(), "{release}: {name} in pieces");
        }
    }
}

#[test]
fn what_is_widened_and_what_is_dropped_is_told() {
    let check = |release: &str, expected: &[&str]| {
        let notes = open(&folder(release)).unwrap().notes().join("\n");
        for expected in expected {
            assert!(notes.contains(expected), "{release}: {notes}");
        }
    };
    check(
        "compressed-fp8",
        &[
            "4 matrices are stored in FP8 and widened while loading, to BF16",
            "3 scales of activations",
        ],
    );
    check(
        "compressed-int",
        &[
            "2 matrices are stored in INT4",
            "3 matrices are stored in INT8",
        ],
    );
    check("compressed-nvfp4", &["1 matrix is stored in FP4"]);
    check(
        "modelopt-fp8",
        &["2 matrices are stored in FP8", "3 scales"],
    );
    check("modelopt-nvfp4", &["1 matrix is stored in FP4", "1 scales"]);
}

/// A file of zeros, under the names and with the types and shapes that are given.
fn file(tensors: &[(&str, Dtype, &[usize])]) -> Vec<u8> {
    let bits = |d: Dtype| match d {
        Dtype::F32 | Dtype::I32 => 4,
        Dtype::I64 => 8,
        Dtype::BF16 => 2,
        _ => 1,
    };
    let sizes = tensors
        .iter()
        .map(|(_, dtype, shape)| vec![0; bits(*dtype) * shape.iter().product::<usize>()]);
    let data: Vec<Vec<u8>> = sizes.collect();
    let views = tensors
        .iter()
        .zip(&data)
        .map(|((name, dtype, shape), data)| {
            (
                name.to_string(),
                TensorView::new(*dtype, shape.to_vec(), data).unwrap(),
            )
        });
    serialize(views, None).unwrap()
}

#[test]
fn scales_that_are_missing_or_misshapen_are_named() {
    use Dtype::{BF16, F8_E4M3, F32, I8, I32, I64, U8};
    let own = std::env::temp_dir().join(format!("strata-quantized-{}", std::process::id()));
    std::fs::create_dir_all(&own).unwrap();
    let check = |config: &str, tensors: &[(&str, Dtype, &[usize])], expected: &str| {
        std::fs::write(own.join("config.json"), config).unwrap();
        std::fs::write(own.join("model.safetensors"), file(tensors)).unwrap();
        let found = match open(&own) {
            Ok(checkpoint) => format!("{:?}", checkpoint.tensors().collect::<Vec<_>>()),
            Err(error) => error,
        };
        assert!(found.contains(expected), "{expected}: {found}");
    };
    let w = ("a.weight", F8_E4M3, &[6, 8][..]);
    check(
        "{}",
        &[w],
        "model.safetensors: tensor \"a.weight\": its scales are not there, neither a.weight_scale nor a.weight_scale_inv",
    );
    check(
        "{}",
        &[w, ("a.weight_scale", F32, &[5])],
        "its scales a.weight_scale have the shape [5], which does not fit [6, 8]",
    );
    check(
        r#"{"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]}}"#,
        &[w, ("a.weight_scale_inv", F32, &[3, 5])],
        "does not fit [6, 8] in blocks of 4 × 4",
    );
    check(
        "{}",
        &[w, ("a.weight_scale", I64, &[6])],
        "its scales a.weight_scale are in I64, which is not read",
    );
    check(
        "{}",
        &[w, ("a.weight_scale", F32, &[0, 1])],
        "have the shape [0, 1]",
    );
    check(
        "{}",
        &[
            ("a.weight", U8, &[6, 8]),
            ("a.weight_scale", F8_E4M3, &[6, 1]),
            ("a.weight_scale_2", F32, &[2]),
        ],
        "its scale a.weight_scale_2 should be one number, and is [2] of F32",
    );
    check(
        "{}",
        &[("a.weight_packed", BF16, &[6, 8])],
        "is packed in BF16; U8 and I32 are read",
    );
    let packed = ("a.weight_packed", I32, &[6, 4][..]);
    check(
        "{}",
        &[packed, ("a.weight_scale", F32, &[6])],
        "a.weight_shape is not there",
    );
    check(
        "{}",
        &[
            packed,
            ("a.weight_scale", F32, &[6]),
            ("a.weight_shape", I64, &[2]),
        ],
        "[6, 4] words do not hold [0, 0] numbers of 4 or 8 bits",
    );
    check(
        "{}",
        &[
            packed,
            ("a.weight_scale", F32, &[6]),
            ("a.weight_shape", I64, &[2]),
            ("a.weight_zero_point", I32, &[1, 6]),
        ],
        "a.weight_zero_point is beside it, which is not read",
    );
    check(
        r#"{"quantization_config": {"quant_method": "gptq"}}"#,
        &[("a.weight", I32, &[6])],
        "says that the weights are quantised by \"gptq\", which is not read; read are compressed-tensors, fp8",
    );
    // Whole numbers without scales are somebody else's.
    check("{}", &[("steps", I8, &[6])], "steps");
    std::fs::remove_dir_all(own).ok();
}

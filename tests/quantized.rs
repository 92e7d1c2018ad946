//! Quantised releases: weights beside what torch makes of the same numbers and scales.
//!
//! `make_quantized_files.py` writes the folders of `quantized/`.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView, serialize};
use strata::load::{ConvertOptions, LoadOptions, Row, Silent, convert, inspect, load};
use strata::session::{Engine, EngineConfig, Request};
use strata_converters::write::Quiet;
use strata_converters::{Checkpoint, ModelFiles};
use strata_kernels::DType;

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

/// The value of an FP8 number (1 sign, 4 exponent and 3 mantissa bits).
fn e4m3(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let size = match exponent {
        0 => mantissa * 2f32.powi(-9),
        _ => (8.0 + mantissa) * 2f32.powi(exponent - 10),
    };
    if bits & 0x80 == 0 { size } else { -size }
}

fn options(model: &Path, dtype: Option<DType>) -> LoadOptions {
    LoadOptions {
        model: Some(model.display().to_string()),
        device: "cpu".into(),
        dtype,
        threads: Some(1),
        ..LoadOptions::default()
    }
}

/// The logits of a few tokens, as bits.
fn logits(model: &Path, dtype: Option<DType>) -> Vec<u32> {
    let model = load(&options(model, dtype), &mut Silent::default()).unwrap();
    let config = EngineConfig::new(64, 1, DType::F32);
    let mut engine = Engine::new(model.network.clone(), config).unwrap();
    let request = Request {
        prompt: vec![1, 5, 28, 3, 3, 17, 0, 9],
        prompt_logits: true,
        ..Request::default()
    };
    engine.submit(request).unwrap();
    let mut found = Vec::new();
    let mut keep = |_, _, logits: &[f32]| found.extend(logits.iter().map(|l| l.to_bits()));
    while engine.step(&mut keep).unwrap() {}
    assert!(found.len() >= 8 * 29);
    found
}

/// A model of the goldens with its projections in FP8 and a scale a row, beside a twin that holds what
/// they stand for: the release runs, and what is converted from it does, as the twin.
#[test]
fn a_release_in_fp8_runs_as_what_it_stands_for() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    let own = std::env::temp_dir().join(format!("strata-fp8-{}", std::process::id()));
    for family in [
        "jamba/dense-tied-bf16",
        "nemotron-h/dense",
        "granite-moe-hybrid/dense-nope",
    ] {
        let from = golden.join(family);
        let folders = ["fp8", "twin", "twin-f32"].map(|f| own.join(family).join(f));
        for folder in &folders {
            std::fs::create_dir_all(folder).unwrap();
            std::fs::copy(from.join("config.json"), folder.join("config.json")).unwrap();
        }
        let bytes = std::fs::read(from.join("model.safetensors")).unwrap();
        let source = SafeTensors::deserialize(&bytes).unwrap();
        let checkpoint = open(&from).unwrap();
        type Tensors = Vec<(String, Dtype, Vec<usize>, Vec<u8>)>;
        let mut files: [Tensors; 3] = Default::default();
        let mut projections = 0;
        for (name, view) in source.tensors() {
            let shape = view.shape().to_vec();
            if !name.ends_with("proj.weight") || shape.len() != 2 {
                let kept = (name, view.dtype(), shape, view.data().to_vec());
                files.iter_mut().for_each(|f| f.push(kept.clone()));
                continue;
            }
            projections += 1;
            let values = checkpoint.tensor(&name).unwrap().to_f32();
            let (mut numbers, mut scales, mut wide) = (Vec::new(), Vec::new(), Vec::new());
            for row in values.chunks_exact(shape[1]) {
                let scale = row.iter().fold(0f32, |m, v| m.max(v.abs())) / 448.0;
                scales.extend(scale.to_le_bytes());
                for v in row {
                    let finite = (0..=255u8).filter(|b| b & 0x7f != 0x7f);
                    let far = |b: &u8| (e4m3(*b) * scale - v).abs();
                    let near = finite.min_by(|a, b| far(a).total_cmp(&far(b))).unwrap();
                    numbers.push(near);
                    wide.push(e4m3(near) * scale);
                }
            }
            let rows = shape[0];
            let words = |v: &[f32]| v.iter().flat_map(|v| v.to_le_bytes()).collect();
            // To the nearest of 16 bits, ties to even.
            let half = |v: &f32| {
                let bits = v.to_bits();
                (((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16).to_le_bytes()
            };
            files[0].push((name.clone(), Dtype::F8_E4M3, shape.clone(), numbers));
            files[0].push((format!("{name}_scale"), Dtype::F32, vec![rows, 1], scales));
            files[1].push((
                name.clone(),
                Dtype::BF16,
                shape.clone(),
                wide.iter().flat_map(half).collect(),
            ));
            files[2].push((name, Dtype::F32, shape, words(&wide)));
        }
        assert!(projections >= 4, "{family}");
        for (folder, tensors) in folders.iter().zip(&files) {
            let views = tensors.iter().map(|(name, dtype, shape, bytes)| {
                (
                    name.clone(),
                    TensorView::new(*dtype, shape.clone(), bytes).unwrap(),
                )
            });
            std::fs::write(
                folder.join("model.safetensors"),
                serialize(views, None).unwrap(),
            )
            .unwrap();
        }
        let [release, twin, twin_f32] = &folders;
        let rows = inspect(&options(release, None), &mut Silent::default())
            .unwrap()
            .rows;
        let small: Vec<_> = rows.iter().filter(|r| r.dtype == "FP8 as BF16").collect();
        let one_each = |r: &&Row| r.bytes == r.shape.iter().product::<usize>() as u64;
        assert!(
            small.len() >= projections && small.iter().any(one_each),
            "{rows:?}"
        );
        let expected = logits(twin, Some(DType::BF16));
        assert!(logits(release, Some(DType::BF16)) == expected, "{family}");
        assert!(
            logits(release, Some(DType::F32)) == logits(twin_f32, Some(DType::F32)),
            "{family} in F32"
        );
        let converted = own.join(family).join("converted");
        let conversion = ConvertOptions {
            from: options(release, None),
            to: converted.clone(),
            gguf: false,
            quantize: None,
            dtype: None,
            shard_bytes: 1 << 30,
            force: true,
            threads: 2,
            seed: 0,
        };
        convert(&conversion, &mut Silent::default(), &mut Quiet).unwrap();
        assert!(
            logits(&converted, Some(DType::BF16)) == expected,
            "{family} converted"
        );
    }
    std::fs::remove_dir_all(&own).unwrap();
}

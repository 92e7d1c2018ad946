//! Quantised releases: weights beside what torch makes of the same numbers and scales.
//!
//! `make_quantized_files.py` writes the folders of `quantized/`.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView, serialize};
use strata::load::{ConvertOptions, LoadOptions, Row, Silent, convert, inspect, load};
use strata::recipe::Recipe;
use strata_converters::write::Quiet;
use strata_converters::{Checkpoint, Config, ModelFiles};
use strata_kernels::DType;
use strata_tests::models::on_cpu;

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
        let mut by_rows = 0;
        for name in names.iter().filter(|n| **n != "norm.weight") {
            let tensor = checkpoint.tensor(name).unwrap();
            if tensor.format().scales_rows() {
                // As it is stored: codes, and the scale of the row.
                by_rows += 1;
                let view = expected.tensor(&format!("{name}.f32")).unwrap();
                let values = tensor.to_f32();
                let found: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                assert_eq!(found, view.data(), "{release}: {name} by rows");
                let (mut pieces, columns) = (Vec::new(), tensor.shape().last().unwrap());
                for row in 0..tensor.len() / columns {
                    let piece = row * columns..(row + 1) * columns;
                    checkpoint.widen(name, piece, &mut pieces).unwrap();
                }
                assert_eq!(pieces, tensor.bytes(), "{release}: {name} row by row");
                let part = checkpoint.widen(name, 0..columns - 1, &mut pieces);
                assert!(part.unwrap_err().to_string().contains("no scale each"));
            }
        }
        let expected_by_rows = match release {
            "compressed-int" | "compressed-fp8" => 2,
            "modelopt-fp8" | "fine-grained" => 1,
            _ => 0,
        };
        assert_eq!(by_rows, expected_by_rows, "{release}");
        checkpoint.widen_to_f32();
        let stays = |n: &&str| checkpoint.tensor(n).unwrap().format().scales_rows();
        assert_eq!(names.iter().filter(|n| stays(n)).count(), by_rows);
        checkpoint.widen_all(false);
        for name in &names {
            let view = expected.tensor(name).unwrap();
            assert_eq!(checkpoint.get(name).unwrap().shape, view.shape());
            let tensor = checkpoint.tensor(name).unwrap();
            assert_eq!(tensor.bytes(), view.data(), "{release}: {name}");
        }
        checkpoint.widen_all(true);
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
        let notes = open(&folder(release)).unwrap().widening().join("\n");
        for expected in expected {
            assert!(notes.contains(expected), "{release}: {notes}");
        }
    };
    check(
        "compressed-fp8",
        &[
            "2 matrices are stored in FP8 with a scale a row, as they run",
            "2 matrices are stored in FP8 and widened while loading, to BF16",
            "3 scales of activations",
        ],
    );
    check(
        "compressed-int",
        &[
            "2 matrices are stored in INT4",
            "1 matrix is stored in INT8 and widened",
            "2 matrices are stored in INT8 with a scale a row, as they run",
        ],
    );
    check("compressed-nvfp4", &["1 matrix is stored in FP4"]);
    check(
        "modelopt-fp8",
        &[
            "1 matrix is stored in FP8 with a scale a row",
            "1 matrix is stored in FP8 and widened",
            "3 scales",
        ],
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
        dtype,
        ..on_cpu(model)
    }
}

/// The logits of a few tokens, as bits.
fn logits(model: &Path, dtype: Option<DType>) -> Vec<u32> {
    logits_of(&options(model, dtype))
}

fn logits_of(options: &LoadOptions) -> Vec<u32> {
    let model = load(options, &mut Silent::default()).unwrap();
    let logits = strata_tests::models::logits(&model, &[1, 5, 28, 3, 3, 17, 0, 9]);
    logits.into_iter().map(f32::to_bits).collect()
}

/// How far logits are from others: the root of the mean square, in standard deviations of those.
fn distance(found: &[u32], expected: &[u32]) -> f32 {
    let values = |bits: &[u32]| bits.iter().map(|b| f32::from_bits(*b)).collect::<Vec<_>>();
    let (found, expected) = (values(found), values(expected));
    let n = expected.len() as f32;
    let mean = expected.iter().sum::<f32>() / n;
    let variance = expected.iter().map(|e| (e - mean).powi(2)).sum::<f32>() / n;
    let far = found.iter().zip(&expected).map(|(f, e)| (f - e).powi(2));
    (far.sum::<f32>() / n / variance).sqrt()
}

/// A model of the goldens with its projections in FP8, beside a twin that holds what they stand for: the release runs,
/// and what is converted from it does, as the twin.
///
/// Where scales are powers of two (one for each tensor here), code times scale is a BF16 number, and a sum of codes times
/// the scale is the sum of those: the bits are the twin's. Of other scales (one a row) the twin in BF16 has rounded each
/// product c · s, by up to 2^-9 of itself, which the release does not, and inputs behind that round to other BF16 numbers; in F32
/// only the order of roundings differs.
#[test]
fn a_release_in_fp8_runs_as_what_it_stands_for() {
    for by_powers in [true, false] {
        release_in_fp8(by_powers);
    }
}

fn release_in_fp8(by_powers: bool) {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    let own = std::env::temp_dir().join(format!("strata-fp8-{by_powers}-{}", std::process::id()));
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
            let most = |v: &[f32]| v.iter().fold(0f32, |m, v| m.max(v.abs())) / 448.0;
            let power = 2f32.powf(most(&values).log2().ceil());
            if by_powers {
                scales.extend(power.to_le_bytes());
            }
            for row in values.chunks_exact(shape[1]) {
                let scale = if by_powers { power } else { most(row) };
                if !by_powers {
                    scales.extend(scale.to_le_bytes());
                }
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
            let of_scales = if by_powers { vec![] } else { vec![rows, 1] };
            files[0].push((format!("{name}_scale"), Dtype::F32, of_scales, scales));
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
        let small: Vec<_> = rows.iter().filter(|r| r.dtype == "FP8").collect();
        let one_each = |r: &&Row| r.bytes == r.shape.iter().product::<usize>() as u64;
        assert!(
            small.len() >= projections && small.iter().any(one_each),
            "{rows:?}"
        );
        let expected = logits(twin, Some(DType::BF16));
        let expected_f32 = logits(twin_f32, Some(DType::F32));
        let found = logits(release, Some(DType::BF16));
        let found_f32 = logits(release, Some(DType::F32));
        if by_powers {
            assert!(found == expected, "{family}");
            assert!(found_f32 == expected_f32, "{family} in F32");
        } else {
            let far = [
                distance(&found, &expected),
                distance(&found_f32, &expected_f32),
            ];
            println!("{family}: {far:?}");
            assert!(far[0] > 0.0 && far[0] < 0.05, "{family}: {far:?}");
            assert!(far[1] > 0.0 && far[1] < 1e-4, "{family}: {far:?}");
        }
        // A copy is the release again, bit for bit; with a type it is widened, and config.json says no more.
        let [copy, wide, wide_f32] = ["copy", "wide", "wide-f32"].map(|f| own.join(family).join(f));
        let mut config = Config::parse(&read(release, "config.json"), "config.json").unwrap();
        let said = r#"{"quant_method": "compressed-tensors"}"#;
        config.set("quantization_config", said).unwrap();
        std::fs::write(release.join("config.json"), config.json()).unwrap();
        convert(
            &conversion(release, &copy, None),
            &mut Silent::default(),
            &mut Quiet,
        )
        .unwrap();
        same_tensors(release, &copy);
        assert!(read(&copy, "config.json").contains("quantization_config"));
        for (to, dtype, expected) in [
            (&wide, DType::BF16, &expected),
            (&wide_f32, DType::F32, &expected_f32),
        ] {
            let conversion = conversion(release, to, Some(dtype));
            convert(&conversion, &mut Silent::default(), &mut Quiet).unwrap();
            assert!(!read(to, "config.json").contains("quantization_config"));
            assert!(logits(to, Some(dtype)) == *expected, "{family} widened");
        }
    }
    std::fs::remove_dir_all(&own).unwrap();
}

fn read(folder: &Path, name: &str) -> String {
    std::fs::read_to_string(folder.join(name)).unwrap()
}

fn conversion(from: &Path, to: &Path, dtype: Option<DType>) -> ConvertOptions {
    ConvertOptions {
        from: options(from, None),
        to: to.to_path_buf(),
        gguf: false,
        quantize: None,
        dtype,
        shard_bytes: 1 << 30,
        force: true,
        threads: 2,
        seed: 0,
    }
}

/// The same tensors in both folders' model.safetensors: names, types, shapes and bytes.
fn same_tensors(a: &Path, b: &Path) {
    let [a, b] = [a, b].map(|f| std::fs::read(f.join("model.safetensors")).unwrap());
    let [a, b] = [&a, &b].map(|bytes| SafeTensors::deserialize(bytes).unwrap());
    let mut names = [a.names(), b.names()];
    names.iter_mut().for_each(|n| n.sort_unstable());
    assert_eq!(names[0], names[1]);
    for name in a.names() {
        let [a, b] = [a.tensor(name).unwrap(), b.tensor(name).unwrap()];
        assert_eq!((a.dtype(), a.shape()), (b.dtype(), b.shape()), "{name}");
        assert!(a.data() == b.data(), "{name}");
    }
}

/// Folders in int8 and fp8 run as the same matrices quantised while loading, and what is made from them is theirs.
#[test]
fn what_is_written_by_rows_runs_as_what_is_quantised_while_loading() {
    written_by_rows("int8", Dtype::I8);
    written_by_rows("fp8", Dtype::F8_E4M3);
}

fn written_by_rows(format: &str, codes: Dtype) {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    let own = std::env::temp_dir().join(format!("strata-{format}-{}", std::process::id()));
    std::fs::create_dir_all(&own).unwrap();
    // What a folder keeps: tables, stacks of experts, and what the recipe keeps anyhow.
    let recipe = own.join("recipe.yaml");
    let text = "recipes: 1\nlinear:\n\
        \x20 - {weights: ['*.router', '*.x_proj', '*.dt_proj', 'embed', '*.experts.*', 'head'], format: keep}\n\
        \x20 - {weights: ['*'], format: FORMAT}\n";
    std::fs::write(&recipe, text.replace("FORMAT", format)).unwrap();
    let linear = Recipe::find(&recipe.display().to_string()).unwrap();
    for family in [
        "jamba/dense-tied-bf16",
        "nemotron-h/dense",
        "falcon-h1/norm-first",
    ] {
        let from = golden.join(family);
        let [small, copy, wide] = ["small", "copy", "wide"].map(|f| own.join(family).join(f));
        let quantised = ConvertOptions {
            quantize: Some(linear.clone()),
            ..conversion(&from, &small, None)
        };
        let done = convert(&quantised, &mut Silent::default(), &mut Quiet).unwrap();
        let notes = done.notes.join("\n");
        let told = format!("matrices are written in {format}");
        assert!(notes.contains(&told), "{notes}");
        let config = read(&small, "config.json");
        let config: serde_json::Value = serde_json::from_str(&config).unwrap();
        let said = &config["quantization_config"];
        assert_eq!(said["quant_method"], "compressed-tensors");
        // Every matrix is written so or named as one that is not.
        let bytes = std::fs::read(small.join("model.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let mut written = 0;
        for (name, view) in tensors.tensors() {
            let Some(module) = name.strip_suffix(".weight") else {
                continue;
            };
            let named = said["ignore"]
                .as_array()
                .unwrap()
                .iter()
                .any(|i| i == module);
            assert_eq!(
                named,
                view.shape().len() == 2 && view.dtype() != codes,
                "{name}"
            );
            if view.dtype() == codes {
                let scale = tensors.tensor(&format!("{name}_scale")).unwrap();
                assert_eq!(
                    (scale.dtype(), scale.shape()),
                    (Dtype::F32, &[view.shape()[0], 1][..])
                );
                written += 1;
            }
        }
        assert!(written >= 4, "{family}: {written}");
        for dtype in [DType::BF16, DType::F32] {
            let loaded = LoadOptions {
                quantize: Some(linear.clone()),
                ..options(&from, Some(dtype))
            };
            let expected = logits_of(&loaded);
            assert!(logits(&small, Some(dtype)) == expected, "{family} {dtype}");
            assert!(logits(&from, Some(dtype)) != expected, "{family} {dtype}");
        }
        let rows = inspect(&options(&small, None), &mut Silent::default())
            .unwrap()
            .rows;
        let by_rows = rows
            .iter()
            .filter(|r| r.dtype == format.to_uppercase())
            .count();
        assert!(by_rows >= written, "{rows:?}");
        convert(
            &conversion(&small, &copy, None),
            &mut Silent::default(),
            &mut Quiet,
        )
        .unwrap();
        same_tensors(&small, &copy);
        convert(
            &conversion(&small, &wide, Some(DType::F32)),
            &mut Silent::default(),
            &mut Quiet,
        )
        .unwrap();
        assert!(!read(&wide, "config.json").contains("quantization_config"));
        // Of fp8 the scale is applied behind the sum, of what was widened before it.
        let logits = [&small, &wide].map(|f| logits(f, Some(DType::F32)));
        let far = distance(&logits[0], &logits[1]);
        let limit = if format == "int8" { 0.0 } else { 1e-4 };
        assert!(far <= limit, "{family} widened: {far}");
    }
    // The table and stacks of experts stay, and that is told; experts apart from each other are written.
    for (family, only_table) in [
        ("granite-moe-hybrid/moe-rope-shards", false),
        ("jamba/moe-shards", true),
    ] {
        let to = own.join(family);
        let quantised = ConvertOptions {
            quantize: Some(Recipe::find(format).unwrap()),
            ..conversion(&golden.join(family), &to, None)
        };
        let done = convert(&quantised, &mut Silent::default(), &mut Quiet).unwrap();
        let notes = done.notes.join("\n");
        assert!(notes.contains("no linear layer (a table, a stack of experts)"));
        assert_eq!(
            notes.contains(
                "
1 tensor"
            ),
            only_table,
            "{notes}"
        );
        logits(&to, None);
    }
    let refused = |change: &dyn Fn(&mut ConvertOptions), expected: &str| {
        let mut options = ConvertOptions {
            quantize: Some(Recipe::find(format).unwrap()),
            ..conversion(
                &golden.join("jamba/dense-tied-bf16"),
                &own.join("not"),
                None,
            )
        };
        change(&mut options);
        let error = convert(&options, &mut Silent::default(), &mut Quiet).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        assert!(!own.join("not").exists());
    };
    refused(&|o| o.gguf = true, "q8_0 is the nearest");
    refused(
        &|o| o.quantize = Some(Recipe::find("q4_k_m").unwrap()),
        "write a GGUF file",
    );
    std::fs::remove_dir_all(&own).unwrap();
}

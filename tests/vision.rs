//! Models of images beside the authors' code.

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use strata::classify::Classifier;
use strata::image::patches;
use strata::load::{LoadOptions, Model, Silent, load};
use strata_kernels::DType;

/// Largest error, in standard deviations of the logits: sums of f32 in another order.
const TOLERANCE: f32 = 1e-3;

fn folders() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/vision-mamba");
    let mut found: Vec<PathBuf> = std::fs::read_dir(root)
        .unwrap()
        .map(|v| v.unwrap().path())
        .collect();
    found.sort();
    assert!(found.len() >= 2, "{found:?}");
    found
}

fn open(folder: &Path, device: &str, threads: usize) -> Model {
    let options = LoadOptions {
        model: Some(folder.display().to_string()),
        device: device.into(),
        dtype: Some(DType::F32),
        threads: Some(threads),
        ..LoadOptions::default()
    };
    load(&options, &mut Silent::default()).unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
}

fn floats(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let data = file.tensor(name).unwrap().data();
    let (numbers, _) = data.as_chunks::<4>();
    numbers.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

#[test]
fn logits_of_images_equal_the_references() {
    for folder in folders() {
        let bytes = std::fs::read(folder.join("vision.safetensors")).unwrap();
        let golden = SafeTensors::deserialize(&bytes).unwrap();
        let (pixels, expected) = (floats(&golden, "pixels"), floats(&golden, "logits"));
        let mut found: Vec<Vec<f32>> = Vec::new();
        for (device, threads) in [("reference", 1), ("cpu", 1), ("cpu", 3)] {
            let model = open(&folder, device, threads);
            let mut classifier = Classifier::new(model.network.clone()).unwrap().unwrap();
            let mut all = Vec::new();
            for i in 0..3 {
                let name = folder.join(format!("{i}.png"));
                let file = std::fs::read(&name).unwrap();
                let seen = patches(&file, "image", classifier.image()).unwrap();
                // The file holds the pixels that the reference saw.
                let spec = classifier.image().clone();
                let (size, stride) = (spec.size, spec.stride.unwrap_or(spec.patch));
                let (side, width) = (spec.side(), spec.patch_width());
                for (p, patch) in seen.chunks_exact(width).enumerate() {
                    let (y, x) = (p / side * stride, p % side * stride);
                    for (at, value) in patch.iter().enumerate() {
                        let (channel, row, column) = (
                            at / spec.patch / spec.patch,
                            at / spec.patch % spec.patch,
                            at % spec.patch,
                        );
                        let pixel = ((i * 3 + channel) * size + y + row) * size + x + column;
                        assert!((value - pixels[pixel]).abs() < 1e-5, "{folder:?} image {i}");
                    }
                }
                all.extend(classifier.logits(&seen).unwrap());
            }
            let mean = expected.iter().sum::<f32>() / expected.len() as f32;
            let spread = expected.iter().map(|l| (l - mean).powi(2)).sum::<f32>();
            let std = (spread / expected.len() as f32).sqrt();
            let far = all
                .iter()
                .zip(&expected)
                .map(|(a, b)| (a - b).abs() / std)
                .fold(0.0, f32::max);
            assert!(far < TOLERANCE, "{folder:?} on {device}: {far}");
            println!(
                "{}: {device}, {threads}: within {far:.1e}",
                folder.display()
            );
            found.push(all);
        }
        assert_eq!(found[1], found[2], "{folder:?} depends on the threads");
    }
}

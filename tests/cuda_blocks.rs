//! Products with weights in blocks, on a GPU.

use std::sync::Arc;

use strata_kernels::{Format, HostTensor};

use super::*;

/// Formats in blocks that GPUs have kernels for.
const BLOCKS: [Format; 12] = [
    Format::Q8_0,
    Format::Q6K,
    Format::Q5K,
    Format::Q5_1,
    Format::Q5_0,
    Format::Q4K,
    Format::Q4_1,
    Format::Q4_0,
    Format::Iq4Nl,
    Format::Iq4Xs,
    Format::Q3K,
    Format::Q2K,
];

/// Integers are summed exactly and blocks in another order; parts with minima are larger than their sum.
const BY_BLOCKS: f32 = 4e-6;
/// Many rows go through matrix units: weights and rounded inputs fall within half a unit of BF16, 2⁻⁹, each.
const AS_BF16: f32 = 4.5e-3;

/// Random rows, quantised.
pub(super) fn quantised(rng: &mut Rng, format: Format, rows: usize, cols: usize) -> HostTensor {
    let each = format.row_bytes(cols).unwrap();
    let mut bytes = vec![0; rows * each];
    for row in bytes.chunks_mut(each) {
        format.quantize(&rng.numbers(cols, 0.3), None, row).unwrap();
    }
    let range = 0..bytes.len();
    HostTensor::new(format, &[rows, cols], Arc::new(bytes), range).unwrap()
}

pub(super) fn matrix(b: &dyn Backend, of: &HostTensor) -> Matrix {
    let [rows, cols] = of.shape()[..] else {
        panic!("two dimensions")
    };
    Matrix::new(of.format(), cols, b.upload(of, rows, cols).unwrap())
}

/// Magnitudes of the elements, as f32.
pub(super) fn magnitudes(of: &HostTensor) -> HostTensor {
    HostTensor::from_f32(of.shape(), &abs(&of.to_f32())).unwrap()
}

fn widths(format: Format) -> Vec<usize> {
    match format.block().elements {
        32 => vec![32, 96, 128, 160, 384, 1056, 2560],
        _ => vec![256, 768, 2560],
    }
}

#[test]
#[ignore = "needs a GPU"]
fn cuda_products_with_blocks() {
    let mut rng = Rng(21 << 20);
    for format in BLOCKS {
        for k in widths(format) {
            for (t, n) in [
                (1, 1),
                (1, 33),
                (2, 130),
                (3, 2),
                (5, 7),
                (8, 66),
                (9, 3),
                (16, 65),
                (17, 1),
                (40, 200),
                (64, 18),
                (65, 40),
                (1, 700),
            ] {
                let w = quantised(&mut rng, format, n, k);
                let x = rng.numbers(t * k, 2.0);
                let bias = (rng.below(2) == 0).then(|| rng.numbers(n, 1.0));
                let wide = rng.below(2) == 0;
                let run =
                    |b: &dyn Backend, x: &[f32], w: &HostTensor, act, bias: &Option<Vec<f32>>| {
                        let (x, w) = (put(b, F32, k, x, wide), matrix(b, w));
                        let bias = bias.as_ref().map(|v| vector(b, v));
                        let mut y = blank(b, t, n, wide);
                        let op = Linear {
                            x: &x.view,
                            w: &w,
                            bias: bias.as_ref(),
                            activations: act,
                            y: &mut y.view,
                        };
                        b.linear(op).unwrap();
                        take(b, &y)
                    };
                let of_bias = bias.as_ref().map(|b| abs(b));
                let magnitude = run(&Reference, &abs(&x), &magnitudes(&w), F32, &of_bias);
                for act in [BF16, F32] {
                    let expected = run(&Reference, &x, &w, act, &bias);
                    let found = run(gpu(), &x, &w, act, &bias);
                    // Up to 64 rows these are multiplied as integers.
                    let bytes = [Format::Q8_0, Format::Q6K, Format::Q4K].contains(&format);
                    let few = t <= 8 || t <= 64 && bytes && k % 128 == 0;
                    let allowed = if act == BF16 && !few {
                        AS_BF16
                    } else {
                        BY_BLOCKS
                    };
                    let what = format!("{format} × {act} ({t}, {k}, {n})");
                    near(&what, &found, &expected, &magnitude, allowed);
                }
            }
        }
    }
}

/// Lookups in tables of these widths.
pub(super) fn lookups_are_exact(rng: &mut Rng, format: Format, widths: &[usize]) {
    for &k in widths {
        let table = quantised(rng, format, 50, k);
        let ids: Vec<u32> = (0..33).map(|_| rng.below(50) as u32).collect();
        let wide = rng.below(2) == 0;
        let run = |b: &dyn Backend| {
            let (table, mut y) = (matrix(b, &table), blank(b, ids.len(), k, wide));
            let op = Embed {
                ids: &ids,
                table: &table,
                y: &mut y.view,
            };
            b.embed(op).unwrap();
            take(b, &y)
        };
        same(&format!("{format}, {k}"), &run(gpu()), &run(&Reference));
    }
}

/// Products with chosen experts of K = `k` and at most `most` outputs: calls `check` with what it is, the type of
/// activations, what the GPU found, what is expected, and magnitudes.
pub(super) fn check_experts(
    rng: &mut Rng,
    format: Format,
    (k, most): (usize, usize),
    check: impl Fn(&str, DType, &[f32], &[f32], &[f32]),
) {
    for (tokens, each) in [
        (1, false),
        (3, true),
        (8, false),
        (9, true),
        (40, false),
        (300, true),
    ] {
        let n = 1 + rng.below(most);
        let w: Vec<HostTensor> = (0..5).map(|_| quantised(rng, format, n, k)).collect();
        let sizes: Vec<HostTensor> = w.iter().map(magnitudes).collect();
        let x = rng.numbers(tokens * k * if each { 2 } else { 1 }, 1.0);
        let chosen: Vec<f32> = (0..2 * tokens).map(|_| rng.below(4) as f32).collect();
        let run = |b: &dyn Backend, x: &[f32], w: &[HostTensor], activations| {
            let w: Vec<Matrix> = w.iter().map(|w| matrix(b, w)).collect();
            let (x, experts) = (
                put(b, F32, k, x, each),
                put(b, DType::I32, 2, &chosen, false),
            );
            let mut y = blank(b, 2 * tokens, n, false);
            let op = ExpertLinear {
                x: &x.view,
                w: &w,
                experts: &experts.view,
                activations,
                y: &mut y.view,
            };
            b.expert_linear(op).unwrap();
            take(b, &y)
        };
        let magnitude = run(&Reference, &abs(&x), &sizes, F32);
        for act in [BF16, F32] {
            let what = format!("{format} × {act}, {tokens} tokens of {k}, {each}");
            let (found, expected) = (run(gpu(), &x, &w, act), run(&Reference, &x, &w, act));
            check(&what, act, &found, &expected, &magnitude);
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn cuda_lookups_in_blocks_are_exact() {
    let mut rng = Rng(22 << 20);
    for format in BLOCKS {
        lookups_are_exact(&mut rng, format, &widths(format));
    }
}

#[test]
#[ignore = "needs a GPU"]
fn cuda_experts_in_blocks() {
    let mut rng = Rng(23 << 20);
    for format in BLOCKS {
        check_experts(
            &mut rng,
            format,
            (512, 90),
            |what, _, found, expected, magnitude| {
                near(what, found, expected, magnitude, BY_BLOCKS);
            },
        );
    }
}

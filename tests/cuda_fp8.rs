//! Weights of E4M3 codes with a scale a row, on a GPU: products are exact, sums have orders of their own.

use std::sync::Arc;

use super::blocks::{check_experts, lookups_are_exact, magnitudes, matrix, quantised};
use super::*;
use strata_kernels::Format;

/// A sum in another order; with F32 activations code times scale is rounded, too.
const FEW: f32 = 4e-6;

fn product(
    b: &dyn Backend,
    x: &[f32],
    w: &HostTensor,
    activations: DType,
    bias: &Option<Vec<f32>>,
    wide: bool,
) -> Vec<f32> {
    let [n, k] = w.shape()[..] else {
        panic!("two dimensions")
    };
    let (x, w) = (put(b, F32, k, x, wide), matrix(b, w));
    let bias = bias.as_ref().map(|v| vector(b, v));
    let mut y = blank(b, x.view.rows(), n, wide);
    let op = Linear {
        x: &x.view,
        w: &w,
        bias: bias.as_ref(),
        activations,
        y: &mut y.view,
    };
    b.linear(op).unwrap();
    take(b, &y)
}

#[test]
#[ignore = "needs a GPU"]
fn cuda_products_with_fp8() {
    let mut rng = Rng(27 << 20);
    for k in [1, 5, 16, 33, 128, 160, 384, 1056, 2560] {
        for (t, n) in [
            (1, 1),
            (1, 33),
            (2, 130),
            (4, 2),
            (7, 9),
            (8, 33),
            (9, 7),
            (16, 65),
            (64, 130),
            (65, 40),
            (129, 129),
            (300, 257),
            (512, 130),
            (600, 66),
            (1, 700),
        ] {
            let w = quantised(&mut rng, Format::Fp8, n, k);
            let x = rng.numbers(t * k, 2.0);
            let bias = (rng.below(2) == 0).then(|| rng.numbers(n, 1.0));
            let wide = rng.below(2) == 0;
            let of_bias = bias.as_ref().map(|b| abs(b));
            let sizes = (abs(&x), magnitudes(&w));
            let magnitude = product(&Reference, &sizes.0, &sizes.1, F32, &of_bias, wide);
            for activations in [BF16, F32] {
                let expected = product(&Reference, &x, &w, activations, &bias, wide);
                let found = product(gpu(), &x, &w, activations, &bias, wide);
                let on_units = activations == BF16 && t > 8;
                let allowed = if on_units { ON_UNITS } else { FEW };
                let what = format!("{activations} ({t}, {k}, {n})");
                near(&what, &found, &expected, &magnitude, allowed);
            }
        }
    }
}

/// Row c of the matrix is code c at one column: the sum is that number, by every kernel.
#[test]
#[ignore = "needs a GPU"]
fn cuda_codes_of_fp8_are_their_numbers() {
    for k in [67, 128, 264] {
        let each = Format::Fp8.row_bytes(k).unwrap();
        let mut bytes = vec![0; 256 * each];
        for (c, row) in bytes.chunks_exact_mut(each).enumerate() {
            row[c % k] = c as u8;
            row[each - 4..].copy_from_slice(&0.5f32.to_le_bytes());
        }
        let range = 0..bytes.len();
        let w = HostTensor::new(Format::Fp8, &[256, k], Arc::new(bytes), range).unwrap();
        for t in [1, 2, 5, 20, 512] {
            for activations in [BF16, F32] {
                let run =
                    |b: &dyn Backend| product(b, &vec![1.0; t * k], &w, activations, &None, true);
                let (found, expected) = (run(gpu()), run(&Reference));
                for (i, (f, e)) in found.iter().zip(&expected).enumerate() {
                    let what = format!("{t} rows of {k}: code {:x}", i % 256);
                    assert!(f == e || f.is_nan() && e.is_nan(), "{what} is {f}, not {e}");
                }
                assert!(found[0x7f].is_nan() && found[0x7e] == 224.0);
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn cuda_lookups_in_fp8_are_exact() {
    let mut rng = Rng(28 << 20);
    lookups_are_exact(&mut rng, Format::Fp8, &[1, 7, 48, 2560, 5000]);
}

#[test]
#[ignore = "needs a GPU"]
fn cuda_experts_in_fp8() {
    let mut rng = Rng(29 << 20);
    for k in [70, 512] {
        check_experts(
            &mut rng,
            Format::Fp8,
            (k, 190),
            |what, act, found, expected, magnitude| {
                let allowed = if act == BF16 { ON_UNITS } else { FEW };
                near(what, found, expected, magnitude, allowed);
            },
        );
    }
}

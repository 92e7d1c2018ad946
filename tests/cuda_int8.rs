//! Weights of whole numbers with a scale a row, on a GPU: the same bits as the plain loops where inputs are rounded to
//! bytes, for any number of rows.

use super::blocks::{check_experts, lookups_are_exact, magnitudes, matrix, quantised};
use super::*;
use strata_kernels::Format;

#[test]
#[ignore = "needs a GPU"]
fn cuda_products_with_int8() {
    let mut rng = Rng(24 << 20);
    for k in [1, 5, 16, 33, 128, 160, 384, 1056, 2560] {
        for (t, n) in [
            (1, 1),
            (1, 33),
            (2, 130),
            (4, 2),
            (5, 7),
            (16, 65),
            (64, 130),
            (65, 40),
            (129, 129),
            (300, 257),
            (1, 700),
        ] {
            let w = quantised(&mut rng, Format::Int8, n, k);
            let x = rng.numbers(t * k, 2.0);
            let bias = (rng.below(2) == 0).then(|| rng.numbers(n, 1.0));
            let wide = rng.below(2) == 0;
            let run = |b: &dyn Backend,
                       x: &[f32],
                       w: &HostTensor,
                       activations,
                       bias: &Option<Vec<f32>>| {
                let (x, w) = (put(b, F32, k, x, wide), matrix(b, w));
                let bias = bias.as_ref().map(|v| vector(b, v));
                let mut y = blank(b, t, n, wide);
                let op = Linear {
                    x: &x.view,
                    w: &w,
                    bias: bias.as_ref(),
                    activations,
                    y: &mut y.view,
                };
                b.linear(op).unwrap();
                take(b, &y)
            };
            let what = format!("({t}, {k}, {n})");
            let expected = run(&Reference, &x, &w, BF16, &bias);
            same(&what, &run(gpu(), &x, &w, BF16, &bias), &expected);
            let of_bias = bias.as_ref().map(|b| abs(b));
            let magnitude = run(&Reference, &abs(&x), &magnitudes(&w), F32, &of_bias);
            let expected = run(&Reference, &x, &w, F32, &bias);
            let found = run(gpu(), &x, &w, F32, &bias);
            near(&format!("f32 {what}"), &found, &expected, &magnitude, 4e-6);
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn cuda_lookups_in_int8_are_exact() {
    let mut rng = Rng(25 << 20);
    lookups_are_exact(&mut rng, Format::Int8, &[1, 7, 48, 2560, 5000]);
}

#[test]
#[ignore = "needs a GPU"]
fn cuda_experts_in_int8() {
    let mut rng = Rng(26 << 20);
    for k in [70, 512] {
        check_experts(
            &mut rng,
            Format::Int8,
            (k, 190),
            |what, act, found, expected, magnitude| {
                if act == BF16 {
                    same(what, found, expected);
                } else {
                    near(what, found, expected, magnitude, 4e-6);
                }
            },
        );
    }
}

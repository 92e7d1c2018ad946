//! Weights of whole numbers with a scale a row, on a GPU: the same bits as the plain loops where inputs are rounded to
//! bytes, for any number of rows.

use super::blocks::{magnitudes, matrix, quantised};
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
    for k in [1, 7, 48, 2560, 5000] {
        let table = quantised(&mut rng, Format::Int8, 50, k);
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
        same(&format!("{k}"), &run(gpu()), &run(&Reference));
    }
}

#[test]
#[ignore = "needs a GPU"]
fn cuda_experts_in_int8() {
    let mut rng = Rng(26 << 20);
    for k in [70, 512] {
        for (tokens, each) in [
            (1, false),
            (3, true),
            (8, false),
            (9, true),
            (40, false),
            (300, true),
        ] {
            let n = 1 + rng.below(190);
            let w: Vec<HostTensor> = (0..5)
                .map(|_| quantised(&mut rng, Format::Int8, n, k))
                .collect();
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
            let what = format!("{tokens} tokens of {k}, {each}");
            let (found, expected) = (run(gpu(), &x, &w, BF16), run(&Reference, &x, &w, BF16));
            same(&what, &found, &expected);
            let magnitude = run(&Reference, &abs(&x), &sizes, F32);
            let (found, expected) = (run(gpu(), &x, &w, F32), run(&Reference, &x, &w, F32));
            near(&format!("f32 {what}"), &found, &expected, &magnitude, 4e-6);
        }
    }
}

//! Products and lookups with weights in blocks, on every instruction set, against the plain loops.
//!
//! Where inputs are rounded (`activations: BF16`), the arithmetic is defined to the bit, so all paths agree
//! exactly. Where they are not, widened blocks give the bits of an f32 matrix of the same numbers.

use std::sync::Arc;

use strata_kernels::cpu::{Cpu, CpuOptions, Isa};
use strata_kernels::ops::{Embed, ExpertLinear, Linear};
use strata_kernels::reference::Reference;
use strata_kernels::{Backend, DType, Format, HostTensor, Matrix, Tensor, random};

/// Without fp8, which rounds no inputs: `fp8.rs` is for that.
fn in_blocks() -> impl Iterator<Item = Format> {
    Format::ALL.into_iter().filter(|f| f.rounds_inputs())
}

fn numbers(seed: u64, n: usize, size: f32) -> Vec<f32> {
    (0..n)
        .map(|i| (2.0 * random::uniform(seed, i as u64) - 1.0) * size)
        .collect()
}

fn tensor(rows: usize, cols: usize, values: &[f32]) -> Tensor {
    let mut tensor = Reference.alloc(DType::F32, rows, cols).unwrap();
    Reference.write(values, &mut tensor).unwrap();
    tensor
}

fn read(tensor: &Tensor) -> Vec<f32> {
    let mut out = vec![0.0; tensor.rows() * tensor.cols()];
    Reference.read(tensor, &mut out).unwrap();
    out
}

/// Random blocks: scales and minima of any kind, and all codes.
fn weight(format: Format, n: usize, k: usize, seed: u64) -> Matrix {
    let size = format.row_bytes(k).unwrap();
    let mut bytes = Vec::with_capacity(n * size);
    for r in 0..n {
        let mut row = vec![0; size];
        let values = numbers(seed + r as u64, k, 0.1);
        format.quantize(&values, None, &mut row).unwrap();
        // Everything but the scales in half precision becomes anything.
        let (block, wide) = (format.block().bytes, format.block().elements == 256);
        let halves: &[usize] = match format {
            Format::Q6K => &[208],
            Format::Q3K => &[108],
            Format::Q2K => &[80, 82],
            Format::Q8_0 | Format::Q5_0 | Format::Q4_0 | Format::Iq4Nl | Format::Iq4Xs => &[0],
            _ => &[0, 2],
        };
        for (i, byte) in row.iter_mut().enumerate() {
            if format.scales_rows() {
                // All codes, those too that are not made here.
                if i < k && r % 2 == 0 {
                    *byte = (random::uniform(seed ^ 77, (r * size + i) as u64) * 256.0) as u8;
                }
                continue;
            }
            let at = i % block;
            if !halves.iter().any(|h| at == *h || at == h + 1) && (wide || r % 2 == 0) {
                *byte = (random::uniform(seed ^ 77, (r * size + i) as u64) * 256.0) as u8;
            }
        }
        bytes.extend(row);
    }
    let range = 0..bytes.len();
    let host = HostTensor::new(format, &[n, k], Arc::new(bytes), range).unwrap();
    Matrix::new(format, k, Reference.upload(&host, n, k).unwrap())
}

fn widened(w: &Matrix) -> Vec<f32> {
    let rows = (0..w.rows() as u32).collect::<Vec<_>>();
    let mut y = tensor(w.rows(), w.cols(), &vec![0.0; w.rows() * w.cols()]);
    let (ids, table) = (&rows[..], w);
    Reference
        .embed(Embed {
            ids,
            table,
            y: &mut y,
        })
        .unwrap();
    read(&y)
}

fn linear(
    b: &dyn Backend,
    x: &[f32],
    w: &Matrix,
    bias: Option<&[f32]>,
    activations: DType,
) -> Vec<f32> {
    let t = x.len() / w.cols();
    let x = tensor(t, w.cols(), x);
    let bias = bias.map(|b| tensor(1, b.len(), b));
    let mut y = tensor(t, w.rows(), &vec![f32::NAN; t * w.rows()]);
    let op = Linear {
        x: &x,
        w,
        bias: bias.as_ref(),
        activations,
        y: &mut y,
    };
    b.linear(op).unwrap();
    read(&y)
}

fn cpu(isa: Isa, threads: usize) -> Cpu {
    Cpu::new(CpuOptions {
        threads,
        isa: Some(isa),
    })
}

#[track_caller]
fn same(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        let both_nan = f.is_nan() && e.is_nan();
        assert!(
            f.to_bits() == e.to_bits() || both_nan,
            "{what}: element {i} is {f:e}, not {e:e}, to the bit"
        );
    }
}

/// The odd ones are for int8, whose rows may have any length.
const WIDTHS: [usize; 9] = [1, 7, 32, 67, 256, 288, 512, 1001, 1280];

#[test]
fn products_are_the_bits_of_the_reference_on_every_path() {
    for (i, format) in in_blocks().enumerate() {
        for k in WIDTHS
            .into_iter()
            .filter(|k| format.row_bytes(*k).is_some())
        {
            for (t, n) in [
                (1, 1),
                (1, 100),
                (2, 33),
                (1, 15),
                (3, 7),
                (4, 41),
                (5, 9),
                (6, 17),
                (7, 70),
                (8, 4),
                (9, 5),
                (33, 66),
                (100, 3),
            ] {
                let w = weight(format, n, k, i as u64);
                let (x, bias) = (numbers(3, t * k, 2.0), numbers(4, n, 1.0));
                let bias = (t % 2 == 1).then_some(&bias[..]);
                let expected = linear(&Reference, &x, &w, bias, DType::BF16);
                for isa in Isa::available() {
                    let what = format!("{format}, {t} × {k} → {n}, {isa:?}");
                    let found = linear(&cpu(isa, 1 + t % 3), &x, &w, bias, DType::BF16);
                    same(&what, &found, &expected);
                }
            }
        }
    }
}

#[test]
fn rounding_inputs_to_bytes_costs_half_a_percent() {
    for format in in_blocks() {
        let (t, k, n) = (5, 512, 40);
        let w = weight(format, n, k, 9);
        let x = numbers(5, t * k, 1.0);
        let rounded = linear(&Reference, &x, &w, None, DType::BF16);
        let exact = linear(&Reference, &x, &w, None, DType::F32);
        let w = widened(&w);
        for (i, (r, e)) in rounded.iter().zip(&exact).enumerate() {
            let (x, w) = (&x[i / n * k..][..k], &w[i % n * k..][..k]);
            let size = |a: &[f32]| a.iter().map(|a| a * a).sum::<f32>().sqrt();
            // Each input errs by at most half of 1 / 127.
            let limit = 0.004 * size(w) * (k as f32).sqrt();
            assert!((r - e).abs() <= limit, "{format}: {r} and {e}");
            assert!((r - e).abs() <= 0.02 * size(x) * size(w), "{format}");
        }
    }
}

#[test]
fn a_row_is_the_same_bits_alone_and_in_any_batch() {
    for format in in_blocks() {
        let (t, k, n) = (23, 768, 50);
        let w = weight(format, n, k, 1);
        let x = numbers(6, t * k, 1.5);
        for activations in [DType::BF16, DType::F32] {
            for isa in Isa::available() {
                let all = linear(&cpu(isa, 1), &x, &w, None, activations);
                for threads in 2..4 {
                    let found = linear(&cpu(isa, threads), &x, &w, None, activations);
                    same("threads", &found, &all);
                }
                let b = cpu(isa, 2);
                for (first, rows) in [(0, 1), (22, 1), (1, 2), (2, 3), (5, 8), (3, 9), (4, 19)] {
                    let x = &x[first * k..][..rows * k];
                    let what = format!("{format}, rows {first} + {rows}, {isa:?}");
                    let found = linear(&b, x, &w, None, activations);
                    same(&what, &found, &all[first * n..][..rows * n]);
                }
            }
        }
    }
}

#[test]
fn unrounded_products_are_those_of_the_widened_matrix() {
    for format in in_blocks() {
        let (t, k, n) = (11, 512, 37);
        let w = weight(format, n, k, 2);
        let dense = Matrix::dense(tensor(n, k, &widened(&w)));
        let (x, bias) = (numbers(7, t * k, 1.0), numbers(8, n, 1.0));
        for isa in Isa::available() {
            for rows in [1, t] {
                let (b, x) = (cpu(isa, 2), &x[..rows * k]);
                let expected = linear(&b, x, &dense, Some(&bias), DType::F32);
                let found = linear(&b, x, &w, Some(&bias), DType::F32);
                same(&format!("{format} {isa:?}"), &found, &expected);
            }
        }
    }
}

#[test]
fn inputs_that_are_no_numbers_make_outputs_that_are_none() {
    for format in in_blocks() {
        let (k, n) = (512, 20);
        let w = weight(format, n, k, 3);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = numbers(9, 3 * k, 1.0);
            x[k + 300] = bad;
            let plain = linear(&Reference, &x, &w, None, DType::BF16);
            for isa in Isa::available() {
                let y = linear(&cpu(isa, 1), &x, &w, None, DType::BF16);
                assert!(y[n..2 * n].iter().all(|y| y.is_nan()), "{format} {isa:?}");
                same("the others", &y, &plain);
                assert!(y[..n].iter().chain(&y[2 * n..]).all(|y| y.is_finite()));
            }
        }
        // Blocks of zeros, and of numbers near to them.
        for size in [0.0, 1e-38] {
            let y = linear(&Reference, &vec![size; k], &w, None, DType::BF16);
            assert!(y.iter().all(|y| *y == 0.0), "{format}");
            let found = linear(
                &cpu(Isa::Portable, 1),
                &vec![size; k],
                &w,
                None,
                DType::BF16,
            );
            same("zeros", &found, &y);
        }
    }
}

#[test]
fn experts_in_blocks_are_those_of_the_reference() {
    for (i, format) in in_blocks().enumerate() {
        let (k, n) = (512, 45);
        // Experts of two formats, one never chosen.
        let other = Format::Q8_0;
        let w: Vec<Matrix> = [format, other, format, format]
            .into_iter()
            .enumerate()
            .map(|(e, f)| weight(f, n, k, (10 * i + e) as u64))
            .collect();
        for (tokens, each) in [(1, false), (1, true), (13, false), (40, true)] {
            let chosen: Vec<f32> = (0..tokens)
                .flat_map(|t| [(t % 2) as f32, if t % 5 == 0 { 3.0 } else { 0.0 }])
                .collect();
            let mut experts = Reference.alloc(DType::I32, tokens, 2).unwrap();
            Reference.write(&chosen, &mut experts).unwrap();
            let rows = if each { 2 * tokens } else { tokens };
            let x = tensor(rows, k, &numbers(11, rows * k, 1.0));
            let run = |b: &dyn Backend, activations| {
                let mut y = tensor(2 * tokens, n, &vec![f32::NAN; 2 * tokens * n]);
                let op = ExpertLinear {
                    x: &x,
                    w: &w,
                    experts: &experts,
                    activations,
                    y: &mut y,
                };
                b.expert_linear(op).unwrap();
                read(&y)
            };
            let expected = run(&Reference, DType::BF16);
            for isa in Isa::available() {
                let what = format!("{format}, {tokens} tokens, {isa:?}");
                same(&what, &run(&cpu(isa, 2), DType::BF16), &expected);
                let dense = run(&cpu(isa, 1), DType::F32);
                same(&what, &run(&cpu(isa, 3), DType::F32), &dense);
                let unrounded = run(&Reference, DType::F32);
                for (f, e) in dense.iter().zip(&unrounded) {
                    assert!((f - e).abs() <= 2e-4 * (1.0 + e.abs()), "{what}: {f}, {e}");
                }
            }
        }
    }
}

#[test]
fn lookups_widen_rows() {
    for format in in_blocks() {
        let w = weight(format, 9, 512, 4);
        let all = widened(&w);
        let mut y = tensor(3, 512, &vec![f32::NAN; 3 * 512]);
        for isa in Isa::available() {
            let op = Embed {
                ids: &[8, 0, 8],
                table: &w,
                y: &mut y,
            };
            cpu(isa, 2).embed(op).unwrap();
            let expected = [&all[8 * 512..], &all[..512], &all[8 * 512..]].concat();
            same(&format!("{format}"), &read(&y), &expected);
        }
    }
}

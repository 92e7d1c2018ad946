//! Products and lookups with fp8, whose definition is in `formats/fp8.rs`.
//!
//! A product is that of the matrix of codes, which are BF16 numbers, with each sum times its row's scale: on the CPU to
//! the bit, on every instruction set and for any number of rows, and near the plain loops.

use std::sync::Arc;

use strata_kernels::cpu::{Cpu, CpuOptions, Isa};
use strata_kernels::ops::{Embed, ExpertLinear, Linear};
use strata_kernels::reference::Reference;
use strata_kernels::{Backend, DType, Format, HostTensor, Matrix, Tensor, random};

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

/// A code's number, by its bits.
fn number(code: u8) -> f32 {
    let (e, m) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let size = match (e, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => m * 2f32.powi(-9),
        _ => (8.0 + m) * 2f32.powi(e - 10),
    };
    if code & 0x80 == 0 { size } else { -size }
}

/// A matrix, its codes as a BF16 matrix, and its scales.
struct Weight {
    fp8: Matrix,
    codes: Matrix,
    scales: Vec<f32>,
}

/// Rows that were quantised, and rows of any codes but NaN. Behind the codes, where only scales belong, lies what would
/// show if it were read.
fn weight(n: usize, k: usize, seed: u64) -> Weight {
    let size = Format::Fp8.row_bytes(k).unwrap();
    let (mut bytes, mut codes, mut scales) = (Vec::new(), Vec::new(), Vec::new());
    for r in 0..n {
        let mut row = vec![0; size];
        let values = numbers(seed + r as u64, k, 0.1);
        Format::Fp8.quantize(&values, None, &mut row).unwrap();
        if r % 2 == 0 {
            for (i, byte) in row[..k].iter_mut().enumerate() {
                *byte = (random::uniform(seed ^ 77, (r * size + i) as u64) * 256.0) as u8;
                if *byte & 0x7f == 0x7f {
                    *byte = 0x80;
                }
            }
            // What lies between codes and scale counts for nothing.
            row[k..size - 4].fill(0x7f);
        }
        scales.push(f32::from_le_bytes(row[size - 4..].try_into().unwrap()));
        codes.extend(row[..k].iter().flat_map(|c| {
            let bits = number(*c).to_bits();
            assert_eq!(bits & 0xffff, 0);
            ((bits >> 16) as u16).to_le_bytes()
        }));
        bytes.extend(row);
    }
    let matrix = |format, bytes: Vec<u8>| {
        let range = 0..bytes.len();
        let host = HostTensor::new(format, &[n, k], Arc::new(bytes), range).unwrap();
        Matrix::new(format, k, Reference.upload(&host, n, k).unwrap())
    };
    Weight {
        fp8: matrix(Format::Fp8, bytes),
        codes: matrix(Format::BF16, codes),
        scales,
    }
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

/// Sums times scales, and the bias.
fn scaled(sums: &[f32], scales: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
    let n = scales.len();
    let sums = sums.iter().enumerate();
    sums.map(|(i, s)| match bias {
        Some(bias) => s * scales[i % n] + bias[i % n],
        None => s * scales[i % n],
    })
    .collect()
}

/// What torch gives: `s = x.abs().amax() / 448`, `q = (x / s).clamp(-448, 448).to(torch.float8_e4m3fn)`.
#[test]
fn rows_are_those_of_torch() {
    let x = [0.5, -1.27, 0.015, 0.025, 0.0, 1.0, -0.005, 0.00001];
    let mut row = vec![9; 12];
    Format::Fp8.quantize(&x, None, &mut row).unwrap();
    assert_eq!(row[..8], [115, 254, 75, 81, 0, 123, 190, 2]);
    let s = 1.27f32 / 448.0;
    assert_eq!(row[8..], s.to_le_bytes());
    let mut back = vec![0.0; 8];
    Format::Fp8.dequantize(&row, &mut back);
    assert_eq!(back[1].to_bits(), (-448.0 * s).to_bits());
    for (x, y) in x.iter().zip(&back) {
        // Half of the last of four significant bits, or of the least step.
        let limit = (x.abs() / 16.0).max(s / 1024.0) * 1.0001;
        assert!((x - y).abs() <= limit, "{x} {y}");
    }
    for size in [0.0, 1e-45, 1e-38, 1e-30, 1e6] {
        Format::Fp8.quantize(&[size; 8], None, &mut row).unwrap();
        Format::Fp8.dequantize(&row, &mut back);
        let near = |y: &f32| y.is_finite() && (y - size).abs() <= size * 1e-4 || size < 1e-42;
        assert!(back.iter().all(near), "{size:e}: {back:?}");
    }
    assert!(
        Format::Fp8
            .quantize(&[f32::NAN], None, &mut [0; 8])
            .is_err()
    );
    assert!(Format::Fp8.quantize(&[1.0], None, &mut [0; 9]).is_err());
}

/// The odd ones are no whole vectors, or no multiple of four.
const WIDTHS: [usize; 10] = [1, 7, 31, 33, 67, 256, 288, 1001, 1280, 4300];

#[test]
fn products_are_those_of_the_codes_times_the_scales() {
    for k in WIDTHS {
        for (t, n) in [
            (1, 1),
            (1, 100),
            (2, 33),
            (3, 7),
            (4, 41),
            (5, 9),
            (8, 4),
            (9, 5),
            (15, 130),
            (33, 66),
        ] {
            let w = weight(n, k, (7 * k + n) as u64);
            let (x, bias) = (numbers(3, t * k, 2.0), numbers(4, n, 1.0));
            let bias = (t % 2 == 1).then_some(&bias[..]);
            let sizes: Vec<f32> = x.iter().map(|x| x.abs()).collect();
            for activations in [DType::BF16, DType::F32] {
                let plain = linear(&Reference, &x, &w.fp8, bias, activations);
                for isa in Isa::available() {
                    let what = format!("{t} × {k} → {n}, {activations}, {isa:?}");
                    let b = cpu(isa, 1 + t % 3);
                    let found = linear(&b, &x, &w.fp8, bias, activations);
                    let sums = linear(&b, &x, &w.codes, None, activations);
                    same(&what, &found, &scaled(&sums, &w.scales, bias));
                    // And near the plain loops, for which 448 is the most of a code.
                    for (i, (f, e)) in found.iter().zip(&plain).enumerate() {
                        let x = &sizes[i / n * k..][..k];
                        let size = x.iter().sum::<f32>() * 448.0 * w.scales[i % n];
                        assert!((f - e).abs() <= 2e-6 * (1.0 + size), "{what}: {f} {e}");
                    }
                }
            }
        }
    }
}

/// Beside a release that is widened: c · s in f32, and what rounding that to BF16 costs.
#[test]
fn the_widened_matrix_is_farther_off_than_its_codes() {
    let (t, k, n) = (4, 1024, 64);
    let w = weight(n, k, 5);
    let rows: Vec<u32> = (0..n as u32).collect();
    let mut wide = tensor(n, k, &vec![0.0; n * k]);
    let op = Embed {
        ids: &rows,
        table: &w.fp8,
        y: &mut wide,
    };
    Reference.embed(op).unwrap();
    let x = numbers(6, t * k, 1.0);
    let exact = linear(
        &Reference,
        &x,
        &Matrix::dense(wide.clone()),
        None,
        DType::BF16,
    );
    let mut half = Reference.alloc(DType::BF16, n, k).unwrap();
    Reference.write(&read(&wide), &mut half).unwrap();
    let half = linear(&Reference, &x, &Matrix::dense(half), None, DType::BF16);
    let found = linear(&Reference, &x, &w.fp8, None, DType::BF16);
    let far = |y: &[f32]| -> f32 {
        let squares = y.iter().zip(&exact).map(|(y, e)| (y - e) * (y - e));
        squares.sum::<f32>().sqrt()
    };
    let size = exact.iter().map(|e| e * e).sum::<f32>().sqrt();
    assert!(far(&found) < 1e-6 * size, "{} of {size}", far(&found));
    let cost = far(&half) / size;
    assert!((1e-4..4e-3).contains(&cost), "{cost}");
}

#[test]
fn a_row_is_the_same_bits_alone_and_in_any_batch() {
    let (t, k, n) = (23, 771, 150);
    let w = weight(n, k, 1).fp8;
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
                let what = format!("rows {first} + {rows}, {isa:?}");
                let found = linear(&b, x, &w, None, activations);
                same(&what, &found, &all[first * n..][..rows * n]);
            }
        }
    }
}

#[test]
fn every_code_is_its_number_on_every_path_and_nan_is_none() {
    // Row c of the matrix is code c at column c % 67 and zeros elsewhere.
    let (n, k) = (256, 67);
    let size = Format::Fp8.row_bytes(k).unwrap();
    let mut bytes = vec![0; n * size];
    for (c, row) in bytes.chunks_exact_mut(size).enumerate() {
        row[c % k] = c as u8;
        row[size - 4..].copy_from_slice(&0.5f32.to_le_bytes());
    }
    let range = 0..bytes.len();
    let host = HostTensor::new(Format::Fp8, &[n, k], Arc::new(bytes), range).unwrap();
    let w = Matrix::new(Format::Fp8, k, Reference.upload(&host, n, k).unwrap());
    let expected: Vec<f32> = (0..=255).map(|c| number(c) * 0.5).collect();
    for activations in [DType::BF16, DType::F32] {
        for isa in Isa::available() {
            for t in [1, 12] {
                let y = linear(&cpu(isa, 2), &vec![1.0; t * k], &w, None, activations);
                for y in y.chunks_exact(n) {
                    for (y, e) in y.iter().zip(&expected) {
                        assert!(y == e || y.is_nan() && e.is_nan(), "{isa:?}: {y} {e}");
                    }
                }
            }
        }
    }
    let mut x = numbers(9, 3 * k, 1.0);
    x[k + 30] = f32::INFINITY;
    let w = weight(20, k, 3).fp8;
    for isa in Isa::available() {
        let y = linear(&cpu(isa, 1), &x, &w, None, DType::BF16);
        assert!(y[20..40].iter().all(|y| !y.is_finite()), "{isa:?}");
        assert!(y[..20].iter().chain(&y[40..]).all(|y| y.is_finite()));
    }
}

#[test]
fn experts_are_products_with_the_chosen() {
    let (k, n) = (512, 45);
    let ours: Vec<Weight> = (0..4).map(|e| weight(n, k, 40 + e)).collect();
    // Of several formats, one never chosen.
    let mixed = |w: fn(&Weight) -> &Matrix, other: &Matrix| -> Vec<Matrix> {
        let mut all: Vec<Matrix> = ours.iter().map(|o| w(o).clone()).collect();
        all[1] = other.clone();
        all
    };
    let other = Matrix::dense(tensor(n, k, &numbers(12, n * k, 0.1)));
    for (tokens, each) in [(1, false), (1, true), (13, false), (40, true)] {
        let chosen: Vec<f32> = (0..tokens)
            .flat_map(|t| [(t % 2) as f32, if t % 5 == 0 { 3.0 } else { 0.0 }])
            .collect();
        let mut experts = Reference.alloc(DType::I32, tokens, 2).unwrap();
        Reference.write(&chosen, &mut experts).unwrap();
        let rows = if each { 2 * tokens } else { tokens };
        let x = tensor(rows, k, &numbers(11, rows * k, 1.0));
        let run = |b: &dyn Backend, w: &[Matrix], activations| {
            let mut y = tensor(2 * tokens, n, &vec![f32::NAN; 2 * tokens * n]);
            let op = ExpertLinear {
                x: &x,
                w,
                experts: &experts,
                activations,
                y: &mut y,
            };
            b.expert_linear(op).unwrap();
            read(&y)
        };
        let (fp8, codes) = (mixed(|w| &w.fp8, &other), mixed(|w| &w.codes, &other));
        for activations in [DType::BF16, DType::F32] {
            let plain = run(&Reference, &fp8, activations);
            for isa in Isa::available() {
                let what = format!("{tokens} tokens, {activations}, {isa:?}");
                let found = run(&cpu(isa, 2), &fp8, activations);
                let mut expected = run(&cpu(isa, 1), &codes, activations);
                for (y, e) in expected.chunks_exact_mut(n).zip(&chosen) {
                    if *e != 1.0 {
                        y.copy_from_slice(&scaled(y, &ours[*e as usize].scales, None));
                    }
                }
                same(&what, &found, &expected);
                for (f, e) in found.iter().zip(&plain) {
                    assert!((f - e).abs() <= 2e-4 * (1.0 + e.abs()), "{what}: {f}, {e}");
                }
            }
        }
    }
}

#[test]
fn lookups_are_codes_times_the_scale() {
    let (n, k) = (9, 513);
    let w = weight(n, k, 4);
    let mut codes = vec![0.0; n * k];
    Reference.read(w.codes.data(), &mut codes).unwrap();
    let (codes, scales) = (&codes, &w.scales);
    let row = |r: usize| codes[r * k..][..k].iter().map(move |c| c * scales[r]);
    let expected: Vec<f32> = row(8).chain(row(0)).chain(row(8)).collect();
    for isa in Isa::available() {
        let mut y = tensor(3, k, &vec![f32::NAN; 3 * k]);
        let op = Embed {
            ids: &[8, 0, 8],
            table: &w.fp8,
            y: &mut y,
        };
        cpu(isa, 2).embed(op).unwrap();
        same(&format!("{isa:?}"), &read(&y), &expected);
    }
}

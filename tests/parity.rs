//! The fast CPU backend against the reference backend, and against itself.
//!
//! Parity: every operation, on every instruction set of the machine and several thread counts, stays
//! within a stated distance of the plain loops. Exactness: what a row comes out as is the same bits
//! whatever is in the batch beside it, however its sequence is cut, wherever its pages lie and
//! however many threads there are.

use strata_kernels::cpu::{Cpu, CpuOptions, Isa};
use strata_kernels::ops::{
    Activate, Activation, Add, Attention, Combine, Conv1d, Decay, Embed, ExpertLinear, Gather,
    HeadNorm, KvWrite, LayerNorm, Likeliest, Linear, Mamba3Scan, Mimo, RmsNorm, Rope, Route,
    S4dScan, Scale, Score, SelectiveScan, SsdChunked, SsdScan,
};
use strata_kernels::reference::Reference;
use strata_kernels::{Backend, DType, KvType, Matrix, Ragged, Span, Tensor, random};

#[path = "cuda.rs"]
mod cuda;
#[path = "cuda_repeat.rs"]
mod cuda_repeat;
#[path = "cuda_repeat_mixer.rs"]
mod cuda_repeat_mixer;

const F32: DType = DType::F32;
const BF16: DType = DType::BF16;
const U8: DType = DType::U8;
const F16: DType = DType::F16;

// ---------------------------------------------------------------- inputs

/// Numbers for one test.
struct Rng(u64);

impl Rng {
    fn uniform(&mut self) -> f32 {
        self.0 += 1;
        random::uniform(0x5eed, self.0)
    }

    fn below(&mut self, n: usize) -> usize {
        ((self.uniform() * n as f32) as usize).min(n - 1)
    }

    /// `n` numbers from `-size` to `size`.
    fn numbers(&mut self, n: usize, size: f32) -> Vec<f32> {
        (0..n)
            .map(|_| (2.0 * self.uniform() - 1.0) * size)
            .collect()
    }
}

/// A tensor, alone or as columns of a wider one whose other columns hold NaN.
struct Put {
    whole: Tensor,
    view: Tensor,
    margin: usize,
}

fn put(b: &dyn Backend, dtype: DType, cols: usize, values: &[f32], wide: bool) -> Put {
    let rows = values.len().checked_div(cols).unwrap_or(0);
    let margin = if wide { 3 } else { 0 };
    let mut whole = b.alloc(dtype, rows, cols + 2 * margin).unwrap();
    b.write(&vec![f32::NAN; rows * (cols + 2 * margin)], &mut whole)
        .unwrap();
    let mut view = whole.columns(margin..margin + cols);
    b.write(values, &mut view).unwrap();
    Put {
        whole,
        view,
        margin,
    }
}

/// An output, filled with NaN.
fn blank(b: &dyn Backend, rows: usize, cols: usize, wide: bool) -> Put {
    let mut put = put(
        b,
        F32,
        cols.max(1),
        &vec![f32::NAN; rows * cols.max(1)],
        wide,
    );
    put.view = put.view.columns(0..cols);
    put
}

/// The elements of an output. Panics when its margins were written.
fn take(b: &dyn Backend, put: &Put) -> Vec<f32> {
    let cols = put.whole.cols();
    let mut all = vec![0.0; put.whole.rows() * cols];
    b.read(&put.whole, &mut all).unwrap();
    let (first, last) = (put.margin, put.margin + put.view.cols());
    let mut out = Vec::new();
    for row in all.chunks(cols) {
        assert!(
            row[..first]
                .iter()
                .chain(&row[cols - put.margin..])
                .all(|x| x.is_nan())
        );
        out.extend_from_slice(&row[first..last]);
    }
    out
}

fn read(b: &dyn Backend, tensor: &Tensor) -> Vec<f32> {
    let mut out = vec![0.0; tensor.rows() * tensor.cols()];
    b.read(tensor, &mut out).unwrap();
    out
}

fn vector(b: &dyn Backend, values: &[f32]) -> Tensor {
    put(b, F32, values.len().max(1), values, false).view
}

// ---------------------------------------------------------------- backends and comparisons

fn cpu(isa: Isa, threads: usize) -> Cpu {
    let cpu = Cpu::new(CpuOptions {
        threads,
        isa: Some(isa),
    });
    assert_eq!(
        (cpu.isa(), cpu.threads(), cpu.features()),
        (isa, threads, isa.name())
    );
    cpu
}

fn backends(threads: &[usize]) -> Vec<Cpu> {
    let isas = Isa::available();
    isas.iter()
        .flat_map(|isa| threads.iter().map(|t| cpu(*isa, *t)))
        .collect()
}

/// Each number within `allowed` times its magnitude of what is expected.
fn near(what: &str, found: &[f32], expected: &[f32], magnitude: &[f32], allowed: f32) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        let limit = allowed * magnitude[i] + 1e-30;
        assert!(
            (f - e).abs() <= limit,
            "{what}: element {i} is {f}, not {e}, within {limit}"
        );
    }
}

fn same(what: &str, found: &[f32], expected: &[f32]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (i, (f, e)) in found.iter().zip(expected).enumerate() {
        assert!(
            f.to_bits() == e.to_bits(),
            "{what}: element {i} is {f:e}, not {e:e}, to the bit"
        );
    }
}

fn abs(x: &[f32]) -> Vec<f32> {
    x.iter().map(|x| x.abs()).collect()
}

// ---------------------------------------------------------------- linear

#[derive(Clone)]
struct LinearCase {
    k: usize,
    n: usize,
    weight: DType,
    activations: DType,
    x: Vec<f32>,
    w: Vec<f32>,
    bias: Option<Vec<f32>>,
    wide: bool,
}

impl LinearCase {
    fn new(rng: &mut Rng, (t, k, n): (usize, usize, usize), weight: DType, act: DType) -> Self {
        let bias = rng.below(2) == 0;
        LinearCase {
            k,
            n,
            weight,
            activations: act,
            x: rng.numbers(t * k, 2.0),
            w: rng.numbers(n * k, 0.1),
            bias: bias.then(|| rng.numbers(n, 1.0)),
            wide: rng.below(2) == 0,
        }
    }

    fn run(&self, b: &dyn Backend) -> Vec<f32> {
        let x = put(b, F32, self.k, &self.x, self.wide);
        let w = Matrix::dense(put(b, self.weight, self.k, &self.w, false).view);
        let bias = self.bias.as_ref().map(|v| vector(b, v));
        let mut y = blank(b, self.x.len() / self.k, self.n, self.wide);
        let op = Linear {
            x: &x.view,
            w: &w,
            bias: bias.as_ref(),
            activations: self.activations,
            y: &mut y.view,
        };
        b.linear(op).unwrap();
        take(b, &y)
    }

    /// Sums of |x · w|, to which rounding is relative.
    fn magnitude(&self) -> Vec<f32> {
        let bias = self.bias.as_ref().map(|b| abs(b));
        LinearCase {
            x: abs(&self.x),
            w: abs(&self.w),
            bias,
            ..self.clone()
        }
        .run(&Reference)
    }

    fn only_row(&self, t: usize) -> Self {
        LinearCase {
            x: self.x[t * self.k..][..self.k].to_vec(),
            ..self.clone()
        }
    }
}

/// Weight types with the activations that they are used with.
const PRODUCTS: [(DType, DType); 6] = [
    (BF16, BF16),
    (BF16, F32),
    (F16, F32),
    (F32, F32),
    (F32, BF16),
    (F16, BF16),
];

#[test]
fn linear_follows_the_reference() {
    let mut rng = Rng(1 << 20);
    let mut shapes = vec![(1, 2560, 70), (3, 5120, 12), (33, 2560, 70), (12, 4097, 9)];
    for k in [1, 5, 16, 31, 64, 100] {
        for (t, n) in [
            (1, 1),
            (2, 33),
            (3, 7),
            (7, 130),
            (8, 4),
            (9, 5),
            (33, 66),
            (130, 3),
        ] {
            shapes.push((t, k, n));
        }
    }
    let backends = backends(&[1, 2, 3]);
    for shape in shapes {
        for (weight, activations) in PRODUCTS {
            let case = LinearCase::new(&mut rng, shape, weight, activations);
            let (expected, magnitude) = (case.run(&Reference), case.magnitude());
            for b in &backends {
                let what = format!("{weight} × {activations} {shape:?} on {b:?}");
                // Up to 5,120 roundings of 6e-8 that mostly cancel, in another order.
                near(&what, &case.run(b), &expected, &magnitude, 2e-6);
            }
        }
    }
}

#[test]
fn a_row_of_a_product_is_the_same_bits_alone_and_in_any_batch() {
    let mut rng = Rng(2 << 20);
    for (k, n) in [(1, 3), (31, 5), (100, 67), (2500, 70), (4200, 6)] {
        for (weight, activations) in PRODUCTS {
            let case = LinearCase::new(&mut rng, (37, k, n), weight, activations);
            for isa in Isa::available() {
                let all = case.run(&cpu(isa, 1));
                for threads in 2..5 {
                    same("threads", &case.run(&cpu(isa, threads)), &all);
                }
                let b = cpu(isa, 2);
                for t in [0, 1, 17, 36] {
                    let what = format!("row {t}, {weight} × {activations}, K {k}, {b:?}");
                    same(&what, &case.only_row(t).run(&b), &all[t * n..][..n]);
                }
                // Batches of all sizes that begin elsewhere, so that rows move through the tiles.
                for (first, rows) in [(1, 2), (2, 3), (3, 4), (5, 7), (6, 8), (4, 9), (7, 29)] {
                    let x = case.x[first * k..][..rows * k].to_vec();
                    let part = LinearCase { x, ..case.clone() }.run(&b);
                    same("part of a batch", &part, &all[first * n..][..rows * n]);
                }
            }
        }
    }
}

// ---------------------------------------------------------------- experts

#[derive(Clone)]
struct ExpertCase {
    k: usize,
    n: usize,
    experts: usize,
    top_k: usize,
    weight: DType,
    activations: DType,
    /// A row of x for each choice, not each token.
    each: bool,
    x: Vec<f32>,
    w: Vec<Vec<f32>>,
    chosen: Vec<f32>,
}

impl ExpertCase {
    fn new(rng: &mut Rng, tokens: usize, each: bool, weight: DType, activations: DType) -> Self {
        let (k, n, experts, top_k) = (96 + rng.below(9), 1 + rng.below(80), 5, 2);
        let mut chosen = Vec::new();
        for _ in 0..tokens {
            // The first expert is busy, the last never.
            let first = if rng.below(3) > 0 {
                0
            } else {
                1 + rng.below(2)
            };
            chosen.extend([first as f32, 3.0]);
        }
        ExpertCase {
            k,
            n,
            experts,
            top_k,
            weight,
            activations,
            each,
            x: rng.numbers(tokens * k * if each { top_k } else { 1 }, 1.0),
            w: (0..experts).map(|_| rng.numbers(n * k, 0.2)).collect(),
            chosen,
        }
    }

    fn run(&self, b: &dyn Backend) -> Vec<f32> {
        let x = put(b, F32, self.k, &self.x, false);
        let matrix = |w: &Vec<f32>| Matrix::dense(put(b, self.weight, self.k, w, false).view);
        let w: Vec<Matrix> = self.w.iter().map(matrix).collect();
        assert_eq!(w.len(), self.experts);
        let experts = put(b, DType::I32, self.top_k, &self.chosen, false);
        let mut y = blank(b, self.chosen.len(), self.n, false);
        let op = ExpertLinear {
            x: &x.view,
            w: &w,
            experts: &experts.view,
            activations: self.activations,
            y: &mut y.view,
        };
        b.expert_linear(op).unwrap();
        take(b, &y)
    }

    fn only_token(&self, t: usize) -> Self {
        let width = self.k * if self.each { self.top_k } else { 1 };
        ExpertCase {
            x: self.x[t * width..][..width].to_vec(),
            chosen: self.chosen[t * self.top_k..][..self.top_k].to_vec(),
            ..self.clone()
        }
    }
}

#[test]
fn experts_follow_the_reference_and_tokens_their_own_choices() {
    let mut rng = Rng(3 << 20);
    for (weight, activations) in PRODUCTS {
        for (tokens, each) in [
            (1, false),
            (1, true),
            (3, true),
            (11, false),
            (40, false),
            (40, true),
        ] {
            let case = ExpertCase::new(&mut rng, tokens, each, weight, activations);
            let magnitude = {
                let w = case.w.iter().map(|w| abs(w)).collect();
                ExpertCase {
                    x: abs(&case.x),
                    w,
                    ..case.clone()
                }
                .run(&Reference)
            };
            let expected = case.run(&Reference);
            for isa in Isa::available() {
                let all = case.run(&cpu(isa, 1));
                let what = format!("{weight} × {activations}, {tokens} tokens, {isa:?}");
                // As for linear.
                near(&what, &all, &expected, &magnitude, 2e-6);
                for threads in 2..5 {
                    same("threads", &case.run(&cpu(isa, threads)), &all);
                }
                let (b, width) = (cpu(isa, 2), case.top_k * case.n);
                for t in [0, tokens / 2, tokens - 1] {
                    same(
                        &what,
                        &case.only_token(t).run(&b),
                        &all[t * width..][..width],
                    );
                }
            }
        }
    }
}

#[test]
fn an_expert_product_is_the_same_bits_as_the_dense_product() {
    let mut rng = Rng(4 << 20);
    for (weight, activations) in PRODUCTS {
        let case = ExpertCase::new(&mut rng, 13, false, weight, activations);
        for b in backends(&[2]) {
            let y = case.run(&b);
            for t in [0, 7] {
                let dense = LinearCase {
                    k: case.k,
                    n: case.n,
                    weight,
                    activations,
                    x: case.x[t * case.k..][..case.k].to_vec(),
                    w: case.w[3].clone(),
                    bias: None,
                    wide: true,
                };
                same(
                    "dense",
                    &y[(2 * t + 1) * case.n..][..case.n],
                    &dense.run(&b),
                );
            }
        }
    }
}

// ---------------------------------------------------------------- rows and elements

const WIDTHS: [usize; 8] = [1, 5, 16, 31, 64, 100, 1000, 2560];
const HEIGHTS: [usize; 6] = [1, 2, 3, 7, 33, 130];
const ACTIVATIONS: [Activation; 7] = [
    Activation::Silu,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Relu,
    Activation::Relu2,
    Activation::Sigmoid,
    Activation::Identity,
];

/// Runs `op` over heights and widths on every backend: near the reference, the same bits whatever
/// the threads, and each row the same bits alone. `op` gets rows by `cols` inputs a and b and a row w.
fn check_rows(
    what: &str,
    allowed: f32,
    magnitude: impl Fn(f32, f32) -> f32,
    op: impl Fn(&dyn Backend, [&Tensor; 3], &mut Tensor),
) {
    let mut rng = Rng(5 << 20);
    let run = |b: &dyn Backend, cols: usize, x: [&[f32]; 3], wide: bool| {
        let [p, q, w] = x.map(|x| put(b, F32, cols, x, wide));
        let w = w.whole.columns(w.margin..w.margin + cols);
        let mut y = blank(b, x[0].len() / cols, cols, wide);
        op(b, [&p.view, &q.view, &w], &mut y.view);
        take(b, &y)
    };
    let backends = backends(&[1, 3]);
    for rows in HEIGHTS {
        for cols in WIDTHS {
            let (p, q) = (rng.numbers(rows * cols, 9.0), rng.numbers(rows * cols, 3.0));
            let w = rng.numbers(cols, 2.0);
            let wide = rng.below(2) == 0;
            let expected = run(&Reference, cols, [&p, &q, &w], wide);
            let size: Vec<f32> = p.iter().zip(&q).map(|(p, q)| magnitude(*p, *q)).collect();
            let mut on_one = Vec::new();
            for b in &backends {
                let found = run(b, cols, [&p, &q, &w], wide);
                near(
                    &format!("{what} {rows} × {cols} on {b:?}"),
                    &found,
                    &expected,
                    &size,
                    allowed,
                );
                if b.threads() == 1 {
                    on_one = found;
                    continue;
                }
                same(what, &found, &on_one);
                for r in [0, rows / 2, rows - 1] {
                    let at = r * cols..(r + 1) * cols;
                    let alone = run(b, cols, [&p[at.clone()], &q[at.clone()], &w], !wide);
                    same(what, &alone, &found[at]);
                }
            }
        }
    }
}

#[test]
fn rms_norm_follows_the_reference() {
    // The mean of up to 2,560 squares in another order, a root and two products.
    check_rows(
        "rms_norm",
        2e-6,
        |p, _| 8.0 * p.abs() + 1.0,
        |b, [x, _, w], y| {
            b.rms_norm(RmsNorm {
                x,
                weight: Some(w),
                eps: 1e-6,
                groups: 1,
                y,
            })
            .unwrap();
        },
    );
    check_rows(
        "rms_norm without weight",
        2e-6,
        |p, _| 4.0 * p.abs() + 1.0,
        |b, [x, _, _], y| {
            b.rms_norm(RmsNorm {
                x,
                weight: None,
                eps: 1e-5,
                groups: 1,
                y,
            })
            .unwrap();
        },
    );
}

/// How many parts rows of so many columns are taken in.
fn parts(cols: usize) -> usize {
    [8, 5, 31]
        .into_iter()
        .find(|g| cols.is_multiple_of(*g))
        .unwrap_or(1)
}

#[test]
fn norms_of_parts_follow_the_reference() {
    // As for whole rows. Parts as narrow as one element and as wide as 320.
    for shared in [false, true] {
        check_rows(
            "rms_norm of parts",
            2e-6,
            |p, _| 8.0 * p.abs() + 1.0,
            |b, [x, _, w], y| {
                let groups = parts(x.cols());
                let width = x.cols() / if shared { groups } else { 1 };
                b.rms_norm(RmsNorm {
                    x,
                    weight: Some(&w.columns(0..width)),
                    eps: 1e-6,
                    groups,
                    y,
                })
                .unwrap();
            },
        );
    }
    let x = Reference.alloc(F32, 2, 12).unwrap();
    let mut y = Reference.alloc(F32, 2, 12).unwrap();
    for (groups, width) in [(0, 12), (5, 12), (3, 5), (3, 3)] {
        let weight = Reference.alloc(F32, 1, width).unwrap();
        let op = RmsNorm {
            x: &x,
            weight: Some(&weight),
            eps: 1e-6,
            groups,
            y: &mut y,
        };
        assert!(Reference.rms_norm(op).is_err(), "{groups} of {width}");
    }
}

#[test]
fn layer_norm_follows_the_reference() {
    // Distances from the mean round by its error, 1e-6 of numbers up to nine; eps keeps them from
    // being enlarged more than ten times where a part's numbers are nearly equal.
    for (weight, bias) in [(false, false), (true, false), (false, true), (true, true)] {
        for of_parts in [false, true] {
            check_rows(
                "layer_norm",
                2e-6,
                |p, _| 20.0 * p.abs() + 20.0,
                |b, [x, _, w], y| {
                    let groups = if of_parts { parts(x.cols()) } else { 1 };
                    let shared = w.columns(0..x.cols() / groups);
                    b.layer_norm(LayerNorm {
                        x,
                        weight: weight.then_some(w),
                        bias: bias.then_some(&shared),
                        eps: 1e-2,
                        groups,
                        y,
                    })
                    .unwrap();
                },
            );
        }
    }
}

#[test]
fn sums_and_multiples_are_those_of_the_reference() {
    // One rounding each, the same one.
    check_rows(
        "add",
        0.0,
        |_, _| 0.0,
        |b, [p, q, _], y| b.add(Add { a: p, b: q, y }).unwrap(),
    );
    check_rows(
        "scale",
        0.0,
        |_, _| 0.0,
        |b, [x, _, _], y| {
            b.scale(Scale { x, by: 0.37, y }).unwrap();
        },
    );
    check_rows(
        "gather",
        0.0,
        |_, _| 0.0,
        |b, [x, _, _], y| {
            let rows: Vec<usize> = (0..x.rows()).collect();
            b.gather(Gather { x, rows: &rows, y }).unwrap();
        },
    );
}

#[test]
fn activations_follow_the_reference() {
    for act in ACTIVATIONS {
        // The error function is within 1.5e-7 on both sides; the others are within 4 units.
        check_rows(
            &format!("{act:?}"),
            5e-7,
            |p, _| match act {
                // At zero it is a half.
                Activation::Sigmoid => 1.0,
                _ => p.abs() * p.abs().max(1.0),
            },
            |b, [x, ..], y| {
                b.activate(Activate {
                    x,
                    gate: None,
                    act,
                    y,
                })
                .unwrap();
            },
        );
        let size = |p: f32, q: f32| match act {
            Activation::Sigmoid => q.abs(),
            _ => (p * q).abs() * p.abs().max(1.0),
        };
        check_rows(
            &format!("gated {act:?}"),
            6e-7,
            size,
            |b, [gate, x, _], y| {
                b.activate(Activate {
                    x,
                    gate: Some(gate),
                    act,
                    y,
                })
                .unwrap();
            },
        );
    }
}

#[test]
fn lookups_copies_and_zeros_are_exact() {
    let mut rng = Rng(6 << 20);
    for dtype in [F32, BF16, F16] {
        for (vocabulary, cols, tokens) in [(1, 1, 1), (7, 31, 33), (50, 100, 3), (9, 2560, 130)] {
            let table = rng.numbers(vocabulary * cols, 3.0);
            let ids: Vec<u32> = (0..tokens).map(|_| rng.below(vocabulary) as u32).collect();
            let run = |b: &dyn Backend| {
                let table = Matrix::dense(put(b, dtype, cols, &table, false).view);
                let mut y = blank(b, tokens, cols, true);
                b.embed(Embed {
                    ids: &ids,
                    table: &table,
                    y: &mut y.view,
                })
                .unwrap();
                let order: Vec<usize> = (0..tokens).rev().collect();
                let mut z = blank(b, tokens, cols, false);
                b.gather(Gather {
                    x: &y.view,
                    rows: &order,
                    y: &mut z.view,
                })
                .unwrap();
                [take(b, &y), take(b, &z)].concat()
            };
            let expected = run(&Reference);
            for b in backends(&[1, 3]) {
                same("embed", &run(&b), &expected);
            }
        }
    }
    for dtype in [F32, BF16, F16, DType::I32] {
        for (rows, cols) in [(1, 1), (3, 7), (200, 1000), (1, 200_000), (40, 20_000)] {
            let values: Vec<f32> = (0..rows * cols).map(|_| rng.below(200) as f32).collect();
            for b in backends(&[1, 3]) {
                let from = put(&b, dtype, cols, &values, true);
                let to = put(&b, dtype, cols, &vec![0.0; rows * cols], true);
                b.copy(&from.view, &mut to.view.clone()).unwrap();
                same("copy", &read(&b, &to.view), &values);
                b.clear(&mut to.view.clone()).unwrap();
                assert!(read(&b, &to.view).iter().all(|x| x.to_bits() == 0));
                if dtype != DType::I32 {
                    take(&b, &to);
                }
                assert!(
                    b.copy(&from.view, &mut b.alloc(dtype, rows, cols + 1).unwrap())
                        .is_err()
                );
            }
        }
    }
}

#[test]
fn random_weights_are_those_of_the_reference() {
    for dtype in [F32, BF16, F16, DType::I32] {
        for (rows, cols) in [(1, 1), (5, 33), (3, 5000), (300, 700), (1, 150_000)] {
            let draw = |b: &dyn Backend| {
                let mut tensor = b.alloc(dtype, rows, cols).unwrap();
                b.fill_normal(&mut tensor, 77, 3.0).unwrap();
                read(b, &tensor)
            };
            let expected = draw(&Reference);
            for b in backends(&[1, 2, 3]) {
                same("fill_normal", &draw(&b), &expected);
            }
        }
    }
}

/// The likeliest tokens of rows with ties, zeros of both signs, and rows that have none.
fn likeliest(b: &dyn Backend, cols: usize, by: f32, wide: bool) -> Vec<f32> {
    let mut rng = Rng(cols as u64);
    let mut rows: Vec<Vec<f32>> = (0..9).map(|_| rng.numbers(cols, 5.0)).collect();
    // Few distinct numbers: most rows have ties, once scaled if not before.
    rows[1].iter_mut().for_each(|x| *x = x.round());
    rows[2].fill(-3.5);
    rows[3].iter_mut().for_each(|x| *x = -x.abs().floor());
    rows[3][cols / 2] = 0.0;
    rows[4][cols - 1] = f32::NAN;
    rows[5][cols / 3] = f32::INFINITY;
    rows[6].fill(f32::NEG_INFINITY);
    rows[7].fill(f32::NEG_INFINITY);
    rows[7][cols - 1] = -1e30;
    rows[8][0] = 3e38;
    let x = put(b, F32, cols, &rows.concat(), wide);
    let mut y = b.alloc(DType::I32, rows.len(), 1).unwrap();
    let x = &x.view;
    b.likeliest(Likeliest { x, by, y: &mut y }).unwrap();
    read(b, &y)
}

const LIKELIEST: [usize; 9] = [1, 2, 5, 16, 127, 128, 1000, 4099, 65_536];

#[test]
fn the_likeliest_is_that_of_the_reference() {
    for cols in LIKELIEST {
        for by in [1.0, 0.1, 7.0, -1.0] {
            let expected = likeliest(&Reference, cols, by, false);
            if by == 1.0 {
                // The first of equals; none of a row with NaN, infinities, or nothing else.
                assert_eq!(expected[2], 0.0);
                assert_eq!(expected[4..7], [-1.0; 3]);
                assert_eq!(expected[7], (cols - 1) as f32);
            }
            if by == 7.0 {
                assert_eq!(expected[8], -1.0);
            }
            for b in backends(&[1, 3]) {
                same("likeliest", &likeliest(&b, cols, by, true), &expected);
            }
        }
    }
}

#[test]
fn routes_and_combinations_follow_the_reference() {
    let mut rng = Rng(7 << 20);
    for (tokens, experts, top_k, cols) in [
        (1, 1, 1, 1),
        (3, 8, 2, 33),
        (33, 16, 4, 100),
        (130, 5, 5, 16),
    ] {
        let logits = rng.numbers(tokens * experts, 3.0);
        let x = rng.numbers(tokens * top_k * cols, 2.0);
        let choice_bias = rng.numbers(experts, 1.0);
        for score in [Score::Softmax, Score::SoftmaxTopK, Score::Sigmoid] {
            for (normalize, biased, groups, scale) in [
                (false, false, None, 1.0),
                (true, false, None, 1.0),
                (false, true, Some((1, 1)), 1.0),
                (true, true, (experts == 16).then_some((4, 2)), 2.5),
            ] {
                let run = |b: &dyn Backend, x: &[f32]| {
                    let logits = put(b, F32, experts, &logits, true);
                    let mut chosen = b.alloc(DType::I32, tokens, top_k).unwrap();
                    let mut weights = blank(b, tokens, top_k, true);
                    let choice_bias = vector(b, &choice_bias);
                    let op = Route {
                        logits: &logits.view,
                        score,
                        choice_bias: biased.then_some(&choice_bias),
                        groups,
                        normalize,
                        scale,
                        experts: &mut chosen,
                        weights: &mut weights.view,
                    };
                    b.route(op).unwrap();
                    let x = put(b, F32, cols, x, true);
                    let mut y = blank(b, tokens, cols, true);
                    let op = Combine {
                        x: &x.view,
                        weights: &weights.view,
                        y: &mut y.view,
                    };
                    b.combine(op).unwrap();
                    (read(b, &chosen), take(b, &weights), take(b, &y))
                };
                let expected = run(&Reference, &x);
                let magnitude = run(&Reference, &abs(&x)).2;
                for b in backends(&[1, 3]) {
                    let found = run(&b, &x);
                    same("chosen experts", &found.0, &expected.0);
                    near("their weights", &found.1, &expected.1, &expected.1, 1e-6);
                    // A few products, fused or not.
                    near("combine", &found.2, &expected.2, &magnitude, 1e-6);
                }
            }
        }
    }
}

// ---------------------------------------------------------------- sequences

/// How sequences share batches: each step gives (sequence, rows) in order; places of their states
/// and pages are shuffled by `seed`.
struct Schedule {
    steps: Vec<Vec<(usize, usize)>>,
    page_size: usize,
    seed: u64,
}

impl Schedule {
    fn lengths(&self) -> Vec<usize> {
        let sequences = self
            .steps
            .iter()
            .flatten()
            .map(|s| s.0 + 1)
            .max()
            .unwrap_or(0);
        let rows = |s| {
            self.steps
                .iter()
                .flatten()
                .filter(|(i, _)| *i == s)
                .map(|(_, n)| n)
                .sum()
        };
        (0..sequences).map(rows).collect()
    }

    fn slots(&self) -> usize {
        self.lengths().len() + 2
    }

    fn pages(&self) -> usize {
        self.lengths()
            .iter()
            .map(|n| n.div_ceil(self.page_size))
            .sum::<usize>()
            + 3
    }

    /// Calls `f` for every step with its batch and, of each row, sequence and position.
    fn run(&self, mut f: impl FnMut(Ragged<'_>, &[(usize, usize)])) {
        let mut rng = Rng(self.seed << 32);
        let mut shuffled = |n: usize| {
            let mut order: Vec<usize> = (0..n).collect();
            (1..n).rev().for_each(|i| order.swap(i, rng.below(i + 1)));
            order
        };
        let slots = shuffled(self.slots());
        let page_table: Vec<u32> = shuffled(self.pages())
            .into_iter()
            .map(|p| p as u32)
            .collect();
        let mut first_page = Vec::new();
        let mut next = 0;
        for length in self.lengths() {
            first_page.push(next);
            next += length.div_ceil(self.page_size);
        }
        let mut positions = vec![0; first_page.len()];
        for step in &self.steps {
            let (mut spans, mut rows) = (Vec::new(), Vec::new());
            for &(sequence, len) in step {
                let position = positions[sequence];
                let pages = (position + len).div_ceil(self.page_size);
                spans.push(Span {
                    start: rows.len(),
                    len,
                    position,
                    slot: slots[sequence],
                    pages: first_page[sequence]..first_page[sequence] + pages,
                });
                rows.extend((position..position + len).map(|p| (sequence, p)));
                positions[sequence] += len;
            }
            let page_size = self.page_size;
            f(
                Ragged {
                    spans: &spans,
                    page_table: &page_table,
                    page_size,
                },
                &rows,
            );
        }
    }
}

/// Rows of a batch from those of the sequences.
fn gathered(of: &[Vec<f32>], width: usize, rows: &[(usize, usize)]) -> Vec<f32> {
    rows.iter()
        .flat_map(|&(s, p)| of[s][p * width..][..width].iter().copied())
        .collect()
}

/// Puts rows of a batch back to their sequences.
fn scatter(from: &[f32], width: usize, rows: &[(usize, usize)], to: &mut Vec<Vec<f32>>) {
    for (row, &(s, _)) in from.chunks(width.max(1)).zip(rows) {
        if to.len() <= s {
            to.resize(s + 1, Vec::new());
        }
        to[s].extend_from_slice(row);
    }
}

/// Ways to run sequences of these lengths: whole one after the other, token by token, and in ragged
/// batches of random pieces.
fn schedules(rng: &mut Rng, lengths: &[usize], page_sizes: [usize; 3]) -> Vec<Schedule> {
    let whole = lengths
        .iter()
        .enumerate()
        .map(|(s, n)| vec![(s, *n)])
        .collect();
    let mut tokens = Vec::new();
    for position in 0..lengths.iter().copied().max().unwrap_or(0) {
        tokens.push(
            (0..lengths.len())
                .filter(|s| position < lengths[*s])
                .map(|s| (s, 1))
                .collect(),
        );
    }
    let mut ragged: Vec<Vec<(usize, usize)>> = Vec::new();
    let mut left = lengths.to_vec();
    while left.iter().any(|n| *n > 0) {
        let mut step = Vec::new();
        for s in (0..lengths.len()).rev() {
            let n = left[s]
                .min(1 + rng.below(40))
                .min(if rng.below(3) == 0 { 1 } else { 40 });
            if n > 0 && (step.is_empty() || rng.below(4) > 0) {
                step.push((s, n));
                left[s] -= n;
            }
        }
        ragged.push(step);
    }
    [whole, tokens, ragged]
        .into_iter()
        .zip(page_sizes)
        .enumerate()
        .map(|(i, (steps, page_size))| Schedule {
            steps,
            page_size,
            seed: i as u64 + 1,
        })
        .collect()
}

// ---------------------------------------------------------------- convolution and scan

#[derive(Clone)]
struct MambaCase {
    inner: usize,
    states: usize,
    taps: usize,
    groups: usize,
    act: Activation,
    bias: bool,
    gate: bool,
    /// Of each sequence: x, dt, b, c, z.
    inputs: [Vec<Vec<f32>>; 5],
    w: Vec<f32>,
    a: Vec<f32>,
    /// Convolution bias, dt bias, d.
    rows: [Vec<f32>; 3],
}

impl MambaCase {
    fn new(
        rng: &mut Rng,
        lengths: &[usize],
        (inner, states, taps, groups): (usize, usize, usize, usize),
    ) -> Self {
        let mut each = |width: usize, size: f32| -> Vec<Vec<f32>> {
            lengths
                .iter()
                .map(|n| rng.numbers(n * width, size))
                .collect()
        };
        let inputs = [
            each(inner, 2.0),
            each(inner, 3.0),
            each(groups * states, 1.0),
            each(groups * states, 1.0),
            each(inner, 3.0),
        ];
        MambaCase {
            inner,
            states,
            taps,
            groups,
            act: ACTIVATIONS[rng.below(ACTIVATIONS.len())],
            bias: rng.below(2) == 0,
            gate: rng.below(2) == 0,
            inputs,
            w: rng.numbers(taps * inner, 1.0),
            a: rng
                .numbers(states * inner, 8.0)
                .iter()
                .map(|a| -a.abs())
                .collect(),
            rows: std::array::from_fn(|_| rng.numbers(inner, 1.0)),
        }
    }

    /// Outputs of the convolution and of the scan for each sequence, and the states left behind.
    fn run(&self, b: &dyn Backend, schedule: &Schedule) -> [Vec<Vec<f32>>; 2] {
        let (inner, states, taps) = (self.inner, self.states, self.taps);
        let [x, dt, bs, cs, z] = &self.inputs;
        let w = put(b, F32, inner, &self.w, true);
        let a = put(b, F32, inner, &self.a, true);
        let [conv_bias, dt_bias, d] = self.rows.each_ref().map(|r| vector(b, r));
        let slots = schedule.slots();
        let mut conv_state = b.alloc(F32, slots, (taps - 1) * inner).unwrap();
        let mut ssm_state = b.alloc(F32, slots, states * inner).unwrap();
        let mut out = [Vec::new(), Vec::new()];
        schedule.run(|ragged, rows| {
            let take_rows =
                |of: &[Vec<f32>], width| put(b, F32, width, &gathered(of, width, rows), true);
            let x = take_rows(x, inner);
            let mut y = blank(b, rows.len(), inner, true);
            let op = Conv1d {
                x: &x.view,
                w: &w.view,
                bias: self.bias.then_some(&conv_bias),
                act: self.act,
                conv_state: &mut conv_state,
                ragged,
                y: &mut y.view,
            };
            b.conv1d(op).unwrap();
            scatter(&take(b, &y), inner, rows, &mut out[0]);
            let (dt, z) = (take_rows(dt, inner), take_rows(z, inner));
            let width = self.groups * states;
            let (bs, cs) = (take_rows(bs, width), take_rows(cs, width));
            let mut y = blank(b, rows.len(), inner, true);
            let op = SelectiveScan {
                x: &x.view,
                dt: &dt.view,
                dt_bias: self.bias.then_some(&dt_bias),
                a: &a.view,
                b: &bs.view,
                c: &cs.view,
                groups: self.groups,
                d: &d,
                z: self.gate.then_some(&z.view),
                ssm_state: &mut ssm_state,
                ragged,
                y: &mut y.view,
            };
            b.selective_scan(op).unwrap();
            scatter(&take(b, &y), inner, rows, &mut out[1]);
        });
        out
    }

    /// What roundings are relative to: sums of absolute values.
    fn magnitude(&self, schedule: &Schedule) -> [Vec<Vec<f32>>; 2] {
        let [x, dt, b, c, z] = self.inputs.clone();
        let positive = |of: Vec<Vec<f32>>| of.iter().map(|v| abs(v)).collect::<Vec<_>>();
        let [conv_bias, dt_bias, d] = self.rows.clone();
        let case = MambaCase {
            inputs: [positive(x), dt, positive(b), positive(c), z],
            w: abs(&self.w),
            act: Activation::Identity,
            rows: [abs(&conv_bias), dt_bias, abs(&d)],
            gate: false,
            ..self.clone()
        };
        let mut sums = case.run(&Reference, schedule);
        for (s, z) in sums[1].iter_mut().zip(&self.inputs[4]) {
            if self.gate {
                s.iter_mut().zip(z).for_each(|(s, z)| *s *= z.abs());
            }
        }
        // Squares and GELU's rounding grow with the argument.
        sums[0].iter_mut().flatten().for_each(|s| *s *= s.max(1.0));
        sums
    }
}

#[test]
fn convolution_and_scan_follow_the_reference_and_no_cut_changes_a_bit() {
    let mut rng = Rng(8 << 20);
    let shapes = [
        (1, 1, 1, 1),
        (5, 3, 2, 5),
        (16, 16, 4, 1),
        (31, 8, 4, 1),
        (100, 16, 3, 1),
        (100, 16, 3, 5),
        (130, 5, 4, 1),
        (130, 5, 4, 2),
        (256, 16, 1, 16),
        (520, 16, 4, 1),
    ];
    for (inner, states, taps, groups) in shapes {
        let lengths = [50, 1, 2, 81];
        let case = MambaCase::new(&mut rng, &lengths, (inner, states, taps, groups));
        let schedules = schedules(&mut rng, &lengths, [1, 1, 1]);
        let expected = case.run(&Reference, &schedules[0]);
        let magnitude = case.magnitude(&schedules[0]);
        for isa in Isa::available() {
            let all = case.run(&cpu(isa, 1), &schedules[0]);
            for (i, allowed) in [(0, 2e-6), (1, 4e-6)] {
                for (s, found) in all[i].iter().enumerate() {
                    let what = format!("part {i} of {inner} × {states}, sequence {s}, {isa:?}");
                    // Convolution: a few roundings and the activation. Scan: exponentials within
                    // two units of an exponent up to 40, whose rounding counts as often.
                    near(&what, found, &expected[i][s], &magnitude[i][s], allowed);
                }
            }
            for (i, schedule) in schedules.iter().enumerate() {
                for threads in 1..5 {
                    if i == 1 && threads > 2 {
                        continue;
                    }
                    let again = case.run(&cpu(isa, threads), schedule);
                    for (again, all) in again.iter().flatten().zip(all.iter().flatten()) {
                        same(
                            &format!("schedule {i}, {threads} threads, {isa:?}"),
                            again,
                            all,
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_sequence_does_not_notice_its_neighbours() {
    let mut rng = Rng(9 << 20);
    let lengths = [40, 25, 60];
    let case = MambaCase::new(&mut rng, &lengths, (70, 16, 4, 1));
    let mut changed = case.clone();
    for input in &mut changed.inputs {
        input[0].iter_mut().for_each(|x| *x = *x * 1.5 + 0.1);
        input[2].iter_mut().for_each(|x| *x *= 1e6);
    }
    let schedule = &schedules(&mut rng, &lengths, [1, 1, 1])[2];
    for b in backends(&[1, 2]) {
        let (before, after) = (case.run(&b, schedule), changed.run(&b, schedule));
        for part in 0..2 {
            same("the middle sequence", &after[part][1], &before[part][1]);
        }
    }
}

// ---------------------------------------------------------------- scans of other kinds

/// A scan of sequences: the rows that it reads, and where their states begin.
trait Scan: Clone {
    /// Inputs of each sequence, and their widths.
    fn inputs(&self) -> Vec<(&[Vec<f32>], usize)>;
    /// State of each sequence before its first row.
    fn begins(&self) -> &[Vec<f32>];
    /// Width of the output.
    fn width(&self) -> usize;
    /// One batch.
    fn step(
        &self,
        b: &dyn Backend,
        inputs: &[Put],
        state: &mut Tensor,
        ragged: Ragged<'_>,
        y: &mut Tensor,
    );
    /// The same with sizes in place of numbers, to whose results roundings are relative.
    fn sizes(&self) -> Self;
    /// What a state of `sizes` means for one of the case itself.
    fn state_size(&self, state: Vec<f32>) -> Vec<f32> {
        state
    }

    /// Outputs of each sequence and its state after the last row.
    fn run(&self, b: &dyn Backend, schedule: &Schedule) -> [Vec<Vec<f32>>; 2] {
        let state_width = self.begins()[0].len();
        let unused = vec![f32::NAN; schedule.slots() * state_width];
        let state = put(b, F32, state_width, &unused, true);
        let (mut out, mut ends) = (Vec::new(), self.begins().to_vec());
        schedule.run(|ragged, rows| {
            for span in ragged.spans {
                if span.position == 0 {
                    let mut slot = state.view.row_range(span.slot..span.slot + 1);
                    b.write(&self.begins()[rows[span.start].0], &mut slot)
                        .unwrap();
                }
            }
            let inputs: Vec<Put> = self
                .inputs()
                .into_iter()
                .map(|(of, width)| put(b, F32, width, &gathered(of, width, rows), true))
                .collect();
            let mut y = blank(b, rows.len(), self.width(), true);
            self.step(b, &inputs, &mut state.view.clone(), ragged, &mut y.view);
            scatter(&take(b, &y), self.width(), rows, &mut out);
            for span in ragged.spans {
                let slot = state.view.row_range(span.slot..span.slot + 1);
                ends[rows[span.start].0] = read(b, &slot);
            }
        });
        take(b, &state);
        [out, ends]
    }

    /// Near the reference on every instruction set, and the same bits by every schedule and beside
    /// any neighbours.
    fn check(&self, rng: &mut Rng, what: &str, allowed: f32) {
        let length = |x: &Vec<f32>| x.len() / self.inputs()[0].1;
        let lengths: Vec<usize> = self.inputs()[0].0.iter().map(length).collect();
        let schedules = schedules(rng, &lengths, [1, 1, 1]);
        let expected = self.run(&Reference, &schedules[0]).concat();
        let [mut sizes, states] = self.sizes().run(&Reference, &schedules[0]);
        sizes.extend(states.into_iter().map(|s| self.state_size(s)));
        for isa in Isa::available() {
            let all = self.run(&cpu(isa, 1), &schedules[0]).concat();
            for (i, found) in all.iter().enumerate() {
                let what = format!("{what}, {i}, {isa:?}");
                near(&what, found, &expected[i], &sizes[i], allowed);
            }
            for (i, schedule) in schedules.iter().enumerate() {
                for threads in 1..5 {
                    if i == 1 && threads > 2 {
                        continue;
                    }
                    let again = self.run(&cpu(isa, threads), schedule).concat();
                    for (again, all) in again.iter().zip(&all) {
                        let what = format!("{what}, schedule {i}, {threads} threads, {isa:?}");
                        same(&what, again, all);
                    }
                }
            }
        }
    }
}

#[derive(Clone)]
struct SsdCase {
    heads: usize,
    groups: usize,
    width: usize,
    states: usize,
    bias: bool,
    skip: bool,
    scale_input: bool,
    dt_limit: (f32, f32),
    /// Q of the form with chunks.
    chunk: Option<usize>,
    /// Of each sequence: x, dt, b, c.
    inputs: [Vec<Vec<f32>>; 4],
    begins: Vec<Vec<f32>>,
    /// a, dt_bias, d.
    rows: [Vec<f32>; 3],
}

impl SsdCase {
    fn new(
        rng: &mut Rng,
        lengths: &[usize],
        (heads, groups, width, states): (usize, usize, usize, usize),
    ) -> Self {
        let mut each = |width: usize, size: f32| -> Vec<Vec<f32>> {
            lengths
                .iter()
                .map(|n| rng.numbers(n * width, size))
                .collect()
        };
        let inputs = [
            each(heads * width, 2.0),
            each(heads, 3.0),
            each(groups * states, 1.0),
            each(groups * states, 1.0),
        ];
        let state = |_| rng.numbers(heads * width * states, 2.0);
        let begins = lengths.iter().map(state).collect();
        let a = rng.numbers(heads, 1.0).iter().map(|a| -a.abs()).collect();
        SsdCase {
            heads,
            groups,
            width,
            states,
            bias: rng.below(2) == 0,
            skip: rng.below(3) > 0,
            scale_input: rng.below(3) > 0,
            dt_limit: if rng.below(2) == 0 {
                (0.0, f32::INFINITY)
            } else {
                (0.1, 2.0)
            },
            chunk: None,
            inputs,
            begins,
            rows: [a, rng.numbers(heads, 1.0), rng.numbers(heads, 1.0)],
        }
    }
}

impl SsdCase {
    /// The same in chunks of so many tokens. What a slot keeps of a chunk begins as numbers that show
    /// wherever they count.
    fn chunked(mut self, size: usize) -> Self {
        self.chunk = Some(size);
        let kept: usize = self.kept().iter().sum();
        for begin in &mut self.begins {
            begin.extend(vec![1e30; kept]);
        }
        self
    }

    /// Elements that a slot keeps of a chunk: inputs, b and decays.
    fn kept(&self) -> [usize; 3] {
        let of = [
            self.heads * self.width,
            self.groups * self.states,
            self.heads,
        ];
        of.map(|n| n * self.chunk.unwrap_or(0))
    }
}

impl Scan for SsdCase {
    fn inputs(&self) -> Vec<(&[Vec<f32>], usize)> {
        let [x, dt, b, c] = &self.inputs;
        let of_groups = self.groups * self.states;
        vec![
            (x, self.heads * self.width),
            (dt, self.heads),
            (b, of_groups),
            (c, of_groups),
        ]
    }

    fn begins(&self) -> &[Vec<f32>] {
        &self.begins
    }

    fn width(&self) -> usize {
        self.heads * self.width
    }

    fn step(
        &self,
        b: &dyn Backend,
        inputs: &[Put],
        ssm_state: &mut Tensor,
        ragged: Ragged<'_>,
        y: &mut Tensor,
    ) {
        let [a, dt_bias, d] = self.rows.each_ref().map(|r| vector(b, r));
        // What a slot keeps of a chunk lies behind the state; whether that is all, the check says.
        let state = match self.chunk {
            None => ssm_state.cols(),
            Some(_) => self.heads * self.width * self.states,
        };
        let [of_inputs, of_b, _] = self.kept();
        let all = ssm_state.cols();
        let ends = [0, state, state + of_inputs, state + of_inputs + of_b, all];
        let [ssm_state, chunk_inputs, chunk_b, chunk_decays] =
            &mut std::array::from_fn(|i| ssm_state.columns(ends[i]..ends[i + 1]));
        let scan = SsdScan {
            x: &inputs[0].view,
            dt: &inputs[1].view,
            dt_bias: self.bias.then_some(&dt_bias),
            dt_limit: self.dt_limit,
            a: &a,
            b: &inputs[2].view,
            c: &inputs[3].view,
            d: self.skip.then_some(&d),
            scale_input: self.scale_input,
            groups: self.groups,
            ssm_state,
            ragged,
            y,
        };
        match self.chunk {
            None => b.ssd_scan(scan).unwrap(),
            Some(chunk_size) => {
                let op = SsdChunked {
                    scan,
                    chunk_size,
                    chunk_inputs,
                    chunk_b,
                    chunk_decays,
                };
                b.ssd_chunked(op).unwrap();
            }
        }
    }

    /// Decays are negative.
    fn state_size(&self, state: Vec<f32>) -> Vec<f32> {
        abs(&state)
    }

    fn sizes(&self) -> Self {
        let positive = |of: &[Vec<f32>]| of.iter().map(|v| abs(v)).collect::<Vec<_>>();
        let [x, dt, b, c] = &self.inputs;
        let [a, dt_bias, d] = self.rows.clone();
        SsdCase {
            inputs: [positive(x), dt.clone(), positive(b), positive(c)],
            begins: positive(&self.begins),
            rows: [a, dt_bias, abs(&d)],
            ..self.clone()
        }
    }
}

#[test]
fn the_ssd_scan_follows_the_reference_and_no_cut_changes_a_bit() {
    let mut rng = Rng(14 << 20);
    let shapes = [
        // heads, groups, width of a head, states
        (1, 1, 1, 1),
        (2, 1, 3, 5),
        (6, 3, 7, 16),
        (4, 4, 16, 9),
        (3, 1, 31, 64),
        (4, 2, 32, 96),
        (3, 3, 48, 7),
        (5, 1, 64, 128),
        (2, 2, 80, 64),
        (2, 1, 128, 256),
        (1, 1, 200, 33),
        (24, 1, 8, 4),
    ];
    for shape in shapes {
        let case = SsdCase::new(&mut rng, &[50, 1, 2, 81], shape);
        // Exponentials of up to 5 within a unit, and sums of up to 256 products. An error of a decay
        // stays in the state, but as the state decays.
        case.check(&mut rng, &format!("{shape:?}"), 4e-6);
    }
}

#[test]
fn the_ssd_scan_by_chunks_follows_the_reference_and_no_cut_changes_a_bit() {
    let mut rng = Rng(17 << 20);
    let cases = [
        // heads, groups, width of a head, states; tokens of a chunk
        ((1, 1, 1, 1), 1),
        ((2, 1, 3, 5), 3),
        ((6, 3, 7, 16), 16),
        ((4, 4, 16, 9), 5),
        ((3, 1, 31, 64), 64),
        ((4, 2, 32, 96), 32),
        ((3, 3, 48, 7), 1),
        ((5, 1, 64, 128), 17),
        ((2, 2, 80, 64), 256),
        ((2, 1, 128, 256), 50),
        ((1, 1, 200, 33), 81),
        ((24, 1, 8, 4), 20),
    ];
    for (shape, size) in cases {
        let case = SsdCase::new(&mut rng, &[50, 1, 2, 81], shape).chunked(size);
        // As for the recurrence; decays of a chunk are as exact as its sum of them is long.
        case.check(&mut rng, &format!("{shape:?} by {size}"), 2e-5);
    }
}

#[test]
fn both_forms_of_the_ssd_scan_say_the_same() {
    let mut rng = Rng(18 << 20);
    let lengths = [70, 1, 33];
    for size in [1, 4, 32, 100] {
        let case = SsdCase::new(&mut rng, &lengths, (6, 2, 9, 11));
        let schedule = schedules(&mut rng, &lengths, [1, 1, 1]).remove(2);
        let [expected, _] = case.run(&Reference, &schedule);
        let [sizes, _] = case.sizes().run(&Reference, &schedule);
        let [found, _] = case.chunked(size).run(&Reference, &schedule);
        for ((found, expected), sizes) in found.iter().zip(&expected).zip(&sizes) {
            near(&format!("chunks of {size}"), found, expected, sizes, 2e-5);
        }
    }
}

#[test]
fn an_ssd_scan_of_odd_arguments_is_refused() {
    let mut rng = Rng(15 << 20);
    let scan = SsdCase::new(&mut rng, &[3], (4, 2, 3, 2));
    for case in [scan.clone(), scan.chunked(5)] {
        let refused = |change: fn(&mut SsdCase)| {
            let mut case = case.clone();
            change(&mut case);
            let schedule = schedules(&mut Rng(1), &[3], [1, 1, 1]).remove(0);
            std::panic::catch_unwind(|| case.run(&Reference, &schedule)).is_err()
        };
        assert!(!refused(|_| {}));
        assert!(refused(|case| case.groups = 3));
        assert!(refused(|case| case.dt_limit = (1.0, 0.5)));
        assert!(refused(|case| case.dt_limit = (f32::NAN, 0.5)));
        assert!(refused(|case| case.begins[0].push(0.0)));
        assert!(refused(|case| case.rows[0].push(-1.0)));
        if case.chunk.is_some() {
            assert!(refused(|case| case.chunk = Some(0)));
            assert!(refused(|case| case.chunk = Some(4)));
        }
    }
}

#[derive(Clone)]
struct S4dCase {
    inner: usize,
    x: Vec<Vec<f32>>,
    begins: Vec<Vec<f32>>,
    /// a and c, real and imaginary.
    matrices: [Vec<f32>; 4],
    d: Vec<f32>,
}

impl S4dCase {
    fn new(rng: &mut Rng, lengths: &[usize], (inner, states): (usize, usize)) -> Self {
        let n = states * inner;
        let (size, angle) = (rng.numbers(n, 0.3), rng.numbers(n, 3.2));
        // Within the unit circle.
        let part = |f: fn(f32) -> f32| -> Vec<f32> {
            let of = |(r, t): (&f32, &f32)| (0.69 + r) * f(*t);
            size.iter().zip(&angle).map(of).collect()
        };
        let numbers = |n: usize, size: f32, rng: &mut Rng| rng.numbers(n, size);
        S4dCase {
            inner,
            x: lengths
                .iter()
                .map(|n| numbers(n * inner, 2.0, rng))
                .collect(),
            begins: lengths.iter().map(|_| numbers(2 * n, 2.0, rng)).collect(),
            matrices: [
                part(f32::cos),
                part(f32::sin),
                numbers(n, 1.0, rng),
                numbers(n, 1.0, rng),
            ],
            d: numbers(inner, 1.0, rng),
        }
    }
}

impl Scan for S4dCase {
    fn inputs(&self) -> Vec<(&[Vec<f32>], usize)> {
        vec![(&self.x, self.inner)]
    }

    fn begins(&self) -> &[Vec<f32>] {
        &self.begins
    }

    fn width(&self) -> usize {
        self.inner
    }

    fn step(
        &self,
        b: &dyn Backend,
        inputs: &[Put],
        ssm_state: &mut Tensor,
        ragged: Ragged<'_>,
        y: &mut Tensor,
    ) {
        let matrix = |m: &Vec<f32>| put(b, F32, self.inner, m, true).view;
        let [a_re, a_im, c_re, c_im] = self.matrices.each_ref().map(matrix);
        let op = S4dScan {
            x: &inputs[0].view,
            a_re: &a_re,
            a_im: &a_im,
            c_re: &c_re,
            c_im: &c_im,
            d: &vector(b, &self.d),
            ssm_state,
            ragged,
            y,
        };
        b.s4d_scan(op).unwrap();
    }

    /// Lengths of complex numbers, as real ones.
    fn sizes(&self) -> Self {
        let length = |re: &[f32], im: &[f32]| -> Vec<f32> {
            re.iter().zip(im).map(|(re, im)| re.hypot(*im)).collect()
        };
        let [a_re, a_im, c_re, c_im] = &self.matrices;
        let begins = self.begins.iter().map(|s| {
            let (re, im) = s.split_at(s.len() / 2);
            [length(re, im), vec![0.0; re.len()]].concat()
        });
        let (a, c) = (length(a_re, a_im), length(c_re, c_im));
        let zeros = vec![0.0; a.len()];
        S4dCase {
            inner: self.inner,
            x: self.x.iter().map(|x| abs(x)).collect(),
            begins: begins.collect(),
            matrices: [a, zeros.clone(), c, zeros],
            d: abs(&self.d),
        }
    }

    fn state_size(&self, state: Vec<f32>) -> Vec<f32> {
        state[..state.len() / 2].repeat(2)
    }
}

#[test]
fn the_s4d_scan_follows_the_reference_and_no_cut_changes_a_bit() {
    let mut rng = Rng(16 << 20);
    for shape in [(1, 1), (5, 3), (16, 32), (31, 8), (100, 33), (260, 6)] {
        let case = S4dCase::new(&mut rng, &[50, 1, 2, 81], shape);
        // A rounding of the state is worth up to a hundred more: it stays, turned and made smaller.
        case.check(&mut rng, &format!("{shape:?}"), 4e-6);
    }
}

// ---------------------------------------------------------------- Mamba-3

#[derive(Clone)]
struct Mamba3Case {
    heads: usize,
    groups: usize,
    rank: usize,
    width: usize,
    states: usize,
    pairs: usize,
    mimo: bool,
    norm: bool,
    decay: Decay,
    /// Of each sequence: x, z, b, c, dt, a, trap, angle.
    inputs: [Vec<Vec<f32>>; 8],
    /// dt_bias, b_bias, c_bias, d, x_in, z_in, y_out, norm.
    weights: [Vec<f32>; 8],
}

/// Heads, groups, rank (zero without a mimo), width of a head, states and pairs.
type Mamba3Shape = (usize, usize, usize, usize, usize, usize);

impl Mamba3Case {
    fn new(rng: &mut Rng, lengths: &[usize], shape: Mamba3Shape, norm: bool, decay: Decay) -> Self {
        let (heads, groups, rank, width, states, pairs) = shape;
        let (mimo, rank) = (rank > 0, rank.max(1));
        let (inner, shared) = (heads * width, rank * groups * states);
        let mut each = |width: usize, size: f32| -> Vec<Vec<f32>> {
            lengths
                .iter()
                .map(|n| rng.numbers(n * width, size))
                .collect()
        };
        let inputs = [
            each(inner, 2.0),
            each(inner, 3.0),
            each(shared, 1.5),
            each(shared, 1.5),
            each(heads, 2.0),
            each(heads, 3.0),
            each(heads, 2.0),
            each(pairs, 1.0),
        ];
        let mut row = |n: usize, size: f32| rng.numbers(n, size);
        let weights = [
            row(heads, 1.5),
            row(heads * rank * states, 1.0),
            row(heads * rank * states, 1.0),
            row(heads, 1.0),
            row(inner * rank, 1.0),
            row(inner * rank, 1.0),
            row(inner * rank, 1.0),
            row(inner, 1.0),
        ];
        Mamba3Case {
            heads,
            groups,
            rank,
            width,
            states,
            pairs,
            mimo,
            norm,
            decay,
            inputs,
            weights,
        }
    }

    /// Outputs of each sequence.
    fn run(&self, b: &dyn Backend, schedule: &Schedule) -> Vec<Vec<f32>> {
        let (inner, slots) = (self.heads * self.width, schedule.slots());
        let shared = self.rank * self.groups * self.states;
        let ranked = self.heads * self.rank * self.states;
        let [dt_bias, b_bias, c_bias, d, x_in, z_in, y_out, norm] =
            self.weights.each_ref().map(|w| vector(b, w));
        let widths = [
            inner, inner, shared, shared, self.heads, self.heads, self.heads, self.pairs,
        ];
        let sizes = [self.heads * self.pairs, inner * self.states, ranked, inner];
        let mut state = sizes.map(|n| b.alloc(F32, slots, n).unwrap());
        let mut out = Vec::new();
        schedule.run(|ragged, rows| {
            let mut i = 0;
            let puts = widths.map(|width| {
                i += 1;
                put(
                    b,
                    F32,
                    width,
                    &gathered(&self.inputs[i - 1], width, rows),
                    true,
                )
            });
            let [x, z, bs, cs, dt, a, trap, angle] = puts.each_ref().map(|p| &p.view);
            let [angle_state, ssm_state, b_state, x_state] = &mut state;
            let mut y = blank(b, rows.len(), inner, true);
            let op = Mamba3Scan {
                x,
                z,
                b: bs,
                c: cs,
                dt,
                a,
                trap,
                angle,
                dt_bias: &dt_bias,
                b_bias: &b_bias,
                c_bias: &c_bias,
                d: &d,
                mimo: self.mimo.then_some(Mimo {
                    x_in: &x_in,
                    z_in: &z_in,
                    y_out: &y_out,
                }),
                norm: self.norm.then_some(HeadNorm {
                    weight: &norm,
                    eps: 1e-5,
                }),
                decay: self.decay,
                a_floor: 1e-2,
                heads: self.heads,
                groups: self.groups,
                rank: self.rank,
                angle_state,
                ssm_state,
                b_state,
                x_state,
                ragged,
                y: &mut y.view,
            };
            b.mamba3_scan(op).unwrap();
            scatter(&take(b, &y), inner, rows, &mut out);
        });
        out
    }

    /// The largest output a channel could have: roundings of angles count like those of B and C.
    fn magnitude(&self, found: &[Vec<f32>]) -> Vec<Vec<f32>> {
        let size = |row: &[f32]| row.iter().fold(1e-3, |a: f32, y| a.max(y.abs()));
        let inner = self.heads * self.width;
        let rows = |of: &Vec<f32>| -> Vec<f32> {
            of.chunks(inner)
                .flat_map(|row| row.chunks(self.width))
                .flat_map(|head| vec![size(head); self.width])
                .collect()
        };
        found.iter().map(rows).collect()
    }
}

#[test]
fn the_scan_of_mamba3_follows_the_reference_and_no_cut_changes_a_bit() {
    let mut rng = Rng(12 << 20);
    let shapes: [(Mamba3Shape, bool, Decay); 7] = [
        ((1, 1, 0, 1, 2, 1), false, Decay::HeavyTail),
        ((3, 1, 0, 5, 7, 2), true, Decay::Softplus),
        ((4, 2, 0, 16, 16, 8), false, Decay::Softplus),
        ((5, 1, 0, 64, 128, 32), false, Decay::HeavyTail),
        ((2, 1, 1, 17, 6, 3), true, Decay::HeavyTail),
        ((6, 3, 2, 33, 10, 2), false, Decay::Softplus),
        ((3, 1, 4, 64, 32, 8), true, Decay::HeavyTail),
    ];
    for (shape, norm, decay) in shapes {
        let lengths = [50, 1, 2, 81];
        let case = Mamba3Case::new(&mut rng, &lengths, shape, norm, decay);
        let schedules = schedules(&mut rng, &lengths, [1, 1, 1]);
        let expected = case.run(&Reference, &schedules[0]);
        let again = case.run(&Reference, &schedules[2]);
        for (again, expected) in again.iter().zip(&expected) {
            same("the reference in pieces", again, expected);
        }
        let magnitude = case.magnitude(&expected);
        for isa in Isa::available() {
            let all = case.run(&cpu(isa, 1), &schedules[0]);
            for (s, found) in all.iter().enumerate() {
                let what = format!("{shape:?}, sequence {s}, {isa:?}");
                // Angles of some turns round by 5e-7 a token, and their sum by as much again.
                near(&what, found, &expected[s], &magnitude[s], 5e-5);
            }
            for (i, schedule) in schedules.iter().enumerate() {
                for threads in 1..5 {
                    if i == 1 && threads > 2 {
                        continue;
                    }
                    let again = case.run(&cpu(isa, threads), schedule);
                    for (again, all) in again.iter().zip(&all) {
                        let what = format!("{shape:?}, schedule {i}, {threads} threads, {isa:?}");
                        same(&what, again, all);
                    }
                }
            }
        }
    }
}

// ---------------------------------------------------------------- attention

#[derive(Clone)]
struct AttentionCase {
    heads: usize,
    kv_heads: usize,
    dim: usize,
    v_dim: usize,
    pages: [DType; 2],
    window: Option<usize>,
    keep_first: usize,
    /// Rotated pairs, and whether pairs are neighbours.
    rope: Option<(usize, bool)>,
    /// Of each sequence: q, k, v.
    inputs: [Vec<Vec<f32>>; 3],
}

impl AttentionCase {
    fn new(
        rng: &mut Rng,
        lengths: &[usize],
        heads: (usize, usize),
        (dim, v_dim): (usize, usize),
    ) -> Self {
        let mut each = |width: usize, size| -> Vec<Vec<f32>> {
            lengths
                .iter()
                .map(|n| rng.numbers(n * width, size))
                .collect()
        };
        let inputs = [
            each(heads.0 * dim, 2.0),
            each(heads.1 * dim, 2.0),
            each(heads.1 * v_dim, 1.0),
        ];
        AttentionCase {
            heads: heads.0,
            kv_heads: heads.1,
            dim,
            v_dim,
            pages: [F32, F32],
            window: None,
            keep_first: 0,
            rope: None,
            inputs,
        }
    }

    /// y of each sequence; page memory begins as NaN, which no row may see.
    fn run(&self, b: &dyn Backend, schedule: &Schedule) -> Vec<Vec<f32>> {
        let (q_width, y_width) = (self.heads * self.dim, self.heads * self.v_dim);
        let kv_widths = [self.kv_heads * self.dim, self.kv_heads * self.v_dim];
        let dims = [self.dim, self.v_dim];
        let page_rows = schedule.pages() * schedule.page_size;
        let mut pages = [0, 1].map(|i| {
            // A scale of these bytes is a NaN too.
            let unseen = if self.pages[i] == U8 { 255.0 } else { f32::NAN };
            let kept = KvType::of(self.pages[i]).unwrap();
            let width = kept.columns(self.kv_heads, dims[i]);
            let unseen = vec![unseen; page_rows * width];
            put(b, self.pages[i], width, &unseen, self.pages[i] != U8).view
        });
        let mut out = Vec::new();
        schedule.run(|ragged, rows| {
            let widths = [q_width, kv_widths[0], kv_widths[1]];
            let mut i = 0;
            let [mut q, mut k, v] = widths.map(|width| {
                i += 1;
                put(
                    b,
                    F32,
                    width,
                    &gathered(&self.inputs[i - 1], width, rows),
                    true,
                )
            });
            if let Some((pairs, interleaved)) = self.rope {
                let rates: Vec<f32> = (0..pairs).map(|f| 0.7f32.powi(f as i32)).collect();
                let frequencies = vector(b, &rates);
                for x in [&mut q.view, &mut k.view] {
                    let head_dim = self.dim;
                    let op = Rope {
                        x,
                        head_dim,
                        frequencies: &frequencies,
                        interleaved,
                        scale: 1.0,
                        ragged,
                    };
                    b.rope(op).unwrap();
                }
            }
            let [k_pages, v_pages] = &mut pages;
            b.kv_write(KvWrite {
                k: &k.view,
                v: &v.view,
                k_pages,
                v_pages,
                kv_heads: self.kv_heads,
                ragged,
            })
            .unwrap();
            let mut y = blank(b, rows.len(), y_width, true);
            let op = Attention {
                q: &q.view,
                k_pages,
                v_pages,
                heads: self.heads,
                kv_heads: self.kv_heads,
                head_dim: self.dim,
                v_head_dim: self.v_dim,
                scale: 1.0 / (self.dim as f32).sqrt(),
                window: self.window,
                keep_first: self.keep_first,
                ragged,
                y: &mut y.view,
            };
            b.attention(op).unwrap();
            scatter(&take(b, &y), y_width, rows, &mut out);
        });
        out
    }
}

#[test]
fn attention_follows_the_reference_and_no_cut_changes_a_bit() {
    let mut rng = Rng(10 << 20);
    let cases = [
        // lengths, (heads, kv_heads), dim, window, pages, rope
        (vec![3, 1, 20], (1, 1), 1, None, [F32, F32], None),
        (
            vec![70, 5],
            (2, 2),
            7,
            Some(1),
            [F32, F32],
            Some((3, false)),
        ),
        (
            vec![130, 64, 65],
            (4, 2),
            16,
            None,
            [BF16, BF16],
            Some((8, true)),
        ),
        (
            vec![200, 33],
            (6, 1),
            64,
            Some(100),
            [F16, F16],
            Some((32, false)),
        ),
        (
            vec![90, 128],
            (5, 5),
            80,
            Some(64),
            [F32, BF16],
            Some((20, true)),
        ),
        (vec![1100, 40], (8, 1), 16, None, [F32, F32], None),
        // Some rows of a tile see nothing of the first 512 positions.
        (vec![700, 9], (4, 2), 8, Some(150), [F32, F32], None),
        (vec![620, 7], (3, 3), 17, Some(530), [BF16, F16], None),
        // In bytes.
        (vec![3, 1, 20], (1, 1), 1, None, [U8, U8], None),
        (vec![130, 64], (4, 2), 16, None, [U8, U8], Some((8, true))),
        (vec![620, 7], (3, 3), 17, Some(130), [U8, U8], None),
        (vec![700, 30], (5, 1), 6, None, [U8, U8], None),
    ];
    for (lengths, heads, dim, window, pages, rope) in cases {
        check_attention(&mut rng, &lengths, heads, (dim, dim), |case| {
            AttentionCase {
                window,
                pages,
                rope,
                ..case
            }
        });
    }
}

#[test]
fn values_of_another_width_and_first_tokens_that_stay_follow_the_reference() {
    let mut rng = Rng(13 << 20);
    let mixed = [F32, BF16];
    let cases = [
        // lengths, (heads, kv_heads), (dim, v_dim), window, first tokens that stay, pages
        (vec![3, 20], (2, 1), (5, 9), None, 0, mixed),
        (vec![130, 40], (4, 2), (16, 64), None, 4, mixed),
        (vec![150, 7], (3, 1), (80, 48), Some(64), 0, mixed),
        (vec![1100, 30], (2, 2), (24, 17), Some(30), 5, mixed),
        (vec![1100, 30], (2, 2), (24, 17), Some(30), 5, [U8, U8]),
        // The tokens that stay end in the middle of a block, and the window begins in the same.
        (vec![200, 90], (4, 1), (8, 8), Some(20), 37, mixed),
        // They fill more than a chunk of positions.
        (vec![1300], (2, 1), (8, 8), Some(1), 600, mixed),
        (vec![660, 3], (6, 2), (32, 16), Some(150), 1, mixed),
        (vec![90], (1, 1), (4, 4), Some(10), 200, mixed),
    ];
    for (lengths, heads, dims, window, keep_first, pages) in cases {
        check_attention(&mut rng, &lengths, heads, dims, |case| AttentionCase {
            window,
            keep_first,
            pages,
            ..case
        });
    }
}

/// Near the reference on every instruction set, and the same bits by every schedule.
fn check_attention(
    rng: &mut Rng,
    lengths: &[usize],
    heads: (usize, usize),
    dims: (usize, usize),
    with: impl FnOnce(AttentionCase) -> AttentionCase,
) {
    let case = with(AttentionCase::new(rng, lengths, heads, dims));
    let schedules = schedules(rng, lengths, [16, 5, 1]);
    let expected = case.run(&Reference, &schedules[0]);
    for isa in Isa::available() {
        let all = case.run(&cpu(isa, 1), &schedules[0]);
        for (s, found) in all.iter().enumerate() {
            let what = format!("{heads:?} heads of {dims:?}, sequence {s}, {isa:?}");
            // Values lie within one, weights sum to one; scores of up to 30 round by 2e-6.
            let magnitude = vec![1.0; found.len()];
            near(&what, found, &expected[s], &magnitude, 4e-6);
        }
        for (i, schedule) in schedules.iter().enumerate() {
            for threads in 1..5 {
                // Token by token takes the longest and has the fewest ways to share.
                if i == 1 && threads != 2 {
                    continue;
                }
                let again = case.run(&cpu(isa, threads), schedule);
                for (again, all) in again.iter().zip(&all) {
                    same(
                        &format!("schedule {i}, {threads} threads, {isa:?}"),
                        again,
                        all,
                    );
                }
            }
        }
    }
}

#[test]
fn rope_is_that_of_the_reference() {
    let mut rng = Rng(11 << 20);
    for (dim, heads, pairs) in [(2, 1, 1), (7, 3, 2), (16, 4, 8), (80, 2, 20), (64, 8, 32)] {
        let x = rng.numbers(33 * heads * dim, 3.0);
        let rates = rng.numbers(pairs, 1.0);
        let spans = [(0, 30, 0), (30, 1, 1000), (31, 2, 77)].map(|(start, len, position)| Span {
            start,
            len,
            position,
            slot: 0,
            pages: 0..0,
        });
        for (interleaved, scale) in [(false, 1.0), (true, 1.0), (false, 1.2), (true, 0.7)] {
            let run = |b: &dyn Backend| {
                let mut x = put(b, F32, heads * dim, &x, true);
                let frequencies = vector(b, &rates);
                let ragged = Ragged {
                    spans: &spans,
                    page_table: &[],
                    page_size: 1,
                };
                let (x_view, head_dim) = (&mut x.view, dim);
                let op = Rope {
                    x: x_view,
                    head_dim,
                    frequencies: &frequencies,
                    interleaved,
                    scale,
                    ragged,
                };
                b.rope(op).unwrap();
                take(b, &x)
            };
            let expected = run(&Reference);
            for b in backends(&[1, 2, 3]) {
                // The same sines, products and sums.
                same("rope", &run(&b), &expected);
            }
        }
    }
}

// ---------------------------------------------------------------- faults

#[test]
fn a_fault_is_refused_before_anything_is_written() {
    for b in backends(&[1, 2]) {
        let x = put(&b, F32, 8, &[1.0; 16], false).view;
        let w = Matrix::dense(put(&b, BF16, 9, &[1.0; 27], false).view);
        let mut y = blank(&b, 2, 3, false);
        let op = Linear {
            x: &x,
            w: &w,
            bias: None,
            activations: BF16,
            y: &mut y.view,
        };
        assert!(b.linear(op).is_err());
        assert!(take(&b, &y).iter().all(|y| y.is_nan()));
    }
}

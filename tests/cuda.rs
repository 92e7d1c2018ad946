//! The CUDA backend against the reference backend: the table of `parity.rs`, on a GPU. Ignored where
//! tests run as they usually do, which is on machines without one:
//!
//! ```text
//! cargo test --test parity cuda -- --ignored
//! cargo test --test golden cuda -- --ignored
//! strata verify --device cuda
//! ```
//!
//! The test binaries (`cargo test --no-run` names them) and `strata` can be carried to a machine that has a
//! GPU and no Rust: `parity cuda --ignored`, `golden cuda --ignored` with STRATA_GOLDEN naming the goldens.
//!
//! Orders of sums differ from the plain loops', and from one batch to another; what the CPU's tests ask
//! to the bit is asked within a stated distance here, but for scans and convolutions, which no cut of a
//! sequence changes: Mamba-2's scan of prompts excepted, which goes by chunks of the batch.

use std::sync::OnceLock;

use strata_kernels::HostTensor;
use strata_kernels::cuda::{Cuda, CudaOptions};

use super::*;

#[path = "cuda_attention.rs"]
mod attention;
#[path = "cuda_blocks.rs"]
mod blocks;
#[path = "cuda_fp8.rs"]
mod fp8;
#[path = "cuda_int8.rs"]
mod int8;
#[path = "cuda_lookups.rs"]
mod lookups;

/// The GPU. One for all tests: making it takes a second.
pub(super) fn gpu() -> &'static Cuda {
    static GPU: OnceLock<Cuda> = OnceLock::new();
    GPU.get_or_init(|| {
        Cuda::new(CudaOptions::default()).unwrap_or_else(|e| panic!("these tests need a GPU: {e}"))
    })
}

/// A sum in another order, for products with up to thousands of terms.
const PRODUCT: f32 = 2e-6;
/// The same on matrix units, whose sums keep a few bits less.
const ON_UNITS: f32 = 4e-5;

fn allowed(weight: DType, activations: DType) -> f32 {
    match (weight, activations) {
        (BF16, BF16) => ON_UNITS,
        _ => PRODUCT,
    }
}

#[test]
#[ignore = "needs a GPU"]
fn cuda_linear() {
    let mut rng = Rng(1 << 20);
    let mut shapes = vec![
        (1, 2560, 70),
        (1, 1024, 4099),
        (1, 16_384, 257),
        (3, 5120, 12),
        (33, 2560, 70),
        (12, 4097, 9),
        (2, 2560, 10240),
        (300, 2560, 192),
        (65, 8192, 512),
        (129, 160, 520),
        (4, 96, 1000),
    ];
    for k in [1, 5, 16, 31, 64, 100] {
        for (t, n) in [
            (1, 1),
            (2, 33),
            (3, 7),
            (7, 130),
            (8, 4),
            (33, 66),
            (130, 3),
        ] {
            shapes.push((t, k, n));
        }
    }
    for shape in shapes {
        for (weight, activations) in PRODUCTS {
            let case = LinearCase::new(&mut rng, shape, weight, activations);
            let (expected, magnitude) = (case.run(&Reference), case.magnitude());
            let what = format!("{weight} × {activations} {shape:?}");
            let allowed = allowed(weight, activations);
            near(&what, &case.run(gpu()), &expected, &magnitude, allowed);
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn cuda_experts() {
    let mut rng = Rng(3 << 20);
    for (weight, activations) in PRODUCTS {
        for tokens in [1, 3, 8, 11, 40, 700] {
            for each in [false, true] {
                let case = ExpertCase::new(&mut rng, tokens, each, weight, activations);
                let sizes = ExpertCase {
                    x: abs(&case.x),
                    w: case.w.iter().map(|w| abs(w)).collect(),
                    ..case.clone()
                };
                let (expected, magnitude) = (case.run(&Reference), sizes.run(&Reference));
                let what = format!("{weight} × {activations}, {tokens} tokens, {each}");
                let allowed = allowed(weight, activations);
                near(&what, &case.run(gpu()), &expected, &magnitude, allowed);
            }
        }
    }
}

/// Runs `op` over heights and widths: near the reference, and each row the same bits alone.
fn rows(
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
    for rows in HEIGHTS {
        for cols in WIDTHS {
            let (p, q) = (rng.numbers(rows * cols, 9.0), rng.numbers(rows * cols, 3.0));
            let w = rng.numbers(cols, 2.0);
            let wide = rng.below(2) == 0;
            let expected = run(&Reference, cols, [&p, &q, &w], wide);
            let size: Vec<f32> = p.iter().zip(&q).map(|(p, q)| magnitude(*p, *q)).collect();
            let found = run(gpu(), cols, [&p, &q, &w], wide);
            near(
                &format!("{what} {rows} × {cols}"),
                &found,
                &expected,
                &size,
                allowed,
            );
            for r in [0, rows / 2, rows - 1] {
                let at = r * cols..(r + 1) * cols;
                let alone = run(gpu(), cols, [&p[at.clone()], &q[at.clone()], &w], !wide);
                same(what, &alone, &found[at]);
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn cuda_norms() {
    for shared in [None, Some(false), Some(true)] {
        for weight in [false, true] {
            let size = |p: f32, _| 8.0 * p.abs() + 1.0;
            rows("rms_norm", 2e-6, size, |b, [x, _, w], y| {
                let groups = if shared.is_none() { 1 } else { parts(x.cols()) };
                let width = x.cols() / if shared == Some(true) { groups } else { 1 };
                b.rms_norm(RmsNorm {
                    x,
                    weight: weight.then_some(&w.columns(0..width)),
                    eps: 1e-6,
                    groups,
                    y,
                })
                .unwrap();
            });
        }
    }
    for (weight, bias) in [(false, false), (true, false), (false, true), (true, true)] {
        for of_parts in [false, true] {
            let size = |p: f32, _| 20.0 * p.abs() + 20.0;
            rows("layer_norm", 2e-6, size, |b, [x, _, w], y| {
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
            });
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn cuda_elements() {
    let none = |_, _| 0.0;
    rows("add", 0.0, none, |b, [p, q, _], y| {
        b.add(Add { a: p, b: q, y }).unwrap();
    });
    rows("scale", 0.0, none, |b, [x, _, _], y| {
        b.scale(Scale { x, by: 0.37, y }).unwrap();
    });
    rows("gather", 0.0, none, |b, [x, _, _], y| {
        let rows: Vec<usize> = (0..x.rows()).collect();
        b.gather(Gather { x, rows: &rows, y }).unwrap();
    });
    for act in ACTIVATIONS {
        // The reference's error function is within 1.5e-7.
        let size = |p: f32, _| match act {
            Activation::Sigmoid => 1.0,
            _ => p.abs() * p.abs().max(1.0),
        };
        rows(&format!("{act:?}"), 1e-6, size, |b, [x, ..], y| {
            let gate = None;
            b.activate(Activate { x, gate, act, y }).unwrap();
        });
        let size = |p: f32, q: f32| match act {
            Activation::Sigmoid => q.abs(),
            _ => (p * q).abs() * p.abs().max(1.0),
        };
        rows(
            &format!("gated {act:?}"),
            1e-6,
            size,
            |b, [gate, x, _], y| {
                let gate = Some(gate);
                b.activate(Activate { x, gate, act, y }).unwrap();
            },
        );
    }
}

#[test]
#[ignore = "needs a GPU"]
fn cuda_routes_and_combinations() {
    let mut rng = Rng(7 << 20);
    let shapes = [
        (1, 1, 1, 1),
        (3, 8, 2, 33),
        (33, 16, 4, 100),
        (130, 5, 5, 16),
        (9, 300, 8, 7),
    ];
    for (tokens, experts, top_k, cols) in shapes {
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
                let (expected, found) = (run(&Reference, &x), run(gpu(), &x));
                let magnitude = run(&Reference, &abs(&x)).2;
                same("chosen experts", &found.0, &expected.0);
                near("their weights", &found.1, &expected.1, &expected.1, 2e-6);
                near("combine", &found.2, &expected.2, &magnitude, 2e-6);
            }
        }
    }
}

/// Near the reference by the first schedule, and the same bits by all.
fn by_schedules(
    what: &str,
    schedules: &[Schedule],
    expected: &[Vec<f32>],
    size: &[Vec<f32>],
    allowed: f32,
    run: impl Fn(&Schedule) -> Vec<Vec<f32>>,
) {
    let all = run(&schedules[0]);
    for (i, found) in all.iter().enumerate() {
        near(
            &format!("{what}, {i}"),
            found,
            &expected[i],
            &size[i],
            allowed,
        );
    }
    for (s, schedule) in schedules.iter().enumerate() {
        for (again, all) in run(schedule).iter().zip(&all) {
            same(&format!("{what}, schedule {s}"), again, all);
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn cuda_convolution_and_selective_scan() {
    let mut rng = Rng(8 << 20);
    let shapes = [
        (1, 1, 1, 1),
        (5, 3, 2, 5),
        (16, 16, 4, 1),
        (31, 8, 4, 1),
        (100, 16, 3, 5),
        (130, 5, 4, 2),
        (256, 16, 1, 16),
        (520, 16, 4, 1),
        (36, 33, 4, 1),
        (40, 20, 4, 2),
    ];
    for shape in shapes {
        let lengths = [50, 1, 2, 81, 130];
        let case = MambaCase::new(&mut rng, &lengths, shape);
        let schedules = schedules(&mut rng, &lengths, [1, 1, 1]);
        let expected = case.run(&Reference, &schedules[0]);
        let mut size = case.magnitude(&schedules[0]);
        if case.act == Activation::Sigmoid {
            // At zero it is a half.
            size[0].iter_mut().flatten().for_each(|s| *s = s.max(1.0));
        }
        for (i, allowed) in [(0, 2e-6), (1, 6e-6)] {
            let what = format!("part {i} of {shape:?}");
            by_schedules(&what, &schedules, &expected[i], &size[i], allowed, |s| {
                let [conv, scan] = case.run(gpu(), s);
                if i == 0 { conv } else { scan }
            });
        }
    }
}

/// A scan of another kind.
fn scan(case: &impl Scan, rng: &mut Rng, what: &str, allowed: f32) {
    let length = |x: &Vec<f32>| x.len() / case.inputs()[0].1;
    let lengths: Vec<usize> = case.inputs()[0].0.iter().map(length).collect();
    let schedules = schedules(rng, &lengths, [1, 1, 1]);
    let expected = case.run(&Reference, &schedules[0]).concat();
    let [mut sizes, states] = case.sizes().run(&Reference, &schedules[0]);
    sizes.extend(states.into_iter().map(|s| case.state_size(s)));
    by_schedules(what, &schedules, &expected, &sizes, allowed, |s| {
        case.run(gpu(), s).concat()
    });
}

#[test]
#[ignore = "needs a GPU"]
fn cuda_ssd_and_s4d_scan() {
    let mut rng = Rng(14 << 20);
    for shape in [
        (1, 1, 1, 1),
        (2, 1, 3, 5),
        (6, 3, 7, 16),
        (4, 4, 16, 9),
        (3, 1, 31, 64),
        (4, 2, 32, 96),
        (5, 1, 64, 128),
        (2, 1, 128, 256),
        (1, 1, 200, 33),
        (24, 1, 8, 4),
    ] {
        let case = SsdCase::new(&mut rng, &[50, 1, 2, 81], shape);
        scan(&case, &mut rng, &format!("{shape:?}"), 6e-6);
    }
    for shape in [(1, 1), (5, 3), (16, 32), (260, 6)] {
        let case = S4dCase::new(&mut rng, &[50, 1, 2, 81], shape);
        scan(&case, &mut rng, &format!("{shape:?}"), 4e-6);
    }
}

/// Prompts may go by chunks on matrix units, whose last bits depend on where a batch is cut.
#[test]
#[ignore = "needs a GPU"]
fn cuda_ssd_scan_of_prompts() {
    let mut rng = Rng(18 << 20);
    let lengths = [700, 1, 129, 2, 320];
    for shape in [
        (1, 1, 1, 1),
        (6, 3, 7, 16),
        (4, 2, 32, 96),
        (3, 1, 64, 128),
        (150, 1, 8, 20),
        (2, 2, 80, 64),
        (2, 1, 130, 50),
    ] {
        let case = SsdCase::new(&mut rng, &lengths, shape);
        let schedules = schedules(&mut rng, &lengths, [1, 1, 1]);
        let expected = case.run(&Reference, &schedules[0]).concat();
        let [mut sizes, states] = case.sizes().run(&Reference, &schedules[0]);
        sizes.extend(states.into_iter().map(|s| case.state_size(s)));
        for (n, schedule) in schedules.iter().enumerate() {
            for (i, found) in case.run(gpu(), schedule).concat().iter().enumerate() {
                let what = format!("{shape:?}, schedule {n}, {i}");
                near(&what, found, &expected[i], &sizes[i], 4e-5);
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn cuda_ssd_scan_by_chunks() {
    let mut rng = Rng(17 << 20);
    for (shape, size) in [
        ((1, 1, 1, 1), 1),
        ((2, 1, 3, 5), 3),
        ((6, 3, 7, 16), 16),
        ((4, 4, 16, 9), 5),
        ((3, 1, 31, 64), 64),
        ((4, 2, 32, 96), 32),
        ((5, 1, 64, 128), 17),
        ((2, 2, 80, 64), 256),
        ((2, 1, 128, 256), 50),
        ((1, 1, 200, 33), 81),
        ((24, 1, 8, 4), 20),
    ] {
        let case = SsdCase::new(&mut rng, &[50, 1, 2, 181], shape).chunked(size);
        // As on the CPU.
        scan(&case, &mut rng, &format!("{shape:?} by {size}"), 2e-5);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn cuda_mamba3_scan() {
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
        let size = case.magnitude(&expected);
        let what = format!("{shape:?}");
        // As on the CPU: angles of some turns round by 5e-7 a token.
        by_schedules(&what, &schedules, &expected, &size, 1e-4, |s| {
            case.run(gpu(), s)
        });
    }
}

#[test]
#[ignore = "needs a GPU"]
fn cuda_refuses_what_it_must() {
    let b = gpu();
    let x = put(b, F32, 8, &[1.0; 16], false).view;
    let w = Matrix::dense(put(b, BF16, 9, &[1.0; 27], false).view);
    let mut y = blank(b, 2, 3, false);
    let op = Linear {
        x: &x,
        w: &w,
        bias: None,
        activations: BF16,
        y: &mut y.view,
    };
    assert!(b.linear(op).is_err());
    assert!(take(b, &y).iter().all(|y| y.is_nan()));
    // A tensor of the host is no tensor of the GPU's.
    let host = Reference.alloc(F32, 2, 8).unwrap();
    let mut y = b.alloc(F32, 2, 8).unwrap();
    let (x, by) = (&host, 1.0);
    assert!(b.scale(Scale { x, by, y: &mut y }).is_err());
    assert!(b.alloc(F32, 1 << 30, 1 << 20).is_err());
    assert!(
        Cuda::new(CudaOptions {
            ordinal: 99,
            ..CudaOptions::default()
        })
        .is_err()
    );
}

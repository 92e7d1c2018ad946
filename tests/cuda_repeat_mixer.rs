//! A mixer of a selective scan in steps that a GPU records, where products wait for what follows them: the same bits as
//! one operation after the other.

use std::sync::Arc;

use strata_kernels::{Format, HostTensor, Repeat, Result};

use super::cuda::gpu;
use super::*;

const WIDTH: usize = 256;
const TAPS: usize = 4;
/// So wide that BF16 has kernels of its own for it.
const WIDE: usize = 16_384;

#[derive(Debug, Clone, Copy)]
struct Sizes {
    inner: usize,
    rank: usize,
    states: usize,
    /// Whether dt, b and c are normed.
    norms: bool,
    /// Whether z stands before x in what the first product makes.
    z_first: bool,
    format: Option<Format>,
    rows: usize,
}

struct Mixer {
    sizes: Sizes,
    embed: Matrix,
    first: Matrix,
    inputs: Matrix,
    dt: Matrix,
    last: Matrix,
    scale: Tensor,
    small: Tensor,
    conv: Tensor,
    conv_bias: Tensor,
    a: Tensor,
    d: Tensor,
    /// Stream, its norm, xz, u, inputs, dt's, b's and c's norms, dt, y, projected, sum, its norm, projected again.
    values: Vec<Tensor>,
    /// Of the convolution and of the scan.
    states: [Tensor; 2],
}

impl Mixer {
    fn new(sizes: Sizes) -> Self {
        let Sizes {
            inner,
            rank,
            states,
            rows,
            ..
        } = sizes;
        let mut rng = Rng(78);
        let mut matrix = |rows: usize, cols: usize, format: Option<Format>| {
            let values = rng.numbers(rows * cols, 0.3);
            let Some(format) = format else {
                return Matrix::dense(put(gpu(), BF16, cols, &values, false).view);
            };
            let mut bytes = vec![0; rows * format.row_bytes(cols).unwrap()];
            let each = bytes.len() / rows;
            for (row, to) in values.chunks(cols).zip(bytes.chunks_mut(each)) {
                format.quantize(row, None, to).unwrap();
            }
            let range = 0..bytes.len();
            let host = HostTensor::new(format, &[rows, cols], Arc::new(bytes), range).unwrap();
            Matrix::new(format, cols, gpu().upload(&host, rows, cols).unwrap())
        };
        let (embed, first, inputs, dt, last) = (
            matrix(100, WIDTH, None),
            matrix(2 * inner, WIDTH, sizes.format),
            matrix(rank + 2 * states, inner, None),
            matrix(inner, rank, None),
            matrix(WIDTH, inner, sizes.format),
        );
        let widths = [
            WIDTH,
            WIDTH,
            2 * inner,
            inner,
            rank + 2 * states,
            rank,
            states,
            states,
            inner,
            inner,
            WIDTH,
            WIDTH,
            WIDTH,
            2 * inner,
        ];
        let alloc = |rows: usize, cols: usize| gpu().alloc(F32, rows, cols).unwrap();
        let a: Vec<f32> = rng.numbers(states * inner, 2.0);
        let a: Vec<f32> = a.iter().map(|a| -a.abs()).collect();
        let new = |of: &[f32]| vector(gpu(), of);
        Mixer {
            sizes,
            embed,
            first,
            inputs,
            dt,
            last,
            scale: new(&rng.numbers(WIDTH, 1.0)),
            small: new(&rng.numbers(rank.max(states), 1.0)),
            conv: put(gpu(), F32, inner, &rng.numbers(TAPS * inner, 0.5), false).view,
            conv_bias: new(&rng.numbers(inner, 0.5)),
            a: put(gpu(), F32, inner, &a, false).view,
            d: new(&rng.numbers(inner, 1.0)),
            values: widths.iter().map(|w| alloc(rows, *w)).collect(),
            states: [alloc(rows, (TAPS - 1) * inner), alloc(rows, states * inner)],
        }
    }

    fn run(&self, ids: &[u32], ragged: Ragged<'_>) -> Result<()> {
        let (b, s) = (gpu(), self.sizes);
        let (inner, rank, states) = (s.inner, s.rank, s.states);
        let v = |i: usize| self.values[i].clone();
        let linear = |x: &Tensor, w: &Matrix, y: usize| {
            let (mut y, bias, activations) = (v(y), None, BF16);
            b.linear(Linear {
                x,
                w,
                bias,
                activations,
                y: &mut y,
            })
        };
        let norm = |x: &Tensor, weight: &Tensor, y: usize| {
            let (weight, eps, groups) = (Some(weight), 1e-5, 1);
            b.rms_norm(RmsNorm {
                x,
                weight,
                eps,
                groups,
                y: &mut v(y),
            })
        };
        let (table, y) = (&self.embed, &mut v(0));
        b.embed(Embed { ids, table, y })?;
        norm(&v(0), &self.scale, 1)?;
        linear(&v(1), &self.first, 2)?;
        let halves = [v(2).columns(0..inner), v(2).columns(inner..2 * inner)];
        let [x, z] = if s.z_first {
            [halves[1].clone(), halves[0].clone()]
        } else {
            halves
        };
        let [mut conv_state, mut ssm_state] = self.states.clone();
        b.conv1d(Conv1d {
            x: &x,
            w: &self.conv,
            bias: (!s.z_first).then_some(&self.conv_bias),
            act: Activation::Silu,
            conv_state: &mut conv_state,
            ragged,
            y: &mut v(3),
        })?;
        linear(&v(3), &self.inputs, 4)?;
        let mut parts = [
            0..rank,
            rank..rank + states,
            rank + states..rank + 2 * states,
        ]
        .map(|range| v(4).columns(range));
        if s.norms {
            for (i, part) in parts.iter_mut().enumerate() {
                norm(part, &self.small.columns(0..part.cols()), 5 + i)?;
                *part = v(5 + i);
            }
        }
        let [dt_low, bs, cs] = parts;
        linear(&dt_low, &self.dt, 8)?;
        b.selective_scan(SelectiveScan {
            x: &v(3),
            dt: &v(8),
            dt_bias: (!s.z_first).then_some(&self.conv_bias),
            a: &self.a,
            b: &bs,
            c: &cs,
            d: &self.d,
            z: s.norms.then_some(&z),
            groups: 1,
            ssm_state: &mut ssm_state,
            ragged,
            y: &mut v(9),
        })?;
        linear(&v(9), &self.last, 10)?;
        b.add(Add {
            a: &v(0),
            b: &v(10),
            y: &mut v(11),
        })?;
        // A product of a norm, with nothing behind it that goes with it.
        norm(&v(11), &self.scale, 12)?;
        linear(&v(12), &self.first, 13)
    }
}

#[test]
#[ignore = "needs a GPU"]
fn cuda_mixers_that_repeat_are_the_same_bits() {
    let mut key = 0;
    for (inner, rank, states) in [
        (512, 8, 16),
        (768, 160, 5),
        (1024, 64, 16),
        (256, 32, 24),
        (2560, 24, 8),
        (WIDE, 8, 16),
    ] {
        for (norms, z_first) in [(true, false), (false, true), (true, true)] {
            for format in [
                None,
                Some(Format::Q8_0),
                Some(Format::Q4K),
                Some(Format::Q6K),
            ] {
                for rows in [1, 3] {
                    if inner == WIDE && (rows > 1 || format.is_some()) {
                        continue;
                    }
                    let sizes = Sizes {
                        inner,
                        rank,
                        states,
                        norms,
                        z_first,
                        format,
                        rows,
                    };
                    key += 1;
                    repeats(sizes, key);
                }
            }
        }
    }
}

fn repeats(sizes: Sizes, key: u64) {
    let (plain, repeated) = (Mixer::new(sizes), Mixer::new(sizes));
    let mut rng = Rng(key);
    let rows = sizes.rows;
    let mut replayed = 0;
    for position in 0..6 {
        let ids: Vec<u32> = (0..rows).map(|_| rng.below(100) as u32).collect();
        let span = |i: usize| Span {
            start: i,
            len: 1,
            position,
            // Slots of sequences are not in the order of their rows.
            slot: rows - 1 - i,
            pages: 0..0,
        };
        let spans: Vec<Span> = (0..rows).map(span).collect();
        let ragged = Ragged {
            spans: &spans,
            page_table: &[],
            page_size: 4,
        };
        plain.run(&ids, ragged).unwrap();
        let step = Repeat {
            key: [u64::MAX - 1000 - key, rows as u64],
            ids: &ids,
            ragged,
        };
        let mut asked = 0;
        let mut operations = || {
            asked += 1;
            repeated.run(&ids, ragged)
        };
        gpu().repeat(&step, &mut operations).unwrap();
        replayed += usize::from(asked == 0);
        let of = |m: &Mixer| -> Vec<Vec<f32>> {
            let all = m.values.iter().chain(&m.states);
            // Without norms nothing is written where their results would be.
            let unused = |i: usize| !sizes.norms && (5..8).contains(&i);
            all.enumerate()
                .filter(|(i, _)| !unused(*i))
                .map(|(_, t)| read(gpu(), t))
                .collect()
        };
        for (i, (found, expected)) in of(&repeated).iter().zip(&of(&plain)).enumerate() {
            same(
                &format!("{sizes:?}, position {position}, value {i}"),
                found,
                expected,
            );
        }
    }
    assert!(replayed > 2, "{sizes:?}: {replayed} steps started as one");
}

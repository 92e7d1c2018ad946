//! Steps that a GPU records and starts as one are the same bits as the same steps run one operation after
//! the other, for other tokens, positions and pages each time.

use std::sync::Arc;

use strata_kernels::{Format, HostTensor, Repeat, Result};

use super::cuda::gpu;
use super::*;

const WIDTH: usize = 256;
/// As it is in most cases; so wide that BF16 has kernels of its own for it.
const INNER: usize = 768;
const WIDE: usize = 16_384;
const PAGE: usize = 4;
const PAGES: usize = 64;

/// A block with everything that is done together while it is recorded: two norms of one row, a gate, a sum.
struct Block<'a> {
    gpu: &'a dyn Backend,
    embed: Matrix,
    gate: Matrix,
    up: Matrix,
    down: Matrix,
    scale: Tensor,
    frequencies: Tensor,
    /// Keys, values.
    pages: [Tensor; 2],
    /// x, its norm, gate, up, activated, down, sum, attended, y.
    values: Vec<Tensor>,
}

impl<'a> Block<'a> {
    fn new(gpu: &'a dyn Backend, rows: usize, inner: usize, format: Option<Format>) -> Self {
        let mut rng = Rng(77);
        let mut matrix = |rows: usize, cols: usize| {
            let values = rng.numbers(rows * cols, 0.3);
            let Some(format) = format else {
                return Matrix::dense(put(gpu, BF16, cols, &values, false).view);
            };
            let mut bytes = vec![0; rows * format.row_bytes(cols).unwrap()];
            let each = bytes.len() / rows;
            for (row, to) in values.chunks(cols).zip(bytes.chunks_mut(each)) {
                format.quantize(row, None, to).unwrap();
            }
            let range = 0..bytes.len();
            let host = HostTensor::new(format, &[rows, cols], Arc::new(bytes), range).unwrap();
            Matrix::new(format, cols, gpu.upload(&host, rows, cols).unwrap())
        };
        let (embed, gate, up, down) = (
            matrix(100, WIDTH),
            matrix(inner, WIDTH),
            matrix(inner, WIDTH),
            matrix(WIDTH, inner),
        );
        let widths = [
            WIDTH, WIDTH, inner, inner, inner, WIDTH, WIDTH, WIDTH, WIDTH,
        ];
        let pages = || gpu.alloc(BF16, PAGES * PAGE, WIDTH).unwrap();
        Block {
            gpu,
            embed,
            gate,
            up,
            down,
            scale: vector(gpu, &[1.5; WIDTH / 2]),
            frequencies: vector(gpu, &[1.0, 0.3, 0.1, 0.02]),
            pages: [pages(), pages()],
            values: widths
                .iter()
                .map(|w| gpu.alloc(F32, rows, *w).unwrap())
                .collect(),
        }
    }

    fn run(&self, ids: &[u32], ragged: Ragged<'_>) -> Result<()> {
        let b = self.gpu;
        let v = |i: usize| self.values[i].clone();
        let linear = |x: usize, w: &Matrix, y: usize| {
            b.linear(Linear {
                x: &v(x),
                w,
                bias: None,
                activations: BF16,
                y: &mut v(y),
            })
        };
        let (table, y) = (&self.embed, &mut v(0));
        b.embed(Embed { ids, table, y })?;
        for half in [0..WIDTH / 2, WIDTH / 2..WIDTH] {
            b.rms_norm(RmsNorm {
                x: &v(0).columns(half.clone()),
                weight: Some(&self.scale),
                eps: 1e-5,
                groups: 1,
                y: &mut v(1).columns(half),
            })?;
        }
        linear(1, &self.gate, 2)?;
        linear(1, &self.up, 3)?;
        b.activate(Activate {
            x: &v(3),
            gate: Some(&v(2)),
            act: Activation::Silu,
            y: &mut v(4),
        })?;
        linear(4, &self.down, 5)?;
        b.add(Add {
            a: &v(0),
            b: &v(5),
            y: &mut v(6),
        })?;
        b.rope(Rope {
            x: &mut v(6),
            head_dim: 16,
            frequencies: &self.frequencies,
            interleaved: false,
            scale: 1.0,
            ragged,
        })?;
        let [mut keys, mut values] = self.pages.clone();
        b.kv_write(KvWrite {
            k: &v(6),
            v: &v(0),
            k_pages: &mut keys,
            v_pages: &mut values,
            kv_heads: 4,
            ragged,
        })?;
        b.attention(Attention {
            q: &v(6),
            k_pages: &keys,
            v_pages: &values,
            heads: 4,
            kv_heads: 4,
            head_dim: 64,
            v_head_dim: 64,
            scale: 0.25,
            window: None,
            keep_first: 0,
            ragged,
            y: &mut v(7),
        })?;
        b.add(Add {
            a: &v(7),
            b: &v(5),
            y: &mut v(8),
        })
    }
}

#[test]
#[ignore = "needs a GPU"]
fn cuda_steps_that_repeat_are_the_same_bits() {
    let forms = [
        None,
        Some(Format::Q8_0),
        Some(Format::Q4K),
        Some(Format::Q6K),
        Some(Format::Q5K),
        Some(Format::Int8),
        Some(Format::Fp8),
    ];
    let of = |rows: usize| forms.map(|form| (rows, INNER, form));
    let cases = [1, 2, 5].into_iter().flat_map(of);
    let cases = cases.chain([(1, WIDE, None)]);
    for (i, (rows, inner, form)) in cases.enumerate() {
        let new = || Block::new(gpu(), rows, inner, form);
        let (plain, repeated) = (new(), new());
        let mut rng = Rng(rows as u64);
        let mut replayed = 0;
        for position in 0..40 {
            let ids: Vec<u32> = (0..rows).map(|_| rng.below(100) as u32).collect();
            let held = position / PAGE + 1;
            // Pages of sequences lie in turns.
            let page_table: Vec<u32> = (0..rows * held)
                .map(|i| (i % held * rows + i / held) as u32)
                .collect();
            let spans: Vec<Span> = (0..rows)
                .map(|i| Span {
                    start: i,
                    len: 1,
                    position,
                    slot: i,
                    pages: i * held..(i + 1) * held,
                })
                .collect();
            let ragged = Ragged {
                spans: &spans,
                page_table: &page_table,
                page_size: PAGE,
            };
            plain.run(&ids, ragged).unwrap();
            let step = Repeat {
                key: [u64::MAX - i as u64, rows as u64],
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
            for (i, (found, expected)) in repeated.values.iter().zip(&plain.values).enumerate() {
                let what =
                    format!("{form:?}, {inner} wide, {rows} rows, position {position}, value {i}");
                same(&what, &read(gpu(), found), &read(gpu(), expected));
            }
        }
        // Each power of two that lengths reach is run and recorded anew.
        assert!(
            replayed > 10,
            "{rows} rows: {replayed} steps started as one"
        );
    }
}

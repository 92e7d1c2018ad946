//! Products with weights in blocks, of inputs that are rounded to 8-bit integers.
//!
//! `activations: BF16` is the type of fast matrix units; with weights in blocks these are the ones that
//! multiply bytes (of fp8, whose codes are BF16 numbers, x stays BF16: `formats::fp8`). So x is cut into blocks as the weight's row is (of 32 or of 256 elements), and in each
//! block becomes `x ≈ dx · q` with integers |q| ≤ 127 and `dx = max |x| / 127`. Then, block after block,
//!
//! - blocks of 32: `y += (Σ q·(c − offset) · d) · dx`, and with minima `y += m · (dx · Σ q)`,
//! - blocks of 256: `y += (Σ over runs of s · Σ q·(c − offset)) · d) · dx`, and with minima
//!   `y −= (Σ over runs of n · Σ q) · m) · dx`,
//!
//! - rows of whole numbers with one scale s (int8), for which x is one block: `y = (Σ q·c · s) · dx`,
//!
//! where sums of integers are exact, and each f32 operation is rounded alone, in the order written. This is
//! the definition to the bit for every path of the CPU: `formats::unpack::Form` says what c, d, m, s and n
//! are. A GPU has the same integers and sums blocks in another order; of many rows it takes integers and
//! weights as BF16. The error is that of x: at most half of dx in each element.

use half::f16;

use crate::format::Format;
use crate::formats::int8;
use crate::formats::unpack::{CHUNK, Form, RAW, WORDS, expand, unpack};
use crate::matrix::Matrix;

/// Below this, blocks of x are zeros: the inverse of their scale would overflow.
const LEAST: f32 = 1e-30;
/// Adding it to |x| < 2²² leaves the nearest integer in the lower bits.
const ROUND: f32 = 12_582_912.0;

/// Rounds one block; its scale. A block with an element that is not finite has a scale of NaN.
#[inline(always)]
pub(crate) fn round_block(x: &[f32], codes: &mut [i8]) -> f32 {
    // As integers, so that the compiler may take many at once: magnitudes order like their bits.
    let bits = x
        .iter()
        .fold(0u32, |most, x| most.max(x.to_bits() & 0x7fff_ffff));
    let most = f32::from_bits(bits);
    let inverse = if most >= LEAST { 127.0 / most } else { 0.0 };
    for (code, x) in codes.iter_mut().zip(x) {
        *code = (x * inverse + ROUND).to_bits() as i8;
    }
    if !most.is_finite() {
        f32::NAN
    } else if most < LEAST {
        0.0
    } else {
        most / 127.0
    }
}

/// A row of x, rounded.
pub(crate) struct RoundedRow {
    codes: Vec<i8>,
    scales: Vec<f32>,
}

impl RoundedRow {
    /// As products with a weight of this format take it.
    pub(crate) fn new(x: &[f32], format: Format) -> Self {
        let mut codes = vec![0; x.len()];
        let block = match format == Format::Int8 {
            true => x.len().max(1),
            false => Form::of(format).block,
        };
        let blocks = x.chunks(block).zip(codes.chunks_mut(block));
        let scales = blocks.map(|(x, codes)| round_block(x, codes)).collect();
        RoundedRow { codes, scales }
    }

    /// The product with row `n` of a weight in blocks: the plain loops.
    pub(crate) fn product(&self, w: &Matrix, n: usize) -> f32 {
        if w.format() == Format::Int8 {
            let row = w.data().view::<u8>();
            let row = row.row(n);
            let products = self.codes.iter().zip(row);
            let sum: i32 = products
                .map(|(x, c)| i32::from(*x) * i32::from(c.cast_signed()))
                .sum();
            let dx = self.scales.first().copied().unwrap_or(0.0);
            return (sum as f32 * int8::scale(row)) * dx + 0.0;
        }
        let form = Form::of(w.format());
        let (mut codes, mut raw, mut words) = ([0; CHUNK], [0; RAW], [0u32; WORDS]);
        let row = w.data().view::<u8>();
        let bytes = w.format().row_bytes(CHUNK).unwrap_or_default();
        let half = |bits: u32| f16::from_bits(bits as u16).to_f32();
        let mut y = 0.0f32;
        let chunks = self.codes.chunks(CHUNK).zip(row.row(n).chunks(bytes));
        for (chunk, (x, from)) in chunks.enumerate() {
            unpack(w.format(), from, &mut codes, &mut raw);
            let across = raw.map(|word| [word]);
            let mut placed = words.map(|word| [word]);
            expand(w.format(), x.len(), &across, &mut placed);
            words = placed.map(|word| word[0]);
            for (b, x) in x.chunks(form.block).enumerate() {
                let dx = self.scales[chunk * CHUNK / form.block + b];
                let (d, m) = (half(words[form.d(b)]), half(words[form.m(b)]));
                let codes = &codes[b * form.block..];
                let runs = x.chunks(form.run).zip(codes.chunks(form.run));
                let (mut sum, mut least) = (0i32, 0i32);
                for (r, (x, codes)) in runs.enumerate() {
                    let products = x.iter().zip(codes);
                    let run: i32 = products
                        .map(|(x, c)| i32::from(*x) * (i32::from(*c) - form.offset))
                        .sum();
                    let total: i32 = x.iter().map(|x| i32::from(*x)).sum();
                    if form.block == 32 {
                        (sum, least) = (run, total);
                    } else {
                        sum += words[form.scale(b, r)].cast_signed() * run;
                        let pair = words[form.minima(b, r / 2)] >> (r % 2 * 16);
                        least += i32::from((pair as u16).cast_signed()) * total;
                    }
                }
                y += (sum as f32 * d) * dx;
                if form.minima && form.block == 32 {
                    y += m * (dx * least as f32);
                } else if form.minima {
                    y -= (least as f32 * m) * dx;
                }
            }
        }
        y
    }
}

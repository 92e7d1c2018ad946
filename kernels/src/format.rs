//! How the elements of a weight are stored: one by one, or in blocks along its rows.
//!
//! The block formats are those of GGUF files, bit for bit: [`Format::dequantize`] says what each holds.

use std::fmt;

use half::f16;

use crate::tensor::DType;

/// The form of a stored weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)] // the names are the field's
pub enum Format {
    F32,
    F16,
    BF16,
    Q8_0,
    Q6K,
    Q5K,
    Q5_1,
    Q5_0,
    Q4K,
    Q4_1,
    Q4_0,
    Iq4Nl,
    Iq4Xs,
    Q3K,
    Q2K,
}

/// The elements that share a scale, and the bytes they take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    /// Elements of a block.
    pub elements: usize,
    /// Bytes of a block.
    pub bytes: usize,
}

impl Format {
    /// All of them; those in blocks from the finest to the coarsest.
    pub const ALL: [Format; 15] = [
        Format::F32,
        Format::F16,
        Format::BF16,
        Format::Q8_0,
        Format::Q6K,
        Format::Q5K,
        Format::Q5_1,
        Format::Q5_0,
        Format::Q4K,
        Format::Q4_1,
        Format::Q4_0,
        Format::Iq4Nl,
        Format::Iq4Xs,
        Format::Q3K,
        Format::Q2K,
    ];

    /// What people call it.
    pub fn name(self) -> &'static str {
        match self {
            Format::F32 => "f32",
            Format::F16 => "f16",
            Format::BF16 => "bf16",
            Format::Q8_0 => "q8_0",
            Format::Q6K => "q6_k",
            Format::Q5K => "q5_k",
            Format::Q5_1 => "q5_1",
            Format::Q5_0 => "q5_0",
            Format::Q4K => "q4_k",
            Format::Q4_1 => "q4_1",
            Format::Q4_0 => "q4_0",
            Format::Iq4Nl => "iq4_nl",
            Format::Iq4Xs => "iq4_xs",
            Format::Q3K => "q3_k",
            Format::Q2K => "q2_k",
        }
    }

    /// The format of this name.
    pub fn named(name: &str) -> Option<Format> {
        Format::ALL.into_iter().find(|f| f.name() == name)
    }

    /// The element type of a format without blocks.
    pub fn dtype(self) -> Option<DType> {
        match self {
            Format::F32 => Some(DType::F32),
            Format::F16 => Some(DType::F16),
            Format::BF16 => Some(DType::BF16),
            _ => None,
        }
    }

    /// The size of its blocks; of one element where it has none.
    pub fn block(self) -> Block {
        let (elements, bytes) = match self {
            Format::F32 => (1, 4),
            Format::F16 | Format::BF16 => (1, 2),
            Format::Q8_0 => (32, 34),
            Format::Q6K => (256, 210),
            Format::Q5K => (256, 176),
            Format::Q5_1 => (32, 24),
            Format::Q5_0 => (32, 22),
            Format::Q4K => (256, 144),
            Format::Q4_1 => (32, 20),
            Format::Q4_0 | Format::Iq4Nl => (32, 18),
            Format::Iq4Xs => (256, 136),
            Format::Q3K => (256, 110),
            Format::Q2K => (256, 84),
        };
        Block { elements, bytes }
    }

    /// Bytes of a row of `cols` elements; none if they are no whole blocks, or too many.
    pub fn row_bytes(self, cols: usize) -> Option<usize> {
        let Block { elements, bytes } = self.block();
        if cols.is_multiple_of(elements) {
            (cols / elements).checked_mul(bytes)
        } else {
            None
        }
    }

    /// Bytes of a tensor, outermost size first; none if its rows are no whole blocks, or too many.
    pub fn bytes_of(self, shape: &[usize]) -> Option<usize> {
        let (cols, outer) = match shape.split_last() {
            Some((cols, outer)) => (*cols, outer),
            None => (1, shape),
        };
        let row = self.row_bytes(cols)?;
        outer.iter().try_fold(row, |a, &n| a.checked_mul(n))
    }

    /// Widens whole blocks: exact for the formats without blocks; for the others the products of scale
    /// and code, each rounded to f32 as the reference implementation of GGUF (gguf-py) rounds them.
    ///
    /// Panics unless `from` holds exactly the blocks of `to`.
    pub fn dequantize(self, from: &[u8], to: &mut [f32]) {
        let Block { elements, bytes } = self.block();
        assert!(
            to.len().is_multiple_of(elements) && from.len() == to.len() / elements * bytes,
            "{} bytes of {self} for {} elements",
            from.len(),
            to.len()
        );
        let widen: fn(&[u8], &mut [f32]) = match self {
            Format::F32 => |b, y| y[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
            Format::F16 => |b, y| y[0] = half_at(b, 0),
            Format::BF16 => |b, y| y[0] = half::bf16::from_le_bytes([b[0], b[1]]).to_f32(),
            Format::Q8_0 => q8_0,
            Format::Q6K => q6_k,
            Format::Q5K => q5_k,
            Format::Q5_1 => q5_1,
            Format::Q5_0 => q5_0,
            Format::Q4K => q4_k,
            Format::Q4_1 => q4_1,
            Format::Q4_0 => q4_0,
            Format::Iq4Nl => iq4_nl,
            Format::Iq4Xs => iq4_xs,
            Format::Q3K => q3_k,
            Format::Q2K => q2_k,
        };
        let blocks = from.chunks_exact(bytes).zip(to.chunks_exact_mut(elements));
        blocks.for_each(|(from, to)| widen(from, to));
    }
}

impl From<DType> for Format {
    /// The format whose elements have this type. Panics for types that no weight has.
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Format::F32,
            DType::F16 => Format::F16,
            DType::BF16 => Format::BF16,
            DType::I32 | DType::U8 => panic!("no weight has elements of type {dtype}"),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// Codes of four bits: the first half of a block in the low ones, the second in the high ones.
fn nibbles(codes: &[u8], y: &mut [f32], widen: impl Fn(usize, u8) -> f32) {
    let half = codes.len();
    for (j, code) in codes.iter().enumerate() {
        y[j] = widen(j, code & 15);
        y[j + half] = widen(j + half, code >> 4);
    }
}

fn q4_0(b: &[u8], y: &mut [f32]) {
    let d = half_at(b, 0);
    nibbles(&b[2..], y, |_, q| (f32::from(q) - 8.0) * d);
}

fn q4_1(b: &[u8], y: &mut [f32]) {
    let (d, m) = (half_at(b, 0), half_at(b, 2));
    nibbles(&b[4..], y, |_, q| f32::from(q) * d + m);
}

/// The fifth bit of code `j`.
fn fifth(bits: &[u8], j: usize) -> u8 {
    (bits[j / 8] >> (j % 8) & 1) << 4
}

fn q5_0(b: &[u8], y: &mut [f32]) {
    let d = half_at(b, 0);
    let high = &b[2..6];
    nibbles(&b[6..], y, |j, q| {
        (f32::from(q | fifth(high, j)) - 16.0) * d
    });
}

fn q5_1(b: &[u8], y: &mut [f32]) {
    let (d, m) = (half_at(b, 0), half_at(b, 2));
    let high = &b[4..8];
    nibbles(&b[8..], y, |j, q| f32::from(q | fifth(high, j)) * d + m);
}

fn q8_0(b: &[u8], y: &mut [f32]) {
    let d = half_at(b, 0);
    for (y, q) in y.iter_mut().zip(&b[2..]) {
        *y = f32::from(q.cast_signed()) * d;
    }
}

/// Scale and minimum of the j-th of eight runs, six bits each, in twelve bytes.
pub(crate) fn scale_min(packed: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (packed[j] & 63, packed[j + 4] & 63)
    } else {
        (
            packed[j + 4] & 15 | (packed[j - 4] >> 6) << 4,
            packed[j + 4] >> 4 | (packed[j] >> 6) << 4,
        )
    }
}

fn q4_k(b: &[u8], y: &mut [f32]) {
    five_bits(b, &[0; 32], &b[16..], y);
}

fn q5_k(b: &[u8], y: &mut [f32]) {
    five_bits(b, &b[16..48], &b[48..], y);
}

/// Eight runs of 32 codes of five bits, the fifth bits apart, each with a scale and a minimum.
fn five_bits(b: &[u8], high: &[u8], codes: &[u8], y: &mut [f32]) {
    let (d, min) = (half_at(b, 0), half_at(b, 2));
    for (run, y) in y.chunks_exact_mut(32).enumerate() {
        let (scale, least) = scale_min(&b[4..16], run);
        let (d, m) = (d * f32::from(scale), min * f32::from(least));
        for (l, y) in y.iter_mut().enumerate() {
            let code = codes[run / 2 * 32 + l] >> (run % 2 * 4) & 15;
            let code = code | (high[l] >> run & 1) << 4;
            *y = d * f32::from(code) - m;
        }
    }
}

fn q6_k(b: &[u8], y: &mut [f32]) {
    let (low, high, scales) = (&b[..128], &b[128..192], &b[192..208]);
    let d = half_at(b, 208);
    for (i, y) in y.iter_mut().enumerate() {
        // Two halves of four runs of 32.
        let (part, run, l) = (i / 128, i % 128 / 32, i % 32);
        let q = low[part * 64 + run % 2 * 32 + l] >> (run / 2 * 4) & 15;
        let q = q | (high[part * 32 + l] >> (2 * run) & 3) << 4;
        let scale = scales[i / 16].cast_signed();
        *y = d * f32::from(scale) * (f32::from(q) - 32.0);
    }
}

/// The i-th of sixteen scales of six bits, in twelve bytes.
pub(crate) fn six_bit_scale(packed: &[u8], i: usize) -> i8 {
    let low = packed[i % 8] >> (i / 8 * 4) & 15;
    let high = packed[8 + i % 4] >> (i / 4 * 2) & 3;
    (low | high << 4).cast_signed() - 32
}

fn q3_k(b: &[u8], y: &mut [f32]) {
    let (high, codes, scales) = (&b[..32], &b[32..96], &b[96..108]);
    let d = half_at(b, 108);
    for (i, y) in y.iter_mut().enumerate() {
        let (part, run, l) = (i / 128, i % 128 / 32, i % 32);
        let q = codes[part * 32 + l] >> (2 * run) & 3;
        let above = high[l] >> (4 * part + run) & 1;
        let q = f32::from(q) - if above == 1 { 0.0 } else { 4.0 };
        *y = d * f32::from(six_bit_scale(scales, i / 16)) * q;
    }
}

fn q2_k(b: &[u8], y: &mut [f32]) {
    let (scales, codes) = (&b[..16], &b[16..80]);
    let (d, min) = (half_at(b, 80), half_at(b, 82));
    for (i, y) in y.iter_mut().enumerate() {
        let (part, run, l) = (i / 128, i % 128 / 32, i % 32);
        let q = codes[part * 32 + l] >> (2 * run) & 3;
        let scale = scales[i / 16];
        *y = d * f32::from(scale & 15) * f32::from(q) - min * f32::from(scale >> 4);
    }
}

/// What the codes of the IQ4 formats stand for.
pub(crate) const IQ4: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

fn iq4_nl(b: &[u8], y: &mut [f32]) {
    let d = half_at(b, 0);
    nibbles(&b[2..], y, |_, q| d * f32::from(IQ4[q as usize]));
}

fn iq4_xs(b: &[u8], y: &mut [f32]) {
    let (d, high) = (half_at(b, 0), u16::from_le_bytes([b[2], b[3]]));
    for (run, (codes, y)) in b[8..]
        .chunks_exact(16)
        .zip(y.chunks_exact_mut(32))
        .enumerate()
    {
        let low = b[4 + run / 2] >> (run % 2 * 4) & 15;
        let scale = i32::from(low) | i32::from(high >> (2 * run) & 3) << 4;
        let d = d * (scale - 32) as f32;
        nibbles(codes, y, |_, q| d * f32::from(IQ4[q as usize]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_has_a_name_and_rows_of_whole_blocks() {
        for format in Format::ALL {
            assert_eq!(Format::named(format.name()), Some(format));
            let block = format.block();
            assert_eq!(format.row_bytes(3 * block.elements), Some(3 * block.bytes));
            if block.elements > 1 {
                assert_eq!(format.row_bytes(block.elements + 1), None);
                assert!(format.dtype().is_none());
            }
        }
        assert_eq!(Format::named("q9"), None);
        assert_eq!(Format::F32.row_bytes(usize::MAX), None);
    }
}

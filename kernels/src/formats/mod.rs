//! What the blocks of each format hold: widening, and the quantisers.
//!
//! Quantisers give the blocks of GGML's reference functions, bit for bit (compared with its C code
//! compiled without fused multiply-adds, in `tests/formats.rs`).

pub(crate) mod fp8;
pub(crate) mod int8;
pub(crate) mod iq4;
mod runs;
mod search;
pub(crate) mod super_blocks;
pub(crate) mod unpack;

use half::{bf16, f16};

use crate::format::Format;

fn half_at(bytes: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

fn put_half(bytes: &mut [u8], at: usize, x: f32) {
    bytes[at..at + 2].copy_from_slice(&f16::from_f32(x).to_le_bytes());
}

/// Widens one block.
pub(crate) fn widen(format: Format) -> fn(&[u8], &mut [f32]) {
    match format {
        Format::F32 => |b, y| y[0] = f32::from_le_bytes([b[0], b[1], b[2], b[3]]),
        Format::F16 => |b, y| y[0] = half_at(b, 0),
        Format::BF16 => |b, y| y[0] = bf16::from_le_bytes([b[0], b[1]]).to_f32(),
        Format::Int8 | Format::Fp8 => panic!("rows of {format} are widened whole"),
        Format::Q8_0 => runs::q8_0,
        Format::Q6K => super_blocks::q6_k,
        Format::Q5K => super_blocks::q5_k,
        Format::Q5_1 => runs::q5_1,
        Format::Q5_0 => runs::q5_0,
        Format::Q4K => super_blocks::q4_k,
        Format::Q4_1 => runs::q4_1,
        Format::Q4_0 => runs::q4_0,
        Format::Iq4Nl => iq4::iq4_nl,
        Format::Iq4Xs => iq4::iq4_xs,
        Format::Q3K => super_blocks::q3_k,
        Format::Q2K => super_blocks::q2_k,
    }
}

/// Quantises a row of finite numbers, of whole blocks; `importance` has as many.
pub(crate) fn quantize(format: Format, row: &[f32], importance: Option<&[f32]>, to: &mut [u8]) {
    let block = format.block();
    let spread = runs::spread(row);
    let blocks = row.chunks_exact(block.elements);
    for (i, (x, b)) in blocks.zip(to.chunks_exact_mut(block.bytes)).enumerate() {
        let w = importance.map(|w| &w[i * block.elements..][..block.elements]);
        let in_row = w.map(|w| (w, spread));
        match format {
            Format::F32 => b.copy_from_slice(&x[0].to_le_bytes()),
            Format::F16 => put_half(b, 0, x[0]),
            Format::BF16 => b.copy_from_slice(&bf16::from_f32(x[0]).to_le_bytes()),
            Format::Int8 | Format::Fp8 => panic!("rows of {format} are quantised whole"),
            Format::Q8_0 => runs::quantize_q8_0(x, b),
            Format::Q6K => super_blocks::quantize_q6_k(x, w, b),
            Format::Q5K => super_blocks::quantize_q5_k(x, w, b),
            Format::Q5_1 => runs::quantize_affine(x, in_row, 31, b),
            Format::Q5_0 => runs::quantize_symmetric(x, in_row, 16, b),
            Format::Q4K => super_blocks::quantize_q4_k(x, w, b),
            Format::Q4_1 => runs::quantize_affine(x, in_row, 15, b),
            Format::Q4_0 => runs::quantize_symmetric(x, in_row, 8, b),
            Format::Iq4Nl => iq4::quantize_iq4_nl(x, w, b),
            Format::Iq4Xs => iq4::quantize_iq4_xs(x, w, b),
            Format::Q3K => super_blocks::quantize_q3_k(x, w, b),
            Format::Q2K => super_blocks::quantize_q2_k(x, w, b),
        }
    }
}

/// Where in a block the numbers of half precision lie.
pub(crate) fn halves(format: Format) -> &'static [usize] {
    match format {
        Format::F32 | Format::BF16 | Format::Int8 | Format::Fp8 => &[],
        Format::F16 | Format::Q8_0 | Format::Q5_0 | Format::Q4_0 => &[0],
        Format::Iq4Nl | Format::Iq4Xs => &[0],
        Format::Q6K => &[208],
        Format::Q3K => &[108],
        Format::Q2K => &[80, 82],
        Format::Q5K | Format::Q5_1 | Format::Q4K | Format::Q4_1 => &[0, 2],
    }
}

/// The first number of half precision that is not finite.
pub(crate) fn first_not_finite(format: Format, blocks: &[u8]) -> Option<usize> {
    let bytes = format.block().bytes;
    blocks
        .chunks_exact(bytes)
        .position(|b| halves(format).iter().any(|at| !half_at(b, *at).is_finite()))
}

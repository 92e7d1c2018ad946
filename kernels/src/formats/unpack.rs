//! Blocks as integers: what products with rounded inputs are formed from.
//!
//! A row is taken apart in chunks of up to [`CHUNK`] elements. Of each element there is its code, a byte
//! that is not negative; of each block there are words with scales and minima: at first [`RAW`] for a chunk,
//! as they are stored, which [`expand`] then places as [`Form`] says, for many rows at once.

use super::iq4;
use crate::format::Format;

/// Elements of a chunk: whole blocks of every format.
pub(crate) const CHUNK: usize = 512;
/// The words of a chunk as they are stored.
pub(crate) const RAW: usize = 16;
/// The most words of a chunk.
pub(crate) const WORDS: usize = 64;

/// What the codes of a format mean.
///
/// In blocks of 32, with a word `d` and perhaps `m` each (both as f16 bits): `d · (code − offset) + m`.
/// In blocks of 256 with a scale s and perhaps a minimum n for each run: `d · s · (code − offset) − m · n`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Form {
    /// Elements of a block: 32, or 256. Inputs are rounded in blocks of that size.
    pub(crate) block: usize,
    /// Elements that share a scale: 32, or 16.
    pub(crate) run: usize,
    /// What a code of zero stands for is that much below nothing.
    pub(crate) offset: i32,
    /// Whether there are minima. Then the offset is zero.
    pub(crate) minima: bool,
}

impl Form {
    /// Of a format in blocks. Panics on others.
    pub(crate) fn of(format: Format) -> Form {
        let (block, run, offset, minima) = match format {
            Format::Q8_0 | Format::Iq4Nl => (32, 32, 128, false),
            Format::Q5_0 => (32, 32, 16, false),
            Format::Q4_0 => (32, 32, 8, false),
            Format::Q4_1 | Format::Q5_1 => (32, 32, 0, true),
            Format::Q4K | Format::Q5K => (256, 32, 0, true),
            Format::Q2K => (256, 16, 0, true),
            Format::Q6K => (256, 16, 32, false),
            Format::Q3K => (256, 16, 4, false),
            Format::Iq4Xs => (256, 32, 128, false),
            Format::F32 | Format::F16 | Format::BF16 | Format::Int8 | Format::Fp8 => {
                panic!("{format} has no blocks")
            }
        };
        Form {
            block,
            run,
            offset,
            minima,
        }
    }

    /// Words of a block of 256: the scales of its runs, its minima in pairs of i16, d and m.
    pub(crate) const fn record(self) -> usize {
        512 / self.run
    }

    /// Where in the words of a chunk d of block `b` lies.
    pub(crate) const fn d(self, b: usize) -> usize {
        if self.block == 32 {
            b
        } else {
            b * self.record() + 384 / self.run
        }
    }

    /// Where m of block `b` lies.
    pub(crate) const fn m(self, b: usize) -> usize {
        self.d(b) + if self.block == 32 { 16 } else { 1 }
    }

    /// Where the scale of a run of block `b` lies: an i32.
    pub(crate) const fn scale(self, b: usize, run: usize) -> usize {
        b * self.record() + run
    }

    /// Where the minima of runs 2·pair and 2·pair + 1 of block `b` lie.
    pub(crate) const fn minima(self, b: usize, pair: usize) -> usize {
        b * self.record() + 256 / self.run + pair
    }
}

/// Blocks of 32 of so many bytes. A macro, not a function that takes one: calls would leave the instruction
/// set of the kernel.
macro_rules! runs {
    ($bytes:literal, $minima:literal, $codes_of:ident, $from:ident, $codes:ident, $words:ident) => {{
        let (blocks, rest) = $from.as_chunks::<$bytes>();
        assert!(
            rest.is_empty() && blocks.len() <= CHUNK / 32,
            "whole blocks"
        );
        let (to, _) = $codes.as_chunks_mut::<32>();
        for (i, (b, to)) in blocks.iter().zip(to).enumerate() {
            // d, and the minimum where there is one.
            $words[i] = if $minima { word(b, 0) } else { half(b, 0) };
            $codes_of(b, to);
        }
    }};
}

/// Blocks of 256 of so many bytes, with so many words.
macro_rules! supers {
    ($bytes:literal, $record:literal, $take_apart:ident, $from:ident, $codes:ident, $words:ident) => {{
        let (blocks, rest) = $from.as_chunks::<$bytes>();
        assert!(
            rest.is_empty() && blocks.len() <= CHUNK / 256,
            "whole blocks"
        );
        let (to, _) = $codes.as_chunks_mut::<256>();
        let (words, _) = $words.as_chunks_mut::<$record>();
        for ((b, to), words) in blocks.iter().zip(to).zip(words) {
            $take_apart(b, to, words);
        }
    }};
}

/// Takes a chunk apart.
///
/// Panics unless `from` holds whole blocks, at most a chunk of them.
#[inline(always)]
pub(crate) fn unpack(format: Format, from: &[u8], codes: &mut [u8; CHUNK], raw: &mut [u32; RAW]) {
    match format {
        Format::Q8_0 => runs!(34, false, flipped, from, codes, raw),
        Format::Q4_0 => runs!(18, false, q4_0, from, codes, raw),
        Format::Q4_1 => runs!(20, true, q4_1, from, codes, raw),
        Format::Q5_0 => runs!(22, false, q5_0, from, codes, raw),
        Format::Q5_1 => runs!(24, true, q5_1, from, codes, raw),
        Format::Iq4Nl => runs!(18, false, iq4_nl, from, codes, raw),
        Format::Q4K => supers!(144, 4, q4_k, from, codes, raw),
        Format::Q5K => supers!(176, 4, q5_k, from, codes, raw),
        Format::Q6K => supers!(210, 5, q6_k, from, codes, raw),
        Format::Q3K => supers!(110, 4, q3_k, from, codes, raw),
        Format::Q2K => supers!(84, 5, q2_k, from, codes, raw),
        Format::Iq4Xs => supers!(136, 2, iq4_xs, from, codes, raw),
        Format::F32 | Format::F16 | Format::BF16 | Format::Int8 | Format::Fp8 => {
            panic!("{format} has no blocks")
        }
    }
}

#[inline(always)]
fn word(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

#[inline(always)]
fn half(b: &[u8], at: usize) -> u32 {
    u32::from(u16::from_le_bytes([b[at], b[at + 1]]))
}

#[inline(always)]
fn flipped(b: &[u8; 34], y: &mut [u8; 32]) {
    for i in 0..32 {
        y[i] = b[2 + i] ^ 128;
    }
}

#[inline(always)]
fn q4_0(b: &[u8; 18], y: &mut [u8; 32]) {
    nibbles(&b[2..], y);
}

#[inline(always)]
fn q4_1(b: &[u8; 20], y: &mut [u8; 32]) {
    nibbles(&b[4..], y);
}

#[inline(always)]
fn q5_0(b: &[u8; 22], y: &mut [u8; 32]) {
    fifths(&b[2..], y);
}

#[inline(always)]
fn q5_1(b: &[u8; 24], y: &mut [u8; 32]) {
    fifths(&b[4..], y);
}

#[inline(always)]
fn iq4_nl(b: &[u8; 18], y: &mut [u8; 32]) {
    values(&b[2..], y);
}

#[inline(always)]
fn nibbles(b: &[u8], y: &mut [u8; 32]) {
    for i in 0..16 {
        y[i] = b[i] & 15;
        y[i + 16] = b[i] >> 4;
    }
}

#[inline(always)]
fn fifths(b: &[u8], y: &mut [u8; 32]) {
    nibbles(&b[4..], y);
    for (i, y) in y.iter_mut().enumerate() {
        *y |= (b[i / 8] >> (i % 8) & 1) << 4;
    }
}

/// `VALUES`, made not negative.
const FROM_ZERO: [u8; 16] = {
    let mut to = [0; 16];
    let mut i = 0;
    while i < 16 {
        to[i] = iq4::VALUES[i].cast_unsigned() ^ 128;
        i += 1;
    }
    to
};

#[inline(always)]
fn values(b: &[u8], y: &mut [u8; 32]) {
    for i in 0..16 {
        y[i] = FROM_ZERO[usize::from(b[i] & 15)];
        y[i + 16] = FROM_ZERO[usize::from(b[i] >> 4)];
    }
}

#[inline(always)]
fn q4_k(b: &[u8; 144], y: &mut [u8; 256], raw: &mut [u32; 4]) {
    for (i, raw) in raw.iter_mut().enumerate() {
        *raw = word(b, 4 * i);
    }
    for j in 0..4 {
        for l in 0..32 {
            y[64 * j + l] = b[16 + 32 * j + l] & 15;
            y[64 * j + 32 + l] = b[16 + 32 * j + l] >> 4;
        }
    }
}

#[inline(always)]
fn q5_k(b: &[u8; 176], y: &mut [u8; 256], raw: &mut [u32; 4]) {
    for (i, raw) in raw.iter_mut().enumerate() {
        *raw = word(b, 4 * i);
    }
    for j in 0..4 {
        for l in 0..32 {
            let (low, high) = (b[48 + 32 * j + l], b[16 + l] >> (2 * j));
            y[64 * j + l] = low & 15 | (high & 1) << 4;
            y[64 * j + 32 + l] = low >> 4 | (high & 2) << 3;
        }
    }
}

#[inline(always)]
fn q6_k(b: &[u8; 210], y: &mut [u8; 256], raw: &mut [u32; 5]) {
    for p in 0..2 {
        for l in 0..32 {
            let (first, second) = (b[64 * p + l], b[64 * p + 32 + l]);
            let high = b[128 + 32 * p + l];
            y[128 * p + l] = first & 15 | (high & 3) << 4;
            y[128 * p + 32 + l] = second & 15 | (high & 12) << 2;
            y[128 * p + 64 + l] = first >> 4 | high & 48;
            y[128 * p + 96 + l] = second >> 4 | (high & 192) >> 2;
        }
    }
    for (i, raw) in raw[..4].iter_mut().enumerate() {
        *raw = word(b, 192 + 4 * i);
    }
    raw[4] = half(b, 208);
}

#[inline(always)]
fn q3_k(b: &[u8; 110], y: &mut [u8; 256], raw: &mut [u32; 4]) {
    for p in 0..2 {
        for r in 0..4 {
            for l in 0..32 {
                let low = b[32 + 32 * p + l] >> (2 * r) & 3;
                y[128 * p + 32 * r + l] = low | (b[l] >> (4 * p + r) & 1) << 2;
            }
        }
    }
    for (i, raw) in raw[..3].iter_mut().enumerate() {
        *raw = word(b, 96 + 4 * i);
    }
    raw[3] = half(b, 108);
}

#[inline(always)]
fn q2_k(b: &[u8; 84], y: &mut [u8; 256], raw: &mut [u32; 5]) {
    for p in 0..2 {
        for r in 0..4 {
            for l in 0..32 {
                y[128 * p + 32 * r + l] = b[16 + 32 * p + l] >> (2 * r) & 3;
            }
        }
    }
    for (i, raw) in raw[..4].iter_mut().enumerate() {
        *raw = word(b, 4 * i);
    }
    raw[4] = word(b, 80);
}

#[inline(always)]
fn iq4_xs(b: &[u8; 136], y: &mut [u8; 256], raw: &mut [u32; 2]) {
    for j in 0..8 {
        let mut run = [0; 32];
        values(&b[8 + 16 * j..], &mut run);
        y[32 * j..32 * j + 32].copy_from_slice(&run);
    }
    raw[0] = word(b, 0);
    raw[1] = word(b, 4);
}

/// Places the words of a chunk of `k` elements as [`Form`] says, of `L` rows side by side.
#[inline(always)]
pub(crate) fn expand<const L: usize>(
    format: Format,
    k: usize,
    raw: &[[u32; L]; RAW],
    words: &mut [[u32; L]; WORDS],
) {
    let form = Form::of(format);
    assert!(k <= CHUNK, "a chunk of {k}");
    // One word of all rows, from words of the same rows: formed apart, so that it becomes a vector.
    macro_rules! put {
        ($to:expr, |$l:ident| $value:expr) => {{
            let mut out = [0; L];
            for ($l, out) in out.iter_mut().enumerate() {
                *out = $value;
            }
            words[$to] = out;
        }};
    }
    // Words are below RAW; said so, they need no check. By value, so that loops stay inside of a word.
    let word = |word: usize| raw[word % RAW];
    if form.block == 32 {
        for b in 0..k / 32 {
            let stored = word(b);
            put!(form.d(b), |l| stored[l] & 0xffff);
            if form.minima {
                put!(form.m(b), |l| stored[l] >> 16);
            }
        }
        return;
    }
    for b in 0..k / 256 {
        match format {
            Format::Q4K | Format::Q5K => {
                let six = |x: u32| x & 0x3f3f_3f3f;
                let last = |low: u32, high: u32| low & 0x0f0f_0f0f | high >> 2 & 0x3030_3030;
                let pair = |x: u32, i: usize| x >> (16 * i) & 255 | (x >> (16 * i + 8) & 255) << 16;
                let (d, first, second) = (word(4 * b), word(4 * b + 1), word(4 * b + 2));
                let third = word(4 * b + 3);
                put!(form.d(b), |l| d[l] & 0xffff);
                put!(form.m(b), |l| d[l] >> 16);
                for i in 0..4 {
                    let byte = |x: u32| x >> (8 * i) & 255;
                    put!(form.scale(b, i), |l| byte(six(first[l])));
                    put!(form.scale(b, i + 4), |l| byte(last(third[l], first[l])));
                }
                for i in 0..2 {
                    let minima = |l: usize| last(third[l] >> 4, second[l]);
                    put!(form.minima(b, i), |l| pair(six(second[l]), i));
                    put!(form.minima(b, i + 2), |l| pair(minima(l), i));
                }
            }
            Format::Q6K => {
                let d = word(5 * b + 4);
                put!(form.d(b), |l| d[l]);
                for w in 0..4 {
                    let four = word(5 * b + w);
                    for i in 0..4 {
                        let signed = |x: u32| (x << (24 - i * 8)).cast_signed() >> 24;
                        put!(form.scale(b, 4 * w + i), |l| signed(four[l])
                            .cast_unsigned());
                    }
                }
            }
            Format::Q2K => {
                let d = word(5 * b + 4);
                put!(form.d(b), |l| d[l] & 0xffff);
                put!(form.m(b), |l| d[l] >> 16);
                for w in 0..4 {
                    let four = word(5 * b + w);
                    for i in 0..4 {
                        put!(form.scale(b, 4 * w + i), |l| four[l] >> (8 * i) & 15);
                    }
                    let pair = |x: u32| x >> 4 & 15 | (x >> 12 & 15) << 16;
                    for i in 0..2 {
                        put!(form.minima(b, 2 * w + i), |l| pair(four[l] >> (16 * i)));
                    }
                }
            }
            Format::Q3K => {
                let (d, high) = (word(4 * b + 3), word(4 * b + 2));
                put!(form.d(b), |l| d[l]);
                for w in 0..4 {
                    // Four bits in the first two words, two in the third.
                    let lows = word(4 * b + w % 2);
                    for i in 0..4 {
                        let low = |x: u32| x >> (8 * i + 4 * (w / 2)) & 15;
                        let above = |x: u32| (x >> (8 * i + 2 * w) & 3) << 4;
                        put!(form.scale(b, 4 * w + i), |l| (low(lows[l])
                            | above(high[l]))
                        .wrapping_sub(32));
                    }
                }
            }
            _ => {
                let (d, low) = (word(2 * b), word(2 * b + 1));
                put!(form.d(b), |l| d[l] & 0xffff);
                for i in 0..8 {
                    let scale = |l: usize| low[l] >> (4 * i) & 15 | (d[l] >> (16 + 2 * i) & 3) << 4;
                    put!(form.scale(b, i), |l| scale(l).wrapping_sub(32));
                }
            }
        }
    }
}

//! Blocks of 256 elements in runs of 16 or 32: one scale in half precision for the block, small integer
//! scales (and minima) for the runs, codes of two to six bits.

use super::runs::{CAREFUL, stored};
use super::search::{self, Loss, TINY, Tries, nearest, sum_of_squares, weigh};
use super::{half_at, put_half};

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

/// The inverse of [`scale_min`], for all eight.
fn put_scale_mins(scales: &[u8], mins: &[u8], to: &mut [u8]) {
    for j in 0..4 {
        to[j] = scales[j] | scales[j + 4] >> 4 << 6;
        to[j + 4] = mins[j] | mins[j + 4] >> 4 << 6;
        to[j + 8] = scales[j + 4] & 15 | mins[j + 4] << 4;
    }
}

/// The i-th of sixteen scales of six bits, in twelve bytes.
pub(crate) fn six_bit_scale(packed: &[u8], i: usize) -> i8 {
    let low = packed[i % 8] >> (i / 8 * 4) & 15;
    let high = packed[8 + i % 4] >> (i / 4 * 2) & 3;
    (low | high << 4).cast_signed() - 32
}

pub(super) fn q4_k(b: &[u8], y: &mut [f32]) {
    five_bits(b, &[0; 32], &b[16..], y);
}

pub(super) fn q5_k(b: &[u8], y: &mut [f32]) {
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

pub(super) fn q6_k(b: &[u8], y: &mut [f32]) {
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

pub(super) fn q3_k(b: &[u8], y: &mut [f32]) {
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

pub(super) fn q2_k(b: &[u8], y: &mut [f32]) {
    let (scales, codes) = (&b[..16], &b[16..80]);
    let (d, min) = (half_at(b, 80), half_at(b, 82));
    for (i, y) in y.iter_mut().enumerate() {
        let (part, run, l) = (i / 128, i % 128 / 32, i % 32);
        let q = codes[part * 32 + l] >> (2 * run) & 3;
        let scale = scales[i / 16];
        *y = d * f32::from(scale & 15) * f32::from(q) - min * f32::from(scale >> 4);
    }
}

/// Two bits of each code: in each half of the block, the codes of four runs in one byte.
fn put_pairs(codes: &[u8; 256], to: &mut [u8]) {
    for (i, to) in to.iter_mut().enumerate() {
        let first = i / 32 * 128 + i % 32;
        *to = (0..4).fold(0, |byte, run| {
            byte | (codes[first + 32 * run] & 3) << (2 * run)
        });
    }
}

/// Codes of a run from the scales as they are stored. A run whose scale became zero keeps what it had.
fn requantize(x: &[f32], d: f32, depth: f32, (least, most): (i32, i32), codes: &mut [u8]) {
    if d == 0.0 {
        return;
    }
    for (c, x) in codes.iter_mut().zip(x) {
        *c = (nearest((x + depth) / d).clamp(least, most) - least) as u8;
    }
}

/// Scales and depths of a block's runs, as integers with a stored scale for each kind.
struct Affine {
    d: f32,
    depth: f32,
    scales: [u8; 16],
    depths: [u8; 16],
}

/// How a format with minima is searched for.
#[derive(Clone, Copy)]
struct Search {
    /// Elements of a run.
    run: usize,
    /// The largest code.
    most: i32,
    /// The largest integer scale.
    most_scale: i32,
    /// Where no importance is given.
    tries: Tries,
}

const Q4_K: Search = Search {
    run: 32,
    most: 15,
    most_scale: 63,
    tries: Tries {
        first: -1.0,
        step: 0.1,
        last: 20,
        loss: Loss::Square,
    },
};
const Q5_K: Search = Search {
    most: 31,
    tries: Tries {
        first: -0.5,
        step: 0.1,
        last: 15,
        loss: Loss::Square,
    },
    ..Q4_K
};
const Q2_K: Search = Search {
    run: 16,
    most: 3,
    most_scale: 15,
    tries: Tries {
        first: -0.5,
        step: 0.1,
        last: 15,
        loss: Loss::Absolute,
    },
};

fn affine(x: &[f32], importance: Option<&[f32]>, search: Search, codes: &mut [u8; 256]) -> Affine {
    let runs = 256 / search.run;
    let (mut d, mut depth, mut sums) = ([0.0f32; 16], [0.0f32; 16], [0.0f32; 16]);
    let spread = if search.run == 32 { 2.0 } else { 1.0 } * sum_of_squares(x) / 256.0;
    let mut weights = [0.0f32; 32];
    let weights = &mut weights[..search.run];
    for (j, (x, codes)) in x
        .chunks_exact(search.run)
        .zip(codes.chunks_exact_mut(search.run))
        .enumerate()
    {
        let tries = if let Some(importance) = importance {
            weigh(x, &importance[j * search.run..], spread, weights);
            sums[j] = weights.iter().fold(0.0, |sum, w| sum + w);
            CAREFUL
        } else {
            let level = match search.tries.loss {
                Loss::Square => (sum_of_squares(x) / 32.0).sqrt(),
                Loss::Absolute => 0.0,
            };
            for (w, x) in weights.iter_mut().zip(x) {
                *w = level + x.abs();
            }
            search.tries
        };
        (d[j], depth[j]) = search::affine(x, search.most, weights, tries, codes);
    }
    let (mut scales, mut depths) = ([0; 16], [0; 16]);
    let integers = |x: &[f32; 16], to: &mut [u8; 16]| {
        if importance.is_some() {
            return search::positive(
                &x[..runs],
                search.most_scale,
                &sums[..runs],
                &mut to[..runs],
            );
        }
        let largest = x.iter().fold(0.0f32, |a, &b| if b > a { b } else { a });
        if largest > 0.0 {
            let inverse = search.most_scale as f32 / largest;
            for (to, x) in to.iter_mut().zip(x) {
                *to = (nearest(inverse * x) as u8).min(search.most_scale as u8);
            }
        }
        largest / search.most_scale as f32
    };
    Affine {
        d: integers(&d, &mut scales),
        depth: integers(&depth, &mut depths),
        scales,
        depths,
    }
}

/// The codes of all runs from the integers as they are stored.
fn requantize_runs(x: &[f32], search: Search, found: &Affine, codes: &mut [u8; 256]) {
    let (d, depth) = (stored(found.d), stored(found.depth));
    let runs = x
        .chunks_exact(search.run)
        .zip(codes.chunks_exact_mut(search.run));
    for (j, (x, codes)) in runs.enumerate() {
        let (d, depth) = (
            d * f32::from(found.scales[j]),
            depth * f32::from(found.depths[j]),
        );
        requantize(x, d, depth, (0, search.most), codes);
    }
}

pub(super) fn quantize_q4_k(x: &[f32], importance: Option<&[f32]>, b: &mut [u8]) {
    let codes = eight_runs(x, importance, Q4_K, b);
    put_eight_runs(&codes, &mut b[16..]);
}

pub(super) fn quantize_q5_k(x: &[f32], importance: Option<&[f32]>, b: &mut [u8]) {
    let codes = eight_runs(x, importance, Q5_K, b);
    let (high, low) = b[16..].split_at_mut(32);
    for (l, high) in high.iter_mut().enumerate() {
        *high = (0..8).fold(0, |byte, run| byte | codes[32 * run + l] >> 4 << run);
    }
    put_eight_runs(&codes, low);
}

/// Scales and minima of q4_k and q5_k go to the block, codes come back.
fn eight_runs(x: &[f32], importance: Option<&[f32]>, search: Search, b: &mut [u8]) -> [u8; 256] {
    let mut codes = [0; 256];
    let found = affine(x, importance, search, &mut codes);
    put_half(b, 0, found.d);
    put_half(b, 2, found.depth);
    put_scale_mins(&found.scales, &found.depths, &mut b[4..16]);
    requantize_runs(x, search, &found, &mut codes);
    codes
}

/// Four bits of each code: two runs of 32 share 32 bytes.
fn put_eight_runs(codes: &[u8; 256], to: &mut [u8]) {
    for (i, to) in to.iter_mut().enumerate() {
        let first = i / 32 * 64 + i % 32;
        *to = codes[first] & 15 | codes[first + 32] << 4;
    }
}

pub(super) fn quantize_q2_k(x: &[f32], importance: Option<&[f32]>, b: &mut [u8]) {
    let mut codes = [0; 256];
    let found = affine(x, importance, Q2_K, &mut codes);
    for (j, b) in b[..16].iter_mut().enumerate() {
        *b = found.scales[j] | found.depths[j] << 4;
    }
    put_half(b, 80, found.d);
    put_half(b, 82, found.depth);
    requantize_runs(x, Q2_K, &found, &mut codes);
    put_pairs(&codes, &mut b[16..80]);
}

/// The scale of the largest magnitude, the first of several.
fn sharpest(scales: &[f32; 16]) -> f32 {
    search::extreme(scales)
}

pub(super) fn quantize_q6_k(x: &[f32], importance: Option<&[f32]>, b: &mut [u8]) {
    let (mut codes, mut scales) = ([0u8; 256], [0.0f32; 16]);
    for (j, (x, codes)) in x.chunks(16).zip(codes.chunks_mut(16)).enumerate() {
        let weights = importance.map(|w| &w[16 * j..16 * j + 16]);
        scales[j] = search::symmetric(x, 32, weights, codes);
    }
    let most = sharpest(&scales);
    if most.abs() < TINY {
        b.fill(0);
        return;
    }
    let inverse = -128.0 / most;
    let d = 1.0 / inverse;
    put_half(b, 208, d);
    for (j, (x, codes)) in x.chunks(16).zip(codes.chunks_mut(16)).enumerate() {
        let scale = nearest(inverse * scales[j]).min(127) as i8;
        b[192 + j] = scale.cast_unsigned();
        requantize(x, stored(d) * f32::from(scale), 0.0, (-32, 31), codes);
    }
    for part in 0..2 {
        let codes = &codes[128 * part..];
        for l in 0..32 {
            let run = |r: usize| codes[32 * r + l];
            b[64 * part + l] = run(0) & 15 | run(2) << 4;
            b[64 * part + 32 + l] = run(1) & 15 | run(3) << 4;
            b[128 + 32 * part + l] = (0..4).fold(0, |byte, r| byte | run(r) >> 4 << (2 * r));
        }
    }
}

pub(super) fn quantize_q3_k(x: &[f32], importance: Option<&[f32]>, b: &mut [u8]) {
    let (mut codes, mut scales) = ([0u8; 256], [0.0f32; 16]);
    // Integer scales, 32 more than what they stand for.
    let mut integers = [0u8; 16];
    let runs = x.chunks(16).zip(codes.chunks_mut(16)).enumerate();
    let d = if let Some(importance) = importance {
        let spread = 2.0 * sum_of_squares(x) / 256.0;
        let (mut weights, mut sums) = ([0.0; 16], [0.0; 16]);
        for (j, (x, codes)) in runs {
            weigh(x, &importance[16 * j..], spread, &mut weights);
            sums[j] = weights.iter().fold(0.0, |sum, w| sum + w);
            scales[j] = search::symmetric(x, 4, Some(&weights), codes);
        }
        search::symmetric(&scales, 32, Some(&sums), &mut integers)
    } else {
        for (j, (x, codes)) in runs {
            scales[j] = search::symmetric_by_moves(x, 4, codes);
        }
        let most = sharpest(&scales);
        if most == 0.0 {
            0.0
        } else {
            let inverse = -32.0 / most;
            for (to, scale) in integers.iter_mut().zip(scales) {
                *to = (nearest(inverse * scale).clamp(-32, 31) + 32) as u8;
            }
            1.0 / inverse
        }
    };
    put_half(b, 108, d);
    let packed = &mut b[96..108];
    for (i, to) in packed[..8].iter_mut().enumerate() {
        *to = integers[i] & 15 | integers[i + 8] << 4;
    }
    for (i, to) in packed[8..].iter_mut().enumerate() {
        *to = (0..4).fold(0, |byte, k| byte | integers[i + 4 * k] >> 4 << (2 * k));
    }
    for (j, (x, codes)) in x.chunks(16).zip(codes.chunks_mut(16)).enumerate() {
        let scale = f32::from(six_bit_scale(&b[96..108], j));
        requantize(x, stored(d) * scale, 0.0, (-4, 3), codes);
    }
    for (l, high) in b[..32].iter_mut().enumerate() {
        *high = (0..8).fold(0, |byte, run| byte | (codes[32 * run + l] >> 2) << run);
    }
    put_pairs(&codes, &mut b[32..96]);
}

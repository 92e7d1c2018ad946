//! Blocks of 32 elements: a scale in half precision, perhaps a minimum, and codes of four to eight bits.

use half::f16;

use super::search::{self, Loss, Tries, extreme, sum_of_squares, weigh};
use super::{half_at, put_half};

/// Codes of four bits: the first half of a block in the low ones, the second in the high ones.
pub(super) fn nibbles(codes: &[u8], y: &mut [f32], widen: impl Fn(usize, u8) -> f32) {
    let half = codes.len();
    for (j, code) in codes.iter().enumerate() {
        y[j] = widen(j, code & 15);
        y[j + half] = widen(j + half, code >> 4);
    }
}

/// The inverse of [`nibbles`]; bits above the fourth are left to the caller.
pub(super) fn put_nibbles(codes: &[u8], to: &mut [u8]) {
    let half = to.len();
    for (j, to) in to.iter_mut().enumerate() {
        *to = codes[j] & 15 | codes[j + half] << 4;
    }
}

/// The fifth bit of code `j`.
fn fifth(bits: &[u8], j: usize) -> u8 {
    (bits[j / 8] >> (j % 8) & 1) << 4
}

fn put_fifths(codes: &[u8], to: &mut [u8]) {
    to.fill(0);
    for (j, code) in codes.iter().enumerate() {
        to[j / 8] |= (code >> 4 & 1) << (j % 8);
    }
}

pub(super) fn q4_0(b: &[u8], y: &mut [f32]) {
    let d = half_at(b, 0);
    nibbles(&b[2..], y, |_, q| (f32::from(q) - 8.0) * d);
}

pub(super) fn q4_1(b: &[u8], y: &mut [f32]) {
    let (d, m) = (half_at(b, 0), half_at(b, 2));
    nibbles(&b[4..], y, |_, q| f32::from(q) * d + m);
}

pub(super) fn q5_0(b: &[u8], y: &mut [f32]) {
    let d = half_at(b, 0);
    let high = &b[2..6];
    nibbles(&b[6..], y, |j, q| {
        (f32::from(q | fifth(high, j)) - 16.0) * d
    });
}

pub(super) fn q5_1(b: &[u8], y: &mut [f32]) {
    let (d, m) = (half_at(b, 0), half_at(b, 2));
    let high = &b[4..8];
    nibbles(&b[8..], y, |j, q| f32::from(q | fifth(high, j)) * d + m);
}

pub(super) fn q8_0(b: &[u8], y: &mut [f32]) {
    let d = half_at(b, 0);
    for (y, q) in y.iter_mut().zip(&b[2..]) {
        *y = f32::from(q.cast_signed()) * d;
    }
}

/// 1 / d, or 0.
fn inverse(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

pub(super) fn quantize_q8_0(x: &[f32], b: &mut [u8]) {
    let d = extreme(x).abs() / 127.0;
    let id = inverse(d);
    put_half(b, 0, d);
    for (b, x) in b[2..].iter_mut().zip(x) {
        // Ties go away from zero.
        *b = ((x * id).round() as i8).cast_unsigned();
    }
}

/// Codes around zero: q4_0 with `most` of 8, q5_0 with 16. `spread` is the mean of x² over the row.
pub(super) fn quantize_symmetric(
    x: &[f32],
    importance: Option<(&[f32], f32)>,
    most: i32,
    b: &mut [u8],
) {
    let mut codes = [0u8; 32];
    let d = if let Some((importance, spread)) = importance {
        let mut weights = [0.0; 32];
        weigh(x, importance, spread, &mut weights);
        search::symmetric(x, most, Some(&weights), &mut codes)
    } else {
        let d = extreme(x) / -most as f32;
        let id = inverse(d);
        for (c, x) in codes.iter_mut().zip(x) {
            let code = (x * id + (most as f32 + 0.5)) as i8;
            *c = i32::from(code).min(2 * most - 1) as u8;
        }
        d
    };
    put_half(b, 0, d);
    let at = if most == 16 {
        put_fifths(&codes, &mut b[2..6]);
        6
    } else {
        2
    };
    put_nibbles(&codes, &mut b[at..]);
}

/// What importance matrices make of codes with a minimum.
pub(super) const CAREFUL: Tries = Tries {
    first: -0.9,
    step: 0.05,
    last: 36,
    loss: Loss::Square,
};

/// Codes above a minimum: q4_1 with `most` of 15, q5_1 with 31. `spread` is the mean of x² over the row.
pub(super) fn quantize_affine(
    x: &[f32],
    importance: Option<(&[f32], f32)>,
    most: i32,
    b: &mut [u8],
) {
    let mut codes = [0u8; 32];
    let (d, least) = if let Some((importance, spread)) = importance {
        let mut weights = [0.0; 32];
        weigh(x, importance, spread, &mut weights);
        let (d, depth) = search::affine(x, most, &weights, CAREFUL, &mut codes);
        (d, -depth)
    } else {
        // Of zeros of both signs the first counts.
        let least = x.iter().fold(f32::MAX, |a, &b| if b < a { b } else { a });
        let largest = x.iter().fold(f32::MIN, |a, &b| if b > a { b } else { a });
        let d = (largest - least) / most as f32;
        let id = inverse(d);
        for (c, x) in codes.iter_mut().zip(x) {
            *c = (((x - least) * id + 0.5) as u8).min(most as u8);
        }
        (d, least)
    };
    put_half(b, 0, d);
    put_half(b, 2, least);
    let at = if most == 31 {
        put_fifths(&codes, &mut b[4..8]);
        8
    } else {
        4
    };
    put_nibbles(&codes, &mut b[at..]);
}

/// The mean of x² over a row.
pub(super) fn spread(row: &[f32]) -> f32 {
    sum_of_squares(row) / row.len() as f32
}

/// The value of a scale once it is stored.
pub(super) fn stored(d: f32) -> f32 {
    f16::from_f32(d).to_f32()
}

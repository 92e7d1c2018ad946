//! Codes of four bits that stand for sixteen unevenly spaced values.

use super::runs::{nibbles, put_nibbles};
use super::search::{TINY, extreme, nearest, sum_of_squares, weigh};
use super::{half_at, put_half};

/// What the codes stand for.
pub(crate) const VALUES: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

pub(super) fn iq4_nl(b: &[u8], y: &mut [f32]) {
    let d = half_at(b, 0);
    nibbles(&b[2..], y, |_, q| d * f32::from(VALUES[q as usize]));
}

/// The scale of the j-th of eight runs.
pub(crate) fn run_scale(b: &[u8], j: usize) -> i8 {
    let high = u16::from_le_bytes([b[2], b[3]]);
    let low = b[4 + j / 2] >> (j % 2 * 4) & 15;
    (low | ((high >> (2 * j) & 3) << 4) as u8).cast_signed() - 32
}

pub(super) fn iq4_xs(b: &[u8], y: &mut [f32]) {
    let d = half_at(b, 0);
    let runs = b[8..].chunks_exact(16).zip(y.chunks_exact_mut(32));
    for (run, (codes, y)) in runs.enumerate() {
        let d = d * f32::from(run_scale(b, run));
        nibbles(codes, y, |_, q| d * f32::from(VALUES[q as usize]));
    }
}

/// The code whose value is nearest, the upper one of two equally near.
fn nearest_value(x: f32) -> u8 {
    let value = |i: usize| f32::from(VALUES[i]);
    // How many of the values are at most x.
    let above = VALUES.iter().take_while(|v| f32::from(**v) <= x).count();
    match above {
        0 => 0,
        16 => 15,
        n if x - value(n - 1) < value(n) - x => n as u8 - 1,
        n => n as u8,
    }
}

/// The scale of a run, the best of sixteen ways to place its extreme element.
fn run(x: &[f32], weights: &[f32]) -> f32 {
    let extreme = extreme(x);
    if extreme.abs() < TINY {
        return 0.0;
    }
    let sums = |inverse: f32| {
        let (mut with_x, mut with_value) = (0.0f32, 0.0f32);
        for (x, w) in x.iter().zip(weights) {
            let q = f32::from(VALUES[nearest_value(inverse * x) as usize]);
            with_x += w * q * x;
            with_value += w * q * q;
        }
        (with_x, with_value)
    };
    let first = f32::from(VALUES[0]);
    let (with_x, with_value) = sums(1.0 / (-extreme / first));
    let mut d = if with_value > 0.0 {
        with_x / with_value
    } else {
        0.0
    };
    let mut best = d * with_x;
    for step in -7i8..=7 {
        let (with_x, with_value) = sums((f32::from(step) + first) / extreme);
        if with_value > 0.0 && with_x * with_x > best * with_value {
            d = with_x / with_value;
            best = d * with_x;
        }
    }
    d
}

/// Weights of a run: see `weigh`; without importance x².
fn run_weights(x: &[f32], importance: Option<&[f32]>, spread: f32) -> [f32; 32] {
    let mut weights = [0.0; 32];
    match importance {
        Some(importance) => weigh(x, importance, spread, &mut weights),
        None => (0..32).for_each(|i| weights[i] = x[i] * x[i]),
    }
    weights
}

fn codes(x: &[f32], d: f32) -> [u8; 32] {
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    std::array::from_fn(|i| nearest_value(inverse * x[i]))
}

pub(super) fn quantize_iq4_nl(x: &[f32], importance: Option<&[f32]>, b: &mut [u8]) {
    let spread = sum_of_squares(x) * (2.0 / 32.0);
    let d = run(x, &run_weights(x, importance, spread));
    put_half(b, 0, d);
    put_nibbles(&codes(x, d), &mut b[2..]);
}

pub(super) fn quantize_iq4_xs(x: &[f32], importance: Option<&[f32]>, b: &mut [u8]) {
    let spread = sum_of_squares(x) * (2.0 / 256.0);
    let scales: [f32; 8] = std::array::from_fn(|j| {
        let x = &x[32 * j..][..32];
        run(x, &run_weights(x, importance.map(|w| &w[32 * j..]), spread))
    });
    let d = -extreme(&scales) / 32.0;
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    put_half(b, 0, d);
    b[2..8].fill(0);
    for (j, scale) in scales.iter().enumerate() {
        let l = nearest(inverse * scale).clamp(-32, 31);
        let codes = codes(&x[32 * j..][..32], d * l as f32);
        put_nibbles(&codes, &mut b[8 + 16 * j..][..16]);
        let l = (l + 32) as u8;
        b[4 + j / 2] |= (l & 15) << (j % 2 * 4);
        b[2 + j / 4] |= l >> 4 << (2 * (j % 4));
    }
}

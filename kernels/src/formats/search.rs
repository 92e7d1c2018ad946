//! The searches for scales that quantisers share. They give the bits of GGML's reference quantisers, so
//! every sum here is formed in f32, one term after the other, each product and quotient rounded alone.

/// Runs whose largest element is smaller count as zeros.
pub(super) const TINY: f32 = 1e-15;

/// The nearest integer, ties to even, for |x| < 2²².
pub(super) fn nearest(x: f32) -> i32 {
    ((x + 12_582_912.0).to_bits() & 0x7f_ffff) as i32 - 0x40_0000
}

/// The element of the largest magnitude, the first of several.
pub(super) fn extreme(x: &[f32]) -> f32 {
    let mut most = 0.0f32;
    for &x in x {
        if x.abs() > most.abs() {
            most = x;
        }
    }
    most
}

/// Σ x².
pub(super) fn sum_of_squares(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |sum, x| sum + x * x)
}

/// How much each element of a run counts: its importance, times √(spread + x²).
pub(super) fn weigh(x: &[f32], importance: &[f32], spread: f32, weights: &mut [f32]) {
    for ((w, x), i) in weights.iter_mut().zip(x).zip(importance) {
        *w = i * (spread + x * x).sqrt();
    }
}

/// What is to be least: the sum of w · error.
#[derive(Clone, Copy)]
pub(super) enum Loss {
    /// Errors squared.
    Square,
    /// Their magnitudes.
    Absolute,
}

impl Loss {
    fn of(self, difference: f32) -> f32 {
        match self {
            Loss::Square => difference * difference,
            Loss::Absolute => difference.abs(),
        }
    }
}

/// Scale and codes for x ≈ scale · (code − most), codes from 0 to 2·most − 1; elements weigh x² unless
/// `weights` says otherwise. The best of 19 ways to place the extreme element.
pub(super) fn symmetric(x: &[f32], most: i32, weights: Option<&[f32]>, codes: &mut [u8]) -> f32 {
    let extreme = extreme(x);
    if extreme.abs() < TINY {
        codes.fill(0);
        return 0.0;
    }
    let weight = |i: usize| weights.map_or(x[i] * x[i], |w| w[i]);
    let code = |inverse: f32, x: f32| nearest(inverse * x).clamp(-most, most - 1);
    let sums = |inverse: f32| {
        let (mut with_x, mut with_code) = (0.0f32, 0.0f32);
        for (i, &x) in x.iter().enumerate() {
            let (l, w) = (code(inverse, x) as f32, weight(i));
            with_x += w * x * l;
            with_code += w * l * l;
        }
        (with_x, with_code)
    };
    let mut chosen = -most as f32 / extreme;
    let (with_x, with_code) = sums(chosen);
    let mut scale = if with_code == 0.0 {
        0.0
    } else {
        with_x / with_code
    };
    let mut best = scale * with_x;
    for step in (-9i8..=9).filter(|s| *s != 0) {
        let inverse = -(most as f32 + 0.1 * f32::from(step)) / extreme;
        let (with_x, with_code) = sums(inverse);
        if with_code > 0.0 && with_x * with_x > best * with_code {
            chosen = inverse;
            scale = with_x / with_code;
            best = scale * with_x;
        }
    }
    for (c, &x) in codes.iter_mut().zip(x) {
        *c = (most + code(chosen, x)) as u8;
    }
    scale
}

/// The same form, elements weighing x²: codes are moved one at a time while that helps.
pub(super) fn symmetric_by_moves(x: &[f32], most: i32, codes: &mut [u8]) -> f32 {
    let extreme = extreme(x);
    if extreme.abs() < TINY {
        codes.fill(0);
        return 0.0;
    }
    let inverse = -most as f32 / extreme;
    let (mut with_x, mut with_code) = (0.0f32, 0.0f32);
    let mut signed = [0i32; 16];
    for (l, &x) in signed.iter_mut().zip(x) {
        *l = nearest(inverse * x).clamp(-most, most - 1);
        let (w, l) = (x * x, *l as f32);
        with_x += w * x * l;
        with_code += w * l * l;
    }
    for _ in 0..5 {
        let mut moved = false;
        for (l, &x) in signed.iter_mut().zip(x) {
            let w = x * x;
            let old = *l as f32;
            let mut x_without = with_x - w * x * old;
            if x_without <= 0.0 {
                continue;
            }
            let mut code_without = with_code - w * old * old;
            let new = nearest(x * code_without / x_without).clamp(-most, most - 1);
            if new == *l {
                continue;
            }
            let to = new as f32;
            x_without += w * x * to;
            code_without += w * to * to;
            if code_without > 0.0
                && x_without * x_without * with_code > with_x * with_x * code_without
            {
                (*l, with_x, with_code) = (new, x_without, code_without);
                moved = true;
            }
        }
        if !moved {
            break;
        }
    }
    for (c, l) in codes.iter_mut().zip(&signed) {
        *c = (l + most) as u8;
    }
    if with_code > 0.0 {
        with_x / with_code
    } else {
        0.0
    }
}

/// The scales that [`affine`] tries: `first + i · step` more than the largest code over the range.
#[derive(Clone, Copy)]
pub(super) struct Tries {
    pub(super) first: f32,
    pub(super) step: f32,
    pub(super) last: u8,
    pub(super) loss: Loss,
}

/// Scale and depth for x ≈ scale · code − depth, codes from 0 to `most`, depth not negative.
pub(super) fn affine(
    x: &[f32],
    most: i32,
    weights: &[f32],
    tries: Tries,
    codes: &mut [u8],
) -> (f32, f32) {
    let (mut least, mut largest) = (x[0], x[0]);
    let (mut sum_w, mut sum_x) = (weights[0], weights[0] * x[0]);
    for (&x, &w) in x.iter().zip(weights).skip(1) {
        least = if x < least { x } else { least };
        largest = if x > largest { x } else { largest };
        sum_w += w;
        sum_x += w * x;
    }
    least = if least > 0.0 { 0.0 } else { least };
    if largest <= least {
        codes.fill(0);
        return (0.0, -least);
    }
    let code = |inverse: f32, least: f32, x: f32| nearest(inverse * (x - least)).clamp(0, most);
    let error = |scale: f32, least: f32, codes: &[u8]| {
        let terms = x.iter().zip(weights).zip(codes);
        terms.fold(0.0f32, |sum, ((x, w), &l)| {
            sum + w * tries.loss.of(scale * f32::from(l) + least - x)
        })
    };
    let range = (largest, least);
    let inverse = most as f32 / (range.0 - range.1);
    let mut scale = 1.0 / inverse;
    for (c, &x) in codes.iter_mut().zip(x) {
        *c = code(inverse, least, x) as u8;
    }
    let mut best = error(scale, least, codes);
    let mut other = [0u8; 32];
    let other = &mut other[..x.len()];
    for i in 0..=tries.last {
        // The bottom of the range moves with what has been found.
        let inverse = (tries.first + tries.step * f32::from(i) + most as f32) / (largest - least);
        let (mut sum_l, mut sum_l2, mut sum_xl) = (0.0f32, 0.0f32, 0.0f32);
        for ((c, &x), &w) in other.iter_mut().zip(x).zip(weights) {
            *c = code(inverse, least, x) as u8;
            let l = f32::from(*c);
            sum_l += w * l;
            sum_l2 += w * l * l;
            sum_xl += w * l * x;
        }
        // Least squares in scale and bottom.
        let determinant = sum_w * sum_l2 - sum_l * sum_l;
        if determinant <= 0.0 {
            continue;
        }
        let mut to = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        let mut bottom = (sum_l2 * sum_x - sum_l * sum_xl) / determinant;
        if bottom > 0.0 {
            (to, bottom) = (sum_xl / sum_l2, 0.0);
        }
        let now = error(to, bottom, other);
        if now < best {
            codes.copy_from_slice(other);
            (best, scale, least) = (now, to, bottom);
        }
    }
    (scale, -least)
}

/// Scale and codes for x ≈ scale · code of numbers that are not negative, codes up to `most`.
pub(super) fn positive(x: &[f32], most: i32, weights: &[f32], codes: &mut [u8]) -> f32 {
    let largest = x.iter().fold(0.0f32, |a, &b| if a > b { a } else { b });
    if largest < TINY {
        codes.fill(0);
        return 0.0;
    }
    let error = |inverse: f32, bound: i32| {
        let scale = 1.0 / inverse;
        let terms = x.iter().zip(weights);
        terms.fold(0.0f32, |sum, (x, w)| {
            let difference = x - scale * nearest(inverse * x).min(bound) as f32;
            sum + w * difference * difference
        })
    };
    let mut inverse = most as f32 / largest;
    let mut best = error(inverse, i32::MAX);
    for step in (-4i8..=4).filter(|s| *s != 0) {
        let other = (0.1 * f32::from(step) + most as f32) / largest;
        let now = error(other, most);
        if now < best {
            (best, inverse) = (now, other);
        }
    }
    let (mut with_x, mut with_code) = (0.0f32, 0.0f32);
    for ((c, &x), &w) in codes.iter_mut().zip(x).zip(weights) {
        *c = nearest(inverse * x).min(most) as u8;
        let l = f32::from(*c);
        with_x += w * x * l;
        with_code += w * l * l;
    }
    for _ in 0..5 {
        let mut moved = false;
        for ((c, &x), &w) in codes.iter_mut().zip(x).zip(weights) {
            let old = f32::from(*c);
            let mut x_without = with_x - w * x * old;
            let mut code_without = with_code - w * old * old;
            if x_without <= 0.0 || code_without <= 0.0 {
                continue;
            }
            let new = nearest(x * code_without / x_without).min(most);
            if new == i32::from(*c) {
                continue;
            }
            x_without += w * x * new as f32;
            code_without += w * new as f32 * new as f32;
            if x_without * x_without * with_code > with_x * with_x * code_without {
                (*c, with_x, with_code) = (new as u8, x_without, code_without);
                moved = true;
            }
        }
        if !moved {
            break;
        }
    }
    if with_code > 0.0 {
        with_x / with_code
    } else {
        0.0
    }
}

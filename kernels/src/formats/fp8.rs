//! Rows of FP8 numbers with one scale: w[n, k] = c[n, k] · s[n].
//!
//! A row lies as one of [`int8`](super::int8) does: its codes, a byte each, zeros up to a multiple of four, and the
//! scale as f32. A code is an E4M3 number of the OCP's 8-bit floating point specification (OFP8, revision 1.0), which
//! is torch's `float8_e4m3fn`: 1 sign, 4 exponent and 3 mantissa bits; with e and m those bits,
//!
//! - e > 0: c = ± (1 + m / 8) · 2^(e − 7), at most 448,
//! - e = 0: c = ± m · 2^−9,
//!
//! no infinities, and NaN where e and m are all ones. Each is a BF16 number, and so is exact in a product of those.
//! The products, on every device:
//!
//! - `activations: BF16`: `y[t, n] = (Σ bf16(x[t, k]) · c[n, k]) · s[n] + bias[n]`,
//! - `activations: F32`: the same with x as it is,
//!
//! with the sum in f32 and one rounding each for the scale and the bias. Inputs are not rounded to eight bits. So a
//! product is that of the BF16 matrix of codes, whose rows are scaled after it; beside one with c · s rounded to BF16,
//! as a release is otherwise widened, it is the nearer: that rounds each weight by up to 2^−9 of itself.

pub(crate) use super::int8::scale;

/// The largest number.
const MOST: f32 = 448.0;
/// Below it numbers are multiples of 2^−9.
const LEAST_NORMAL: f32 = 1.0 / 64.0;

/// The number of each code.
pub(crate) static VALUES: [f32; 256] = {
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        values[code] = value(code as u32);
        code += 1;
    }
    values
};

const fn value(code: u32) -> f32 {
    let size = match code & 0x7f {
        0x7f => f32::NAN.to_bits(),
        // From an exponent of 7 as zero to one of 127.
        normal @ 8.. => (normal << 20) + (120 << 23),
        steps => (steps as f32 / 512.0).to_bits(),
    };
    f32::from_bits(size | (code & 0x80) << 24)
}

/// The code of the nearest number, ties to an even code; of what is larger than 448, that.
fn code(x: f32) -> u8 {
    let size = x.abs().min(MOST);
    let code = if size < LEAST_NORMAL {
        (size * 512.0).round_ties_even() as u32
    } else {
        let bits = size.to_bits() - (120 << 23);
        (bits + 0x7_ffff + (bits >> 20 & 1)) >> 20
    };
    code as u8 | if x.is_sign_negative() { 0x80 } else { 0 }
}

/// Widens a row.
pub(crate) fn widen(row: &[u8], to: &mut [f32]) {
    let s = scale(row);
    for (to, code) in to.iter_mut().zip(row) {
        *to = VALUES[usize::from(*code)] * s;
    }
}

/// The numbers of a row's codes, without its scale.
pub(crate) fn codes(row: &[u8], to: &mut [f32]) {
    for (to, code) in to.iter_mut().zip(row) {
        *to = VALUES[usize::from(*code)];
    }
}

/// Quantises a row of finite numbers: s = max |x| / 448, codes to the nearest, ties to even.
pub(crate) fn quantize(x: &[f32], to: &mut [u8]) {
    let most = x.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let s = most / MOST;
    to.fill(0);
    if s > 0.0 {
        for (to, x) in to.iter_mut().zip(x) {
            *to = code(x / s);
        }
    }
    let at = to.len() - 4;
    to[at..].copy_from_slice(&s.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_what_their_bits_say() {
        let numbers = [
            (0x00, 0.0),
            (0x01, 1.0 / 512.0),
            (0x07, 7.0 / 512.0),
            (0x08, 1.0 / 64.0),
            (0x38, 1.0),
            (0xb9, -1.125),
            (0x7e, 448.0),
            (0xfe, -448.0),
        ];
        for (code, number) in numbers {
            assert_eq!(VALUES[code].to_bits(), f32::to_bits(number), "{code:x}");
        }
        assert!(VALUES[0x7f].is_nan() && VALUES[0xff].is_nan());
        // Exact in BF16.
        assert!(
            VALUES
                .iter()
                .all(|v| v.is_nan() || v.to_bits() & 0xffff == 0)
        );
    }

    #[test]
    fn the_nearest_code_is_found_and_ties_go_to_an_even_one() {
        for c in (0..=255u8).filter(|c| c & 0x7f != 0x7f) {
            assert_eq!(code(VALUES[usize::from(c)]), c);
        }
        for c in 0..0x7eu8 {
            let (a, b) = (VALUES[usize::from(c)], VALUES[usize::from(c) + 1]);
            let middle = (a + b) / 2.0;
            for sign in [1.0, -1.0] {
                let of = |x: f32| code(x * sign) & 0x7f;
                assert_eq!(of(middle), c + c % 2, "{c}");
                assert_eq!(of(middle.next_down()), c);
                assert_eq!(of(middle.next_up()), c + 1);
            }
        }
        assert_eq!(
            [1e9, -1e9, 448.1, f32::MIN_POSITIVE].map(code),
            [0x7e, 0xfe, 0x7e, 0]
        );
    }
}

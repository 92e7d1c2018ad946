//! Rows of whole numbers with one scale: w[n, k] = c[n, k] · s[n], with |c| ≤ 127 where they are made here.
//!
//! A row is its codes as bytes (i8), zeros up to a multiple of four, and the scale as f32: as releases of
//! compressed-tensors have them (INT8, a scale a channel), brought together so that one place is read.

/// Most columns: sums of products of bytes then stay in 32 bits.
const MOST: usize = 1 << 17;

/// What makes whole numbers of fractions when it is added.
const WHOLE: f32 = 12_582_912.0;

/// Bytes of a row; none if it is too long.
pub(crate) fn row_bytes(cols: usize) -> Option<usize> {
    (cols <= MOST).then(|| cols.next_multiple_of(4) + 4)
}

/// The scale of a row.
#[inline(always)]
pub(crate) fn scale(row: &[u8]) -> f32 {
    let at = row.len() - 4;
    f32::from_le_bytes([row[at], row[at + 1], row[at + 2], row[at + 3]])
}

/// Widens a row.
#[inline(always)]
pub(crate) fn widen(row: &[u8], to: &mut [f32]) {
    let s = scale(row);
    for (to, code) in to.iter_mut().zip(row) {
        *to = f32::from(code.cast_signed()) * s;
    }
}

/// Quantises a row of finite numbers: s = max |x| / 127, codes to the nearest, ties to even.
#[inline(always)]
pub(crate) fn quantize(x: &[f32], to: &mut [u8]) {
    let most = x.iter().fold(0.0f32, |most, x| most.max(x.abs()));
    let s = most / 127.0;
    to.fill(0);
    if s > 0.0 {
        for (to, x) in to.iter_mut().zip(x) {
            // A sum near 1.5 · 2^23 has no place for fractions: it is rounded to the nearest, ties to even.
            let code = (x / s).clamp(-127.0, 127.0) + WHOLE - WHOLE;
            *to = (code as i32 as i8).cast_unsigned();
        }
    }
    let at = to.len() - 4;
    to[at..].copy_from_slice(&s.to_le_bytes());
}

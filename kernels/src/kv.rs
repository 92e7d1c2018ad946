//! How keys and values are kept in pages: as numbers of a floating-point type, or as bytes with a scale for each
//! head of each token.
//!
//! A row of pages is one token's keys, or its values. Of [`KvType::Int8`] it is, head after head, what a row of
//! [`Format::Int8`](crate::Format) is: the codes as bytes, zeros up to a multiple of four, and the scale as f32, so
//! that x = code · scale with |code| ≤ 127. A token is rounded by itself, when it is written; what reads it later sees
//! the same numbers whatever was written beside it.

use std::fmt;

use crate::formats::int8;
use crate::tensor::{DType, Tensor};

/// The form of keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)] // the names are the field's
pub enum KvType {
    F32,
    F16,
    BF16,
    /// Bytes, with a scale for each head of each token.
    Int8,
}

impl KvType {
    /// All of them.
    pub const ALL: [KvType; 4] = [KvType::F32, KvType::F16, KvType::BF16, KvType::Int8];

    /// What people call it.
    pub fn name(self) -> &'static str {
        match self {
            KvType::F32 => "f32",
            KvType::F16 => "f16",
            KvType::BF16 => "bf16",
            KvType::Int8 => "int8",
        }
    }

    /// The type of this name.
    pub fn named(name: &str) -> Option<KvType> {
        KvType::ALL.into_iter().find(|t| t.name() == name)
    }

    /// The type that pages of this element type hold; none of whole numbers of 32 bits.
    pub fn of(pages: DType) -> Option<KvType> {
        KvType::ALL.into_iter().find(|t| t.dtype() == pages)
    }

    /// The element type of pages.
    pub fn dtype(self) -> DType {
        match self {
            KvType::F32 => DType::F32,
            KvType::F16 => DType::F16,
            KvType::BF16 => DType::BF16,
            KvType::Int8 => DType::U8,
        }
    }

    /// Elements of a row of pages, for so many heads of `dim` numbers.
    pub fn columns(self, heads: usize, dim: usize) -> usize {
        match self {
            KvType::Int8 => heads * int8_head(dim),
            _ => heads * dim,
        }
    }

    /// Bytes of a row of pages.
    pub fn row_bytes(self, heads: usize, dim: usize) -> usize {
        self.columns(heads, dim) * self.dtype().size()
    }
}

impl From<DType> for KvType {
    /// Keys and values in numbers of this type. Panics for types that they do not have.
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => KvType::F32,
            DType::F16 => KvType::F16,
            DType::BF16 => KvType::BF16,
            DType::I32 | DType::U8 => panic!("no keys and values are numbers of type {dtype}"),
        }
    }
}

impl fmt::Display for KvType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Bytes of a head of `dim` numbers.
pub(crate) fn int8_head(dim: usize) -> usize {
    dim.next_multiple_of(4) + 4
}

/// Rounds heads of `dim` numbers to bytes: scale = max |x| / 127, codes to the nearest, ties to even. A head that
/// holds a NaN or an infinity is NaN afterwards, so that it is not lost.
#[inline(always)]
pub(crate) fn quantize(x: &[f32], dim: usize, to: &mut [u8]) {
    for (x, to) in x.chunks_exact(dim).zip(to.chunks_exact_mut(int8_head(dim))) {
        int8::quantize(x, to);
        if x.iter().any(|x| !x.is_finite()) {
            let at = to.len() - 4;
            to[at..].copy_from_slice(&f32::NAN.to_le_bytes());
        }
    }
}

/// Row `r` of pages with heads of `dim` numbers, widened.
pub(crate) fn read_row(pages: &Tensor, r: usize, dim: usize, to: &mut [f32]) {
    if pages.dtype() != DType::U8 {
        return crate::ops::linear::read_row(pages, r, to);
    }
    let view = pages.view::<u8>();
    let heads = view.row(r).chunks_exact(int8_head(dim));
    for (from, to) in heads.zip(to.chunks_exact_mut(dim)) {
        int8::widen(from, to);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Format;

    #[test]
    fn types_have_names_and_rows_of_whole_heads() {
        for kv in KvType::ALL {
            assert_eq!(KvType::named(kv.name()), Some(kv));
            assert_eq!(KvType::of(kv.dtype()), Some(kv));
        }
        assert_eq!(KvType::named("int4"), None);
        assert_eq!(KvType::of(DType::I32), None);
        for dim in [1, 3, 4, 7, 64, 80, 128] {
            let row = Format::Int8.row_bytes(dim).unwrap();
            assert_eq!(KvType::Int8.row_bytes(3, dim), 3 * row);
            assert_eq!(KvType::BF16.row_bytes(3, dim), 6 * dim);
        }
    }

    #[test]
    fn a_head_is_rounded_by_its_own_largest_number() {
        let x = [1.0, -2.0, 0.5, 100.0, 0.0, -0.3, 0.0, 0.0, 0.0];
        let mut bytes = [0xee; 3 * 8];
        quantize(&x, 3, &mut bytes);
        let mut back = [0.0; 9];
        let heads = bytes.chunks_exact(8).zip(back.chunks_exact_mut(3));
        heads.for_each(|(from, to)| int8::widen(from, to));
        for (i, (x, back)) in x.iter().zip(back).enumerate() {
            let most: f32 = [2.0, 100.0, 0.0][i / 3];
            assert!(
                (x - back).abs() <= most / 127.0 * 0.5001,
                "{i}: {x} and {back}"
            );
        }
        // What is padded is written too.
        assert_eq!([bytes[3], bytes[11], bytes[19]], [0; 3]);
    }

    #[test]
    fn what_is_not_finite_stays_so() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut bytes = [0; 2 * 8];
            quantize(&[1.0, bad, 2.0, 3.0, 4.0, 5.0], 3, &mut bytes);
            let mut back = [0.0; 3];
            int8::widen(&bytes[..8], &mut back);
            assert!(back.iter().all(|x| x.is_nan()), "{back:?}");
            int8::widen(&bytes[8..], &mut back);
            assert!(back.iter().all(|x| x.is_finite()), "{back:?}");
        }
    }
}

//! How the elements of a weight are stored: one by one, or in blocks along its rows.
//!
//! The block formats are those of GGUF files, bit for bit: [`Format::dequantize`] says what each holds. Two formats,
//! int8 and fp8, have a scale for each row instead.

use std::fmt;

use crate::error::{Error, Result};
use crate::formats::{self, fp8, int8};
use crate::tensor::DType;

/// The form of a stored weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)] // the names are the field's
pub enum Format {
    F32,
    F16,
    BF16,
    Int8,
    Fp8,
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
    pub const ALL: [Format; 17] = [
        Format::F32,
        Format::F16,
        Format::BF16,
        Format::Int8,
        Format::Fp8,
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
            Format::Int8 => "int8",
            Format::Fp8 => "fp8",
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

    /// Whether a scale belongs to a whole row, which then is taken whole only.
    pub fn scales_rows(self) -> bool {
        matches!(self, Format::Int8 | Format::Fp8)
    }

    /// Whether products with BF16 activations round their inputs to bytes: of fp8, as of BF16 itself, they stay
    /// BF16.
    pub fn rounds_inputs(self) -> bool {
        self.dtype().is_none() && self != Format::Fp8
    }

    /// The size of its blocks; of one element where it has none. Rows with a scale have more bytes than these:
    /// see [`Format::row_bytes`].
    pub fn block(self) -> Block {
        let (elements, bytes) = match self {
            Format::F32 => (1, 4),
            Format::F16 | Format::BF16 => (1, 2),
            Format::Int8 | Format::Fp8 => (1, 1),
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
        if self.scales_rows() {
            return int8::row_bytes(cols);
        }
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
    /// Panics unless `from` holds exactly the blocks of `to`; of int8 and fp8, one row.
    pub fn dequantize(self, from: &[u8], to: &mut [f32]) {
        if self.scales_rows() {
            assert_eq!(
                self.row_bytes(to.len()),
                Some(from.len()),
                "a row of {self}"
            );
            return match self {
                Format::Fp8 => fp8::widen(from, to),
                _ => int8::widen(from, to),
            };
        }
        let Block { elements, bytes } = self.block();
        assert!(
            to.len().is_multiple_of(elements) && from.len() == to.len() / elements * bytes,
            "{} bytes of {self} for {} elements",
            from.len(),
            to.len()
        );
        let widen = formats::widen(self);
        let blocks = from.chunks_exact(bytes).zip(to.chunks_exact_mut(elements));
        blocks.for_each(|(from, to)| widen(from, to));
    }

    /// Quantises a row to whole blocks, as GGML's reference functions do, bit for bit; formats without
    /// blocks round to nearest even; of int8 and fp8 the row is one, with codes to the nearest. `importance` says how much each column counts (numbers that are not
    /// negative, as an importance matrix has them); q8_0, int8, fp8 and formats without
    /// blocks do not ask.
    ///
    /// Fails where the row is no whole blocks, where lengths differ, where a number is not finite or too
    /// large, and where a scale is too large for half precision; `to` is then left with anything.
    pub fn quantize(self, row: &[f32], importance: Option<&[f32]>, to: &mut [u8]) -> Result<()> {
        let fault = |why: String| Error::Value {
            op: "quantize",
            why,
        };
        let Block { elements, bytes } = self.block();
        if self.row_bytes(row.len()) != Some(to.len()) {
            return Err(fault(format!(
                "{} elements do not fill {} bytes of {self}, which takes {bytes} for each {elements}",
                row.len(),
                to.len()
            )));
        }
        if let Some(i) = row.iter().position(|x| !x.is_finite()) {
            return Err(fault(format!(
                "element {i} of the row is {}, and {self} holds finite numbers only",
                row[i]
            )));
        }
        let scaled = elements > 1 || self.scales_rows();
        let large = |x: &f32| scaled && x.abs() > MOST;
        if let Some(i) = row.iter().position(large) {
            return Err(fault(format!(
                "element {i} of the row is {}, too large for {self}: {MOST} is the most",
                row[i]
            )));
        }
        if let Some(importance) = importance {
            if importance.len() != row.len() {
                return Err(fault(format!(
                    "the importance of {} columns for a row of {}",
                    importance.len(),
                    row.len()
                )));
            }
            let is_weight = |w: &f32| w.is_finite() && *w >= 0.0;
            if let Some(i) = importance.iter().position(|w| !is_weight(w)) {
                return Err(fault(format!(
                    "the importance of column {i} is {}, where a number of at least 0 was expected",
                    importance[i]
                )));
            }
        }
        match self {
            Format::Int8 => int8::quantize(row, to),
            Format::Fp8 => fp8::quantize(row, to),
            _ => formats::quantize(self, row, importance, to),
        }
        if self.scales_rows() {
            return Ok(());
        }
        match formats::first_not_finite(self, to) {
            Some(block) => Err(fault(format!(
                "the numbers from element {} of the row on are too large for {self}, whose scales are in half precision",
                block * elements
            ))),
            None => Ok(()),
        }
    }
}

/// The largest magnitude that is quantised to blocks: searches for scales form powers of it, which must
/// stay finite.
const MOST: f32 = 1_048_576.0;

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_has_a_name_and_rows_of_whole_blocks() {
        let rows = Format::ALL.into_iter().filter(|f| f.scales_rows());
        for format in rows {
            assert_eq!(Format::named(format.name()), Some(format));
            let sizes = [0, 1, 4, 5, 1 << 17, (1 << 17) + 1].map(|k| format.row_bytes(k));
            let long = Some((1 << 17) + 4);
            assert_eq!(sizes, [Some(4), Some(8), Some(8), Some(12), long, None]);
        }
        for format in Format::ALL.into_iter().filter(|f| !f.scales_rows()) {
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

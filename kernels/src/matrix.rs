//! Weight matrices in the format they run in.

use crate::format::Format;
use crate::formats::fp8;
use crate::ops::linear::read_row;
use crate::tensor::{DType, Tensor};

/// A weight of `rows` outputs by `cols` inputs, as files store it: y = x · Wᵀ.
#[derive(Debug, Clone)]
pub struct Matrix {
    format: Format,
    cols: usize,
    data: Tensor,
}

impl Matrix {
    /// A dense matrix. Panics unless `data` is contiguous floating point.
    pub fn dense(data: Tensor) -> Self {
        Matrix::new(Format::from(data.dtype()), data.cols(), data)
    }

    /// A matrix of `cols` inputs, from its elements or from the bytes of its blocks, row after row. Panics
    /// unless `data` is contiguous and holds such rows.
    pub fn new(format: Format, cols: usize, data: Tensor) -> Self {
        let dtype = format.dtype().unwrap_or(DType::U8);
        let row = format.row_bytes(cols).map(|bytes| bytes / dtype.size());
        assert!(
            data.is_contiguous() && data.dtype() == dtype && row == Some(data.cols()),
            "no {format} matrix of {cols} columns: {data:?}"
        );
        Matrix { format, cols, data }
    }

    /// How its elements are stored.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Number of outputs.
    pub fn rows(&self) -> usize {
        self.data.rows()
    }

    /// Number of inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes that one product reads.
    pub fn bytes(&self) -> usize {
        self.data.bytes()
    }

    /// The elements, or the bytes of the blocks: (rows, bytes of a row). A device may lay those out in an
    /// order of its own.
    pub fn data(&self) -> &Tensor {
        &self.data
    }

    /// What tells it from other matrices while both live: where its elements begin, and its shape.
    pub fn place(&self) -> (usize, usize, usize) {
        (self.data.place(), self.rows(), self.cols)
    }

    /// Row `r`, widened: the plain way.
    pub(crate) fn read_row(&self, r: usize, to: &mut [f32]) {
        if self.format.dtype().is_some() {
            read_row(&self.data, r, to);
        } else {
            self.format.dequantize(self.data.view::<u8>().row(r), to);
        }
    }

    /// Row `r` as products with unrounded weights take it: its numbers, and what their sum is multiplied by. That is
    /// one but where codes are multiplied for themselves.
    pub(crate) fn factors(&self, r: usize, to: &mut [f32]) -> f32 {
        if self.format != Format::Fp8 {
            self.read_row(r, to);
            return 1.0;
        }
        let rows = self.data.view::<u8>();
        fp8::codes(rows.row(r), to);
        fp8::scale(rows.row(r))
    }
}

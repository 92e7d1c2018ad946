//! Weight matrices in the format they run in.

use crate::tensor::{DType, Tensor};

/// A weight of `rows` outputs by `cols` inputs, as files store it: y = x · Wᵀ.
#[derive(Debug, Clone)]
pub struct Matrix {
    data: Tensor,
}

impl Matrix {
    /// A dense matrix. Panics unless `data` is contiguous floating point.
    pub fn dense(data: Tensor) -> Self {
        assert!(
            data.is_contiguous() && data.dtype() != DType::I32,
            "not a dense matrix: {data:?}"
        );
        Matrix { data }
    }

    /// Number of outputs.
    pub fn rows(&self) -> usize {
        self.data.rows()
    }

    /// Number of inputs.
    pub fn cols(&self) -> usize {
        self.data.cols()
    }

    /// Bytes that one product reads.
    pub fn bytes(&self) -> usize {
        self.data.bytes()
    }

    /// The elements.
    pub fn data(&self) -> &Tensor {
        &self.data
    }
}

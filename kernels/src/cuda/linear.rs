//! Products with weights. One row goes at the speed of memory; more rows, rounded to BF16, go through
//! matrix units; the rest in tiles of f32.

use super::device::{Param, launch};
use super::matmul::{Matmul, Shape, alignment};
use super::{Rows, State, address, optional, rows};
use crate::error::Result;
use crate::ops::Linear;
use crate::tensor::{DType, Tensor};

/// Rows and outputs of a tile: `TILE` in products.cuh.
const TILE: usize = 64;
/// Rows of a weight that a block of `one_row` takes.
const WARPS: usize = 8;

/// `Product` in products.cu.
#[repr(C)]
struct Product {
    x: Rows,
    w: u64,
    bias: u64,
    y: Rows,
    rows: i32,
    k: i32,
    n: i32,
    round: i32,
}

// SAFETY: laid out as there.
unsafe impl Param for Product {}

/// Whether rows of `w` are whole chunks of sixteen bytes.
pub(super) fn in_chunks(w: &Tensor, pointer: u64) -> bool {
    (w.cols() * w.dtype().size()).is_multiple_of(16) && pointer.is_multiple_of(16)
}

/// The kernel for a type of weights.
pub(super) fn of_type(dtype: DType, names: [&'static str; 3]) -> &'static str {
    match dtype {
        // Bytes of blocks are refused when they are uploaded.
        DType::F32 | DType::I32 | DType::U8 => names[0],
        DType::F16 => names[1],
        DType::BF16 => names[2],
    }
}

impl State {
    pub fn linear(&mut self, op: Linear<'_>) -> Result<()> {
        let (w, rows, k, n) = (op.w.data(), op.x.rows(), op.x.cols(), op.w.rows());
        let product = Product {
            x: Rows::of(op.x)?,
            w: address(w)?,
            bias: optional(op.bias)?,
            y: Rows::of(op.y)?,
            rows: rows as i32,
            k: k as i32,
            n: n as i32,
            round: i32::from(op.activations == DType::BF16),
        };
        let chunks = in_chunks(w, product.w);
        if rows == 1 && chunks && product.x.wide() {
            let kernel = of_type(w.dtype(), ["one_row_f32", "one_row_f16", "one_row_bf16"]);
            return launch!(self, kernel, (n.div_ceil(WARPS), 1, 1), 32 * WARPS, 0; product);
        }
        let for_units = w.dtype() == DType::BF16 && op.activations == DType::BF16 && chunks;
        if for_units && self.by_units(&op, &product)? {
            return Ok(());
        }
        let kernel = of_type(w.dtype(), ["tiles_f32", "tiles_f16", "tiles_bf16"]);
        let grid = (n.div_ceil(TILE), rows.div_ceil(TILE), 1);
        launch!(self, kernel, grid, 256, 0; product)
    }

    /// False where the library has no algorithm for the shape.
    fn by_units(&mut self, op: &Linear<'_>, product: &Product) -> Result<bool> {
        if self.matmul.is_none() {
            self.matmul = Some(Matmul::new(&self.device, &self.libraries)?);
        }
        let (m, k, n) = (op.x.rows(), op.x.cols(), op.w.rows());
        // K is a multiple of eight.
        let x = self.scratch(2 * m * k)?;
        let wide = i32::from(product.x.wide());
        launch!(self, "round_rows", rows::grid(m, k), 256, 0; product.x, x, k as i32, k as i32, wide)?;
        let shape = Shape {
            m,
            n,
            k,
            x_stride: k,
            y_stride: if m == 1 { n } else { op.y.stride() },
            w_align: alignment(product.w),
            y_align: alignment(product.y.pointer),
        };
        let Some(matmul) = &mut self.matmul else {
            return Ok(false);
        };
        if !matmul.run(shape, x, product.w, product.y.pointer)? {
            return Ok(false);
        }
        if product.bias != 0 {
            launch!(self, "add_bias", rows::grid(m, n), 256, 0; product.bias, product.y, n as i32)?;
        }
        Ok(true)
    }
}

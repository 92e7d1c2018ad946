//! Products with weights. One row goes at the speed of memory; more rows, rounded to BF16, go through
//! matrix units; the rest in tiles of f32.

use super::device::{Param, launch};
use super::matmul::{Matmul, Shape, alignment};
use super::{Rows, State, address, optional, rows};
use crate::error::Result;
use crate::format::Format;
use crate::ops::Linear;
use crate::tensor::{DType, Tensor};

/// Rows and outputs of a tile: `TILE` in products.cuh.
pub(super) const TILE: usize = 64;
/// Warps of a block of `one_row`.
const WARPS: usize = 8;

/// Blocks that a processor holds at once.
const BLOCKS: usize = 8;
/// Two outputs a warp, one, a half and a quarter.
const ONE_ROW: [[&str; 3]; 4] = [
    ["one_row_f32_2_1", "one_row_f16_2_1", "one_row_bf16_2_1"],
    ["one_row_f32_1_1", "one_row_f16_1_1", "one_row_bf16_1_1"],
    ["one_row_f32_1_2", "one_row_f16_1_2", "one_row_bf16_1_2"],
    ["one_row_f32_1_4", "one_row_f16_1_4", "one_row_bf16_1_4"],
];

/// `Product` in products.cu.
#[repr(C)]
pub(super) struct Product {
    pub x: Rows,
    pub w: u64,
    pub bias: u64,
    pub y: Rows,
    pub rows: i32,
    pub k: i32,
    pub n: i32,
    pub round: i32,
}

// SAFETY: laid out as there.
unsafe impl Param for Product {}

/// Rows that a product has just rounded: the next one may have the same.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Rounded {
    pub from: Rows,
    pub rows: usize,
    pub cols: usize,
    pub to: u64,
    /// Of the weights in blocks that they are for; none is BF16.
    pub format: Option<Format>,
}

/// Whether rows of `w` are whole chunks of sixteen bytes.
pub(super) fn in_chunks(w: &Tensor, pointer: u64) -> bool {
    (w.cols() * w.dtype().size()).is_multiple_of(16) && pointer.is_multiple_of(16)
}

/// The kernel for a type of weights.
pub(super) fn of_type(dtype: DType, names: [&'static str; 3]) -> &'static str {
    match dtype {
        DType::F32 | DType::I32 | DType::U8 => names[0],
        DType::F16 => names[1],
        DType::BF16 => names[2],
    }
}

impl State {
    pub fn linear(&mut self, op: Linear<'_>) -> Result<()> {
        let rounded = self.rounded.take();
        if op.w.format().dtype().is_none() {
            if let Some(blocks) = self.block_row(&op) {
                return self.row(&op, Some(blocks));
            }
            self.flush()?;
            if self.by_block_units(&op, rounded)? {
                return Ok(());
            }
            match op.w.format() {
                Format::Int8 if op.activations == DType::BF16 => {
                    return self.linear_int8(&op, rounded);
                }
                Format::Fp8 if op.activations == DType::BF16 => {
                    return self.linear_fp8(&op, rounded);
                }
                _ => {}
            }
            return self.linear_blocks(&op);
        }
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
        if State::is_row(&op, &product.x, chunks) {
            let blocks = self.block_row(&op);
            return self.row(&op, blocks);
        }
        self.flush()?;
        if rows == 1 && chunks && product.x.wide() {
            let (split, blocks) = self.split(n);
            let kernel = of_type(w.dtype(), ONE_ROW[split]);
            return launch!(self, kernel, (blocks, 1, 1), 32 * WARPS, 0; product);
        }
        let for_units = w.dtype() == DType::BF16 && op.activations == DType::BF16 && chunks;
        if for_units && self.by_units(&op, &product, rounded)? {
            return Ok(());
        }
        let kernel = of_type(w.dtype(), ["tiles_f32", "tiles_f16", "tiles_bf16"]);
        let grid = (n.div_ceil(TILE), rows.div_ceil(TILE), 1);
        launch!(self, kernel, grid, 256, 0; product)
    }

    /// How warps share `n` outputs, and how many blocks that makes: so that all processors have as much
    /// to do.
    pub fn split(&self, n: usize) -> (usize, usize) {
        let processors = self.device.processors.max(1);
        let mut best = (0, n.div_ceil(2 * WARPS), 0.0);
        // Outputs of a block.
        for (split, outputs) in [2 * WARPS, WARPS, WARPS / 2, WARPS / 4]
            .into_iter()
            .enumerate()
        {
            let blocks = n.div_ceil(outputs);
            let busy = blocks as f64 / blocks.next_multiple_of(processors) as f64;
            let fits = split == 0 || blocks <= BLOCKS * processors;
            if n > 1 && fits && busy > best.2 + 0.02 {
                best = (split, blocks, busy);
            }
        }
        if n == 1 {
            return (3, 1);
        }
        (best.0, best.1)
    }

    /// The library of products, loaded when it is first asked for.
    pub(super) fn matmul(&mut self) -> Result<&mut Matmul> {
        let matmul = match self.matmul.take() {
            Some(matmul) => matmul,
            None => Matmul::new(&self.device, &self.libraries)?,
        };
        Ok(self.matmul.insert(matmul))
    }

    /// False where the library has no algorithm for the shape.
    fn by_units(
        &mut self,
        op: &Linear<'_>,
        product: &Product,
        rounded: Option<Rounded>,
    ) -> Result<bool> {
        let (m, k, n) = (op.x.rows(), op.x.cols(), op.w.rows());
        // K is a multiple of eight.
        let x = self.scratch(2 * m * k)?;
        let of = Rounded {
            from: product.x,
            rows: m,
            cols: k,
            to: x,
            format: None,
        };
        if rounded != Some(of) {
            let wide = i32::from(product.x.wide());
            launch!(self, "round_rows", rows::grid(m, k), 256, 0;
                product.x, x, k as i32, k as i32, wide)?;
        }
        let shape = Shape {
            integers: false,
            m,
            n,
            k,
            x_stride: k,
            y_stride: if m == 1 { n } else { op.y.stride() },
            w_align: alignment(product.w),
            y_align: alignment(product.y.pointer),
        };
        if !self.matmul()?.run(shape, x, product.w, product.y.pointer)? {
            return Ok(false);
        }
        if product.bias != 0 {
            launch!(self, "add_bias", rows::grid(m, n), 256, 0; product.bias, product.y, n as i32)?;
        }
        self.rounded = Some(of);
        Ok(true)
    }
}

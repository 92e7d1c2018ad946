//! Weights of E4M3 codes with a scale a row, laid out as those of [`int8`](super::int8). With BF16 activations inputs are
//! rounded to BF16 once, and codes are widened to that in registers. One row goes as [`row_blocks`](super::row_blocks)
//! has it, few by a warp an output, more on matrix units; of many rows codes are widened to BF16 in memory, for the
//! library's product. Products are exact in all of them, sums have orders of their own. With F32 activations rows are
//! widened with their scales, code times scale rounded to f32.

use super::device::{Param, launch};
use super::experts::{ExpertProduct, ONE_BY_ONE, tiles};
use super::linear::Rounded;
use super::matmul::{Shape, alignment};
use super::{Rows, State, address, blocks, optional, rows};
use crate::error::Result;
use crate::format::Format;
use crate::ops::{ExpertLinear, Linear};
use crate::tensor::{DType, Tensor};

/// Rows that go without tiles.
const FEW: usize = 8;
/// Outputs of a block of them.
const WARPS: usize = 8;
/// Rows from which on the matrix is widened in memory, which costs as much as some hundred rows of a product.
const MANY: usize = 512;
/// Rows and outputs of a tile in fp8.cu, and what three stages of it take.
const TILE: usize = 128;
const STAGES: usize = 3 * TILE * ((2 * 64 + 32) + (64 + 16));

/// `Codes` in fp8.cu.
#[repr(C)]
struct Codes {
    x: u64,
    w: u64,
    experts: u64,
    bias: u64,
    y: Rows,
    rows: i32,
    k: i32,
    n: i32,
    x_div: i32,
}

// SAFETY: laid out as there.
unsafe impl Param for Codes {}

/// Codes of a row, and BF16 numbers of a row of x: `pitch_of` in fp8.cu.
fn pitch(k: usize) -> usize {
    k.next_multiple_of(16)
}

impl State {
    /// Rows of x in BF16 at `to`.
    fn round_fp8(&mut self, x: &Tensor, to: u64) -> Result<()> {
        let (of, k) = (Rows::of(x)?, x.cols());
        let pitch = pitch(k);
        let wide = i32::from(of.wide() && pitch == k);
        launch!(self, "round_rows", rows::grid(x.rows(), pitch), 256, 0;
            of, to, pitch as i32, k as i32, wide)
    }

    /// A product with BF16 activations.
    pub(super) fn linear_fp8(&mut self, op: &Linear<'_>, rounded: Option<Rounded>) -> Result<()> {
        let (rows, k, n) = (op.x.rows(), op.x.cols(), op.w.rows());
        let of_x = (2 * rows * pitch(k)).next_multiple_of(256);
        let many = rows >= MANY && k.is_multiple_of(8);
        let each = blocks::part(n, 2 * k);
        let x = self.scratch(of_x + if many { 2 * each * k } else { 0 })?;
        let of = Rounded {
            from: Rows::of(op.x)?,
            rows,
            cols: k,
            to: x,
            // Rows without gaps are those of products with BF16.
            format: (pitch(k) != k).then_some(Format::Fp8),
        };
        if rounded != Some(of) {
            self.round_fp8(op.x, x)?;
        }
        self.rounded = Some(of);
        if many && self.fp8_widened(op, x, x + of_x as u64, each)? {
            return Ok(());
        }
        let codes = Codes {
            x,
            w: address(op.w.data())?,
            experts: 0,
            bias: optional(op.bias)?,
            y: Rows::of(op.y)?,
            rows: rows as i32,
            k: k as i32,
            n: n as i32,
            x_div: 1,
        };
        if rows <= FEW {
            let (kernel, of) = match rows {
                1 => ("few_fp8_1", 1),
                2 => ("few_fp8_2", 2),
                _ => ("few_fp8_4", 4),
            };
            let grid = (n.div_ceil(WARPS), rows.div_ceil(of), 1);
            return launch!(self, kernel, grid, 32 * WARPS, 0; codes);
        }
        let grid = (n.div_ceil(TILE), rows.div_ceil(TILE), 1);
        launch!(self, "units_fp8", grid, 256, STAGES; codes)
    }

    /// Many rows: parts of the matrix as BF16, `each` rows of it at `w`. False where the library has no algorithm.
    fn fp8_widened(&mut self, op: &Linear<'_>, x: u64, w: u64, each: usize) -> Result<bool> {
        let (m, k, n) = (op.x.rows(), op.x.cols(), op.w.rows());
        for first in (0..n).step_by(each) {
            let part = each.min(n - first);
            self.widen("widen_fp8", op.w, first..first + part, w, DType::BF16)?;
            let y = blocks::after(op.y, first)?.pointer;
            let shape = Shape {
                integers: false,
                m,
                n: part,
                k,
                x_stride: pitch(k),
                y_stride: op.y.stride(),
                w_align: alignment(w),
                y_align: alignment(y),
            };
            if !self.matmul()?.run(shape, x, w, y)? {
                return Ok(false);
            }
        }
        let scales = address(op.w.data())? + (n * pitch(k)) as u64;
        let (bias, y) = (optional(op.bias)?, Rows::of(op.y)?);
        launch!(self, "scale_fp8", rows::grid(m, n), 256, 0; scales, bias, y, n as i32)?;
        Ok(true)
    }

    /// Products with chosen experts and BF16 activations.
    pub(super) fn expert_fp8(
        &mut self,
        op: &ExpertLinear<'_>,
        product: &ExpertProduct,
    ) -> Result<()> {
        let (choices, k, n) = (op.y.rows(), op.x.cols(), op.y.cols());
        let of_x = 2 * op.x.rows() * pitch(k);
        let (sorted, x) = if choices <= ONE_BY_ONE {
            (None, self.scratch(of_x)?)
        } else {
            let (sorted, x) = self.sort_choices(product, choices, op.w.len(), TILE, of_x)?;
            (Some(sorted), x)
        };
        self.round_fp8(op.x, x)?;
        let codes = Codes {
            x,
            w: 0,
            experts: product.w,
            bias: 0,
            y: product.y,
            rows: choices as i32,
            k: k as i32,
            n: n as i32,
            x_div: product.x_div,
        };
        let Some(sorted) = sorted else {
            let grid = (n.div_ceil(WARPS), choices, 1);
            return launch!(self, "few_fp8_chosen", grid, 32 * WARPS, 0;
                codes, product.experts, product.experts_stride, product.choices);
        };
        let grid = (n.div_ceil(TILE), tiles(choices, op.w.len(), TILE), 1);
        launch!(self, "units_fp8_chosen", grid, 256, STAGES; codes, sorted)
    }
}

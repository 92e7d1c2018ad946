//! Weights of whole numbers with a scale a row. With BF16 activations inputs become bytes with a scale a row, and since
//! sums of whole numbers are exact, one row and many give the same bits, which are the CPU's too. One row goes as
//! [`row_blocks`](super::row_blocks) has it, few by dot products of bytes, more by the library's products of bytes, or
//! by tiles of our own where it has none and for chosen experts.

use cudarc::driver::result;

use super::device::{Allocation, Param, failed, launch};
use super::experts::{ExpertProduct, ONE_BY_ONE, tiles};
use super::linear::Rounded;
use super::matmul::{Shape, alignment};
use super::{Rows, State, address, optional, rows};
use crate::error::Result;
use crate::format::Format;
use crate::ops::{ExpertLinear, Linear};
use crate::tensor::Tensor;

/// Rows that go without tiles.
const FEW: usize = 4;
/// Outputs of a block of them.
const WARPS: usize = 8;
/// Rows and outputs of a tile in int8.cu, and what four stages of it take.
const TILE: usize = 128;
const STAGES: usize = 4 * 2 * TILE * (64 + 16);
/// Bytes that are uploaded at a time.
const PART: usize = 16 << 20;

/// `Bytes` in int8.cu.
#[repr(C)]
struct Bytes {
    x: u64,
    scales: u64,
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
unsafe impl Param for Bytes {}

/// Bytes of a row's codes: `pitch_of` in int8.cu.
fn pitch(k: usize) -> usize {
    k.next_multiple_of(16)
}

/// Bytes of so many rounded rows.
fn room(rows: usize, k: usize) -> usize {
    rows * (pitch(k) + 4)
}

impl State {
    /// Copies rows to the device: all codes, then all scales.
    pub(super) fn upload_int8(
        &mut self,
        bytes: &[u8],
        rows: usize,
        k: usize,
    ) -> Result<Allocation> {
        let memory = Allocation::zeroed(&self.device, room(rows, k))?;
        let row = k.next_multiple_of(4) + 4;
        let each = (PART / row).max(1);
        for (i, part) in bytes.chunks(each * row).enumerate() {
            let room = self.scratch(part.len())?;
            // SAFETY: there is room for the bytes, which the driver has taken over when this returns.
            unsafe { result::memcpy_htod_async(room, part, self.device.stream) }
                .map_err(failed("copying a weight"))?;
            let (first, count) = ((i * each) as i64, (part.len() / row) as i64);
            launch!(self, "arrange_int8", (part.len().div_ceil(1024), 1, 1), 256, 0;
                room, memory.pointer, first, count, rows as i64, k as i32)?;
        }
        Ok(memory)
    }

    /// Rows of x as bytes at `to`, then their scales.
    fn round_int8(&mut self, x: &Tensor, to: u64) -> Result<u64> {
        let scales = to + (x.rows() * pitch(x.cols())) as u64;
        launch!(self, "round_int8", (x.rows(), 1, 1), 256, 0;
            Rows::of(x)?, to, scales, x.cols() as i32)?;
        Ok(scales)
    }

    /// A product with BF16 activations.
    pub(super) fn linear_int8(&mut self, op: &Linear<'_>, rounded: Option<Rounded>) -> Result<()> {
        let (rows, k, n) = (op.x.rows(), op.x.cols(), op.w.rows());
        let x = self.scratch(room(rows, k))?;
        let of = Rounded {
            from: Rows::of(op.x)?,
            rows,
            cols: k,
            to: x,
            format: Some(Format::Int8),
        };
        let mut scales = x + (rows * pitch(k)) as u64;
        if rounded != Some(of) {
            scales = self.round_int8(op.x, x)?;
        }
        let bytes = Bytes {
            x,
            scales,
            w: address(op.w.data())?,
            experts: 0,
            bias: optional(op.bias)?,
            y: Rows::of(op.y)?,
            rows: rows as i32,
            k: k as i32,
            n: n as i32,
            x_div: 1,
        };
        let shape = Shape {
            integers: true,
            m: rows,
            n,
            k: pitch(k),
            x_stride: pitch(k),
            y_stride: if rows == 1 { n } else { op.y.stride() },
            w_align: alignment(bytes.w),
            y_align: alignment(bytes.y.pointer),
        };
        if rows <= FEW {
            let grid = (n.div_ceil(WARPS), rows, 1);
            launch!(self, "few_int8", grid, 32 * WARPS, 0; bytes)?;
        } else if self.matmul()?.run(shape, x, bytes.w, bytes.y.pointer)? {
            launch!(self, "scale_int8", rows::grid(rows, n), 256, 0; bytes)?;
        } else {
            let grid = (n.div_ceil(TILE), rows.div_ceil(TILE), 1);
            launch!(self, "units_int8", grid, 256, STAGES; bytes)?;
        }
        self.rounded = Some(of);
        Ok(())
    }

    /// Products with chosen experts and BF16 activations.
    pub(super) fn expert_int8(
        &mut self,
        op: &ExpertLinear<'_>,
        product: &ExpertProduct,
    ) -> Result<()> {
        let (choices, k, n) = (op.y.rows(), op.x.cols(), op.y.cols());
        let of_x = room(op.x.rows(), k);
        let few = choices <= ONE_BY_ONE;
        let (sorted, x) = if few {
            (None, self.scratch(of_x)?)
        } else {
            let (sorted, x) = self.sort_choices(product, choices, op.w.len(), TILE, of_x)?;
            (Some(sorted), x)
        };
        let bytes = Bytes {
            x,
            scales: self.round_int8(op.x, x)?,
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
            return launch!(self, "few_int8_chosen", grid, 32 * WARPS, 0;
                bytes, product.experts, product.experts_stride, product.choices);
        };
        let grid = (n.div_ceil(TILE), tiles(choices, op.w.len(), TILE), 1);
        launch!(self, "units_int8_chosen", grid, 256, STAGES; bytes, sorted)
    }
}

#[cfg(test)]
mod tests {
    use super::{pitch, room};

    #[test]
    fn rows_are_whole_chunks_and_scales_are_aligned() {
        assert_eq!([1, 16, 17, 2560].map(pitch), [16, 16, 32, 2560]);
        for rows in [1, 3, 64] {
            assert!((rows * pitch(33)).is_multiple_of(4));
            assert_eq!(room(rows, 33), rows * (48 + 4));
        }
    }
}

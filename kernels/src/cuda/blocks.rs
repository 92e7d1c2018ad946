//! Weights in blocks. Uploaded, the blocks of a matrix are laid out by fields, so that what neighbouring
//! threads read is side by side and aligned; the bytes stay as many.
//!
//! With BF16 activations inputs become 8-bit integers, as [`rounded`](crate::rounded) has it. Where
//! [`row_blocks`](super::row_blocks) and [`block_units`](super::block_units) have kernels, those multiply. Else up to
//! eight rows are multiplied straight from the blocks, by integer products; blocks are summed in another
//! order than there. More rows go through matrix units: both sides are widened and rounded to BF16, the
//! inputs after their rounding to integers, so that one row and many see the same inputs but for half a
//! unit of BF16. With F32 activations nothing is rounded: rows of the matrix are widened to f32.

use super::device::{Allocation, Param, launch};
use super::linear::{Product, TILE};
use super::matmul::{Shape, alignment};
use super::{Rows, State, address, dense, optional, rows};
use crate::error::Result;
use crate::format::Format;
use crate::formats::unpack::Form;
use crate::matrix::Matrix;
use crate::ops::{Embed, Linear};
use crate::tensor::DType;

/// Rows that are multiplied straight from the blocks.
const FEW: usize = 8;
/// Warps of a block of `few`, and outputs that a team of them takes at a time.
const WARPS: usize = 8;
const OUTPUTS: usize = 2;
/// Blocks of `few` on a processor.
const RESIDENT: usize = 3;
/// Warps a processor that are enough to read at full speed.
const BUSY: usize = 16;
/// Bytes that a widened part of a matrix takes at most.
const WIDENED: usize = 64 << 20;
/// Bytes of blocks that are uploaded at a time.
const PART: usize = 16 << 20;

/// `Few` in blocks.cuh.
#[repr(C)]
struct Few {
    x: Rows,
    w: u64,
    blocks: i64,
    bias: u64,
    y: Rows,
    rows: i32,
    k: i32,
    n: i32,
    split: i32,
    wide: i32,
    row_bytes: i32,
}

/// `Widen` in blocks.cuh.
#[repr(C)]
pub(super) struct Widen {
    pub w: u64,
    pub list: u64,
    pub table: u64,
    pub blocks: i64,
    pub ids: u64,
    pub first: i32,
    pub k: i32,
    pub to: u64,
    pub stride: i64,
    pub dtype: i32,
    pub wide: i32,
}

/// `Arrange` in blocks_narrow.cu.
#[repr(C)]
struct Arrange {
    from: u64,
    to: u64,
    first: i64,
    count: i64,
    blocks: i64,
    bytes: i32,
    offset: [i32; 4],
    size: [i32; 4],
}

// SAFETY: laid out as there.
unsafe impl Param for Few {}
// SAFETY: as above.
unsafe impl Param for Widen {}
// SAFETY: as above.
unsafe impl Param for Arrange {}

/// The kernels of a format.
pub(super) struct Kernels {
    /// For up to one, four and eight rows.
    few: [&'static str; 3],
    pub chosen: &'static str,
    pub widen: &'static str,
    /// Where the fields of a block lie, in the order in which they are laid out: offset and size.
    fields: &'static [(usize, usize)],
}

/// Those of a format in blocks that has some.
pub(super) fn kernels(format: Format) -> Option<Kernels> {
    macro_rules! of {
        ($name:literal, $fields:expr) => {
            Some(Kernels {
                few: [
                    concat!("few_", $name, "_1"),
                    concat!("few_", $name, "_4"),
                    concat!("few_", $name, "_8"),
                ],
                chosen: concat!("few_", $name, "_chosen"),
                widen: concat!("widen_", $name),
                fields: &$fields,
            })
        };
    }
    match format {
        Format::Q8_0 => of!("q8_0", [(2, 32), (0, 2)]),
        Format::Q4_0 => of!("q4_0", [(2, 16), (0, 2)]),
        Format::Iq4Nl => of!("iq4_nl", [(2, 16), (0, 2)]),
        Format::Q4_1 => of!("q4_1", [(4, 16), (0, 4)]),
        Format::Q5_0 => of!("q5_0", [(6, 16), (2, 4), (0, 2)]),
        Format::Q5_1 => of!("q5_1", [(8, 16), (4, 4), (0, 4)]),
        Format::Q4K => of!("q4_k", [(16, 128), (0, 16)]),
        Format::Q5K => of!("q5_k", [(48, 128), (16, 32), (0, 16)]),
        Format::Q6K => of!("q6_k", [(0, 128), (128, 64), (192, 16), (208, 2)]),
        Format::Iq4Xs => of!("iq4_xs", [(8, 128), (0, 8)]),
        Format::Q3K => of!("q3_k", [(32, 64), (0, 32), (96, 12), (108, 2)]),
        Format::Q2K => of!("q2_k", [(16, 64), (0, 16), (80, 4)]),
        _ => None,
    }
}

/// The kernel that widens rows of a format that is not stored one by one.
pub(super) fn widening(format: Format) -> Option<&'static str> {
    match format {
        Format::Int8 => Some("widen_int8"),
        Format::Fp8 => Some("widen_fp8"),
        _ => kernels(format).map(|k| k.widen),
    }
}

/// Blocks of a matrix; its rows where those have scales.
pub(super) fn blocks(w: &Matrix) -> usize {
    if w.format().scales_rows() {
        return w.rows();
    }
    w.rows() * (w.cols() / w.format().block().elements)
}

/// Bytes of shared memory that `rows` rounded rows take: `row_room` in blocks.cuh, and BF16 beside fp8.
pub(super) fn room(format: Format, k: usize, rows: usize) -> usize {
    if matches!(format, Format::Fp8 | Format::BF16) {
        return rows * (2 * k).next_multiple_of(16);
    }
    let block = if format.scales_rows() {
        128
    } else {
        Form::of(format).block
    };
    rows * (k + k / 4 + 4 * (k / block)).next_multiple_of(16)
}

/// Rows of `n` that are widened at a time, at `bytes` a row.
pub(super) fn part(n: usize, bytes: usize) -> usize {
    let parts = (n * bytes).div_ceil(WIDENED).max(1);
    n.div_ceil(parts).next_multiple_of(2 * TILE).min(n).max(1)
}

impl State {
    /// Copies blocks to the device, laid out by fields.
    pub(super) fn upload_blocks(&mut self, format: Format, bytes: &[u8]) -> Result<Allocation> {
        let memory = Allocation::new(&self.device, bytes.len())?;
        let size = format.block().bytes;
        let fields = kernels(format).map_or(&[][..], |k| k.fields);
        let (mut offset, mut sizes) = ([0; 4], [0; 4]);
        for (i, (at, len)) in fields.iter().enumerate() {
            (offset[i], sizes[i]) = (*at as i32, *len as i32);
        }
        let each = PART / size;
        for (i, part) in bytes.chunks(each * size).enumerate() {
            let room = self.scratch(part.len())?;
            self.send(room, part)?;
            let arrange = Arrange {
                from: room,
                to: memory.pointer,
                first: (i * each) as i64,
                count: (part.len() / size) as i64,
                blocks: (bytes.len() / size) as i64,
                bytes: size as i32,
                offset,
                size: sizes,
            };
            let grid = (part.len().div_ceil(1024), 1, 1);
            launch!(self, "arrange", grid, 256, 0; arrange)?;
        }
        Ok(memory)
    }

    /// How many warps share outputs, so that all processors have enough of them, and blocks of them.
    pub(super) fn teams(&self, n: usize, k: usize) -> (usize, usize) {
        let (groups, processors) = (n.div_ceil(OUTPUTS), self.device.processors.max(1));
        let mut split = 1;
        while split < WARPS && groups * split < BUSY * processors && k > 1024 * split {
            split *= 2;
        }
        let blocks = groups.div_ceil(WARPS / split);
        let turns = blocks.div_ceil(RESIDENT * processors);
        (split, blocks.div_ceil(turns))
    }

    pub(super) fn embed_blocks(&mut self, op: Embed<'_>) -> Result<()> {
        let Some(widening) = widening(op.table.format()) else {
            return dense("embed", op.table);
        };
        let (y, k) = (Rows::of(op.y)?, op.table.cols());
        let widen = Widen {
            w: address(op.table.data())?,
            list: 0,
            table: 0,
            blocks: blocks(op.table) as i64,
            ids: self.lists.ids(op.ids)?,
            first: 0,
            k: k as i32,
            to: y.pointer,
            stride: y.stride,
            dtype: 0,
            wide: i32::from(y.wide()),
        };
        let grid = (op.ids.len(), k.div_ceil(32).div_ceil(128), 1);
        launch!(self, widening, grid, 128, 0; widen)
    }

    pub(super) fn linear_blocks(&mut self, op: &Linear<'_>) -> Result<()> {
        let Some(widening) = widening(op.w.format()) else {
            return dense("linear", op.w);
        };
        let (rows, k, n) = (op.x.rows(), op.x.cols(), op.w.rows());
        let rounded = op.activations == DType::BF16;
        if let Some(kernels) = kernels(op.w.format()).filter(|_| rounded) {
            let shared = room(op.w.format(), k, if rows == 1 { 1 } else { 8 });
            if rows <= FEW && shared <= self.device.shared_memory {
                return self.few(op, &kernels);
            }
            if self.blocks_by_units(op, &kernels)? {
                return Ok(());
            }
        }
        // Part of the matrix as f32, and x where it is rounded.
        let each = part(n, 4 * k);
        let of_x = if rounded { 4 * rows * k } else { 0 };
        let scratch = self.scratch(of_x + 4 * each * k)?;
        let mut x = Rows::of(op.x)?;
        if rounded {
            x = self.round_blocks(op.x, op.w.format(), scratch, DType::F32)?;
        }
        let w = scratch + of_x as u64;
        for first in (0..n).step_by(each) {
            let part = each.min(n - first);
            self.widen(widening, op.w, first..first + part, w, DType::F32)?;
            let product = Product {
                x,
                w,
                bias: match optional(op.bias)? {
                    0 => 0,
                    bias => bias + 4 * first as u64,
                },
                y: after(op.y, first)?,
                rows: rows as i32,
                k: k as i32,
                n: part as i32,
                round: 0,
            };
            if rows == 1 && x.wide() && k.is_multiple_of(4) {
                let grid = (part.div_ceil(WARPS), 1, 1);
                launch!(self, "one_row_f32_1_1", grid, 32 * WARPS, 0; product)?;
            } else {
                let grid = (part.div_ceil(TILE), rows.div_ceil(TILE), 1);
                launch!(self, "tiles_f32", grid, 256, 0; product)?;
            }
        }
        Ok(())
    }

    fn few(&mut self, op: &Linear<'_>, kernels: &Kernels) -> Result<()> {
        let (rows, k, n) = (op.x.rows(), op.x.cols(), op.w.rows());
        let (x, y) = (Rows::of(op.x)?, Rows::of(op.y)?);
        let block = op.w.format().block().elements;
        let (split, grid) = self.teams(n, k);
        let few = Few {
            x,
            w: address(op.w.data())?,
            blocks: blocks(op.w) as i64,
            bias: optional(op.bias)?,
            y,
            rows: rows as i32,
            k: k as i32,
            n: n as i32,
            split: split as i32,
            wide: i32::from(x.wide()),
            row_bytes: (k / block * kernels.fields[0].1) as i32,
        };
        let (kernel, of) = match rows {
            1 => (kernels.few[0], 1),
            2..=4 => (kernels.few[1], 4),
            _ => (kernels.few[2], 8),
        };
        let shared = room(op.w.format(), k, of);
        launch!(self, kernel, (grid, 1, 1), 32 * WARPS, shared; few)
    }

    /// Rows of `w` as numbers, side by side at `to`.
    pub(super) fn widen(
        &mut self,
        kernel: &'static str,
        w: &Matrix,
        range: std::ops::Range<usize>,
        to: u64,
        dtype: DType,
    ) -> Result<()> {
        let k = w.cols();
        let widen = Widen {
            w: address(w.data())?,
            list: 0,
            table: 0,
            blocks: blocks(w) as i64,
            ids: 0,
            first: range.start as i32,
            k: k as i32,
            to,
            stride: k as i64,
            dtype: super::code(dtype),
            wide: 1,
        };
        let grid = (range.len(), k.div_ceil(32).div_ceil(128), 1);
        launch!(self, kernel, grid, 128, 0; widen)
    }

    /// Rows of x at `to`, rounded as products with this format take them.
    pub(super) fn round_blocks(
        &mut self,
        x: &crate::tensor::Tensor,
        format: Format,
        to: u64,
        dtype: DType,
    ) -> Result<Rows> {
        let (of, k) = (Rows::of(x)?, x.cols());
        let kernel = match Form::of(format).block {
            32 => "round_blocks_32",
            _ => "round_blocks_256",
        };
        let grid = (x.rows(), k.div_ceil(2048), 1);
        let wide = i32::from(of.wide());
        launch!(self, kernel, grid, 256, 0; of, to, super::code(dtype), k as i32, wide)?;
        Ok(Rows {
            pointer: to,
            stride: k as i64,
        })
    }

    /// By matrix units: parts of the matrix as BF16. False where the library has no algorithm.
    fn blocks_by_units(&mut self, op: &Linear<'_>, kernels: &Kernels) -> Result<bool> {
        let (m, k, n) = (op.x.rows(), op.x.cols(), op.w.rows());
        let each = part(n, 2 * k);
        let of_x = (2 * m * k).next_multiple_of(256);
        let x = self.scratch(of_x + 2 * each * k)?;
        let w = x + of_x as u64;
        self.round_blocks(op.x, op.w.format(), x, DType::BF16)?;
        for first in (0..n).step_by(each) {
            let part = each.min(n - first);
            self.widen(kernels.widen, op.w, first..first + part, w, DType::BF16)?;
            let y = after(op.y, first)?.pointer;
            let shape = Shape {
                integers: false,
                m,
                n: part,
                k,
                x_stride: k,
                y_stride: if m == 1 { n } else { op.y.stride() },
                w_align: alignment(w),
                y_align: alignment(y),
            };
            if !self.matmul()?.run(shape, x, w, y)? {
                return Ok(false);
            }
        }
        let bias = optional(op.bias)?;
        if bias != 0 {
            let y = Rows::of(op.y)?;
            launch!(self, "add_bias", rows::grid(m, n), 256, 0; bias, y, n as i32)?;
        }
        Ok(true)
    }
}

/// The columns of y from `first` on.
pub(super) fn after(y: &crate::tensor::Tensor, first: usize) -> Result<Rows> {
    let y = Rows::of(y)?;
    Ok(Rows {
        pointer: y.pointer + 4 * first as u64,
        ..y
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_whole_blocks_and_aligned() {
        for format in Format::ALL {
            let Some(kernels) = kernels(format) else {
                continue;
            };
            let block = format.block();
            let mut seen = vec![0; block.bytes];
            let mut before = 0;
            for (at, size) in kernels.fields {
                seen[*at..at + size].iter_mut().for_each(|s| *s += 1);
                // Where a field of the last of one block, or of eight, begins.
                let read = size.next_power_of_two().min(16) >> (2 * usize::from(*size == 12));
                assert!(before % read == 0, "{format}: {at}");
                before += size;
            }
            assert!(seen.iter().all(|s| *s == 1), "{format}");
        }
        let blocks = Format::ALL.iter().filter(|f| f.dtype().is_none()).count();
        let known = Format::ALL.iter().filter(|f| kernels(**f).is_some());
        assert!(blocks >= 12 && known.count() == 12);
    }

    #[test]
    fn parts_are_bounded_and_cover() {
        assert_eq!(part(10_240, 2 * 2560), 10_240);
        assert_eq!(part(5, 64), 5);
        let each = part(65_536, 2 * 2560);
        assert!(each * 2 * 2560 <= WIDENED + 2 * TILE * 2 * 2560 && each.is_multiple_of(128));
    }
}

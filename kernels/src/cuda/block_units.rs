//! Products of up to 64 rows with weights in blocks, rounded to integers, on matrix units that multiply bytes,
//! for the formats that have kernels for it. Rows are rounded once for all products that take them one after
//! the other.

use super::device::{Param, launch};
use super::linear::Rounded;
use super::{Rows, State, address, blocks, optional};
use crate::error::Result;
use crate::format::Format;
use crate::formats::unpack::Form;
use crate::ops::Linear;
use crate::tensor::DType;

/// Most rows.
const MOST: usize = 64;
/// Rows of a tile, and outputs of a warp.
const TILE: usize = 8;
const OUTPUTS: usize = 16;
/// Warps of a block.
const WARPS: usize = 8;
/// Codes of a step.
const STEP: usize = 128;

/// `Units` in blocks_units.cu.
#[repr(C)]
struct Units {
    x: u64,
    w: u64,
    blocks: i64,
    bias: u64,
    y: Rows,
    rows: i32,
    k: i32,
    n: i32,
    split: i32,
}

// SAFETY: laid out as there.
unsafe impl Param for Units {}

/// The kernel that rounds rows for a format, and those for one, two, four and eight tiles of them.
fn kernels(format: Format) -> Option<(&'static str, [&'static str; 4])> {
    macro_rules! of {
        ($name:literal) => {
            Some((
                concat!("round_units_", $name),
                [
                    concat!("units_", $name, "_1"),
                    concat!("units_", $name, "_2"),
                    concat!("units_", $name, "_4"),
                    concat!("units_", $name, "_8"),
                ],
            ))
        };
    }
    match format {
        Format::Q8_0 => of!("q8_0"),
        Format::Q6K => of!("q6_k"),
        Format::Q4K => of!("q4_k"),
        _ => None,
    }
}

/// Bytes of so many tiles of rounded rows: codes, sums of runs, scales of blocks.
fn room(tiles: usize, k: usize, block: usize) -> usize {
    tiles * TILE * (k + 4 * (k / 32) + 4 * (k / block))
}

impl State {
    /// False where these kernels are not for the product.
    pub fn by_block_units(&mut self, op: &Linear<'_>, rounded: Option<Rounded>) -> Result<bool> {
        let (format, rows, k, n) = (op.w.format(), op.x.rows(), op.x.cols(), op.w.rows());
        let whole = k.is_multiple_of(STEP) && (2..=MOST).contains(&rows);
        let Some((round, kernels)) = kernels(format).filter(|_| whole) else {
            return Ok(false);
        };
        if op.activations != DType::BF16 {
            return Ok(false);
        }
        let kind = rows.div_ceil(TILE).next_power_of_two().trailing_zeros() as usize;
        let tiles = 1 << kind;
        let x = self.scratch(room(tiles, k, Form::of(format).block))?;
        let from = Rows::of(op.x)?;
        let of = Rounded {
            from,
            rows,
            cols: k,
            to: x,
            format: Some(format),
        };
        if rounded != Some(of) {
            let grid = (TILE * tiles, k.div_ceil(2048), 1);
            let wide = i32::from(from.wide());
            launch!(self, round, grid, 256, 0; from, rows as i32, x, k as i32, wide)?;
        }
        // By the outputs alone, and with it the order of sums.
        let few = n.div_ceil(OUTPUTS) <= WARPS * self.device.processors;
        let split = if few { WARPS } else { 2 };
        let units = Units {
            x,
            w: address(op.w.data())?,
            blocks: blocks::blocks(op.w) as i64,
            bias: optional(op.bias)?,
            y: Rows::of(op.y)?,
            rows: rows as i32,
            k: k as i32,
            n: n as i32,
            split: split as i32,
        };
        let grid = (n.div_ceil(WARPS / split * OUTPUTS), 1, 1);
        launch!(self, kernels[kind], grid, 32 * WARPS, 0; units)?;
        self.rounded = Some(of);
        Ok(true)
    }
}

//! Products of one row with weights in blocks, rounded to integers, for the formats that have kernels of their
//! own for it, and with large matrices in BF16. What follows them is done as [`row`](super::row) has it.

use super::device::{Param, launch};
use super::row::{Blocks, CONVOLVE, Convolution, RowProduct};
use super::{Rows, State, blocks};
use crate::error::Result;
use crate::format::Format;
use crate::ops::Linear;
use crate::tensor::DType;

/// Threads of a block, and teams of eight lanes: as in row_blocks.cu.
const THREADS: usize = 512;
const TEAMS: usize = THREADS / 8;
/// Elements from which on a matrix in BF16 is for these kernels: smaller ones are read at once by row.cu's.
const LARGE: usize = 1 << 22;
/// Bytes that an output's convolution needs: `WINDOW` floats in after.cuh.
const WINDOW: usize = 32;
/// From so many outputs a processor on it gets two blocks.
const OUTPUTS: usize = 8;

/// `BlockRow` in row_blocks.cu.
#[repr(C)]
struct BlockRow {
    x: Rows,
    w: u64,
    blocks: i64,
    bias: u64,
    y: Rows,
    k: i32,
    n: i32,
    after: i32,
    other: Rows,
    z: Rows,
    gate: u64,
    gate_bias: u64,
    gate_y: Rows,
    act: i32,
    rows: i32,
    share: i32,
    places: i32,
    wide: i32,
    windows: i32,
    conv: Convolution,
}

// SAFETY: laid out as there.
unsafe impl Param for BlockRow {}

/// The kernels of a format, plain and with a gate, and the codes of a step.
fn kernels(format: Format) -> Option<([&'static str; 2], usize)> {
    match format {
        Format::Q8_0 => Some((["row_q8_0", "row_q8_0_gated"], 128)),
        Format::Q4K => Some((["row_q4_k", "row_q4_k_gated"], 256)),
        Format::Q6K => Some((["row_q6_k", "row_q6_k_gated"], 256)),
        Format::Int8 => Some((["row_int8", "row_int8_gated"], 128)),
        Format::Fp8 => Some((["row_fp8", "row_fp8_gated"], 128)),
        Format::BF16 => Some((["row_bf16", "row_bf16_gated"], 64)),
        _ => None,
    }
}

/// How outputs are shared out: by the shape and the device alone, and with it the order of sums.
#[derive(Debug, PartialEq)]
struct Cut {
    /// Outputs of a block of threads, and how many of those there are.
    rows: usize,
    grid: usize,
    /// Steps of a team, and the outputs that it can have to do with.
    share: usize,
    places: usize,
}

impl Cut {
    fn new(n: usize, steps: usize, processors: usize) -> Self {
        let processors = processors.max(1);
        let blocks = if n >= OUTPUTS * processors {
            2 * processors
        } else {
            processors
        };
        let rows = n.div_ceil(blocks).max(1);
        let share = (rows * steps).div_ceil(TEAMS).max(1);
        Cut {
            rows,
            grid: n.div_ceil(rows),
            share,
            places: share / steps.max(1) + 2,
        }
    }
}

impl State {
    /// Where the blocks of a product's matrix are that is for these kernels.
    pub fn block_row(&self, op: &Linear<'_>) -> Option<Blocks> {
        let format = op.w.format();
        let (_, codes) = kernels(format)?;
        let (k, n) = (op.x.cols(), op.w.rows());
        let large = format != Format::BF16 || n * k >= LARGE;
        let fits =
            op.x.rows() == 1 && op.activations == DType::BF16 && k.is_multiple_of(codes) && large;
        let cut = Cut::new(n, k / codes, self.device.processors);
        let shared = blocks::room(format, k, 1) + 8 * TEAMS * cut.places + WINDOW * cut.rows;
        let steps = (cut.rows * (k / codes)).max(n);
        let fits = fits && shared <= self.device.shared_memory && steps < 1 << 24;
        fits.then(|| Blocks {
            format,
            count: blocks::blocks(op.w) as i64,
        })
    }

    /// Starts a product, or two with an activation between them.
    pub fn start_block_row(&mut self, of: &RowProduct, blocks: Blocks) -> Result<()> {
        let Some((kernels, codes)) = kernels(blocks.format) else {
            return Ok(());
        };
        let (k, n) = (of.k as usize, of.n as usize);
        let cut = Cut::new(n, k / codes, self.device.processors);
        let gated = of.gate != 0;
        let parts = 4 * TEAMS * cut.places * if gated { 2 } else { 1 };
        let room = blocks::room(blocks.format, k, 1);
        let row = BlockRow {
            x: of.x,
            w: of.w,
            blocks: blocks.count,
            bias: of.bias,
            y: of.y,
            k: of.k,
            n: of.n,
            after: of.after,
            other: of.other,
            z: of.z,
            gate: of.gate,
            gate_bias: of.gate_bias,
            gate_y: of.gate_y,
            act: of.act,
            rows: cut.rows as i32,
            share: cut.share as i32,
            places: cut.places as i32,
            wide: i32::from(of.x.wide()),
            windows: (room + parts) as i32,
            conv: of.conv,
        };
        let windows = if of.after == CONVOLVE {
            WINDOW * cut.rows
        } else {
            0
        };
        let shared = room + parts + windows;
        let kernel = kernels[usize::from(gated)];
        launch!(self, kernel, (cut.grid, 1, 1), THREADS, shared; row)
    }
}

#[cfg(test)]
mod tests {
    use super::{Cut, TEAMS};

    #[test]
    fn teams_have_places_for_all_outputs_they_meet() {
        for n in [1, 2, 7, 192, 1056, 2560, 10_240, 65_536, 131_072] {
            for steps in [1, 2, 3, 10, 20, 64, 257] {
                let cut = Cut::new(n, steps, 132);
                assert!(cut.rows * cut.grid >= n && cut.rows * (cut.grid - 1) < n);
                let total = cut.rows * steps;
                assert!(cut.share * TEAMS >= total);
                for team in 0..TEAMS {
                    let (first, end) = (team * cut.share, ((team + 1) * cut.share).min(total));
                    if first < end {
                        let met = (end - 1) / steps - first / steps + 1;
                        assert!(met <= cut.places, "{n} {steps} {team}");
                    }
                }
            }
        }
    }
}

//! Products with chosen experts: few choices one by one, many sorted by expert and in tiles.

use std::collections::HashMap;

use cudarc::driver::result;

use super::device::{Allocation, Param, failed, launch};
use super::linear::{in_chunks, of_type};
use super::{Rows, State, address, blocks, dense, rows};
use crate::error::{Error, Result};
use crate::format::Format;
use crate::matrix::Matrix;
use crate::ops::ExpertLinear;
use crate::tensor::DType;

/// Choices that go one by one: each reads its expert by itself.
pub(super) const ONE_BY_ONE: usize = 16;
const TILE: usize = 64;
/// Rows and outputs of a tile in expert_units.cu, and what four stages of it take.
const TILE_OF_UNITS: usize = 128;
const STAGES_OF_UNITS: usize = 4 * 2 * TILE_OF_UNITS * 2 * (32 + 8);
const WARPS: usize = 8;
/// Bytes that widened rows of all experts take at most, beyond a tile of each.
const WIDENED: usize = 256 << 20;

/// `ExpertProduct` in experts.cu.
#[repr(C)]
pub(super) struct ExpertProduct {
    pub x: Rows,
    pub w: u64,
    pub experts: u64,
    pub experts_stride: i64,
    pub y: Rows,
    pub k: i32,
    pub n: i32,
    pub round: i32,
    pub x_div: i32,
    pub choices: i32,
}

// SAFETY: laid out as there.
unsafe impl Param for ExpertProduct {}

/// `Chosen` in blocks.cuh.
#[repr(C)]
struct Chosen {
    x: Rows,
    w: u64,
    experts: u64,
    experts_stride: i64,
    blocks: i64,
    y: Rows,
    k: i32,
    n: i32,
    split: i32,
    wide: i32,
    x_div: i32,
    choices: i32,
}

// SAFETY: laid out as there.
unsafe impl Param for Chosen {}

/// `Sorted` in experts.cu.
#[repr(C)]
pub(super) struct Sorted {
    count: u64,
    order: u64,
    tiles: u64,
}

// SAFETY: laid out as there.
unsafe impl Param for Sorted {}

/// Lists of matrices' addresses on the device, by their contents.
#[derive(Default)]
pub(super) struct Tables {
    known: HashMap<Vec<u64>, Allocation>,
    asked: Vec<u64>,
}

impl State {
    /// Where the addresses of `of` stand on the device.
    fn table(&mut self, of: &[Matrix]) -> Result<u64> {
        let mut asked = std::mem::take(&mut self.experts.asked);
        asked.clear();
        for matrix in of {
            asked.push(address(matrix.data())?);
        }
        if let Some(known) = self.experts.known.get(&asked) {
            let pointer = known.pointer;
            self.experts.asked = asked;
            return Ok(pointer);
        }
        let memory = Allocation::new(&self.device, 8 * asked.len())?;
        // SAFETY: there is room, and the driver has taken the numbers over when this returns.
        unsafe { result::memcpy_htod_async(memory.pointer, &asked, self.device.stream) }
            .map_err(failed("sending a table"))?;
        let pointer = memory.pointer;
        self.experts.known.insert(asked, memory);
        Ok(pointer)
    }

    pub fn expert_linear(&mut self, op: ExpertLinear<'_>) -> Result<()> {
        let first = op.w[0].data();
        if op.w.iter().any(|w| w.format() != op.w[0].format()) {
            return Err(Error::Unsupported {
                op: "expert_linear",
                backend: "cuda",
                why: "the experts of a layer are of several types; convert them with --dtype"
                    .into(),
            });
        }
        let (choices, k, n) = (op.y.rows(), op.x.cols(), op.y.cols());
        let of_each = op.x.rows() != op.experts.rows();
        let product = ExpertProduct {
            x: Rows::of(op.x)?,
            w: self.table(op.w)?,
            experts: address(op.experts)?,
            experts_stride: op.experts.stride() as i64,
            y: Rows::of(op.y)?,
            k: k as i32,
            n: n as i32,
            round: i32::from(op.activations == DType::BF16),
            x_div: if of_each { 1 } else { op.experts.cols() as i32 },
            choices: op.experts.cols() as i32,
        };
        if op.w[0].format().dtype().is_none() {
            return self.expert_blocks(&op, product);
        }
        let mut chunks = product.x.wide();
        for w in op.w {
            chunks &= in_chunks(w.data(), address(w.data())?);
        }
        if choices <= ONE_BY_ONE && chunks {
            let names = ["expert_row_f32", "expert_row_f16", "expert_row_bf16"];
            let grid = (n.div_ceil(WARPS), choices, 1);
            return launch!(self, of_type(first.dtype(), names), grid, 32 * WARPS, 0; product);
        }
        let experts = op.w.len();
        let rounded = op.activations == DType::BF16 && first.dtype() == DType::BF16;
        if rounded && chunks {
            let of_x = 2 * op.x.rows() * k;
            let (sorted, room) =
                self.sort_choices(&product, choices, experts, TILE_OF_UNITS, of_x)?;
            launch!(self, "round_rows", rows::grid(op.x.rows(), k), 256, 0;
                product.x, room, k as i32, k as i32, 1i32)?;
            let most = tiles(choices, experts, TILE_OF_UNITS);
            let grid = (n.div_ceil(TILE_OF_UNITS), most, 1);
            return launch!(self, "expert_units", grid, 256, STAGES_OF_UNITS; product, sorted, room);
        }
        let sorted = self.sort_choices(&product, choices, experts, TILE, 0)?.0;
        let most = tiles(choices, experts, TILE);
        let names = ["expert_tiles_f32", "expert_tiles_f16", "expert_tiles_bf16"];
        let grid = (n.div_ceil(TILE), most, 1);
        launch!(self, of_type(first.dtype(), names), grid, 256, 0; product, sorted)
    }

    /// Sorts choices by expert and cuts them into tiles of `tile`, in memory that has `beside` bytes more at its beginning: where they are,
    /// and where the other bytes begin.
    pub(super) fn sort_choices(
        &mut self,
        product: &ExpertProduct,
        choices: usize,
        experts: usize,
        tile: usize,
        beside: usize,
    ) -> Result<(Sorted, u64)> {
        let (most, beside) = (tiles(choices, experts, tile), beside.next_multiple_of(256));
        let room = self.scratch(beside + 4 * (1 + choices + 3 * most + experts + 1))?;
        let count = room + beside as u64;
        let sorted = Sorted {
            count,
            order: count + 4,
            tiles: count + 4 * (1 + choices) as u64,
        };
        let ends = sorted.tiles + 12 * most as u64;
        launch!(self, "sort_choices", (1, 1, 1), 1024, 0;
            product.experts, product.experts_stride, product.choices, choices as i32,
            experts as i32, tile as i32, ends, sorted)?;
        Ok((sorted, room))
    }

    /// Experts in blocks: few choices straight from them; for many, rows of all experts are widened, as
    /// many at a time as fit a bounded memory.
    fn expert_blocks(&mut self, op: &ExpertLinear<'_>, mut product: ExpertProduct) -> Result<()> {
        let (format, experts) = (op.w[0].format(), op.w.len());
        let Some(widening) = blocks::widening(format) else {
            return dense("expert_linear", &op.w[0]);
        };
        let (choices, k, n) = (op.y.rows(), op.x.cols(), op.y.cols());
        let of_matrix = blocks::blocks(&op.w[0]) as i64;
        let rounded = op.activations == DType::BF16;
        match format {
            Format::Int8 if rounded => return self.expert_int8(op, &product),
            Format::Fp8 if rounded => return self.expert_fp8(op, &product),
            _ => {}
        }
        let shared = blocks::room(format, k, 1);
        let few = choices <= ONE_BY_ONE && shared <= self.device.shared_memory;
        if let Some(kernels) = blocks::kernels(format).filter(|_| rounded && few) {
            let (split, grid) = self.teams(n * choices, k);
            let chosen = Chosen {
                x: product.x,
                w: product.w,
                experts: product.experts,
                experts_stride: product.experts_stride,
                blocks: of_matrix,
                y: product.y,
                k: product.k,
                n: product.n,
                split: split as i32,
                wide: i32::from(product.x.wide()),
                x_div: product.x_div,
                choices: product.choices,
            };
            let grid = (grid.div_ceil(choices), choices, 1);
            return launch!(self, kernels.chosen, grid, 32 * WARPS, shared; chosen);
        }
        let each = (WIDENED / (4 * k * experts)).max(1);
        let each = each.next_multiple_of(TILE).min(n);
        let of_x = if rounded { 4 * op.x.rows() * k } else { 0 };
        let of_w = 4 * each * k * experts;
        let (sorted, room) =
            self.sort_choices(&product, choices, experts, TILE, of_x + of_w + 8 * experts)?;
        let (widened, table) = (room + of_x as u64, room + (of_x + of_w) as u64);
        if rounded {
            product.x = self.round_blocks(op.x, format, room, DType::F32)?;
        }
        (product.round, product.n) = (0, n as i32);
        let list = std::mem::replace(&mut product.w, table);
        for first in (0..n).step_by(each) {
            let part = each.min(n - first);
            let widen = blocks::Widen {
                w: 0,
                list,
                table,
                blocks: of_matrix,
                ids: 0,
                first: first as i32,
                k: k as i32,
                to: widened,
                stride: k as i64,
                dtype: 0,
                wide: 1,
            };
            let grid = (part, k.div_ceil(32).div_ceil(128), experts);
            launch!(self, widening, grid, 128, 0; widen)?;
            (product.y, product.n) = (blocks::after(op.y, first)?, part as i32);
            let grid = (part.div_ceil(TILE), tiles(choices, experts, TILE), 1);
            launch!(self, "expert_tiles_f32", grid, 256, 0; product, sorted)?;
        }
        Ok(())
    }
}

/// The most tiles of so many rows that choices are cut into.
pub(super) fn tiles(choices: usize, experts: usize, tile: usize) -> usize {
    choices.div_ceil(tile) + experts.min(choices)
}

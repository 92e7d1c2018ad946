//! Products with chosen experts: few choices one by one, many sorted by expert and in tiles.

use std::collections::HashMap;

use cudarc::driver::result;

use super::device::{Allocation, Param, failed, launch};
use super::linear::{in_chunks, of_type};
use super::{Rows, State, address, dense};
use crate::error::{Error, Result};
use crate::matrix::Matrix;
use crate::ops::ExpertLinear;
use crate::tensor::DType;

/// Choices that go one by one: each reads its expert by itself.
const ONE_BY_ONE: usize = 16;
const TILE: usize = 64;
const WARPS: usize = 8;

/// `ExpertProduct` in experts.cu.
#[repr(C)]
struct ExpertProduct {
    x: Rows,
    w: u64,
    experts: u64,
    experts_stride: i64,
    y: Rows,
    k: i32,
    n: i32,
    round: i32,
    x_div: i32,
    choices: i32,
}

// SAFETY: laid out as there.
unsafe impl Param for ExpertProduct {}

/// `Sorted` in experts.cu.
#[repr(C)]
struct Sorted {
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
        op.w.iter().try_for_each(|w| dense("expert_linear", w))?;
        let first = op.w[0].data();
        if op.w.iter().any(|w| w.data().dtype() != first.dtype()) {
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
        let most = choices.div_ceil(TILE) + experts.min(choices);
        let room = self.scratch(4 * (1 + choices + 3 * most + experts + 1))?;
        let sorted = Sorted {
            count: room,
            order: room + 4,
            tiles: room + 4 * (1 + choices) as u64,
        };
        let ends = sorted.tiles + 12 * most as u64;
        launch!(self, "sort_choices", (1, 1, 1), 1024, 0;
            product.experts, product.experts_stride, product.choices, choices as i32,
            experts as i32, ends, sorted)?;
        let names = ["expert_tiles_f32", "expert_tiles_f16", "expert_tiles_bf16"];
        let grid = (n.div_ceil(TILE), most, 1);
        launch!(self, of_type(first.dtype(), names), grid, 256, 0; product, sorted)
    }
}

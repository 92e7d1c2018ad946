//! Products of one row, in BF16 or with weights in blocks, and what follows them in the same kernel while a step is recorded: a gate
//! with its activation, a sum, a convolution; or what they go on to, a scan's step. All that the operations by themselves would write is written, in the same
//! bits, so nobody needs to know who reads what.

use super::device::{Param, launch};
use super::sequences::Given;
use super::{Rows, State, address, optional, rows, sequences};
use crate::error::Result;
use crate::format::Format;
use crate::ops::{Activate, Add, Conv1d, Linear, SelectiveScan};
use crate::tensor::DType;

/// Elements of a row that fit a block's shared memory in BF16.
const LONGEST: usize = 16_384;
const THREADS: usize = 256;

/// By what [`State::split`] says.
const PLAIN: [&str; 4] = ["row_2_1", "row_1_1", "row_1_2", "row_1_4"];
/// The same with a gate, of which a warp takes an output's two rows.
const GATED: [&str; 4] = ["row_gated_1", "row_gated_1", "row_gated_2", "row_gated_4"];
/// Outputs of a block with a gate.
const GATED_OUTPUTS: [usize; 4] = [8, 8, 4, 2];

/// `RowProduct` in row.cu.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct RowProduct {
    pub x: Rows,
    pub w: u64,
    pub bias: u64,
    pub y: Rows,
    pub k: i32,
    pub n: i32,
    pub after: i32,
    pub other: Rows,
    pub z: Rows,
    pub gate: u64,
    pub gate_bias: u64,
    pub gate_y: Rows,
    pub act: i32,
    pub conv: Convolution,
}

/// `Convolution` in after.cuh.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Convolution {
    w: Rows,
    bias: u64,
    state: u64,
    state_stride: i64,
    y: Rows,
    spans: u64,
    first: i32,
    cols: i32,
    act: i32,
}

/// What follows: `After` in after.cuh.
const ADD: i32 = 1;
pub(super) const CONVOLVE: i32 = 2;
/// Taps of a convolution that may follow.
const TAPS: usize = 4;

// SAFETY: laid out as there.
unsafe impl Param for RowProduct {}

/// Where the weights of a product are in blocks: how, and how many of them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Blocks {
    pub format: Format,
    pub count: i64,
}

/// A product and the form of its weights, which are BF16 if they are not in blocks.
#[derive(Clone, Copy)]
pub(super) struct OneRow {
    product: RowProduct,
    blocks: Option<Blocks>,
}

/// Products that wait for what follows them; none outside a recording.
#[derive(Default)]
#[expect(
    clippy::large_enum_variant,
    reason = "there is one of it, and its parts are copied"
)]
pub(super) enum Waiting {
    #[default]
    None,
    One(OneRow),
    /// Of one row with two matrices of one shape and form.
    Two(OneRow, OneRow),
}

/// Whether `n` floats from `a` on and `m` from `b` on have one in common.
fn overlap(a: u64, n: i32, b: u64, m: i32) -> bool {
    a < b + 4 * m as u64 && b < a + 4 * n as u64
}

impl RowProduct {
    /// Whether the kernel may write so many floats at `to` while blocks of it still read x.
    fn may_write(&self, to: u64) -> bool {
        !overlap(self.x.pointer, self.k, to, self.n)
    }

    /// Whether another product of the same shape reads the same row, and not this one's result.
    fn goes_with(&self, other: &RowProduct) -> bool {
        self.x.pointer == other.x.pointer
            && (self.k, self.n) == (other.k, other.n)
            && self.may_write(other.y.pointer)
            && other.may_write(self.y.pointer)
    }
}

impl OneRow {
    fn goes_with(&self, other: &OneRow) -> bool {
        self.blocks == other.blocks && self.product.goes_with(&other.product)
    }
}

impl State {
    /// Whether a product is for these kernels.
    pub fn is_row(op: &Linear<'_>, x: &Rows, chunks: bool) -> bool {
        op.x.rows() == 1
            && chunks
            && x.wide()
            && op.w.data().dtype() == DType::BF16
            && op.activations == DType::BF16
            && op.x.cols() <= LONGEST
    }

    /// A product of one row, now or with what follows it.
    pub fn row(&mut self, op: &Linear<'_>, blocks: Option<Blocks>) -> Result<()> {
        let none = Rows::NONE;
        let product = RowProduct {
            x: Rows::of(op.x)?,
            w: address(op.w.data())?,
            bias: optional(op.bias)?,
            y: Rows::of(op.y)?,
            k: op.x.cols() as i32,
            n: op.w.rows() as i32,
            after: 0,
            other: none,
            z: none,
            gate: 0,
            gate_bias: 0,
            gate_y: none,
            act: 0,
            conv: Convolution {
                w: none,
                bias: 0,
                state: 0,
                state_stride: 0,
                y: none,
                spans: 0,
                first: 0,
                cols: 0,
                act: 0,
            },
        };
        let product = OneRow { product, blocks };
        if !self.device.records() {
            return self.start_row(&product);
        }
        // Norms that wait were there before the product that waits.
        self.waiting = match std::mem::take(&mut self.waiting) {
            Waiting::One(first) if first.goes_with(&product) => Waiting::Two(first, product),
            Waiting::None if self.norms.give(product.product.x, product.product.k) => {
                Waiting::One(product)
            }
            before => {
                self.start_norms()?;
                self.start_waiting(before)?;
                Waiting::One(product)
            }
        };
        Ok(())
    }

    /// Starts what waits: what comes now does not belong to it.
    pub fn flush(&mut self) -> Result<()> {
        self.start_norms()?;
        let waiting = std::mem::take(&mut self.waiting);
        self.start_waiting(waiting)
    }

    fn start_waiting(&mut self, waiting: Waiting) -> Result<()> {
        match waiting {
            Waiting::None => Ok(()),
            Waiting::One(product) => self.start_row(&product),
            Waiting::Two(first, second) => {
                self.start_row(&first)?;
                self.start_row(&second)
            }
        }
    }

    fn start_row(&mut self, row: &OneRow) -> Result<()> {
        let product = &row.product;
        if let Some(blocks) = row.blocks {
            return self.start_block_row(product, blocks);
        }
        let (split, blocks) = self.split(product.n as usize);
        let shared = 2 * product.k as usize;
        launch!(self, PLAIN[split], (blocks, 1, 1), THREADS, shared; *product)
    }

    /// Does a sum with the product that waits for it; false if none does.
    pub fn added(&mut self, op: &Add<'_>) -> Result<bool> {
        let Waiting::One(mut row) = self.waiting else {
            return Ok(false);
        };
        let product = &mut row.product;
        let (a, b, z) = (Rows::of(op.a)?, Rows::of(op.b)?, Rows::of(op.y)?);
        let y = product.y.pointer;
        let other = if a.pointer == y { b } else { a };
        let mine = (a.pointer == y) != (b.pointer == y);
        if !mine || op.y.rows() != 1 || op.y.cols() != product.n as usize {
            return Ok(false);
        }
        // Others read the row while sums are written.
        if !product.may_write(z.pointer) {
            return Ok(false);
        }
        self.waiting = Waiting::None;
        (product.after, product.other, product.z) = (ADD, other, z);
        self.start_norms()?;
        self.start_row(&row)?;
        Ok(true)
    }

    /// Does an activation with the two products that wait for it; false if none do.
    pub fn gated(&mut self, op: &Activate<'_>) -> Result<bool> {
        let Waiting::Two(gate, up) = self.waiting else {
            return Ok(false);
        };
        let (gate, up, blocks) = (gate.product, up.product, up.blocks);
        let (x, g, z) = (Rows::of(op.x)?, Rows::optional(op.gate)?, Rows::of(op.y)?);
        let mine = x.pointer == up.y.pointer && g.pointer == gate.y.pointer;
        let whole = op.y.rows() == 1 && op.y.cols() == up.n as usize;
        if !mine || !whole || !up.may_write(z.pointer) {
            return Ok(false);
        }
        self.waiting = Waiting::None;
        self.start_norms()?;
        let both = RowProduct {
            z,
            gate: gate.w,
            gate_bias: gate.bias,
            gate_y: gate.y,
            act: rows::activation(op.act),
            ..up
        };
        if let Some(blocks) = blocks {
            self.start_block_row(&both, blocks)?;
            return Ok(true);
        }
        let (split, _) = self.split(up.n as usize);
        let blocks = (up.n as usize).div_ceil(GATED_OUTPUTS[split]);
        launch!(self, GATED[split], (blocks, 1, 1), THREADS, 2 * up.k as usize; both)?;
        Ok(true)
    }
}

impl State {
    /// Does a convolution with the product that waits for it; false if none does.
    pub fn convolved(&mut self, op: &Conv1d<'_>) -> Result<bool> {
        let Waiting::One(mut row) = self.waiting else {
            return Ok(false);
        };
        let product = &mut row.product;
        let (x, y, cols) = (Rows::of(op.x)?, Rows::of(op.y)?, op.x.cols() as i32);
        let from = product.y.pointer;
        let within =
            x.pointer >= from && x.pointer + 4 * cols as u64 <= from + 4 * product.n as u64;
        let one = op.x.rows() == 1 && op.ragged.spans.len() == 1 && op.w.rows() == TAPS;
        // Others read the row while outputs are written; in its own place an output is written last.
        let apart = !overlap(product.x.pointer, product.k, y.pointer, cols)
            && (y.pointer == x.pointer || !overlap(from, product.n, y.pointer, cols));
        if !within || !one || !apart {
            return Ok(false);
        }
        let batch = self.lists.batch(&op.ragged)?;
        let (state, state_stride) = sequences::state(op.conv_state)?;
        product.after = CONVOLVE;
        product.conv = Convolution {
            w: Rows::of(op.w)?,
            bias: optional(op.bias)?,
            state,
            state_stride,
            y,
            spans: batch.spans,
            first: ((x.pointer - from) / 4) as i32,
            cols,
            act: rows::activation(op.act),
        };
        self.waiting = Waiting::None;
        self.start_norms()?;
        self.start_row(&row)?;
        Ok(true)
    }

    /// What gives a step's dt, b and c, taken from what waits; none if it is not for one kernel.
    pub fn given(&mut self, op: &SelectiveScan<'_>) -> Result<Option<Given>> {
        let Waiting::One(row) = self.waiting else {
            return Ok(None);
        };
        let product = row.product;
        let [dt, x, z, b, c, y] = [
            Rows::of(op.dt)?,
            Rows::of(op.x)?,
            Rows::optional(op.z)?,
            Rows::of(op.b)?,
            Rows::of(op.c)?,
            Rows::of(op.y)?,
        ];
        let (n, k) = (product.n as usize, product.k as usize);
        let warps = 1 << self.split(n).0.saturating_sub(1);
        let one = op.x.rows() == 1 && op.ragged.spans.len() == 1;
        let mine = row.blocks.is_none() && dt.pointer == product.y.pointer && op.x.cols() == n;
        // Of a row that several warps share, only one has anything to do.
        let fits = op.a.rows() <= 32 && (k <= 256 || warps == 1);
        if !one || !mine || !fits {
            return Ok(None);
        }
        let norms = &self.norms;
        // Blocks read all of a norm's input while others are done.
        let inner = op.x.cols() as i32;
        let writes = |to: u64| {
            let reads = norms.inputs().chain(match norms.of(product.x) {
                Some(_) => None,
                None => Some((product.x.pointer, product.k)),
            });
            let results = norms.results();
            reads
                .chain(results)
                .all(|(at, len)| !overlap(at, len, to, inner))
        };
        let may = writes(y.pointer)
            && writes(product.y.pointer)
            && [x, z]
                .iter()
                .all(|r| !overlap(r.pointer, inner, product.y.pointer, inner))
            && norms.keep_inputs();
        if !may {
            return Ok(None);
        }
        let given = Given::new(&self.norms, &product, warps, b, c);
        if given.is_some() {
            self.waiting = Waiting::None;
            self.norms.clear();
        }
        Ok(given)
    }
}

#[cfg(test)]
mod tests {
    use super::overlap;

    #[test]
    fn ranges_overlap_where_they_share_a_float() {
        assert!(overlap(1024, 4, 1036, 4));
        assert!(overlap(1036, 4, 1024, 4));
        assert!(!overlap(1024, 4, 1040, 4));
        assert!(!overlap(1040, 4, 1024, 4));
    }
}

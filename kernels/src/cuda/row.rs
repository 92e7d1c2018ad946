//! Products of one row, in BF16 or with weights in blocks, and what belongs to them in the same kernel while a step is
//! recorded: the norm that makes the row, a gate with its activation, a sum, a step of a convolution or of a selective
//! scan. All that the operations by themselves would write is written, in the same bits, so nobody needs to know who
//! reads what.

use super::device::{Param, launch};
use super::rows::Norm;
use super::{Rows, State, address, optional, rows};
use crate::error::Result;
use crate::format::Format;
use crate::ops::{Activate, Add, Conv1d, Linear, SelectiveScan};
use crate::tensor::DType;

/// Elements of a row that fit a block's shared memory in BF16.
const LONGEST: usize = 16_384;
/// Elements of a row whose norm is done with the product, as floats beside it.
const LONGEST_NORM: i32 = 4096;
const THREADS: usize = 256;
/// Most states of a scan that is done with the product before it, and elements of the norms of its inputs.
const STATES: usize = 16;
/// Norms that wait with a product: of its row, and of two other inputs of a scan.
const NORMS: usize = 3;

/// By what [`State::split`] says.
const PLAIN: [&str; 4] = ["row_2_1", "row_1_1", "row_1_2", "row_1_4"];
/// The same with a gate, of which a warp takes an output's two rows.
const GATED: [&str; 4] = ["row_gated_1", "row_gated_1", "row_gated_2", "row_gated_4"];
/// Outputs of a block with a gate, or with a scan.
const OUTPUTS: [usize; 4] = [8, 8, 4, 2];
/// With a scan of up to eight states, and of up to sixteen.
const SCANNED: [[&str; 4]; 2] = [
    [
        "row_scan_1_1",
        "row_scan_1_1",
        "row_scan_1_2",
        "row_scan_1_4",
    ],
    [
        "row_scan_2_1",
        "row_scan_2_1",
        "row_scan_2_2",
        "row_scan_2_4",
    ],
];

/// `RowNorm` in row.cuh. All zeros is none.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct RowNorm {
    pub x: Rows,
    pub weight: u64,
    pub y: Rows,
    pub eps: f32,
    pub width: i32,
    pub threads: i32,
}

/// `RowConv` in row.cuh. All zeros is none.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(super) struct RowConv {
    pub w: Rows,
    pub bias: u64,
    pub state: u64,
    pub state_stride: i64,
    pub y: Rows,
    pub spans: u64,
    pub first: i32,
    pub cols: i32,
    pub act: i32,
}

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
    pub norm: RowNorm,
    pub conv: RowConv,
}

/// `RowScan` in row.cu.
#[repr(C)]
struct RowScan {
    product: RowProduct,
    x: Rows,
    z: Rows,
    b: Rows,
    c: Rows,
    a: Rows,
    dt_bias: u64,
    d: u64,
    state: u64,
    state_stride: i64,
    y: Rows,
    spans: u64,
    inner: i32,
    states: i32,
    norm_b: RowNorm,
    norm_c: RowNorm,
}

// SAFETY: laid out as there.
unsafe impl Param for RowProduct {}
// SAFETY: as above.
unsafe impl Param for RowScan {}

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
    /// Norms to be done before it or with it; one makes its row.
    norms: [Option<Norm>; NORMS],
}

/// Products that wait for what follows them: none outside a recording, one, or two of one row with matrices of one
/// shape and form.
pub(super) type Waiting = Vec<OneRow>;

/// Whether `n` floats from `a` on and `m` from `b` on have one in common.
fn overlap(a: u64, n: i32, b: u64, m: i32) -> bool {
    a < b + 4 * m as u64 && b < a + 4 * n as u64
}

impl RowNorm {
    /// Bytes of its row and its weights.
    pub fn room(&self) -> usize {
        8 * self.width as usize
    }
}

impl RowProduct {
    /// Bytes of shared memory of a product with weights in BF16.
    fn shared(&self) -> usize {
        2 * self.k as usize + self.norm.room()
    }

    /// Whether the kernel may write so many floats at `to` while blocks of it still read x.
    fn may_write(&self, to: u64, n: i32) -> bool {
        let norm = &self.norm;
        !overlap(self.x.pointer, self.k, to, n) && !overlap(norm.x.pointer, norm.width, to, n)
    }

    /// Whether another product of the same shape reads the same row, and not this one's result.
    fn goes_with(&self, other: &RowProduct) -> bool {
        self.x.pointer == other.x.pointer
            && (self.k, self.n) == (other.k, other.n)
            && self.may_write(other.y.pointer, self.n)
            && other.may_write(self.y.pointer, self.n)
    }

    /// Whether a norm makes its row, in rows that can be read by fours.
    fn is_of(&self, norm: &Norm) -> bool {
        norm.y.pointer == self.x.pointer
            && norm.width == self.k
            && norm.width <= LONGEST_NORM
            && norm.x.wide()
            && norm.y.wide()
            && norm.weight.is_multiple_of(16)
            && !overlap(norm.x.pointer, norm.width, norm.y.pointer, norm.width)
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

    /// A product of one row, now or with what belongs to it.
    pub fn row(&mut self, op: &Linear<'_>, blocks: Option<Blocks>) -> Result<()> {
        let product = RowProduct {
            x: Rows::of(op.x)?,
            w: address(op.w.data())?,
            bias: optional(op.bias)?,
            y: Rows::of(op.y)?,
            k: op.x.cols() as i32,
            n: op.w.rows() as i32,
            after: 0,
            other: Rows::default(),
            z: Rows::default(),
            gate: 0,
            gate_bias: 0,
            gate_y: Rows::default(),
            act: 0,
            norm: RowNorm::default(),
            conv: RowConv::default(),
        };
        let mut row = OneRow {
            product,
            blocks,
            norms: [None; NORMS],
        };
        if !self.device.records() {
            return self.start_row(row);
        }
        self.take_norms(&mut row)?;
        if !matches!(&self.waiting[..], [first] if first.goes_with(&row)) {
            self.start_waiting()?;
        }
        self.waiting.push(row);
        Ok(())
    }

    /// Gives the norms that wait to a product whose row one of them makes; starts them if there is none.
    fn take_norms(&mut self, row: &mut OneRow) -> Result<()> {
        let fuse: u32 = std::env::var("STRATA_FUSE")
            .ok()
            .and_then(|v| v.parse().ok())
            .unwrap_or(7);
        if fuse & 1 == 0 && self.norms.norms.len() < 2
            || fuse & 4 == 0 && self.norms.norms.len() > 1
        {
            return self.start_norms();
        }
        let norms = &self.norms.norms;
        let own = |n: &Norm| row.product.is_of(n);
        let small = |n: &Norm| own(n) || n.width as usize <= STATES;
        let few = norms.len() == 1
            || row.blocks.is_none() && norms.len() <= NORMS && norms.iter().all(small);
        // Its kernel has no registers left for one.
        let full = row.blocks.is_some_and(|b| b.format == Format::Q6K);
        if full || self.norms.rows != 1 || !few || !norms.iter().any(own) {
            return self.start_norms();
        }
        let norms = std::mem::take(&mut self.norms.norms);
        for (to, norm) in row.norms.iter_mut().zip(norms) {
            if row.product.is_of(&norm) {
                row.product.norm = norm.of_row();
            }
            *to = Some(norm);
        }
        Ok(())
    }

    /// Starts what waits: what comes now does not belong to it.
    pub fn flush(&mut self) -> Result<()> {
        self.start_norms()?;
        self.start_waiting()
    }

    fn start_waiting(&mut self) -> Result<()> {
        let mut waiting = std::mem::take(&mut self.waiting);
        waiting.drain(..).try_for_each(|row| self.start_row(row))?;
        self.waiting = waiting;
        Ok(())
    }

    /// Norms start by themselves where their inputs would be written over, or their results read, while blocks of the
    /// product still do them. Those beside the row's own are for a scan, which `takes` some.
    fn settle(
        &mut self,
        row: &mut OneRow,
        writes: &[(Rows, i32)],
        reads: &[(Rows, i32)],
        takes: usize,
    ) -> Result<()> {
        let norms = row.norms.iter().flatten();
        let mut apart = norms.clone().count() <= 1 + takes;
        for norm in norms {
            let free = |of: Rows| {
                move |(at, n): &(Rows, i32)| !overlap(of.pointer, norm.width, at.pointer, *n)
            };
            apart &= writes.iter().all(free(norm.x)) && writes.iter().all(free(norm.y));
            apart &= reads.iter().all(free(norm.y));
        }
        if !apart {
            let norms = std::mem::replace(&mut row.norms, [None; NORMS]);
            self.norms.norms.extend(norms.into_iter().flatten());
            self.norms.rows = 1;
            self.start_norms()?;
            row.product.norm = RowNorm::default();
        }
        Ok(())
    }

    fn start_row(&mut self, mut row: OneRow) -> Result<()> {
        let RowProduct { y, z, n, other, .. } = row.product;
        let (conv, cols) = (row.product.conv.y, row.product.conv.cols);
        self.settle(&mut row, &[(y, n), (z, n), (conv, cols)], &[(other, n)], 0)?;
        let product = &row.product;
        if let Some(blocks) = row.blocks {
            return self.start_block_row(product, blocks);
        }
        let (mut split, mut blocks) = self.split(product.n as usize);
        if split == 0 && product.conv.cols > 0 {
            // An output a warp has its sum in the same order.
            (split, blocks) = (1, (product.n as usize).div_ceil(OUTPUTS[1]));
        }
        let shared = product.shared();
        launch!(self, PLAIN[split], (blocks, 1, 1), THREADS, shared; *product)
    }

    /// Does a sum with the product that waits for it; false if none does.
    pub fn added(&mut self, op: &Add<'_>) -> Result<bool> {
        let [mut row] = self.waiting[..] else {
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
        if !product.may_write(z.pointer, product.n) {
            return Ok(false);
        }
        self.waiting.clear();
        (product.after, product.other, product.z) = (1, other, z);
        self.start_row(row)?;
        Ok(true)
    }

    /// Does an activation with the two products that wait for it; false if none do.
    pub fn gated(&mut self, op: &Activate<'_>) -> Result<bool> {
        let [gate, up] = self.waiting[..] else {
            return Ok(false);
        };
        let norms = gate.norms;
        let (gate, up, blocks) = (gate.product, up.product, up.blocks);
        let (x, g, z) = (Rows::of(op.x)?, Rows::optional(op.gate)?, Rows::of(op.y)?);
        let mine = x.pointer == up.y.pointer && g.pointer == gate.y.pointer;
        let whole = op.y.rows() == 1 && op.y.cols() == up.n as usize;
        if !mine || !whole || !gate.may_write(z.pointer, gate.n) {
            return Ok(false);
        }
        self.waiting.clear();
        let product = RowProduct {
            z,
            gate: gate.w,
            gate_bias: gate.bias,
            gate_y: gate.y,
            act: rows::activation(op.act),
            norm: gate.norm,
            ..up
        };
        let mut both = OneRow {
            product,
            blocks,
            norms,
        };
        let writes = [(gate.y, up.n), (up.y, up.n), (z, up.n)];
        self.settle(&mut both, &writes, &[], 0)?;
        if let Some(blocks) = blocks {
            self.start_block_row(&both.product, blocks)?;
            return Ok(true);
        }
        let (split, _) = self.split(up.n as usize);
        let blocks = (up.n as usize).div_ceil(OUTPUTS[split]);
        let shared = both.product.shared();
        launch!(self, GATED[split], (blocks, 1, 1), THREADS, shared; both.product)?;
        Ok(true)
    }

    /// Does a step of a convolution with the product that waits and makes its input; false if none does.
    pub fn convolved(&mut self, op: &Conv1d<'_>) -> Result<bool> {
        let fuse: u32 = std::env::var("STRATA_FUSE")
            .ok()
            .and_then(|v| v.parse().ok())
            .unwrap_or(7);
        if fuse & 2 == 0 {
            return Ok(false);
        }
        let [mut row] = self.waiting[..] else {
            return Ok(false);
        };
        let (product, x) = (&row.product, Rows::of(op.x)?);
        let (cols, one) = (op.x.cols(), op.x.rows() == 1 && op.ragged.spans.len() == 1);
        let before = x.pointer.wrapping_sub(product.y.pointer);
        let within =
            before / 4 < product.n as u64 && before as usize / 4 + cols <= product.n as usize;
        if !one || !within || op.w.rows() != 4 {
            return Ok(false);
        }
        let conv = self.convolution(op)?;
        let cols = conv.cols;
        let apart = !overlap(product.y.pointer, product.n, conv.y.pointer, cols);
        if !apart || !product.may_write(conv.y.pointer, cols) {
            return Ok(false);
        }
        self.waiting.clear();
        row.product.conv = RowConv {
            w: conv.w,
            bias: conv.bias,
            state: conv.state,
            state_stride: conv.state_stride,
            y: conv.y,
            spans: conv.spans,
            first: (before / 4) as i32,
            cols,
            act: conv.act,
        };
        self.start_row(row)?;
        Ok(true)
    }

    /// Does a step of a selective scan with the product that waits and makes its step sizes; false if none does.
    pub fn scanned(&mut self, op: &SelectiveScan<'_>) -> Result<bool> {
        let fuse: u32 = std::env::var("STRATA_FUSE")
            .ok()
            .and_then(|v| v.parse().ok())
            .unwrap_or(7);
        if fuse & 4 == 0 {
            return Ok(false);
        }
        let [mut row] = self.waiting[..] else {
            return Ok(false);
        };
        let (product, states) = (row.product, op.a.rows());
        let one = op.x.rows() == 1 && op.ragged.spans.len() == 1 && op.groups == 1;
        let dt =
            Rows::of(op.dt)?.pointer == product.y.pointer && op.dt.cols() == product.n as usize;
        if !one || !dt || row.blocks.is_some() || states > STATES {
            return Ok(false);
        }
        let scan = self.selective(op)?;
        if !product.may_write(scan.y.pointer, scan.inner) {
            return Ok(false);
        }
        let norm_of = |of: Rows| {
            let mut norms = row.norms.iter().flatten();
            norms.find(|n| n.y.pointer == of.pointer && n.width == scan.states && !product.is_of(n))
        };
        let (norm_b, norm_c) = (norm_of(scan.b), norm_of(scan.c));
        let takes = usize::from(norm_b.is_some()) + usize::from(norm_c.is_some());
        let of_row = |n: Option<&Norm>| n.map_or(RowNorm::default(), Norm::of_row);
        let (norm_b, norm_c) = (of_row(norm_b), of_row(norm_c));
        let (n, inner) = (product.n, scan.inner);
        let mut reads = vec![(scan.x, inner), (scan.z, inner)];
        for (of, norm) in [(scan.b, &norm_b), (scan.c, &norm_c)] {
            if norm.threads == 0 {
                reads.push((of, scan.states));
            }
        }
        self.waiting.clear();
        self.settle(&mut row, &[(product.y, n), (scan.y, inner)], &reads, takes)?;
        let whole = row.norms.iter().flatten().next().is_some();
        let kept = |norm| if whole { norm } else { RowNorm::default() };
        let (split, _) = self.split(n as usize);
        let shared = row.product.shared();
        let both = RowScan {
            product: row.product,
            x: scan.x,
            z: scan.z,
            b: scan.b,
            c: scan.c,
            a: scan.a,
            dt_bias: scan.dt_bias,
            d: scan.d,
            state: scan.state,
            state_stride: scan.state_stride,
            y: scan.y,
            spans: scan.spans,
            inner,
            states: scan.states,
            norm_b: kept(norm_b),
            norm_c: kept(norm_c),
        };
        let kernel = SCANNED[usize::from(states > 8)][split];
        let grid = ((n as usize).div_ceil(OUTPUTS[split]), 1, 1);
        launch!(self, kernel, grid, THREADS, shared; both)?;
        Ok(true)
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
        assert!(!overlap(1024, 4, 0, 0));
    }
}

//! Operations along sequences: convolution and scans. Each takes the rows of a span in order and keeps
//! its state in the sequence's slot.

use super::device::{Param, launch};
use super::row::RowProduct;
use super::rows::{MOST_NORMS, Norm, WaitingNorms};
use super::{Rows, State, address, optional, rows};
use crate::error::{Error, Result};
use crate::ops::{Conv1d, Decay, Mamba3Scan, S4dScan, SelectiveScan, SsdScan};
use crate::tensor::Tensor;

/// Channels that a block of a scan takes: `CHANNELS` in scan.cuh, and `A_BLOCK` in selective_scan.cu.
const CHANNELS: usize = 16;
const SELECTIVE_CHANNELS: usize = 8;
/// Channels that a block takes where every sequence has one token: `STEP_CHANNELS` in scan.cuh.
const STEP_CHANNELS: usize = 32;
/// Spans up to this length are convolved by one thread a channel.
const SHORT: usize = 4;
/// Rows that a block of a convolution takes: `ROWS` in conv1d.cu.
const ROWS: usize = 16;

/// `Conv` in conv1d.cu.
#[repr(C)]
struct Conv {
    x: Rows,
    w: Rows,
    bias: u64,
    state: u64,
    state_stride: i64,
    y: Rows,
    spans: u64,
    span_of: u64,
    cols: i32,
    taps: i32,
    act: i32,
    rows: i32,
}

/// `SelectiveScan` in selective_scan.cu.
#[repr(C)]
struct Selective {
    x: Rows,
    dt: Rows,
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
    group_width: i32,
}

/// `Given` in selective_scan.cu: what gives a step's dt, b and c.
#[repr(C)]
pub(super) struct Given {
    norms: [Norm; MOST_NORMS],
    threads: [i32; MOST_NORMS],
    count: i32,
    x: Rows,
    w: u64,
    bias: u64,
    y: Rows,
    k: i32,
    warps: i32,
    x_of: i32,
    b_of: i32,
    c_of: i32,
}

/// Floats of all norms' results that a block of a step keeps.
const MOST_NORMED: usize = 4096;

impl Given {
    /// None where the norms' results do not fit.
    pub fn new(
        norms: &WaitingNorms,
        product: &RowProduct,
        warps: i32,
        b: Rows,
        c: Rows,
    ) -> Option<Self> {
        let number = |of: Rows| norms.of(of).map_or(-1, |i| i as i32);
        let (all, widths) = norms.all();
        let mut threads = [0; MOST_NORMS];
        for (i, of) in widths.enumerate() {
            threads[i] = of as i32;
        }
        let given = Given {
            norms: std::array::from_fn(|i| all.get(i).copied().unwrap_or(Norm::NONE)),
            threads,
            count: all.len() as i32,
            x: product.x,
            w: product.w,
            bias: product.bias,
            y: product.y,
            k: product.k,
            warps,
            x_of: number(product.x),
            b_of: number(b),
            c_of: number(c),
        };
        (given.floats() <= MOST_NORMED).then_some(given)
    }

    fn floats(&self) -> usize {
        self.norms[..self.count as usize]
            .iter()
            .map(Norm::width)
            .sum()
    }
}

/// `SsdScan` in ssd_scan.cu.
#[repr(C)]
struct Ssd {
    x: Rows,
    dt: Rows,
    b: Rows,
    c: Rows,
    a: u64,
    dt_bias: u64,
    d: u64,
    least: f32,
    greatest: f32,
    state: u64,
    state_stride: i64,
    y: Rows,
    spans: u64,
    heads: i32,
    width: i32,
    states: i32,
    group_heads: i32,
    scale_input: i32,
}

/// `S4dScan` in s4d_scan.cu.
#[repr(C)]
struct S4d {
    x: Rows,
    a_re: Rows,
    a_im: Rows,
    c_re: Rows,
    c_im: Rows,
    d: u64,
    state: u64,
    state_stride: i64,
    y: Rows,
    spans: u64,
    inner: i32,
    states: i32,
}

/// `Mamba3Scan` in mamba3_scan.cu.
#[repr(C)]
struct Mamba3 {
    x: Rows,
    z: Rows,
    b: Rows,
    c: Rows,
    dt: Rows,
    a: Rows,
    trap: Rows,
    angle: Rows,
    dt_bias: u64,
    b_bias: u64,
    c_bias: u64,
    d: u64,
    x_in: u64,
    z_in: u64,
    y_out: u64,
    norm: u64,
    eps: f32,
    a_floor: f32,
    heads: i32,
    groups: i32,
    rank: i32,
    width: i32,
    states: i32,
    pairs: i32,
    softplus_decay: i32,
    /// Of angles, S, B and x.
    state: [u64; 4],
    state_stride: [i64; 4],
    y: Rows,
    spans: u64,
}

// SAFETY: laid out as there.
unsafe impl Param for Conv {}
// SAFETY: as above.
unsafe impl Param for Selective {}
// SAFETY: as above.
unsafe impl Param for Given {}
// SAFETY: as above.
unsafe impl Param for Ssd {}
// SAFETY: as above.
unsafe impl Param for S4d {}
// SAFETY: as above.
unsafe impl Param for Mamba3 {}

pub(super) fn unsupported(op: &'static str, why: String) -> Error {
    Error::Unsupported {
        op,
        backend: "cuda",
        why,
    }
}

/// Address and row stride of a state.
pub(super) fn state(of: &Tensor) -> Result<(u64, i64)> {
    Ok((address(of)?, of.stride() as i64))
}

impl State {
    pub fn conv1d(&mut self, op: Conv1d<'_>) -> Result<()> {
        self.rounded = None;
        if self.convolved(&op)? {
            return Ok(());
        }
        self.flush()?;
        let batch = self.lists.batch(&op.ragged)?;
        let (state, state_stride) = state(op.conv_state)?;
        let (cols, spans) = (op.x.cols(), op.ragged.spans.len());
        let conv = Conv {
            x: Rows::of(op.x)?,
            w: Rows::of(op.w)?,
            bias: optional(op.bias)?,
            state,
            state_stride,
            y: Rows::of(op.y)?,
            spans: batch.spans,
            span_of: batch.span_of,
            cols: cols as i32,
            taps: op.w.rows() as i32,
            act: rows::activation(op.act),
            rows: op.x.rows() as i32,
        };
        let across = cols.div_ceil(128);
        if op.ragged.spans.iter().all(|s| s.len <= SHORT) {
            return launch!(self, "conv1d_step", (across, spans, 1), 128, 0; conv);
        }
        let down = op.x.rows().div_ceil(ROWS);
        launch!(self, "conv1d_rows", (across, down, 1), 128, 0; conv)?;
        launch!(self, "conv1d_state", (across, spans, 1), 128, 0; conv)
    }

    pub fn selective_scan(&mut self, op: SelectiveScan<'_>) -> Result<()> {
        self.rounded = None;
        let given = self.given(&op)?;
        self.flush()?;
        let (inner, states) = (op.x.cols(), op.a.rows());
        let batch = self.lists.batch(&op.ragged)?;
        let (state, state_stride) = state(op.ssm_state)?;
        let scan = Selective {
            x: Rows::of(op.x)?,
            dt: Rows::of(op.dt)?,
            z: Rows::optional(op.z)?,
            b: Rows::of(op.b)?,
            c: Rows::of(op.c)?,
            a: Rows::of(op.a)?,
            dt_bias: optional(op.dt_bias)?,
            d: address(op.d)?,
            state,
            state_stride,
            y: Rows::of(op.y)?,
            spans: batch.spans,
            inner: inner as i32,
            states: states as i32,
            group_width: (inner / op.groups) as i32,
        };
        let spans = op.ragged.spans.len();
        let step = op.ragged.rows() == spans;
        if let Some(given) = given {
            let kernel = match states {
                0..=8 => "selective_scan_given_1",
                9..=16 => "selective_scan_given_2",
                _ => "selective_scan_given_4",
            };
            let grid = (inner.div_ceil(STEP_CHANNELS), 1, 1);
            return launch!(self, kernel, grid, 256, 4 * given.floats(); scan, given);
        }
        let kernel = match (states, op.groups) {
            (0..=8, _) if step => "selective_scan_step_1",
            (9..=16, _) if step => "selective_scan_step_2",
            (17..=32, _) if step => "selective_scan_step_4",
            (0..=8, 1) => "selective_scan_1",
            (9..=16, 1) => "selective_scan_2",
            (17..=32, 1) => "selective_scan_4",
            (33..=64, 1) => "selective_scan_8",
            (0..=8, _) => "selective_scan_groups_1",
            (9..=16, _) => "selective_scan_groups_2",
            (17..=32, _) => "selective_scan_groups_4",
            _ => {
                let why = format!(
                    "{states} states in {} groups; at most 64 run in one group, 32 in more; use --device cpu",
                    op.groups
                );
                return Err(unsupported("selective_scan", why));
            }
        };
        if step && states <= 32 {
            let grid = (inner.div_ceil(STEP_CHANNELS), spans, 1);
            return launch!(self, kernel, grid, 256, 0; scan);
        }
        let grid = (inner.div_ceil(SELECTIVE_CHANNELS), spans, 1);
        launch!(self, kernel, grid, 12 * SELECTIVE_CHANNELS, 0; scan)
    }

    pub fn ssd_scan(&mut self, op: SsdScan<'_>) -> Result<()> {
        if self.ssd_by_units(&op)? {
            return Ok(());
        }
        let (heads, states) = (op.a.cols(), op.states());
        let width = op.x.cols() / heads;
        let batch = self.lists.batch(&op.ragged)?;
        let (state, state_stride) = state(op.ssm_state)?;
        let scan = Ssd {
            x: Rows::of(op.x)?,
            dt: Rows::of(op.dt)?,
            b: Rows::of(op.b)?,
            c: Rows::of(op.c)?,
            a: address(op.a)?,
            dt_bias: optional(op.dt_bias)?,
            d: optional(op.d)?,
            least: op.dt_limit.0,
            greatest: op.dt_limit.1,
            state,
            state_stride,
            y: Rows::of(op.y)?,
            spans: batch.spans,
            heads: heads as i32,
            width: width as i32,
            states: states as i32,
            group_heads: (heads / op.groups) as i32,
            scale_input: i32::from(op.scale_input),
        };
        let step = op.ragged.rows() == op.ragged.spans.len();
        // Two neighbouring channels a thread.
        let whole = width.is_multiple_of(2) && state_stride % 2 == 0 && state.is_multiple_of(8);
        let pairs = step && whole;
        let kernel = match states {
            0..=8 if pairs => "ssd_scan_pairs_1",
            9..=16 if pairs => "ssd_scan_pairs_2",
            17..=32 if pairs => "ssd_scan_pairs_4",
            33..=64 if pairs => "ssd_scan_pairs_8",
            65..=128 if pairs => "ssd_scan_pairs_16",
            129..=256 if pairs => "ssd_scan_pairs_32",
            0..=8 if step => "ssd_scan_step_1",
            9..=16 if step => "ssd_scan_step_2",
            17..=32 if step => "ssd_scan_step_4",
            33..=64 if step => "ssd_scan_step_8",
            65..=128 if step => "ssd_scan_step_16",
            129..=256 if step => "ssd_scan_step_32",
            0..=8 => "ssd_scan_1",
            9..=16 => "ssd_scan_2",
            17..=32 => "ssd_scan_4",
            33..=64 => "ssd_scan_8",
            65..=128 => "ssd_scan_16",
            129..=256 => "ssd_scan_32",
            _ => {
                let why = format!("{states} states, at most 256; use --device cpu");
                return Err(unsupported("ssd_scan", why));
            }
        };
        let (channels, threads) = if pairs {
            (2 * STEP_CHANNELS, 256)
        } else if step {
            (STEP_CHANNELS, 256)
        } else {
            (CHANNELS, 128)
        };
        let grid = (heads * width.div_ceil(channels), op.ragged.spans.len(), 1);
        launch!(self, kernel, grid, threads, 0; scan)
    }

    pub fn s4d_scan(&mut self, op: S4dScan<'_>) -> Result<()> {
        let batch = self.lists.batch(&op.ragged)?;
        let (state, state_stride) = state(op.ssm_state)?;
        let scan = S4d {
            x: Rows::of(op.x)?,
            a_re: Rows::of(op.a_re)?,
            a_im: Rows::of(op.a_im)?,
            c_re: Rows::of(op.c_re)?,
            c_im: Rows::of(op.c_im)?,
            d: address(op.d)?,
            state,
            state_stride,
            y: Rows::of(op.y)?,
            spans: batch.spans,
            inner: op.x.cols() as i32,
            states: op.a_re.rows() as i32,
        };
        let grid = (op.x.cols().div_ceil(64), op.ragged.spans.len(), 1);
        launch!(self, "s4d_scan", grid, 64, 0; scan)
    }

    pub fn mamba3_scan(&mut self, op: Mamba3Scan<'_>) -> Result<()> {
        let (width, states) = op.sizes();
        let shared = 12 * op.rank * states;
        if shared > self.device.shared_memory {
            let why = format!("rank {} of {states} states does not fit", op.rank);
            return Err(unsupported("mamba3_scan", why));
        }
        let batch = self.lists.batch(&op.ragged)?;
        let parts = [&*op.angle_state, op.ssm_state, op.b_state, op.x_state];
        let (mut at, mut stride) = ([0; 4], [0; 4]);
        for (i, part) in parts.into_iter().enumerate() {
            (at[i], stride[i]) = state(part)?;
        }
        let scan = Mamba3 {
            x: Rows::of(op.x)?,
            z: Rows::of(op.z)?,
            b: Rows::of(op.b)?,
            c: Rows::of(op.c)?,
            dt: Rows::of(op.dt)?,
            a: Rows::of(op.a)?,
            trap: Rows::of(op.trap)?,
            angle: Rows::of(op.angle)?,
            dt_bias: address(op.dt_bias)?,
            b_bias: address(op.b_bias)?,
            c_bias: address(op.c_bias)?,
            d: address(op.d)?,
            x_in: optional(op.mimo.map(|m| m.x_in))?,
            z_in: optional(op.mimo.map(|m| m.z_in))?,
            y_out: optional(op.mimo.map(|m| m.y_out))?,
            norm: optional(op.norm.map(|n| n.weight))?,
            eps: op.norm.map_or(0.0, |n| n.eps),
            a_floor: op.a_floor,
            heads: op.heads as i32,
            groups: op.groups as i32,
            rank: op.rank as i32,
            width: width as i32,
            states: states as i32,
            pairs: op.angle.cols() as i32,
            softplus_decay: i32::from(op.decay == Decay::Softplus),
            state: at,
            state_stride: stride,
            y: Rows::of(op.y)?,
            spans: batch.spans,
        };
        let grid = (op.heads, op.ragged.spans.len(), 1);
        launch!(self, "mamba3_scan", grid, 128, shared; scan)
    }
}

//! Elementwise operations, lookups, norms, routes: each row by itself.

use std::ops::Range;

use super::device::{Param, launch};
use super::row::Waiting;
use super::{Rows, State, address, code, optional};
use crate::error::{Error, Result};
use crate::ops::{
    Activate, Activation, Add, Combine, Embed, Gather, LayerNorm, Likeliest, RmsNorm, Route, Scale,
    Score,
};
use crate::tensor::Tensor;

/// Columns that a block takes: `COLUMNS` in elements.cu.
const COLUMNS: usize = 1024;

/// Columns that a block looks through where several share a row: as in route.cu.
const LIKELIEST_COLUMNS: usize = 4096;

/// A block a row and so many columns.
pub(super) fn grid(rows: usize, cols: usize) -> (usize, usize, usize) {
    (rows, cols.div_ceil(COLUMNS), 1)
}

/// `activation` in common.cuh.
pub(super) fn activation(act: Activation) -> i32 {
    match act {
        Activation::Silu => 0,
        Activation::Gelu => 1,
        Activation::GeluTanh => 2,
        Activation::Relu => 3,
        Activation::Relu2 => 4,
        Activation::Sigmoid => 5,
        Activation::Identity => 6,
    }
}

/// `Norm` in norms.cu.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Norm {
    x: Rows,
    weight: u64,
    bias: u64,
    y: Rows,
    eps: f32,
    width: i32,
    weight_cols: i32,
    bias_cols: i32,
}

// SAFETY: laid out as there.
unsafe impl Param for Norm {}

/// `Norms` in norms.cu.
#[repr(C)]
struct Several {
    norms: [Norm; MOST_NORMS],
    threads: [i32; MOST_NORMS],
}

/// Norms that one kernel does.
pub(super) const MOST_NORMS: usize = 4;

// SAFETY: laid out as there.
unsafe impl Param for Several {}

/// Norms that wait for more of their kind, while a step is recorded: of so many rows each in one part.
#[derive(Default)]
pub(super) struct WaitingNorms {
    norms: Vec<Norm>,
    rows: usize,
}

impl WaitingNorms {
    /// The number of the norm whose result this is.
    pub fn of(&self, y: Rows) -> Option<usize> {
        self.norms.iter().position(|n| n.y.pointer == y.pointer)
    }

    /// Whether one gives a single row of `k` elements here.
    pub fn give(&self, x: Rows, k: i32) -> bool {
        self.rows == 1 && self.of(x).is_some_and(|i| self.norms[i].width == k)
    }

    /// What they read and what they write of a row: addresses and elements.
    pub fn inputs(&self) -> impl Iterator<Item = (u64, i32)> {
        self.norms.iter().map(|n| (n.x.pointer, n.width))
    }

    pub fn results(&self) -> impl Iterator<Item = (u64, i32)> {
        self.norms.iter().map(|n| (n.y.pointer, n.width))
    }

    /// Whether none writes where it reads.
    pub fn keep_inputs(&self) -> bool {
        let of = |n: &Norm, r| Norm::extent(r, n.width, 1);
        self.norms.iter().all(|n| apart(&of(n, n.x), &of(n, n.y)))
    }

    pub fn clear(&mut self) {
        self.norms.clear();
    }

    /// All of them, and the threads of each.
    pub fn all(&self) -> (&[Norm], impl Iterator<Item = usize>) {
        let of = self.norms.iter().map(|n| threads(n.width as usize));
        (&self.norms, of)
    }
}

impl Norm {
    /// Nothing to do.
    pub const NONE: Norm = Norm {
        x: Rows::NONE,
        weight: 0,
        bias: 0,
        y: Rows::NONE,
        eps: 0.0,
        width: 0,
        weight_cols: 0,
        bias_cols: 0,
    };

    pub fn width(&self) -> usize {
        self.width as usize
    }

    /// Bytes from the first to behind the last of `rows` rows.
    fn extent(of: Rows, width: i32, rows: usize) -> Range<u64> {
        let floats = (rows as i64 - 1) * of.stride + i64::from(width);
        of.pointer..of.pointer + 4 * floats as u64
    }

    /// Whether neither writes what the other reads or writes.
    fn is_apart(&self, other: &Norm, rows: usize) -> bool {
        let y = |n: &Norm| Norm::extent(n.y, n.width, rows);
        let x = |n: &Norm| Norm::extent(n.x, n.width, rows);
        apart(&y(self), &x(other)) && apart(&y(other), &x(self)) && apart(&y(self), &y(other))
    }
}

/// Whether two parts of memory have nothing in common.
fn apart(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.end <= b.start || b.end <= a.start
}

/// Threads that do a norm: by the width alone, which fixes the order of the sums.
fn threads(width: usize) -> usize {
    (width / 4).next_power_of_two().clamp(32, 512)
}

/// `Route` in route.cu.
#[repr(C)]
struct Routing {
    logits: Rows,
    bias: u64,
    experts: u64,
    experts_stride: i64,
    weights: Rows,
    count: i32,
    top_k: i32,
    score: i32,
    groups: i32,
    top_groups: i32,
    normalize: i32,
    scale: f32,
}

// SAFETY: laid out as there.
unsafe impl Param for Routing {}

impl State {
    pub fn add(&mut self, op: Add<'_>) -> Result<()> {
        self.rounded = None;
        if self.added(&op)? {
            return Ok(());
        }
        self.flush()?;
        let (a, b, y) = (Rows::of(op.a)?, Rows::of(op.b)?, Rows::of(op.y)?);
        let cols = op.a.cols();
        let wide = cols.is_multiple_of(4) && a.wide() && b.wide() && y.wide();
        launch!(self, "add", grid(op.a.rows(), cols), 256, 0; a, b, y, cols as i32, i32::from(wide))
    }

    pub fn scale(&mut self, op: Scale<'_>) -> Result<()> {
        let (x, y, cols) = (Rows::of(op.x)?, Rows::of(op.y)?, op.x.cols());
        launch!(self, "scale", grid(op.x.rows(), cols), 256, 0; x, op.by, y, cols as i32)
    }

    pub fn activate(&mut self, op: Activate<'_>) -> Result<()> {
        self.rounded = None;
        if self.gated(&op)? {
            return Ok(());
        }
        self.flush()?;
        let (x, y, cols) = (Rows::of(op.x)?, Rows::of(op.y)?, op.x.cols());
        let gate = Rows::optional(op.gate)?;
        let wide = cols.is_multiple_of(4) && x.wide() && y.wide() && gate.wide();
        launch!(self, "activate", grid(op.x.rows(), cols), 256, 0;
            x, gate, activation(op.act), y, cols as i32, i32::from(wide))
    }

    pub fn embed(&mut self, op: Embed<'_>) -> Result<()> {
        if op.table.format().dtype().is_none() {
            return self.embed_blocks(op);
        }
        let table = op.table.data();
        let (pointer, y, cols) = (address(table)?, Rows::of(op.y)?, table.cols());
        let ids = self.lists.ids(op.ids)?;
        launch!(self, "embed", grid(op.ids.len(), cols), 256, 0;
            ids, pointer, table.stride() as i64, code(table.dtype()), y, cols as i32)
    }

    pub fn gather(&mut self, op: Gather<'_>) -> Result<()> {
        let (x, y, cols) = (Rows::of(op.x)?, Rows::of(op.y)?, op.x.cols());
        let rows = self.lists.send_numbers(op.rows.iter().map(|r| *r as u32))?;
        launch!(self, "gather", grid(op.rows.len(), cols), 256, 0; x, rows, y, cols as i32)
    }

    pub fn likeliest(&mut self, op: Likeliest<'_>) -> Result<()> {
        let (x, y, cols) = (Rows::of(op.x)?, Rows::of(op.y)?, op.x.cols());
        let rows = op.x.rows();
        // Many rows keep the device busy by themselves.
        let across = if rows < self.device.processors {
            cols.div_ceil(LIKELIEST_COLUMNS)
        } else {
            1
        };
        if across <= 1 {
            return launch!(self, "likeliest", (rows, 1, 1), 1024, 0; x, op.by, y, cols as i32, 0_u64);
        }
        let parts = self.scratch(8 * rows * across)?;
        launch!(self, "likeliest", (rows, across, 1), 1024, 0; x, op.by, y, cols as i32, parts)?;
        launch!(self, "likeliest_parts", (rows, 1, 1), 32, 0; parts, across as i32, y)
    }

    pub fn combine(&mut self, op: Combine<'_>) -> Result<()> {
        let (x, weights, y) = (Rows::of(op.x)?, Rows::of(op.weights)?, Rows::of(op.y)?);
        let (cols, choices) = (op.y.cols(), op.weights.cols() as i32);
        launch!(self, "combine", grid(op.y.rows(), cols), 256, 0; x, weights, choices, y, cols as i32)
    }

    pub fn rms_norm(&mut self, op: RmsNorm<'_>) -> Result<()> {
        let vectors = (op.weight, None);
        let norm = State::prepare(op.x, vectors, op.eps, op.groups, op.y)?;
        if !self.device.records() || op.groups > 1 || op.x.rows() == 0 {
            self.flush()?;
            return self.norm("rms_norm", &norm, op.x.rows(), op.groups);
        }
        let rows = op.x.rows();
        let waiting = &self.norms;
        let joins = waiting.rows == rows
            && matches!(self.waiting, Waiting::None)
            && (1..MOST_NORMS).contains(&waiting.norms.len())
            && waiting.norms.iter().all(|n| n.is_apart(&norm, rows));
        if !joins {
            self.flush()?;
        }
        self.norms.rows = rows;
        self.norms.norms.push(norm);
        Ok(())
    }

    /// Starts the norms that wait.
    pub fn start_norms(&mut self) -> Result<()> {
        let rows = self.norms.rows;
        let norms = std::mem::take(&mut self.norms.norms);
        let (Some(first), count) = (norms.first(), norms.len()) else {
            return Ok(());
        };
        if count == 1 {
            return self.norm("rms_norm", first, rows, 1);
        }
        let mut several = Several {
            norms: [*first; MOST_NORMS],
            threads: [0; MOST_NORMS],
        };
        for (i, norm) in norms.iter().enumerate() {
            several.norms[i] = *norm;
            several.threads[i] = threads(norm.width as usize) as i32;
        }
        let most = several.threads.into_iter().max().unwrap_or(0) as usize;
        launch!(self, "rms_norms", (rows, 1, count), most, 0; several)
    }

    pub fn layer_norm(&mut self, op: LayerNorm<'_>) -> Result<()> {
        let vectors = (op.weight, op.bias);
        let norm = State::prepare(op.x, vectors, op.eps, op.groups, op.y)?;
        self.norm("layer_norm", &norm, op.x.rows(), op.groups)
    }

    fn prepare(
        x: &Tensor,
        (weight, bias): (Option<&Tensor>, Option<&Tensor>),
        eps: f32,
        groups: usize,
        y: &Tensor,
    ) -> Result<Norm> {
        let width = x.cols() / groups;
        let cols = |t: Option<&Tensor>| t.map_or(0, |t| t.cols() as i32);
        Ok(Norm {
            x: Rows::of(x)?,
            weight: optional(weight)?,
            bias: optional(bias)?,
            y: Rows::of(y)?,
            eps,
            width: width as i32,
            weight_cols: cols(weight),
            bias_cols: cols(bias),
        })
    }

    fn norm(
        &mut self,
        kernel: &'static str,
        norm: &Norm,
        rows: usize,
        groups: usize,
    ) -> Result<()> {
        let threads = threads(norm.width as usize);
        launch!(self, kernel, (rows, groups, 1), threads, 0; *norm)
    }

    pub fn route(&mut self, op: Route<'_>) -> Result<()> {
        let (count, groups) = (op.logits.cols(), op.groups.unwrap_or((0, 0)));
        let shared = 4 * (count + groups.0);
        if shared > self.device.shared_memory {
            return Err(Error::Unsupported {
                op: "route",
                backend: "cuda",
                why: format!("{count} experts do not fit a block's memory"),
            });
        }
        let routing = Routing {
            logits: Rows::of(op.logits)?,
            bias: optional(op.choice_bias)?,
            experts: address(op.experts)?,
            experts_stride: op.experts.stride() as i64,
            weights: Rows::of(op.weights)?,
            count: count as i32,
            top_k: op.experts.cols() as i32,
            score: match op.score {
                Score::Softmax => 0,
                Score::SoftmaxTopK => 1,
                Score::Sigmoid => 2,
            },
            groups: groups.0 as i32,
            top_groups: groups.1 as i32,
            normalize: i32::from(op.normalize),
            scale: op.scale,
        };
        launch!(self, "route", (op.logits.rows(), 1, 1), 32, shared; routing)
    }
}

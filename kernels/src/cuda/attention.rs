//! Rotation, the way into pages, and attention over pages.

use super::device::{Param, launch};
use super::{Rows, State, address, code};
use crate::error::{Error, Result};
use crate::ops::{Attention, KvWrite, Rope};
use crate::span::Ragged;
use crate::tensor::DType;

/// Queries of a tile, and keys of a block: `QUERIES` and `KEYS` in attention.cu.
const QUERIES: usize = 16;
const KEYS: usize = 32;
/// The same in attention_units.cu.
const QUERIES_OF_UNITS: usize = 64;
const KEYS_OF_UNITS: usize = 64;
/// Columns of values that 128 threads keep sums of.
const MOST_COLUMNS: usize = 256;

/// `Rope` in attention.cu.
#[repr(C)]
struct Rotation {
    x: Rows,
    frequencies: u64,
    spans: u64,
    span_of: u64,
    head_dim: i32,
    heads: i32,
    pairs: i32,
    interleaved: i32,
    scale: f32,
}

/// `KvWrite` in attention.cu.
#[repr(C)]
struct Write {
    k: Rows,
    v: Rows,
    k_pages: u64,
    v_pages: u64,
    k_stride: i64,
    v_stride: i64,
    k_type: i32,
    v_type: i32,
    spans: u64,
    span_of: u64,
    table: u64,
    page_size: i32,
    k_cols: i32,
    v_cols: i32,
}

/// `Attention` in attention.cu.
#[repr(C)]
struct Attend {
    q: Rows,
    k_pages: u64,
    v_pages: u64,
    k_stride: i64,
    v_stride: i64,
    k_type: i32,
    v_type: i32,
    spans: u64,
    table: u64,
    tiles: u64,
    span_count: i32,
    page_size: i32,
    heads: i32,
    kv_heads: i32,
    dim: i32,
    v_dim: i32,
    scale: f32,
    window: i32,
    keep_first: i32,
    y: Rows,
    parts: u64,
    splits: i32,
}

// SAFETY: laid out as there.
unsafe impl Param for Rotation {}
// SAFETY: as above.
unsafe impl Param for Write {}
// SAFETY: as above.
unsafe impl Param for Attend {}

/// A power of two that no sequence of the batch is longer than: what launches depend on, so that they stay
/// the same for many tokens.
pub(super) fn reach(ragged: &Ragged<'_>) -> usize {
    let ends = ragged.spans.iter().map(|s| s.position + s.len);
    ends.max().unwrap_or(0).next_power_of_two()
}

/// A number of tokens as kernels take it. More than fit are more than there can be.
fn tokens(n: usize) -> i32 {
    i32::try_from(n).unwrap_or(i32::MAX)
}

impl State {
    pub fn rope(&mut self, op: Rope<'_>) -> Result<()> {
        let batch = self.lists.batch(&op.ragged)?;
        let heads = op.x.cols() / op.head_dim;
        let pairs = op.frequencies.cols();
        let rotation = Rotation {
            x: Rows::of(op.x)?,
            frequencies: address(op.frequencies)?,
            spans: batch.spans,
            span_of: batch.span_of,
            head_dim: op.head_dim as i32,
            heads: heads as i32,
            pairs: pairs as i32,
            interleaved: i32::from(op.interleaved),
            scale: op.scale,
        };
        let grid = (op.x.rows(), (heads * pairs).div_ceil(128), 1);
        launch!(self, "rope", grid, 128, 0; rotation)
    }

    pub fn kv_write(&mut self, op: KvWrite<'_>) -> Result<()> {
        let batch = self.lists.batch(&op.ragged)?;
        let write = Write {
            k: Rows::of(op.k)?,
            v: Rows::of(op.v)?,
            k_pages: address(op.k_pages)?,
            v_pages: address(op.v_pages)?,
            k_stride: op.k_pages.stride() as i64,
            v_stride: op.v_pages.stride() as i64,
            k_type: code(op.k_pages.dtype()),
            v_type: code(op.v_pages.dtype()),
            spans: batch.spans,
            span_of: batch.span_of,
            table: batch.table,
            page_size: op.ragged.page_size as i32,
            k_cols: op.k.cols() as i32,
            v_cols: op.v.cols() as i32,
        };
        let grid = (op.k.rows(), (op.k.cols() + op.v.cols()).div_ceil(128), 1);
        launch!(self, "kv_write", grid, 128, 0; write)
    }

    /// The kernel for matrix units, if these sizes have one.
    fn for_units(op: &Attention<'_>) -> Option<&'static str> {
        let pages = [op.k_pages, op.v_pages];
        let fits = pages.iter().all(|p| {
            p.dtype() == DType::BF16
                && p.stride().is_multiple_of(8)
                && p.device_address().is_some_and(|a| a.is_multiple_of(16))
        });
        if !fits || op.head_dim != op.v_head_dim {
            return None;
        }
        match op.head_dim {
            64 => Some("attention_units_64"),
            80 => Some("attention_units_80"),
            96 => Some("attention_units_96"),
            128 => Some("attention_units_128"),
            _ => None,
        }
    }

    pub fn attention(&mut self, op: Attention<'_>) -> Result<()> {
        let by_units = State::for_units(&op);
        let deep = op.head_dim.next_multiple_of(4);
        let keys = (deep + 1).max(op.v_head_dim);
        let shared = 4 * (QUERIES * deep + KEYS * keys);
        if op.v_head_dim > MOST_COLUMNS || shared > self.device.shared_memory {
            return Err(Error::Unsupported {
                op: "attention",
                backend: "cuda",
                why: format!(
                    "heads of {} and {} elements, at most {MOST_COLUMNS}; use --device cpu",
                    op.head_dim, op.v_head_dim
                ),
            });
        }
        let batch = self.lists.batch(&op.ragged)?;
        let group = op.heads / op.kv_heads;
        let queries = by_units.map_or(QUERIES, |_| QUERIES_OF_UNITS);
        let (tiles, count) = self.lists.tiles(&op.ragged, group, queries)?;
        // Where tiles are few, several blocks share the keys of each.
        let reach = reach(&op.ragged);
        let wanted = (2 * self.device.processors) / (count * op.kv_heads).max(1);
        let splits = wanted.clamp(1, reach.div_ceil(2 * KEYS).max(1));
        let parts = if splits > 1 {
            self.scratch(4 * op.q.rows() * op.heads * splits * (op.v_head_dim + 2))?
        } else {
            0
        };
        let attend = Attend {
            q: Rows::of(op.q)?,
            k_pages: address(op.k_pages)?,
            v_pages: address(op.v_pages)?,
            k_stride: op.k_pages.stride() as i64,
            v_stride: op.v_pages.stride() as i64,
            k_type: code(op.k_pages.dtype()),
            v_type: code(op.v_pages.dtype()),
            spans: batch.spans,
            table: batch.table,
            tiles,
            span_count: op.ragged.spans.len() as i32,
            page_size: op.ragged.page_size as i32,
            heads: op.heads as i32,
            kv_heads: op.kv_heads as i32,
            dim: op.head_dim as i32,
            v_dim: op.v_head_dim as i32,
            scale: op.scale,
            window: op.window.map_or(0, tokens),
            keep_first: tokens(op.keep_first),
            y: Rows::of(op.y)?,
            parts,
            splits: splits as i32,
        };
        if let Some(kernel) = by_units {
            // Two stages of keys and values, in rows with eight elements of padding.
            let shared = 2 * 2 * 2 * KEYS_OF_UNITS * (op.head_dim + 8);
            launch!(self, kernel, (count, op.kv_heads, splits), 128, shared; attend)?;
        } else {
            launch!(self, "attention", (count, op.kv_heads, splits), 128, shared; attend)?;
        }
        if splits > 1 {
            launch!(self, "attention_sum", (op.q.rows(), op.heads, 1), 128, 4 * splits;
                parts, splits as i32, op.heads as i32, op.v_head_dim as i32, attend.y)?;
        }
        Ok(())
    }
}

//! Rotation, the way into pages, and attention over pages.

use super::device::{Param, launch};
use super::{Rows, State, address, code};
use crate::error::{Error, Result};
use crate::ops::{Attention, KvWrite, Rope};
use crate::span::Ragged;
use crate::tensor::{DType, Tensor};

/// Queries of a tile, and keys of a block: `QUERIES` and `KEYS` in attention.cu.
const QUERIES: usize = 16;
const KEYS: usize = 32;
/// The same in attention_units.cu.
const QUERIES_OF_UNITS: usize = 64;
const KEYS_OF_UNITS: usize = 64;
/// Queries of a tile in attention_hopper.cu.
const QUERIES_OF_HOPPER: usize = 128;
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
    kv_heads: i32,
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

/// A kernel for matrix units.
#[derive(Clone, Copy)]
struct Units {
    kernel: &'static str,
    /// Of a tile.
    queries: usize,
    threads: usize,
    shared: usize,
    /// Blocks that a processor holds at once.
    blocks: usize,
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

/// Refuses heads of bytes whose scales cannot be read as what they are.
fn scales_are_aligned(op: &'static str, pages: &[&Tensor; 2]) -> Result<()> {
    for pages in pages.iter().filter(|p| p.dtype() == DType::U8) {
        if !pages.stride().is_multiple_of(4) || !address(pages)?.is_multiple_of(4) {
            let why = format!("rows of {pages:?} do not begin at multiples of four bytes");
            return Err(Error::Value { op, why });
        }
    }
    Ok(())
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
        scales_are_aligned("kv_write", &[op.k_pages, op.v_pages])?;
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
            kv_heads: op.kv_heads as i32,
        };
        if op.k_pages.dtype() == DType::U8 {
            let grid = (op.k.rows(), (2 * op.kv_heads).div_ceil(4), 1);
            return launch!(self, "kv_write_bytes", grid, 128, 0; write);
        }
        let grid = (op.k.rows(), (op.k.cols() + op.v.cols()).div_ceil(128), 1);
        launch!(self, "kv_write", grid, 128, 0; write)
    }

    /// The kernel for matrix units, if these sizes have one: Hopper's, where a prompt is read, has tiles of
    /// 128 queries, the other tiles of 64.
    fn for_units(&self, op: &Attention<'_>) -> Option<Units> {
        let pages = [op.k_pages, op.v_pages];
        let fits = pages.iter().all(|p| {
            p.dtype() == DType::BF16
                && p.stride().is_multiple_of(8)
                && p.device_address().is_some_and(|a| a.is_multiple_of(16))
        });
        if !fits || op.head_dim != op.v_head_dim {
            return None;
        }
        let dim = op.head_dim;
        let hopper = match dim {
            64 => "attention_hopper_64",
            80 => "attention_hopper_80",
            96 => "attention_hopper_96",
            128 => "attention_hopper_128",
            192 => "attention_hopper_192",
            256 => "attention_hopper_256",
            _ => "",
        };
        let queries = Rows::of(op.q).is_ok_and(|q| q.wide());
        if self.device.has(hopper) && queries && op.q.rows() > op.ragged.spans.len() {
            // The queries and two stages of keys and values, in panels of 64 columns that begin at multiples of
            // 1,024 bytes.
            let keys = if dim <= 128 { 128 } else { 64 };
            return Some(Units {
                kernel: hopper,
                queries: QUERIES_OF_HOPPER,
                threads: 256,
                shared: 128 * dim.div_ceil(64) * (QUERIES_OF_HOPPER + 4 * keys) + 1024,
                blocks: 1,
            });
        }
        let kernel = match dim {
            64 => "attention_units_64",
            80 => "attention_units_80",
            96 => "attention_units_96",
            128 => "attention_units_128",
            _ => return None,
        };
        Some(Units {
            kernel,
            queries: QUERIES_OF_UNITS,
            threads: 128,
            // Two stages of keys and values, in rows with eight elements of padding.
            shared: 2 * 2 * 2 * KEYS_OF_UNITS * (dim + 8),
            blocks: 2,
        })
    }

    pub fn attention(&mut self, op: Attention<'_>) -> Result<()> {
        scales_are_aligned("attention", &[op.k_pages, op.v_pages])?;
        let by_units = self.for_units(&op);
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
        let (queries, at_once) = by_units.map_or((QUERIES, 2), |u| (u.queries, u.blocks));
        let (tiles, count) = self.lists.tiles(&op.ragged, group, queries)?;
        // Where tiles are few, several blocks share the keys of each.
        let reach = reach(&op.ragged);
        let wanted = (at_once * self.device.processors) / (count * op.kv_heads).max(1);
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
        let grid = (count, op.kv_heads, splits);
        match by_units {
            Some(u) => launch!(self, u.kernel, grid, u.threads, u.shared; attend)?,
            None if op.k_pages.dtype() == DType::U8 => {
                launch!(self, "attention_bytes", grid, 128, shared; attend)?;
            }
            None => launch!(self, "attention", grid, 128, shared; attend)?,
        }
        if splits > 1 {
            launch!(self, "attention_sum", (op.q.rows(), op.heads, 1), 128, 4 * splits;
                parts, splits as i32, op.heads as i32, op.v_head_dim as i32, attend.y)?;
        }
        Ok(())
    }
}

//! The scan of Mamba-2 by chunks: products within chunks, then chunk after chunk, then what an unfinished
//! chunk keeps for the tokens to come.

use super::device::{Param, launch};
use super::sequences::{state, unsupported};
use super::{Rows, State, address, optional};
use crate::error::Result;
use crate::ops::SsdChunked;

/// Channels of a block, and tokens that it takes at a time: `PARTS` and `ROWS` in ssd_chunked.cu.
const CHANNELS: usize = 16;
const TOKENS: usize = 32;

/// `SsdChunked` in ssd_chunked.cu.
#[repr(C)]
struct Chunked {
    x: Rows,
    dt: Rows,
    b: Rows,
    c: Rows,
    a: u64,
    dt_bias: u64,
    d: u64,
    least: f32,
    greatest: f32,
    /// Of S, u, b and l.
    state: [u64; 4],
    state_stride: [i64; 4],
    y: Rows,
    spans: u64,
    span_of: u64,
    scores: u64,
    heads: i32,
    width: i32,
    states: i32,
    groups: i32,
    scale_input: i32,
    size: i32,
}

// SAFETY: laid out as there.
unsafe impl Param for Chunked {}

impl State {
    pub fn ssd_chunked(&mut self, op: SsdChunked<'_>) -> Result<()> {
        let (scan, size) = (op.scan, op.chunk_size);
        let (heads, states, rows) = (scan.a.cols(), scan.states(), scan.x.rows());
        let width = scan.x.cols() / heads;
        let (kernel, n) = match states {
            0..=128 => ("ssd_chunked_4", 128),
            129..=256 => ("ssd_chunked_8", 256),
            _ => {
                let why = format!("{states} states, at most 256; use --device cpu");
                return Err(unsupported("ssd_chunked", why));
            }
        };
        let tiles = TOKENS * (n + 4) + TOKENS * TOKENS;
        let kept = size.saturating_mul(CHANNELS + 1);
        let shared = kept.saturating_add(n * CHANNELS + tiles).saturating_mul(4);
        if shared > self.device.shared_memory {
            let why = format!(
                "chunks of {size} tokens do not fit a block's memory; a lower chunk_size does, or --device cpu"
            );
            return Err(unsupported("ssd_chunked", why));
        }
        let batch = self.lists.batch(&scan.ragged)?;
        let parts = [
            &*scan.ssm_state,
            op.chunk_inputs,
            op.chunk_b,
            op.chunk_decays,
        ];
        let (mut at, mut stride) = ([0; 4], [0; 4]);
        for (i, part) in parts.into_iter().enumerate() {
            (at[i], stride[i]) = state(part)?;
        }
        let chunked = Chunked {
            x: Rows::of(scan.x)?,
            dt: Rows::of(scan.dt)?,
            b: Rows::of(scan.b)?,
            c: Rows::of(scan.c)?,
            a: address(scan.a)?,
            dt_bias: optional(scan.dt_bias)?,
            d: optional(scan.d)?,
            least: scan.dt_limit.0,
            greatest: scan.dt_limit.1,
            state: at,
            state_stride: stride,
            y: Rows::of(scan.y)?,
            spans: batch.spans,
            span_of: batch.span_of,
            scores: self.scratch(4 * rows * scan.groups * size)?,
            heads: heads as i32,
            width: width as i32,
            states: states as i32,
            groups: scan.groups as i32,
            scale_input: i32::from(scan.scale_input),
            size: size as i32,
        };
        let spans = scan.ragged.spans.len();
        launch!(self, "ssd_scores", (rows, scan.groups, 1), 128, 4 * states; chunked)?;
        let grid = (heads * width.div_ceil(CHANNELS), spans, 1);
        launch!(self, kernel, grid, 128, shared; chunked)?;
        launch!(self, "ssd_keep", (heads, spans, 1), 128, 0; chunked)
    }
}

//! The scan of Mamba-2 over prompts on Hopper's matrix units: chunks of a span, and segments of chunks where
//! heads are fewer than processors.

use super::device::{Param, launch};
use super::sequences::state;
use super::{Rows, State, address, optional};
use crate::error::Result;
use crate::ops::SsdScan;

/// Tokens of a chunk, channels of a block and its threads, x's row in shared memory: `CHUNK`, `WIDE`, `THREADS`
/// and `PITCH` in ssd_hopper.cu.
const CHUNK: usize = 64;
const WIDE: usize = 64;
const THREADS: usize = 128;
const PITCH: usize = WIDE + 4;
/// Shorter prompts go token by token: that takes less time than the start of three kernels.
const SHORT: usize = 128;
/// Chunks that a segment has at least.
const LEAST: usize = 4;
const ALIGN: usize = 256;

/// `Ssd` in ssd_hopper.cu.
#[repr(C)]
struct ByUnits {
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
    chunks: u64,
    segments: u64,
    images: u64,
    scores: u64,
    steps: u64,
    left: u64,
    fades: u64,
    span_count: i32,
    length: i32,
    heads: i32,
    width: i32,
    states: i32,
    groups: i32,
    scale_input: i32,
}

// SAFETY: laid out as there.
unsafe impl Param for ByUnits {}

/// Bytes of a block's shared memory: `full` for the scan, else for what segments leave by themselves.
fn shared(states: usize, full: bool) -> usize {
    let tiles = if full { 4 } else { 2 } * 2 * CHUNK * states;
    // In two halves.
    let weights = if full { 4 * CHUNK * CHUNK } else { 0 };
    2 * (tiles + weights + 2 * 4 * CHUNK + 4 * CHUNK * PITCH) + 1024
}

impl State {
    /// False where the recurrence is to run: on other GPUs, for short prompts, for more than 128 states.
    pub fn ssd_by_units(&mut self, op: &SsdScan<'_>) -> Result<bool> {
        let (heads, states) = (op.a.cols(), op.states());
        let width = op.x.cols() / heads;
        let [prepare, segments, scan] = if states <= 64 {
            ["ssd_prepare_64", "ssd_segments_64", "ssd_hopper_64"]
        } else {
            ["ssd_prepare_128", "ssd_segments_128", "ssd_hopper_128"]
        };
        let longest = op.ragged.spans.iter().map(|s| s.len).max().unwrap_or(0);
        if states > 128 || longest < SHORT || !self.device.has(scan) {
            return Ok(false);
        }
        let states_here = if states <= 64 { 64 } else { 128 };
        let blocks = heads * width.div_ceil(WIDE);
        let batch = self.lists.batch(&op.ragged)?;
        let (chunks, chunk_count) = self.lists.tiles(&op.ragged, 1, CHUNK)?;
        // As many segments as there are processors for.
        let parts = (self.device.processors / blocks).max(1);
        let length = if parts == 1 {
            longest.div_ceil(CHUNK)
        } else {
            chunk_count.div_ceil(parts).max(LEAST)
        };
        let (segments_at, segment_count) = self.lists.tiles(&op.ragged, 1, CHUNK * length)?;

        let mut room = 0;
        let mut take = |bytes: usize| {
            let at = room;
            room = (room + bytes).next_multiple_of(ALIGN);
            at as u64
        };
        let of_groups = chunk_count * op.groups;
        let images = take(of_groups * 8 * CHUNK * states_here);
        let scores = take(of_groups * 4 * CHUNK * CHUNK);
        let steps = take(chunk_count * heads * 8 * CHUNK);
        let left = take(segment_count * blocks * 4 * WIDE * states_here);
        let fades = take(segment_count * heads * 4);
        let room = self.scratch(room)?;

        let (state, state_stride) = state(op.ssm_state)?;
        let by_units = ByUnits {
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
            chunks,
            segments: segments_at,
            images: room + images,
            scores: room + scores,
            steps: room + steps,
            left: room + left,
            fades: room + fades,
            span_count: op.ragged.spans.len() as i32,
            length: length as i32,
            heads: heads as i32,
            width: width as i32,
            states: states as i32,
            groups: op.groups as i32,
            scale_input: i32::from(op.scale_input),
        };
        let grid = (chunk_count, op.groups + heads.div_ceil(THREADS), 1);
        let tiles = 8 * CHUNK * states_here + 1024;
        launch!(self, prepare, grid, THREADS, tiles; by_units)?;
        let grid = (blocks, segment_count, 1);
        if segment_count > op.ragged.spans.len() {
            launch!(self, segments, grid, THREADS, shared(states_here, false); by_units)?;
        }
        launch!(self, scan, grid, 2 * THREADS, shared(states_here, true); by_units)?;
        Ok(true)
    }
}

//! Attention over pages, by blocks of keys at fixed positions.
//!
//! For every row, keys are taken in blocks of `KEYS` and chunks of `CHUNK` positions, counted from
//! the start of the sequence: a running softmax goes over the blocks of a chunk, and chunks are then
//! merged in order. A block that a row sees only in part is taken in part. Where first tokens stay
//! beside a window, those of a block are taken before what the window shows of it. So the arithmetic of a
//! row is the same whether it is decoded alone or part of a prompt, and the chunks of one long
//! sequence can go to several threads.

use std::ops::Range;

use super::Cpu;
use super::dot::{COLUMNS, Widened, tile};
use super::kept::{Int8, Kept};
use super::math::exp;
use super::simd::{Kernel, Simd, with_float};
use crate::ops::{Attention, Sight};
use crate::span::{Ragged, Span};
use crate::tensor::{DType, View, ViewMut};

/// Keys of a block.
const KEYS: usize = 64;
/// Positions whose blocks are merged first among themselves.
const CHUNK: usize = 512;
/// Rows (tokens times query heads of a group) that share the keys they load.
const ROWS: usize = 64;
/// Elements of sums beyond which chunks are not shared out: there are units enough then.
const SHARED_SUMS: usize = 4 << 20;
/// Rows and vectors of a register tile.
const TILE: usize = 4;
/// Heads are padded to whole vectors of the widest instruction set.
const PAD: usize = 16;

#[derive(Clone, Copy)]
struct Task<'a> {
    q: View<f32>,
    y: ViewMut<f32>,
    ragged: Ragged<'a>,
    kv_heads: usize,
    /// Query heads of one head of keys.
    group: usize,
    dim: usize,
    v_dim: usize,
    /// `dim` and `v_dim`, padded.
    pitch: usize,
    v_pitch: usize,
    scale: f32,
    sight: Sight,
    /// Tokens of a unit.
    tokens: usize,
}

/// Some tokens of one sequence and one head of keys and values.
struct Unit<'a> {
    span: &'a Span,
    /// Rows of the batch.
    rows: Range<usize>,
    kv_head: usize,
}

impl Task<'_> {
    fn units(&self) -> usize {
        let tiles: usize = self
            .ragged
            .spans
            .iter()
            .map(|s| s.len.div_ceil(self.tokens))
            .sum();
        tiles * self.kv_heads
    }

    fn unit(&self, index: usize) -> Unit<'_> {
        let (mut tile, kv_head) = (index / self.kv_heads, index % self.kv_heads);
        for span in self.ragged.spans {
            let tiles = span.len.div_ceil(self.tokens);
            if tile < tiles {
                let start = span.start + tile * self.tokens;
                let rows = start..(start + self.tokens).min(span.start + span.len);
                return Unit {
                    span,
                    rows,
                    kv_head,
                };
            }
            tile -= tiles;
        }
        unreachable!("unit {index} of {}", self.units())
    }

    /// Positions that a row of the batch sees: see [`Sight::of`].
    fn seen(&self, unit: &Unit<'_>, row: usize) -> [Range<usize>; 2] {
        self.sight.of(unit.span.position + row - unit.span.start)
    }

    /// Positions of either kind that some row of the unit sees; they may meet.
    fn seen_by_all(&self, unit: &Unit<'_>) -> [Range<usize>; 2] {
        let [_, first] = self.seen(unit, unit.rows.start);
        let [kept, last] = self.seen(unit, unit.rows.end - 1);
        [kept, first.start..last.end]
    }

    /// Chunks that some row of the unit sees.
    fn chunks(&self, unit: &Unit<'_>) -> Chunks {
        let [kept, recent] = self.seen_by_all(unit);
        let kept = kept.end.div_ceil(CHUNK);
        Chunks {
            kept,
            recent: kept.max(recent.start / CHUNK)..recent.end.div_ceil(CHUNK),
        }
    }

    /// Elements of a [`Sums`] for every row of a unit.
    fn sums_len(&self) -> usize {
        self.tokens * self.group * (self.v_pitch + PAD)
    }
}

/// Numbers of chunks: the first ones, and some later ones.
struct Chunks {
    kept: usize,
    recent: Range<usize>,
}

impl Chunks {
    fn len(&self) -> usize {
        self.kept + self.recent.len()
    }

    /// The i-th of them.
    fn at(&self, i: usize) -> usize {
        if i < self.kept {
            i
        } else {
            self.recent.start + i - self.kept
        }
    }

    fn iter(&self) -> impl Iterator<Item = usize> {
        (0..self.kept).chain(self.recent.clone())
    }
}

/// For each row of a unit the running softmax over some keys: the largest score, the sum of weights,
/// and the weighted sum of values, as one row of `pitch + PAD` elements.
struct Sums<'a> {
    elements: &'a mut [f32],
    pitch: usize,
}

impl Sums<'_> {
    fn clear(&mut self) {
        self.elements.fill(0.0);
        for row in self.elements.chunks_exact_mut(self.pitch + PAD) {
            row[self.pitch] = f32::NEG_INFINITY;
        }
    }

    fn row(&mut self, r: usize) -> (&mut [f32], &mut [f32]) {
        let row = &mut self.elements[r * (self.pitch + PAD)..][..self.pitch + PAD];
        row.split_at_mut(self.pitch)
    }
}

/// Places in the second part of a row of `Sums`.
const LARGEST: usize = 0;
const WEIGHTS: usize = 1;

impl Cpu {
    pub(super) fn do_attention(&self, op: Attention<'_>) {
        let group = op.heads / op.kv_heads;
        let longest = op.ragged.spans.iter().map(|s| s.len).max().unwrap_or(0);
        let task = Task {
            q: op.q.view(),
            y: op.y.view_mut(),
            ragged: op.ragged,
            kv_heads: op.kv_heads,
            group,
            dim: op.head_dim,
            v_dim: op.v_head_dim,
            pitch: op.head_dim.next_multiple_of(PAD),
            v_pitch: op.v_head_dim.next_multiple_of(PAD),
            scale: op.scale,
            sight: op.sight(),
            tokens: (ROWS / group.max(1)).clamp(1, longest.max(1)),
        };
        if group == 0 {
            return;
        }
        if op.k_pages.dtype() == DType::U8 {
            return self.attend(task, Int8(op.k_pages.view()), Int8(op.v_pages.view()));
        }
        with_float!(op.k_pages.dtype(), K => with_float!(op.v_pages.dtype(), V => {
            self.attend(task, op.k_pages.view::<K>(), op.v_pages.view::<V>());
        }));
    }

    fn attend<K: Kept, V: Kept>(&self, task: Task<'_>, k: K, v: V) {
        let (units, sums_len) = (task.units(), task.sums_len());
        let most = (0..units)
            .map(|u| task.chunks(&task.unit(u)).len())
            .max()
            .unwrap_or(0);
        let sizes = [
            ROWS.max(task.group) * task.pitch * 4,
            KEYS * task.pitch * 4,
            KEYS * task.v_pitch * 4,
            TILE * KEYS * 4,
            sums_len * 4,
            sums_len * 4,
        ];
        if most <= 1 || units * most * sums_len > SHARED_SUMS {
            // From the last unit, which has the most keys to see, to the first.
            self.pool().run(units, |part, scratch| {
                let mut parts = scratch.split(&sizes);
                let room = Room {
                    q: parts.next(ROWS.max(task.group) * task.pitch),
                    k: parts.next(KEYS * task.pitch),
                    v: parts.next(KEYS * task.v_pitch),
                    scores: parts.next(TILE * KEYS),
                };
                let (sums, total) = (parts.next(sums_len), parts.next(sums_len));
                let unit = task.unit(units - 1 - part);
                self.isa().launch(Whole {
                    task,
                    k,
                    v,
                    unit,
                    room,
                    sums,
                    total,
                });
            });
            return;
        }
        let mut shared = self.shared();
        let sums = AllSums {
            pointer: shared.take::<f32>(units * most * sums_len).as_mut_ptr(),
        };
        // SAFETY: the memory has room for `most` chunks of each unit; each is written by one part.
        let of = |unit: usize, chunks: Range<usize>| unsafe {
            let at = (unit * most + chunks.start) * sums_len;
            std::slice::from_raw_parts_mut(sums.at(at), chunks.len() * sums_len)
        };
        self.pool().run(units * most, |part, scratch| {
            // Heads of one chunk after each other: their keys lie side by side.
            let (index, chunk) = (part % units, part / units);
            let unit = task.unit(index);
            let chunks = task.chunks(&unit);
            if chunk >= chunks.len() {
                return;
            }
            let mut parts = scratch.split(&sizes);
            let room = Room {
                q: parts.next(ROWS.max(task.group) * task.pitch),
                k: parts.next(KEYS * task.pitch),
                v: parts.next(KEYS * task.v_pitch),
                scores: parts.next(TILE * KEYS),
            };
            let (sums, chunk) = (of(index, chunk..chunk + 1), chunks.at(chunk));
            self.isa().launch(Chunk {
                task,
                k,
                v,
                unit,
                room,
                chunk,
                sums,
            });
        });
        self.pool().run(units, |index, scratch| {
            let unit = task.unit(index);
            let sums = of(index, 0..task.chunks(&unit).len());
            let total = scratch.take(sums_len);
            self.isa().launch(Merged {
                task,
                unit,
                sums,
                total,
            });
        });
    }
}

struct AllSums {
    pointer: *mut f32,
}
impl AllSums {
    fn at(&self, i: usize) -> *mut f32 {
        self.pointer.wrapping_add(i)
    }
}
// SAFETY: parts use disjoint pieces of it.
unsafe impl Sync for AllSums {}

/// Scratch of one unit, rows `pitch` apart.
struct Room<'a> {
    q: &'a mut [f32],
    k: &'a mut [f32],
    v: &'a mut [f32],
    scores: &'a mut [f32],
}

/// A unit from its first key to its last.
struct Whole<'a, K, V> {
    task: Task<'a>,
    k: K,
    v: V,
    unit: Unit<'a>,
    room: Room<'a>,
    sums: &'a mut [f32],
    total: &'a mut [f32],
}

impl<K: Kept, V: Kept> Kernel for Whole<'_, K, V> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Whole {
            task,
            k,
            v,
            unit,
            mut room,
            sums,
            total,
        } = self;
        let mut sums = Sums {
            elements: sums,
            pitch: task.v_pitch,
        };
        let mut total = Sums {
            elements: total,
            pitch: task.v_pitch,
        };
        total.clear();
        load_queries(&task, &unit, room.q);
        for chunk in task.chunks(&unit).iter() {
            attend_chunk(s, &task, &k, &v, &unit, &mut room, chunk, &mut sums);
            merge(s, &task, &unit, chunk, &mut sums, &mut total);
        }
        finish(s, &task, &unit, &mut total);
    }
}

/// One chunk of a unit.
struct Chunk<'a, K, V> {
    task: Task<'a>,
    k: K,
    v: V,
    unit: Unit<'a>,
    room: Room<'a>,
    chunk: usize,
    sums: &'a mut [f32],
}

impl<K: Kept, V: Kept> Kernel for Chunk<'_, K, V> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Chunk {
            task,
            k,
            v,
            unit,
            mut room,
            chunk,
            sums,
        } = self;
        let mut sums = Sums {
            elements: sums,
            pitch: task.v_pitch,
        };
        load_queries(&task, &unit, room.q);
        attend_chunk(s, &task, &k, &v, &unit, &mut room, chunk, &mut sums);
    }
}

/// All chunks of a unit, computed before, put together.
struct Merged<'a> {
    task: Task<'a>,
    unit: Unit<'a>,
    /// Chunk after chunk.
    sums: &'a mut [f32],
    total: &'a mut [f32],
}

impl Kernel for Merged<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Merged {
            task,
            unit,
            sums,
            total,
        } = self;
        let mut total = Sums {
            elements: total,
            pitch: task.v_pitch,
        };
        total.clear();
        let chunks = task.chunks(&unit);
        let all = chunks.iter().zip(sums.chunks_exact_mut(task.sums_len()));
        for (chunk, elements) in all {
            let mut sums = Sums {
                elements,
                pitch: task.v_pitch,
            };
            merge(s, &task, &unit, chunk, &mut sums, &mut total);
        }
        finish(s, &task, &unit, &mut total);
    }
}

/// Copies the queries of a unit, head by head for each token, padded with zeros.
#[inline(always)]
fn load_queries(task: &Task<'_>, unit: &Unit<'_>, q: &mut [f32]) {
    for (i, t) in unit.rows.clone().enumerate() {
        for head in 0..task.group {
            let to = &mut q[(i * task.group + head) * task.pitch..][..task.pitch];
            let from = (unit.kv_head * task.group + head) * task.dim;
            to[..task.dim].copy_from_slice(&task.q.row(t)[from..][..task.dim]);
            to[task.dim..].fill(0.0);
        }
    }
}

/// Widens positions `seen` of a unit's keys or values, `dim` elements each padded with zeros, to their
/// places in a block.
#[inline(always)]
fn load_block<S: Simd, P: Kept>(
    s: S,
    task: &Task<'_>,
    unit: &Unit<'_>,
    (pages, dim): (&P, usize),
    seen: Range<usize>,
    to: &mut [f32],
) {
    let pitch = dim.next_multiple_of(PAD);
    let page_size = task.ragged.page_size;
    let mut row = 0;
    for j in seen.clone() {
        // Rows of a page follow each other.
        row = if j == seen.start || j % page_size == 0 {
            task.ragged.page_row(unit.span, j)
        } else {
            row + 1
        };
        let to = &mut to[j % KEYS * pitch..][..pitch];
        pages.load(s, row, unit.kv_head, &mut to[..dim]);
        to[dim..].fill(0.0);
    }
}

/// The running softmax of every row of a unit over one chunk.
#[inline(always)]
#[allow(clippy::too_many_arguments)]
fn attend_chunk<S: Simd, K: Kept, V: Kept>(
    s: S,
    task: &Task<'_>,
    k: &K,
    v: &V,
    unit: &Unit<'_>,
    room: &mut Room<'_>,
    chunk: usize,
    sums: &mut Sums<'_>,
) {
    sums.clear();
    let all = task.seen_by_all(unit);
    for block in chunk * CHUNK / KEYS..(chunk + 1) * CHUNK / KEYS {
        let block = block * KEYS..(block + 1) * KEYS;
        // What a row sees of a block may be two pieces, the first of those kept: one after the other.
        for (which, all) in all.iter().enumerate() {
            let seen = all.start.max(block.start)..all.end.min(block.end);
            if seen.is_empty() {
                continue;
            }
            load_block(s, task, unit, (k, task.dim), seen.clone(), room.k);
            load_block(s, task, unit, (v, task.v_dim), seen.clone(), room.v);
            let part = |row: usize| {
                let seen = &task.seen(unit, unit.rows.start + row / task.group)[which];
                let start = seen.start.clamp(block.start, block.end) - block.start;
                start..seen.end.clamp(block.start, block.end) - block.start
            };
            let rows = unit.rows.len() * task.group;
            let mut first = 0;
            while first < rows {
                let seen = part(first);
                let mut same = 1;
                while same < TILE.min(rows - first) && part(first + same) == seen {
                    same += 1;
                }
                // SAFETY: the rooms hold whole rows of `pitch` elements for these rows and keys.
                let taken = unsafe {
                    match same {
                        _ if seen.is_empty() => same,
                        4 => attend_rows::<S, 4>(s, task, room, first, seen, sums),
                        2 | 3 => attend_rows::<S, 2>(s, task, room, first, seen, sums),
                        _ => attend_rows::<S, 1>(s, task, room, first, seen, sums),
                    }
                };
                first += taken;
            }
        }
    }
}

/// `R` rows over the keys `seen` of a block.
///
/// # Safety
/// `room` holds the queries of these rows and the keys and values of `seen`.
#[inline(always)]
unsafe fn attend_rows<S: Simd, const R: usize>(
    s: S,
    task: &Task<'_>,
    room: &mut Room<'_>,
    first: usize,
    seen: Range<usize>,
    sums: &mut Sums<'_>,
) -> usize {
    let pitch = task.pitch;
    room.scores[..R * KEYS].fill(f32::NEG_INFINITY);
    for j in seen.clone().step_by(COLUMNS) {
        // SAFETY: rows of queries and keys have `pitch` elements, whole vectors.
        let scores = unsafe {
            let q = std::array::from_fn(|r| room.q.as_ptr().add((first + r) * pitch));
            let key = |c: usize| (j + c).min(seen.end - 1) * pitch;
            let k = std::array::from_fn(|c| room.k.as_ptr().add(key(c)));
            tile::<S, Widened<f32>, R>(s, q, k, (S::LANES, 0), pitch)
        };
        for (r, scores) in scores.into_iter().enumerate() {
            let n = COLUMNS.min(seen.end - j);
            for (c, score) in scores.into_iter().take(n).enumerate() {
                room.scores[r * KEYS + j + c] = task.scale * score;
            }
        }
    }
    let mut scales = [s.splat(1.0); R];
    for (r, scale) in scales.iter_mut().enumerate() {
        let (_, state) = sums.row(first + r);
        let scores = &mut room.scores[r * KEYS..][..KEYS];
        // SAFETY: a row of scores is a whole number of vectors.
        unsafe {
            let mut largest = s.splat(f32::NEG_INFINITY);
            for i in (0..KEYS).step_by(S::LANES) {
                largest = s.max(largest, s.load(scores.as_ptr().add(i)));
            }
            let largest = s.largest(largest);
            let largest = if largest > state[LARGEST] {
                largest
            } else {
                state[LARGEST]
            };
            *scale = exp(s, s.splat(state[LARGEST] - largest));
            let mut weights = s.splat(0.0);
            for i in (0..KEYS).step_by(S::LANES) {
                let score = s.load(scores.as_ptr().add(i));
                let weight = exp(s, s.sub(score, s.splat(largest)));
                s.store(scores.as_mut_ptr().add(i), weight);
                weights = s.add(weights, weight);
            }
            let mut before = [0.0; PAD];
            s.store(before.as_mut_ptr(), *scale);
            state[LARGEST] = largest;
            state[WEIGHTS] = state[WEIGHTS] * before[0] + s.sum(weights);
        }
    }
    let vectors = task.v_pitch / S::LANES;
    let mut at = 0;
    while at < vectors {
        let offset = at * S::LANES;
        // SAFETY: `at` and the vectors taken lie within the rows.
        at += unsafe {
            if vectors - at >= TILE {
                add_values::<S, R, TILE>(s, room, first, seen.clone(), sums, offset, scales)
            } else {
                add_values::<S, R, 1>(s, room, first, seen.clone(), sums, offset, scales)
            }
        };
    }
    R
}

/// Scales the sums of `R` rows and adds weighted values, for `D` vectors of a head.
///
/// # Safety
/// The vectors from `offset` lie within the rows.
#[inline(always)]
unsafe fn add_values<S: Simd, const R: usize, const D: usize>(
    s: S,
    room: &Room<'_>,
    first: usize,
    seen: Range<usize>,
    sums: &mut Sums<'_>,
    offset: usize,
    scales: [S::V; R],
) -> usize {
    let pitch = sums.pitch;
    // SAFETY: the caller's promise.
    unsafe {
        let mut acc = [[s.splat(0.0); D]; R];
        for (r, acc) in acc.iter_mut().enumerate() {
            let (row, _) = sums.row(first + r);
            for (d, acc) in acc.iter_mut().enumerate() {
                *acc = s.mul(scales[r], s.load(row.as_ptr().add(offset + d * S::LANES)));
            }
        }
        for j in seen {
            let value = room.v.as_ptr().add(j * pitch + offset);
            let mut values = [s.splat(0.0); D];
            for (d, v) in values.iter_mut().enumerate() {
                *v = s.load(value.add(d * S::LANES));
            }
            for (r, acc) in acc.iter_mut().enumerate() {
                let weight = s.splat(*room.scores.as_ptr().add(r * KEYS + j));
                for (d, acc) in acc.iter_mut().enumerate() {
                    *acc = s.fma(weight, values[d], *acc);
                }
            }
        }
        for (r, acc) in acc.into_iter().enumerate() {
            let (row, _) = sums.row(first + r);
            for (d, acc) in acc.into_iter().enumerate() {
                s.store(row.as_mut_ptr().add(offset + d * S::LANES), acc);
            }
        }
    }
    D
}

/// Adds what a unit's rows saw in `chunk` to what they saw before.
#[inline(always)]
fn merge<S: Simd>(
    s: S,
    task: &Task<'_>,
    unit: &Unit<'_>,
    chunk: usize,
    sums: &mut Sums<'_>,
    total: &mut Sums<'_>,
) {
    for r in 0..unit.rows.len() * task.group {
        let seen = task.seen(unit, unit.rows.start + r / task.group);
        let outside = |seen: &Range<usize>| {
            seen.is_empty() || seen.start >= (chunk + 1) * CHUNK || seen.end <= chunk * CHUNK
        };
        if seen.iter().all(outside) {
            continue;
        }
        let ((new, new_state), (old, state)) = (sums.row(r), total.row(r));
        let larger = new_state[LARGEST] > state[LARGEST];
        let largest = if larger {
            new_state[LARGEST]
        } else {
            state[LARGEST]
        };
        let by_old = exp(s, s.splat(state[LARGEST] - largest));
        let by_new = exp(s, s.splat(new_state[LARGEST] - largest));
        // SAFETY: rows are whole vectors, and `PAD` elements hold the widest.
        unsafe {
            for i in (0..task.v_pitch).step_by(S::LANES) {
                let old = old.as_mut_ptr().add(i);
                let new = s.mul(by_new, s.load(new.as_ptr().add(i)));
                s.store(old, s.fma(by_old, s.load(old), new));
            }
            let mut by = [[0.0; PAD]; 2];
            s.store(by[0].as_mut_ptr(), by_old);
            s.store(by[1].as_mut_ptr(), by_new);
            state[WEIGHTS] = state[WEIGHTS] * by[0][0] + new_state[WEIGHTS] * by[1][0];
            state[LARGEST] = largest;
        }
    }
}

/// Divides by the sums of weights and writes y.
#[inline(always)]
fn finish<S: Simd>(s: S, task: &Task<'_>, unit: &Unit<'_>, total: &mut Sums<'_>) {
    for r in 0..unit.rows.len() * task.group {
        let (row, state) = total.row(r);
        let by = s.splat(1.0 / state[WEIGHTS]);
        let first = (unit.kv_head * task.group + r % task.group) * task.v_dim;
        // SAFETY: rows are whole vectors; these columns of y belong to this unit.
        unsafe {
            for i in (0..task.v_pitch).step_by(S::LANES) {
                let at = row.as_mut_ptr().add(i);
                s.store(at, s.mul(by, s.load(at)));
            }
            let t = unit.rows.start + r / task.group;
            let y = task.y.columns(t, first..first + task.v_dim);
            y.copy_from_slice(&row[..task.v_dim]);
        }
    }
}

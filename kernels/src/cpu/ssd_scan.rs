//! The scan of Mamba-2: channels of a head in lanes.
//!
//! Work is cut into strips, up to `STRIP` channels of one head. For a block of tokens the step sizes,
//! decays and inputs of a strip are computed first; then a tile of its state, a few states of a few
//! vectors of channels, is loaded into registers once and taken through all tokens of the block,
//! adding to their outputs what these states count for. A sum over states is formed in their order
//! whatever the tiles, and a lane never meets another, so that bits depend on neither blocks nor tiles.
//!
//! A single token has nothing to gain from tiles: its strips are read and written in one go.

use std::ops::Range;

use super::Cpu;
use super::GRAIN;
use super::math::{exp, softplus};
use super::simd::{Kernel, Simd, load, store};
use crate::ops::SsdScan;
use crate::span::Span;
use crate::tensor::{View, ViewMut};

/// Channels of a strip: a whole number of vectors on every path.
const STRIP: usize = 64;
/// Tokens of a block: inputs and outputs of a strip fit in a first-level cache beside a tile.
const TOKENS: usize = 32;
/// States of a tile.
const STATES: usize = 4;
/// Strips whose states stay in a second-level cache from block to block.
const MOST_STRIPS: usize = 16;
/// Lanes of the widest instruction set.
const MOST_LANES: usize = 16;

impl Cpu {
    pub(super) fn do_ssd_scan(&self, op: SsdScan<'_>) {
        let (heads, states) = (op.a.cols(), op.states());
        let width = op.x.cols() / heads;
        let scan = Scan {
            x: op.x.view(),
            dt: op.dt.view(),
            dt_bias: op.dt_bias.map(|t| t.view()),
            dt_limit: op.dt_limit,
            a: op.a.view(),
            b: op.b.view(),
            c: op.c.view(),
            d: op.d.map(|t| t.view()),
            scale_input: op.scale_input,
            heads_of_group: heads / op.groups,
            states,
            width,
            strips: width.div_ceil(STRIP),
            state: op.ssm_state.view_mut(),
            y: op.y.view_mut(),
        };
        let spans = op.ragged.spans;
        let longest = spans.iter().map(|span| span.len).max().unwrap_or(0);
        let (rows, strips) = (scan.x.rows(), heads * scan.strips);
        if rows == 0 || strips == 0 {
            return;
        }
        // The longest sequence alone makes parts enough for all threads where it has most of the rows.
        let cost = rows.div_ceil(spans.len()) * states.max(1) * width.min(STRIP);
        let height = (strips * rows)
            .div_ceil(longest * 4 * self.threads())
            .min(MOST_STRIPS)
            .max(GRAIN.div_ceil(cost))
            .min(strips);
        let parts = strips.div_ceil(height);
        let tiles = states.div_ceil(STATES);
        self.pool().run(spans.len() * parts, |part, scratch| {
            let first = part % parts * height;
            let span = &spans[part / parts];
            let sizes = [tiles * TILE_PITCH, TOKENS * STRIP, TOKENS * STRIP];
            let mut room = scratch.split(&sizes.map(|n| 4 * n));
            self.isa().launch(Strips {
                scan,
                span,
                strips: first..(first + height).min(strips),
                packed: room.next(sizes[0]),
                inputs: room.next(sizes[1]),
                sums: room.next(sizes[2]),
            });
        });
    }
}

#[derive(Clone, Copy)]
struct Scan {
    x: View<f32>,
    dt: View<f32>,
    dt_bias: Option<View<f32>>,
    dt_limit: (f32, f32),
    a: View<f32>,
    b: View<f32>,
    c: View<f32>,
    d: Option<View<f32>>,
    scale_input: bool,
    heads_of_group: usize,
    states: usize,
    /// Channels of a head.
    width: usize,
    /// Strips of a head.
    strips: usize,
    state: ViewMut<f32>,
    y: ViewMut<f32>,
}

/// Some channels of a head.
struct Strip {
    head: usize,
    /// The first of them, in the head.
    first: usize,
    channels: usize,
}

impl Scan {
    fn strip(&self, i: usize) -> Strip {
        let (head, first) = (i / self.strips, i % self.strips * STRIP);
        Strip {
            head,
            first,
            channels: (self.width - first).min(STRIP),
        }
    }

    /// The states of `group` in a row of b or c.
    #[inline(always)]
    fn of_group<'a>(&self, of: &'a View<f32>, t: usize, group: usize) -> &'a [f32] {
        &of.row(t)[group * self.states..][..self.states]
    }

    /// δ and exp(δ · a) for each lane.
    #[inline(always)]
    fn steps<S: Simd>(&self, s: S, dt: S::V, dt_bias: S::V, a: S::V) -> (S::V, S::V) {
        let (least, greatest) = self.dt_limit;
        let delta = softplus(s, s.add(dt, dt_bias));
        // The order of arguments lets a NaN through.
        let delta = s.min(s.splat(greatest), s.max(s.splat(least), delta));
        (delta, exp(s, s.mul(delta, a)))
    }
}

/// Some strips of one sequence.
struct Strips<'a> {
    scan: Scan,
    span: &'a Span,
    strips: Range<usize>,
    /// Room for b and c of a block: see `pack`.
    packed: &'a mut [f32],
    /// Room for what enters the state, and for the sums over states, `STRIP` of each token.
    inputs: &'a mut [f32],
    sums: &'a mut [f32],
}

impl Kernel for Strips<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        // SAFETY: these channels of the rows and of the slot are ours: a slot belongs to one span, and
        // a strip to one kernel.
        unsafe {
            if self.span.len == 1 {
                one_token(s, &self);
            } else {
                blocks(s, self);
            }
        }
    }
}

/// A sequence's only token.
///
/// # Safety
/// The strips of this row and of the slot belong to the caller.
#[inline(always)]
unsafe fn one_token<S: Simd>(s: S, all: &Strips<'_>) {
    let (scan, t) = (&all.scan, all.span.start);
    let heads = scan.a.cols();
    // Step sizes of the heads from `from` on, as many as there are lanes.
    let (mut from, mut deltas, mut decays) = (usize::MAX, [0.0; MOST_LANES], [0.0; MOST_LANES]);
    for i in all.strips.clone() {
        let strip = scan.strip(i);
        // SAFETY: heads from `from` on are there; the strip is ours.
        unsafe {
            if from > strip.head || strip.head >= from + S::LANES {
                from = strip.head;
                let n = (heads - from).min(S::LANES);
                let of = |view: View<f32>, r: usize| load(s, view.row(r).as_ptr().add(from), n);
                let dt_bias = scan.dt_bias.map_or(s.splat(0.0), |b| of(b, 0));
                let (delta, decay) = scan.steps(s, of(scan.dt, t), dt_bias, of(scan.a, 0));
                s.store(deltas.as_mut_ptr(), delta);
                s.store(decays.as_mut_ptr(), decay);
            }
            let by = if scan.scale_input {
                Some(deltas[strip.head - from])
            } else {
                None
            };
            let decay = decays[strip.head - from];
            match strip.channels.div_ceil(S::LANES) {
                1 => through::<S, 1>(s, scan, all.span, &strip, by, decay),
                2 => through::<S, 2>(s, scan, all.span, &strip, by, decay),
                3 | 4 => through::<S, 4>(s, scan, all.span, &strip, by, decay),
                _ => through::<S, 8>(s, scan, all.span, &strip, by, decay),
            }
        }
    }
}

/// How many elements ahead a state is asked for.
const AHEAD: usize = 1024;

/// All states of a strip of at most `V` vectors, for one token.
///
/// # Safety
/// As for `one_token`.
#[inline(always)]
unsafe fn through<S: Simd, const V: usize>(
    s: S,
    scan: &Scan,
    span: &Span,
    strip: &Strip,
    by: Option<f32>,
    decay: f32,
) {
    let (t, width) = (span.start, scan.width);
    let column = strip.head * width + strip.first;
    let group = strip.head / scan.heads_of_group;
    let (b, c) = (
        scan.of_group(&scan.b, t, group),
        scan.of_group(&scan.c, t, group),
    );
    // How many channels vector `v` has.
    let lanes = |v: usize| strip.channels.saturating_sub(v * S::LANES).min(S::LANES);
    // SAFETY: the caller's promise; vectors are masked to the channels that are there, and those with
    // none are left out.
    unsafe {
        let x = scan.x.row(t).as_ptr().add(column);
        let mut inputs = [s.splat(0.0); V];
        for (v, input) in inputs.iter_mut().enumerate() {
            if lanes(v) > 0 {
                *input = load(s, x.add(v * S::LANES), lanes(v));
                if let Some(by) = by {
                    *input = s.mul(s.splat(by), *input);
                }
            }
        }
        let mut sums = [s.splat(0.0); V];
        let decay = s.splat(decay);
        let state = scan.state.row_pointer(span.slot);
        let state = state.add(strip.head * scan.states * width + strip.first);
        for (n, (b, c)) in b.iter().zip(c).enumerate() {
            let (b, c, row) = (s.splat(*b), s.splat(*c), state.add(n * width));
            for line in (0..strip.channels).step_by(16) {
                s.prefetch(row.wrapping_add(AHEAD + line));
            }
            if strip.channels == V * S::LANES {
                for (v, (input, sum)) in inputs.iter().zip(&mut sums).enumerate() {
                    let at = row.add(v * S::LANES);
                    let h = s.fma(decay, s.load(at), s.mul(b, *input));
                    s.store(at, h);
                    *sum = s.fma(c, h, *sum);
                }
            } else {
                for (v, (input, sum)) in inputs.iter().zip(&mut sums).enumerate() {
                    if lanes(v) > 0 {
                        let at = row.add(v * S::LANES);
                        let h = s.fma(decay, load(s, at, lanes(v)), s.mul(b, *input));
                        store(s, at, lanes(v), h);
                        *sum = s.fma(c, h, *sum);
                    }
                }
            }
        }
        let y = scan.y.columns(t, column..column + strip.channels);
        for (v, sum) in sums.into_iter().enumerate() {
            if lanes(v) > 0 {
                let x = load(s, x.add(v * S::LANES), lanes(v));
                let sum = scan
                    .d
                    .map_or(sum, |d| s.fma(s.splat(d.row(0)[strip.head]), x, sum));
                store(s, y.as_mut_ptr().add(v * S::LANES), lanes(v), sum);
            }
        }
    }
}

/// Elements of a tile's b and c in `packed`.
const TILE_PITCH: usize = TOKENS * 2 * STATES;

/// Copies a group's b and c of some tokens in the order in which tiles read them: tile by tile, token
/// by token, `STATES` of b and then of c.
#[inline(always)]
fn pack(scan: &Scan, rows: Range<usize>, group: usize, packed: &mut [f32]) {
    for (i, t) in rows.enumerate() {
        for (of, offset) in [(&scan.b, 0), (&scan.c, STATES)] {
            let row = scan.of_group(of, t, group);
            let (whole, rest) = row.as_chunks::<STATES>();
            let at = |tile: usize| tile * TILE_PITCH + i * 2 * STATES + offset;
            for (tile, states) in whole.iter().enumerate() {
                packed[at(tile)..][..STATES].copy_from_slice(states);
            }
            if !rest.is_empty() {
                packed[at(whole.len())..][..rest.len()].copy_from_slice(rest);
            }
        }
    }
}

/// All tokens of a sequence, a block after the other.
///
/// # Safety
/// The strips of the sequence's rows and of its slot belong to the caller.
#[inline(always)]
unsafe fn blocks<S: Simd>(s: S, all: Strips<'_>) {
    let Strips {
        scan,
        span,
        strips,
        packed,
        inputs,
        sums,
    } = all;
    assert!(packed.len() >= scan.states.div_ceil(STATES) * TILE_PITCH);
    assert!(inputs.len() >= TOKENS * STRIP && sums.len() >= TOKENS * STRIP);
    for start in span.rows().step_by(TOKENS) {
        let rows = start..(start + TOKENS).min(span.rows().end);
        let mut of_group = usize::MAX;
        for i in strips.clone() {
            let strip = scan.strip(i);
            let group = strip.head / scan.heads_of_group;
            if group != of_group {
                of_group = group;
                pack(&scan, rows.clone(), group, packed);
            }
            let mut decays = [0.0; TOKENS];
            // SAFETY: the strip is ours, and the rooms are as large as asserted.
            unsafe {
                prepare(s, &scan, rows.clone(), &strip, &mut decays, inputs);
                sums[..rows.len() * STRIP].fill(0.0);
                let vectors = strip.channels.div_ceil(S::LANES);
                let mut v = 0;
                while v < vectors {
                    let column = Column {
                        scan: &scan,
                        slot: span.slot,
                        strip: &strip,
                        v,
                        packed: packed.as_ptr(),
                        decays: &decays[..rows.len()],
                        inputs: inputs.as_ptr(),
                        sums: sums.as_mut_ptr(),
                    };
                    // So many that a tile, its inputs and its sums fit into the registers.
                    v += match vectors - v {
                        4.. if S::LANES == 16 => column.run::<S, 4>(s),
                        2.. => column.run::<S, 2>(s),
                        _ => column.run::<S, 1>(s),
                    };
                }
                finish(s, &scan, rows.clone(), &strip, sums);
            }
        }
    }
}

/// Decays of a block of tokens, and what enters the state of a strip; lanes without a channel are zero.
///
/// # Safety
/// `inputs` has `STRIP` elements for each row.
#[inline(always)]
unsafe fn prepare<S: Simd>(
    s: S,
    scan: &Scan,
    rows: Range<usize>,
    strip: &Strip,
    decays: &mut [f32; TOKENS],
    inputs: &mut [f32],
) {
    let head = strip.head;
    let of_head = |view: View<f32>| s.splat(view.row(0)[head]);
    let dt_bias = scan.dt_bias.map_or(s.splat(0.0), of_head);
    let (mut deltas, a) = ([0.0; TOKENS], of_head(scan.a));
    for (t, delta) in rows.clone().zip(&mut deltas) {
        *delta = scan.dt.row(t)[head];
    }
    // SAFETY: a block is a whole number of vectors, as is a strip of `inputs`; the channels of the
    // strip are in every row.
    unsafe {
        for i in (0..rows.len()).step_by(S::LANES) {
            let dt = s.load(deltas.as_ptr().add(i));
            let (delta, decay) = scan.steps(s, dt, dt_bias, a);
            s.store(deltas.as_mut_ptr().add(i), delta);
            s.store(decays.as_mut_ptr().add(i), decay);
        }
        for (i, t) in rows.enumerate() {
            let x = scan.x.row(t).as_ptr().add(head * scan.width + strip.first);
            let by = s.splat(deltas[i]);
            for p in (0..strip.channels).step_by(S::LANES) {
                let mut input = load(s, x.add(p), (strip.channels - p).min(S::LANES));
                if scan.scale_input {
                    input = s.mul(by, input);
                }
                s.store(inputs.as_mut_ptr().add(i * STRIP + p), input);
            }
            // The next strip, and what will be written of this one: rows are too far apart for the
            // machine to guess.
            let y = scan.y.row_pointer(t);
            let y = y.wrapping_add(head * scan.width + strip.first);
            for line in (0..strip.channels).step_by(16) {
                s.prefetch(x.wrapping_add(STRIP + line));
                s.prefetch(y.wrapping_add(line));
            }
        }
    }
}

/// Adds d · x to the sums and writes y.
///
/// # Safety
/// These channels of y belong to the caller, and `sums` has `STRIP` elements for each row.
#[inline(always)]
unsafe fn finish<S: Simd>(s: S, scan: &Scan, rows: Range<usize>, strip: &Strip, sums: &[f32]) {
    let column = strip.head * scan.width + strip.first;
    let d = scan.d.map(|d| s.splat(d.row(0)[strip.head]));
    for (i, t) in rows.enumerate() {
        // SAFETY: the caller's promise.
        unsafe {
            let x = scan.x.row(t).as_ptr().add(column);
            let y = scan.y.columns(t, column..column + strip.channels);
            for p in (0..strip.channels).step_by(S::LANES) {
                let n = (strip.channels - p).min(S::LANES);
                let sum = s.load(sums.as_ptr().add(i * STRIP + p));
                let sum = d.map_or(sum, |d| s.fma(d, load(s, x.add(p), n), sum));
                store(s, y.as_mut_ptr().add(p), n, sum);
            }
        }
    }
}

/// Some vectors of a strip, from `v` on, over a block of tokens.
struct Column<'a> {
    scan: &'a Scan,
    slot: usize,
    strip: &'a Strip,
    v: usize,
    packed: *const f32,
    /// One for each token.
    decays: &'a [f32],
    inputs: *const f32,
    sums: *mut f32,
}

impl Column<'_> {
    /// All states of `V` vectors, of which only the last may have fewer channels than lanes.
    ///
    /// # Safety
    /// The pointers are to the rooms that `blocks` asserts, and the strip is the caller's.
    #[inline(always)]
    unsafe fn run<S: Simd, const V: usize>(self, s: S) -> usize {
        let (states, width) = (self.scan.states, self.scan.width);
        let first = self.v * S::LANES;
        let last = (self.strip.channels - first - (V - 1) * S::LANES).min(S::LANES);
        // SAFETY: the caller's promise.
        unsafe {
            let (inputs, sums) = (self.inputs.add(first), self.sums.add(first));
            let state = self.scan.state.row_pointer(self.slot);
            let state = state.add(self.strip.head * states * width + self.strip.first + first);
            for n in (0..states).step_by(STATES) {
                let packed = self.packed.add(n / STATES * TILE_PITCH);
                let at = |k: usize| state.add((n + k) * width);
                if n + STATES <= states {
                    let rows = std::array::from_fn(at);
                    tile::<S, STATES, V>(s, rows, last, packed, self.decays, inputs, sums);
                } else {
                    for k in 0..states - n {
                        let packed = packed.add(k);
                        tile::<S, 1, V>(s, [at(k)], last, packed, self.decays, inputs, sums);
                    }
                }
            }
        }
        V
    }
}

/// `K` states of `V` vectors of channels through a block of tokens.
///
/// # Safety
/// `state` points to `V` vectors for each state, the last with `last` channels; the other pointers to
/// as many tokens as there are decays.
#[inline(always)]
#[allow(clippy::needless_range_loop)] // a tile is read by its two indices
unsafe fn tile<S: Simd, const K: usize, const V: usize>(
    s: S,
    state: [*mut f32; K],
    last: usize,
    packed: *const f32,
    decays: &[f32],
    inputs: *const f32,
    sums: *mut f32,
) {
    let lanes = |v: usize| if v + 1 == V { last } else { S::LANES };
    let mut h = [[s.splat(0.0); V]; K];
    // SAFETY: the caller's promise.
    unsafe {
        for k in 0..K {
            for v in 0..V {
                h[k][v] = load(s, state[k].add(v * S::LANES), lanes(v));
            }
        }
        for (t, decay) in decays.iter().enumerate() {
            let decay = s.splat(*decay);
            let (bc, at) = (packed.add(t * 2 * STATES), t * STRIP);
            let (mut input, mut sum) = ([s.splat(0.0); V], [s.splat(0.0); V]);
            for v in 0..V {
                input[v] = s.load(inputs.add(at + v * S::LANES));
                sum[v] = s.load(sums.add(at + v * S::LANES));
            }
            for k in 0..K {
                let (b, c) = (s.splat(*bc.add(k)), s.splat(*bc.add(STATES + k)));
                for v in 0..V {
                    h[k][v] = s.fma(decay, h[k][v], s.mul(b, input[v]));
                    sum[v] = s.fma(c, h[k][v], sum[v]);
                }
            }
            for v in 0..V {
                s.store(sums.add(at + v * S::LANES), sum[v]);
            }
        }
        for k in 0..K {
            for v in 0..V {
                store(s, state[k].add(v * S::LANES), lanes(v), h[k][v]);
            }
        }
    }
}

//! The scan of Mamba-3: heads are shared out, channels lie in lanes, and a tile of the state stays in
//! registers for some tokens at a time.

use std::f32::consts::{LOG2_E, PI, TAU};
use std::ops::Range;

use super::Cpu;
use super::math::{exp2, floor, sigmoid, silu, sin_cos, softplus, tanh};
use super::scratch::Scratch;
use super::simd::{Kernel, Simd};
use crate::ops::{Decay, Mamba3Scan};
use crate::span::Ragged;
use crate::tensor::{View, ViewMut};

/// Tokens that one visit to the state takes.
const TOKENS: usize = 8;

/// Lanes of the widest instruction set.
const MOST_LANES: usize = 16;

/// States of a tile, of two vectors of channels each.
const TILE: usize = 4;

impl Cpu {
    pub(super) fn do_mamba3_scan(&self, op: Mamba3Scan<'_>) {
        let (width, states) = op.sizes();
        let scan = Scan {
            x: op.x.view(),
            z: op.z.view(),
            b: op.b.view(),
            c: op.c.view(),
            dt: op.dt.view(),
            a: op.a.view(),
            trap: op.trap.view(),
            angle: op.angle.view(),
            dt_bias: op.dt_bias.view(),
            b_bias: op.b_bias.view(),
            c_bias: op.c_bias.view(),
            d: op.d.view(),
            mimo: op
                .mimo
                .map(|m| [m.x_in.view(), m.z_in.view(), m.y_out.view()]),
            norm: op.norm.map(|n| (n.weight.view(), n.eps)),
            decay: op.decay,
            a_floor: op.a_floor,
            heads_of_group: op.heads / op.groups,
            groups: op.groups,
            rank: op.rank,
            width,
            states,
            angle_state: op.angle_state.view_mut(),
            ssm_state: op.ssm_state.view_mut(),
            b_state: op.b_state.view_mut(),
            x_state: op.x_state.view_mut(),
            ragged: op.ragged,
            y: op.y.view_mut(),
        };
        let cost = scan.x.rows() * (2 * scan.rank + 2) * states * width;
        self.for_rows(op.heads, cost, |heads, scratch| {
            self.isa().launch(Part {
                scan,
                heads,
                scratch,
            });
        });
    }
}

#[derive(Clone, Copy)]
struct Scan<'a> {
    x: View<f32>,
    z: View<f32>,
    b: View<f32>,
    c: View<f32>,
    dt: View<f32>,
    a: View<f32>,
    trap: View<f32>,
    angle: View<f32>,
    dt_bias: View<f32>,
    b_bias: View<f32>,
    c_bias: View<f32>,
    d: View<f32>,
    mimo: Option<[View<f32>; 3]>,
    norm: Option<(View<f32>, f32)>,
    decay: Decay,
    a_floor: f32,
    heads_of_group: usize,
    groups: usize,
    rank: usize,
    width: usize,
    states: usize,
    angle_state: ViewMut<f32>,
    ssm_state: ViewMut<f32>,
    b_state: ViewMut<f32>,
    x_state: ViewMut<f32>,
    ragged: Ragged<'a>,
    y: ViewMut<f32>,
}

struct Part<'a> {
    scan: Scan<'a>,
    heads: Range<usize>,
    scratch: &'a mut Scratch,
}

/// What some tokens of a head need while they visit its state. Rows are a token's, rank after rank.
struct Work<'a> {
    /// B of the token before the first, then of each token: (TOKENS + 1, R·N).
    b: &'a mut [f32],
    /// (TOKENS, R·N).
    c: &'a mut [f32],
    /// X of each token: (TOKENS, R·P).
    x: &'a mut [f32],
    /// (1 - λ) · δ · α · X of the token before: (TOKENS, R·P).
    before: &'a mut [f32],
    /// λ · δ · X: (TOKENS, R·P).
    now: &'a mut [f32],
    /// C · S: (TOKENS, R·P).
    sums: &'a mut [f32],
    /// Angles, their sines and their cosines: (3, K).
    turns: &'a mut [f32],
    /// x of the token before: (P).
    last: &'a mut [f32],
}

/// δ, α, (1 - λ) · δ · α and λ · δ of some tokens.
#[derive(Default)]
struct Factors {
    delta: [f32; MOST_LANES],
    alpha: [f32; MOST_LANES],
    before: [f32; MOST_LANES],
    now: [f32; MOST_LANES],
}

impl Kernel for Part<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Part {
            scan,
            heads,
            scratch,
        } = self;
        let (states, width, pairs) = (
            scan.rank * scan.states,
            scan.rank * scan.width,
            scan.angle.cols(),
        );
        let sizes = [
            (TOKENS + 1) * states,
            TOKENS * states,
            TOKENS * width,
            TOKENS * width,
            TOKENS * width,
            TOKENS * width,
            3 * pairs,
            scan.width,
        ];
        let mut parts = scratch.split(&sizes.map(|n| 4 * n));
        let [b, c, x, before, now, sums, turns, last] = sizes.map(|n| parts.next::<f32>(n));
        let mut work = Work {
            b,
            c,
            x,
            before,
            now,
            sums,
            turns,
            last,
        };
        for h in heads {
            for span in scan.ragged.spans {
                // SAFETY: a slot belongs to one span, and a head's columns of slots and of y to this
                // kernel; the slices below are the only references to them.
                let (theta, b_state, x_state) = unsafe {
                    (
                        scan.angle_state
                            .columns(span.slot, h * pairs..(h + 1) * pairs),
                        scan.b_state
                            .columns(span.slot, h * states..(h + 1) * states),
                        scan.x_state
                            .columns(span.slot, h * scan.width..(h + 1) * scan.width),
                    )
                };
                work.b[..states].copy_from_slice(b_state);
                work.last.copy_from_slice(x_state);
                for start in span.rows().step_by(TOKENS) {
                    let rows = start..(start + TOKENS).min(span.start + span.len);
                    let count = rows.len();
                    let factors = factors(s, &scan, h, rows.clone());
                    for (at, t) in rows.clone().enumerate() {
                        turn(s, &scan, t, factors.delta[at], theta, work.turns);
                        rotate(&scan, h, at, t, &mut work);
                        inputs(&scan, h, at, t, &factors, &mut work);
                    }
                    visit(s, &scan, (h, span.slot), &factors, count, &mut work);
                    for (at, t) in rows.enumerate() {
                        let columns = h * scan.width..(h + 1) * scan.width;
                        // SAFETY: as above.
                        let y = unsafe { scan.y.columns(t, columns) };
                        output(s, &scan, h, at, t, &mut work, y);
                    }
                    work.b.copy_within(count * states..(count + 1) * states, 0);
                }
                b_state.copy_from_slice(&work.b[..states]);
                x_state.copy_from_slice(work.last);
            }
        }
    }
}

/// The scalars of some tokens, all lanes at once.
#[inline(always)]
fn factors<S: Simd>(s: S, scan: &Scan<'_>, h: usize, rows: Range<usize>) -> Factors {
    let mut raw = [[0.0f32; MOST_LANES]; 3];
    for (at, t) in rows.enumerate() {
        raw[0][at] = scan.dt.row(t)[h] + scan.dt_bias.row(0)[h];
        raw[1][at] = scan.a.row(t)[h];
        raw[2][at] = scan.trap.row(t)[h];
    }
    let mut out = Factors::default();
    let (zero, one) = (s.splat(0.0), s.splat(1.0));
    for i in (0..TOKENS).step_by(S::LANES) {
        // SAFETY: all arrays have MOST_LANES elements, a multiple of the lanes, and i + LANES of
        // them at least: TOKENS divides MOST_LANES.
        unsafe {
            let [dt, a, trap] = raw.each_ref().map(|v| s.load(v.as_ptr().add(i)));
            let delta = softplus(s, dt);
            let rate = match scan.decay {
                Decay::HeavyTail => {
                    let low = s.sub(one, s.min(zero, a));
                    s.add(s.max(zero, a), s.div(one, low))
                }
                Decay::Softplus => softplus(s, a),
            };
            let rate = s.max(s.splat(scan.a_floor), rate);
            let alpha = exp2(s, s.mul(s.mul(delta, rate), s.splat(-LOG2_E)));
            let lambda = sigmoid(s, trap);
            let before = s.mul(s.mul(s.sub(one, lambda), delta), alpha);
            s.store(out.delta.as_mut_ptr().add(i), delta);
            s.store(out.alpha.as_mut_ptr().add(i), alpha);
            s.store(out.before.as_mut_ptr().add(i), before);
            s.store(out.now.as_mut_ptr().add(i), s.mul(lambda, delta));
        }
    }
    out
}

/// Moves the angles on by one token, and leaves them with their sines and cosines in `turns`.
#[inline(always)]
fn turn<S: Simd>(
    s: S,
    scan: &Scan<'_>,
    t: usize,
    delta: f32,
    theta: &mut [f32],
    turns: &mut [f32],
) {
    let (pairs, raw) = (theta.len(), scan.angle.row(t));
    assert!(raw.len() == pairs && turns.len() == 3 * pairs);
    let step = s.splat(PI * delta);
    for i in (0..pairs).step_by(S::LANES) {
        let n = (pairs - i).min(S::LANES);
        // SAFETY: all have `n` elements from `i`, and `turns` two times `pairs` more.
        unsafe {
            let sum = s.fma(
                tanh(s, load(s, raw.as_ptr().add(i), n)),
                step,
                load(s, theta.as_ptr().add(i), n),
            );
            let whole = floor(s, s.mul(sum, s.splat(1.0 / TAU)));
            let angle = s.fma(whole, s.splat(-TAU), sum);
            let (sin, cos) = sin_cos(s, angle);
            store(s, theta.as_mut_ptr().add(i), n, angle);
            store(s, turns.as_mut_ptr().add(pairs + i), n, sin);
            store(s, turns.as_mut_ptr().add(2 * pairs + i), n, cos);
        }
    }
}

/// B and C of token `at`: with their biases, and turned.
#[inline(always)]
fn rotate(scan: &Scan<'_>, h: usize, at: usize, t: usize, work: &mut Work<'_>) {
    let (states, pairs) = (scan.states, scan.angle.cols());
    let (sin, cos) = work.turns[pairs..].split_at(pairs);
    let group = h / scan.heads_of_group;
    for r in 0..scan.rank {
        let from = (r * scan.groups + group) * states;
        let bias = (h * scan.rank + r) * states;
        let place = |token: usize| (token * scan.rank + r) * states;
        let sides = [
            (
                &scan.b,
                &scan.b_bias,
                &mut work.b[place(at + 1)..][..states],
            ),
            (&scan.c, &scan.c_bias, &mut work.c[place(at)..][..states]),
        ];
        for (of, bias_of, to) in sides {
            let raw = &of.row(t)[from..][..states];
            let bias = &bias_of.row(0)[bias..][..states];
            for ((to, raw), bias) in to.iter_mut().zip(raw).zip(bias) {
                *to = raw + bias;
            }
            let turned = |(u, v): (&mut f32, &mut f32), sin: &f32, cos: &f32| {
                (*u, *v) = (*u * cos - *v * sin, *u * sin + *v * cos);
            };
            if scan.mimo.is_some() {
                let (low, high) = to.split_at_mut(states / 2);
                let halves = low.iter_mut().zip(high);
                for ((pair, sin), cos) in halves.zip(sin).zip(cos) {
                    turned(pair, sin, cos);
                }
            } else {
                for (([u, v], sin), cos) in to.as_chunks_mut().0.iter_mut().zip(sin).zip(cos) {
                    turned((u, v), sin, cos);
                }
            }
        }
    }
}

/// What token `at` and the one before add to the state, channel by channel.
#[inline(always)]
fn inputs(scan: &Scan<'_>, h: usize, at: usize, t: usize, factors: &Factors, work: &mut Work<'_>) {
    let width = scan.width;
    let x = &scan.x.row(t)[h * width..][..width];
    for r in 0..scan.rank {
        let place = (at * scan.rank + r) * width;
        let by = scan
            .mimo
            .as_ref()
            .map(|m| &m[0].row(0)[(h * scan.rank + r) * width..][..width]);
        for p in 0..width {
            let by = by.map_or(1.0, |by| by[p]);
            let input = x[p] * by;
            work.x[place + p] = input;
            work.now[place + p] = factors.now[at] * input;
            work.before[place + p] = factors.before[at] * (work.last[p] * by);
        }
    }
    work.last.copy_from_slice(x);
}

/// Takes the state through `count` tokens, and leaves C · S of each in `work.sums`.
#[inline(always)]
fn visit<S: Simd>(
    s: S,
    scan: &Scan<'_>,
    (h, slot): (usize, usize),
    factors: &Factors,
    count: usize,
    work: &mut Work<'_>,
) {
    let (states, width, rank) = (scan.states, scan.width, scan.rank);
    work.sums[..count * rank * width].fill(0.0);
    assert!(count <= TOKENS && work.b.len() >= (count + 1) * rank * states);
    assert!(work.c.len() >= count * rank * states && work.now.len() >= count * rank * width);
    assert!(work.before.len() >= count * rank * width);
    let first = h * states * width;
    assert!(first + states * width <= scan.ssm_state.cols());
    // SAFETY: `first` and the state that follows lie in the slot's row.
    let state = unsafe { scan.ssm_state.row_pointer(slot).add(first) };
    let tile = Tile {
        scan,
        factors,
        count,
        state,
    };
    let mut p = 0;
    while p < width {
        let vectors = if width - p >= 2 * S::LANES { 2 } else { 1 };
        let n = (width - p).min(vectors * S::LANES);
        let whole = states / TILE * TILE;
        for k in (0..whole).step_by(TILE) {
            // SAFETY: the state has `states` rows of `width` elements, of which this takes TILE rows
            // from k and `n` elements from p; the lengths of the work were checked.
            unsafe {
                match vectors {
                    2 => tile.run::<S, TILE, 2>(s, k, p, n, work),
                    _ => tile.run::<S, TILE, 1>(s, k, p, n, work),
                }
            }
        }
        for k in whole..states {
            // SAFETY: as above, with one row.
            unsafe {
                match vectors {
                    2 => tile.run::<S, 1, 2>(s, k, p, n, work),
                    _ => tile.run::<S, 1, 1>(s, k, p, n, work),
                }
            }
        }
        p += n;
    }
}

/// What all tiles of a visit have in common.
struct Tile<'a> {
    scan: &'a Scan<'a>,
    factors: &'a Factors,
    count: usize,
    /// The head's state: (N, P).
    state: *mut f32,
}

impl Tile<'_> {
    /// `N` states from `k` of `V` vectors of channels from `p`, of which `n` are there. Every sum goes
    /// over the states in their order, whatever the tile.
    ///
    /// # Safety
    /// The state and the rows of the work have these elements; `n` is less than `V` vectors for one
    /// vector only.
    #[inline(always)]
    unsafe fn run<S: Simd, const N: usize, const V: usize>(
        &self,
        s: S,
        k: usize,
        p: usize,
        n: usize,
        work: &mut Work<'_>,
    ) {
        let (states, width, rank) = (self.scan.states, self.scan.width, self.scan.rank);
        let n = if V == 1 { n } else { S::LANES };
        // SAFETY: the caller's promise.
        unsafe {
            let at = |i: usize, v: usize| self.state.add((k + i) * width + p + v * S::LANES);
            let mut tile = [[s.splat(0.0); V]; N];
            for (i, row) in tile.iter_mut().enumerate() {
                for (v, state) in row.iter_mut().enumerate() {
                    *state = load(s, at(i, v), n);
                }
            }
            for t in 0..self.count {
                let alpha = s.splat(self.factors.alpha[t]);
                for state in tile.iter_mut().flatten() {
                    *state = s.mul(*state, alpha);
                }
                for r in 0..rank {
                    let place = (t * rank + r) * width + p;
                    let b_before = work.b.as_ptr().add((t * rank + r) * states + k);
                    let b = b_before.add(rank * states);
                    for v in 0..V {
                        let place = place + v * S::LANES;
                        let before = load(s, work.before.as_ptr().add(place), n);
                        let now = load(s, work.now.as_ptr().add(place), n);
                        for (i, row) in tile.iter_mut().enumerate() {
                            row[v] = s.fma(s.splat(*b_before.add(i)), before, row[v]);
                            row[v] = s.fma(s.splat(*b.add(i)), now, row[v]);
                        }
                    }
                }
                for r in 0..rank {
                    let c = work.c.as_ptr().add((t * rank + r) * states + k);
                    for v in 0..V {
                        let place = (t * rank + r) * width + p + v * S::LANES;
                        let sums = work.sums.as_mut_ptr().add(place);
                        let mut sum = load(s, sums, n);
                        for (i, row) in tile.iter().enumerate() {
                            sum = s.fma(s.splat(*c.add(i)), row[v], sum);
                        }
                        store(s, sums, n, sum);
                    }
                }
            }
            for (i, row) in tile.iter().enumerate() {
                for (v, state) in row.iter().enumerate() {
                    store(s, at(i, v), n, *state);
                }
            }
        }
    }
}

/// y of token `at`: what goes past the state, the norm, the gate and the sum over ranks.
#[inline(always)]
fn output<S: Simd>(
    s: S,
    scan: &Scan<'_>,
    h: usize,
    at: usize,
    t: usize,
    work: &mut Work<'_>,
    y: &mut [f32],
) {
    let (width, rank) = (scan.width, scan.rank);
    let z = &scan.z.row(t)[h * width..][..width];
    let d = s.splat(scan.d.row(0)[h]);
    assert!(y.len() == width);
    for r in 0..rank {
        let place = (at * rank + r) * width;
        let (x, sums) = (&work.x[place..][..width], &mut work.sums[place..][..width]);
        let weights = scan
            .mimo
            .as_ref()
            .map(|m| [1, 2].map(|i| &m[i].row(0)[(h * rank + r) * width..][..width]));
        let norm = scan
            .norm
            .as_ref()
            .map(|(w, eps)| (&w.row(0)[h * width..][..width], *eps));
        // SAFETY: all slices have `width` elements, and vectors are masked to those that are there.
        unsafe {
            let mut square = s.splat(0.0);
            for i in (0..width).step_by(S::LANES) {
                let n = (width - i).min(S::LANES);
                let input = load(s, x.as_ptr().add(i), n);
                let sum = s.fma(d, input, load(s, sums.as_ptr().add(i), n));
                square = s.fma(sum, sum, square);
                store(s, sums.as_mut_ptr().add(i), n, sum);
            }
            let by =
                norm.map(|(_, eps)| s.splat(1.0 / (s.sum(square) / width as f32 + eps).sqrt()));
            for i in (0..width).step_by(S::LANES) {
                let n = (width - i).min(S::LANES);
                let mut out = load(s, sums.as_ptr().add(i), n);
                if let (Some((weight, _)), Some(by)) = (norm, by) {
                    out = s.mul(s.mul(out, by), load(s, weight.as_ptr().add(i), n));
                }
                let gate = load(s, z.as_ptr().add(i), n);
                let to = y.as_mut_ptr().add(i);
                match weights {
                    None => store(s, to, n, s.mul(out, silu(s, gate))),
                    Some([z_in, y_out]) => {
                        let gate = silu(s, s.mul(gate, load(s, z_in.as_ptr().add(i), n)));
                        let y_out = load(s, y_out.as_ptr().add(i), n);
                        let so_far = if r == 0 { s.splat(0.0) } else { load(s, to, n) };
                        store(s, to, n, s.fma(s.mul(out, gate), y_out, so_far));
                    }
                }
            }
        }
    }
}

#[inline(always)]
unsafe fn load<S: Simd>(s: S, p: *const f32, n: usize) -> S::V {
    // SAFETY: the caller has `n` elements there.
    unsafe {
        if n == S::LANES {
            s.load(p)
        } else {
            s.load_n(p, n)
        }
    }
}

#[inline(always)]
unsafe fn store<S: Simd>(s: S, p: *mut f32, n: usize, x: S::V) {
    // SAFETY: the caller has `n` elements there.
    unsafe {
        if n == S::LANES {
            s.store(p, x)
        } else {
            s.store_n(p, n, x)
        }
    }
}

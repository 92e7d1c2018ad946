//! The selective scan: channels in lanes, their states in registers for a whole chunk.

use std::ops::Range;

use super::Cpu;
use super::math::{exp2, silu, softplus};
use super::simd::{Kernel, Simd, load, store};
use crate::ops::SelectiveScan;
use crate::span::Ragged;
use crate::tensor::{View, ViewMut};

impl Cpu {
    pub(super) fn do_selective_scan(&self, op: SelectiveScan<'_>) {
        let scan = Scan {
            x: op.x.view(),
            dt: op.dt.view(),
            dt_bias: op.dt_bias.map(|t| t.view()),
            a: op.a.view(),
            b: op.b.view(),
            c: op.c.view(),
            channels: op.x.cols() / op.groups,
            d: op.d.view(),
            z: op.z.map(|t| t.view()),
            state: op.ssm_state.view_mut(),
            ragged: op.ragged,
            y: op.y.view_mut(),
        };
        let states = scan.a.rows();
        self.for_columns(
            scan.x.cols(),
            scan.x.rows() * (16 + 4 * states),
            |columns, scratch| {
                let rates = scratch.take(states * MOST_LANES);
                self.isa().launch(Block {
                    scan,
                    columns,
                    rates,
                });
            },
        );
    }
}

/// Lanes of the widest instruction set.
const MOST_LANES: usize = 16;

#[derive(Clone, Copy)]
struct Scan<'a> {
    x: View<f32>,
    dt: View<f32>,
    dt_bias: Option<View<f32>>,
    a: View<f32>,
    b: View<f32>,
    c: View<f32>,
    /// Channels of a group.
    channels: usize,
    d: View<f32>,
    z: Option<View<f32>>,
    state: ViewMut<f32>,
    ragged: Ragged<'a>,
    y: ViewMut<f32>,
}

impl Scan<'_> {
    /// A group's b and c at row `t`.
    #[inline(always)]
    fn of_group(&self, t: usize, group: usize) -> (*const f32, *const f32) {
        let states = self.a.rows();
        let of = group * states..(group + 1) * states;
        (
            self.b.row(t)[of.clone()].as_ptr(),
            self.c.row(t)[of].as_ptr(),
        )
    }
}

struct Block<'a> {
    scan: Scan<'a>,
    columns: Range<usize>,
    /// Room for a · log₂ e of one vector of channels, state after state.
    rates: &'a mut [f32],
}

impl Kernel for Block<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Block {
            scan,
            columns,
            rates,
        } = self;
        let mut next = columns.start;
        while next < columns.end {
            // A vector has channels of one group: what they read of b and c is the same.
            let i = next;
            let group = i / scan.channels;
            let n = columns.end.min((group + 1) * scan.channels) - i;
            let n = n.min(S::LANES);
            next += n;
            for (state, rate) in rates
                .chunks_exact_mut(S::LANES)
                .take(scan.a.rows())
                .enumerate()
            {
                // SAFETY: rows of a have `n` elements from `i`, and the chunk has a vector's.
                unsafe {
                    let a = load(s, scan.a.row(state).as_ptr().add(i), n);
                    s.store(
                        rate.as_mut_ptr(),
                        s.mul(a, s.splat(std::f32::consts::LOG2_E)),
                    );
                }
            }
            for span in scan.ragged.spans {
                let (rows, slot, at) = (span.rows(), span.slot, (group, i, n));
                // SAFETY: a slot belongs to one span, and these channels to this kernel; vectors
                // are masked to the `n` channels that are there.
                unsafe {
                    match scan.a.rows() {
                        8 => in_registers::<S, 8>(s, &scan, rates, rows, slot, at),
                        16 => in_registers::<S, 16>(s, &scan, rates, rows, slot, at),
                        _ => in_memory(s, &scan, rates, rows, slot, at),
                    }
                }
            }
        }
    }
}

/// Tokens whose step sizes are computed together, and whose outputs are: neither waits for the state,
/// and their long chains of operations overlap.
const TOKENS: usize = 8;

/// A vector for each of some tokens.
type Vectors = [[f32; MOST_LANES]; TOKENS];

/// δ = softplus(dt + bias) at some tokens.
#[inline(always)]
unsafe fn step_sizes<S: Simd>(
    s: S,
    scan: &Scan<'_>,
    rows: Range<usize>,
    (i, n): (usize, usize),
    deltas: &mut Vectors,
) {
    for (t, delta) in rows.zip(deltas) {
        // SAFETY: rows have `n` elements from `i`, and a vector has room.
        unsafe {
            let mut dt = load(s, scan.dt.row(t).as_ptr().add(i), n);
            if let Some(bias) = scan.dt_bias {
                dt = s.add(dt, load(s, bias.row(0).as_ptr().add(i), n));
            }
            s.store(delta.as_mut_ptr(), softplus(s, dt));
        }
    }
}

/// Adds d · x, applies the gate and writes y at some tokens.
#[inline(always)]
unsafe fn outputs<S: Simd>(
    s: S,
    scan: &Scan<'_>,
    rows: Range<usize>,
    (i, n): (usize, usize),
    sums: &Vectors,
) {
    for (t, sum) in rows.zip(sums) {
        // SAFETY: rows have `n` elements from `i`, and these of y are ours.
        unsafe {
            let x = load(s, scan.x.row(t).as_ptr().add(i), n);
            let d = load(s, scan.d.row(0).as_ptr().add(i), n);
            let mut y = s.fma(d, x, s.load(sum.as_ptr()));
            if let Some(z) = scan.z {
                y = s.mul(y, silu(s, load(s, z.row(t).as_ptr().add(i), n)));
            }
            store(s, scan.y.columns(t, i..i + n).as_mut_ptr(), n, y);
        }
    }
}

/// Asks for the inputs of a later token: rows are too far apart for the machine to guess.
#[inline(always)]
fn prefetch<S: Simd>(s: S, scan: &Scan<'_>, t: usize, i: usize) {
    for view in [Some(scan.x), Some(scan.dt), scan.z].into_iter().flatten() {
        s.prefetch(view.pointer().wrapping_add(t * view.stride() + i));
    }
}

/// All `N` states of a vector of channels stay in registers.
///
/// # Safety
/// Channels `i..i + n`, which are of one group, of the rows and of the slot belong to the caller.
#[inline(always)]
unsafe fn in_registers<S: Simd, const N: usize>(
    s: S,
    scan: &Scan<'_>,
    rates: &[f32],
    rows: Range<usize>,
    slot: usize,
    (group, i, n): (usize, usize, usize),
) {
    let inner = scan.a.cols();
    assert!(rates.len() >= N * S::LANES);
    // SAFETY: the caller's promise; `rates` holds N vectors, a group's b and c N elements.
    unsafe {
        let state = scan.state.row_pointer(slot).add(i);
        let mut h = [s.splat(0.0); N];
        for (k, h) in h.iter_mut().enumerate() {
            *h = load(s, state.add(k * inner), n);
        }
        let (mut deltas, mut sums) = (Vectors::default(), Vectors::default());
        for start in rows.clone().step_by(TOKENS) {
            let rows = start..(start + TOKENS).min(rows.end);
            step_sizes(s, scan, rows.clone(), (i, n), &mut deltas);
            for (at, t) in rows.clone().enumerate() {
                prefetch(s, scan, t + TOKENS, i);
                let delta = s.load(deltas[at].as_ptr());
                let delta_x = s.mul(delta, load(s, scan.x.row(t).as_ptr().add(i), n));
                let (b, c) = scan.of_group(t, group);
                let mut sum = [s.splat(0.0); 2];
                for k in 0..N {
                    let rate = s.load(rates.as_ptr().add(k * S::LANES));
                    let decay = exp2(s, s.mul(delta, rate));
                    h[k] = s.fma(decay, h[k], s.mul(delta_x, s.splat(*b.add(k))));
                    sum[k % 2] = s.fma(s.splat(*c.add(k)), h[k], sum[k % 2]);
                }
                s.store(sums[at].as_mut_ptr(), s.add(sum[0], sum[1]));
            }
            outputs(s, scan, rows, (i, n), &sums);
        }
        for (k, h) in h.into_iter().enumerate() {
            store(s, state.add(k * inner), n, h);
        }
    }
}

/// Any number of states, in the slot itself.
///
/// # Safety
/// As for `in_registers`.
#[inline(always)]
unsafe fn in_memory<S: Simd>(
    s: S,
    scan: &Scan<'_>,
    rates: &[f32],
    rows: Range<usize>,
    slot: usize,
    (group, i, n): (usize, usize, usize),
) {
    let (states, inner) = (scan.a.rows(), scan.a.cols());
    assert!(rates.len() >= states * S::LANES);
    // SAFETY: the caller's promise; `rates` holds a vector for each state, a group's b and c as many
    // elements.
    unsafe {
        let state = scan.state.row_pointer(slot).add(i);
        let (mut deltas, mut sums) = (Vectors::default(), Vectors::default());
        for start in rows.clone().step_by(TOKENS) {
            let rows = start..(start + TOKENS).min(rows.end);
            step_sizes(s, scan, rows.clone(), (i, n), &mut deltas);
            for (at, t) in rows.clone().enumerate() {
                prefetch(s, scan, t + TOKENS, i);
                let delta = s.load(deltas[at].as_ptr());
                let delta_x = s.mul(delta, load(s, scan.x.row(t).as_ptr().add(i), n));
                let (b, c) = scan.of_group(t, group);
                let mut sum = s.splat(0.0);
                for k in 0..states {
                    let at = state.add(k * inner);
                    let rate = s.load(rates.as_ptr().add(k * S::LANES));
                    let decay = exp2(s, s.mul(delta, rate));
                    let h = s.fma(decay, load(s, at, n), s.mul(delta_x, s.splat(*b.add(k))));
                    store(s, at, n, h);
                    sum = s.fma(s.splat(*c.add(k)), h, sum);
                }
                s.store(sums[at].as_mut_ptr(), sum);
            }
            outputs(s, scan, rows, (i, n), &sums);
        }
    }
}

//! The scan of S4D: channels in lanes, as the scan of Mamba-2 does it. A tile of states stays in
//! registers for a block of tokens and adds to their outputs; a sum over states is formed in their
//! order whatever the tiles.

use std::ops::Range;

use super::Cpu;
use super::simd::{Kernel, Simd, load, store};
use crate::ops::S4dScan;
use crate::span::{Ragged, Span};
use crate::tensor::{View, ViewMut};

/// Channels that are taken together.
const STRIP: usize = 64;
/// Tokens of a block.
const TOKENS: usize = 32;

impl Cpu {
    pub(super) fn do_s4d_scan(&self, op: S4dScan<'_>) {
        let scan = Scan {
            x: op.x.view(),
            a: [op.a_re.view(), op.a_im.view()],
            c: [op.c_re.view(), op.c_im.view()],
            d: op.d.view(),
            state: op.ssm_state.view_mut(),
            ragged: op.ragged,
            y: op.y.view_mut(),
        };
        let cost = scan.x.rows() * (8 + 2 * scan.a[0].rows());
        self.for_columns(scan.x.cols(), cost, |columns, scratch| {
            let sums = scratch.take(TOKENS * STRIP);
            self.isa().launch(Columns {
                scan,
                columns,
                sums,
            });
        });
    }
}

#[derive(Clone, Copy)]
struct Scan<'a> {
    x: View<f32>,
    /// Real and imaginary parts.
    a: [View<f32>; 2],
    c: [View<f32>; 2],
    d: View<f32>,
    state: ViewMut<f32>,
    ragged: Ragged<'a>,
    y: ViewMut<f32>,
}

/// Some channels of all sequences.
struct Columns<'a> {
    scan: Scan<'a>,
    columns: Range<usize>,
    /// Room for the sums over states, `STRIP` of each token.
    sums: &'a mut [f32],
}

impl Kernel for Columns<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Columns {
            scan,
            columns,
            sums,
        } = self;
        assert!(sums.len() >= TOKENS * STRIP);
        for first in columns.clone().step_by(STRIP) {
            let strip = first..(first + STRIP).min(columns.end);
            for span in scan.ragged.spans {
                for start in span.rows().step_by(TOKENS) {
                    let rows = start..(start + TOKENS).min(span.rows().end);
                    sums[..rows.len() * STRIP].fill(0.0);
                    // SAFETY: a slot belongs to one span, and these channels to this kernel.
                    unsafe {
                        states(s, &scan, span, rows.clone(), strip.clone(), sums);
                        outputs(s, &scan, rows, strip.clone(), sums);
                    }
                }
            }
        }
    }
}

/// All states of a strip, tile by tile.
///
/// # Safety
/// These channels of the rows and of the slot belong to the caller, and `sums` has `STRIP` elements for
/// each row.
#[inline(always)]
unsafe fn states<S: Simd>(
    s: S,
    scan: &Scan<'_>,
    span: &Span,
    rows: Range<usize>,
    strip: Range<usize>,
    sums: &mut [f32],
) {
    let states = scan.a[0].rows();
    let mut first = 0;
    while first < states {
        // So many that they fit into the registers.
        let taken = match states - first {
            4.. if S::LANES == 16 => 4,
            2.. => 2,
            _ => 1,
        };
        for i in strip.clone().step_by(S::LANES) {
            let n = (strip.end - i).min(S::LANES);
            let (rows, sums) = (rows.clone(), &mut sums[i - strip.start..]);
            // SAFETY: the caller's promise.
            unsafe {
                match taken {
                    4 => tile::<S, 4>(s, scan, span.slot, first, rows, (i, n), sums),
                    2 => tile::<S, 2>(s, scan, span.slot, first, rows, (i, n), sums),
                    _ => tile::<S, 1>(s, scan, span.slot, first, rows, (i, n), sums),
                }
            }
        }
        first += taken;
    }
}

/// `K` states from `first` on of the channels `i..i + n`, through a block of tokens.
///
/// # Safety
/// As for `states`.
#[inline(always)]
unsafe fn tile<S: Simd, const K: usize>(
    s: S,
    scan: &Scan<'_>,
    slot: usize,
    first: usize,
    rows: Range<usize>,
    (i, n): (usize, usize),
    sums: &mut [f32],
) {
    let (states, inner) = (scan.a[0].rows(), scan.x.cols());
    let zero = s.splat(0.0);
    // SAFETY: the caller's promise.
    unsafe {
        let state = scan.state.row_pointer(slot).add(first * inner + i);
        let imaginary = state.add(states * inner);
        let of = |view: &View<f32>, k: usize| load(s, view.row(first + k).as_ptr().add(i), n);
        let (mut re, mut im) = ([zero; K], [zero; K]);
        let (mut a_re, mut a_im, mut c_re, mut less_c_im) =
            ([zero; K], [zero; K], [zero; K], [zero; K]);
        for k in 0..K {
            re[k] = load(s, state.add(k * inner), n);
            im[k] = load(s, imaginary.add(k * inner), n);
            (a_re[k], a_im[k]) = (of(&scan.a[0], k), of(&scan.a[1], k));
            c_re[k] = of(&scan.c[0], k);
            less_c_im[k] = s.mul(s.splat(-1.0), of(&scan.c[1], k));
        }
        for (t, sums) in rows.zip(sums.chunks_mut(STRIP)) {
            let x = load(s, scan.x.row(t).as_ptr().add(i), n);
            let mut sum = s.load(sums.as_ptr());
            for k in 0..K {
                let less_im = s.mul(s.splat(-1.0), im[k]);
                let next = s.fma(a_re[k], re[k], s.fma(a_im[k], less_im, x));
                im[k] = s.fma(a_re[k], im[k], s.mul(a_im[k], re[k]));
                re[k] = next;
                sum = s.fma(c_re[k], re[k], sum);
                sum = s.fma(less_c_im[k], im[k], sum);
            }
            s.store(sums.as_mut_ptr(), sum);
        }
        for k in 0..K {
            store(s, state.add(k * inner), n, re[k]);
            store(s, imaginary.add(k * inner), n, im[k]);
        }
    }
}

/// Doubles the sums, adds d · x and writes y.
///
/// # Safety
/// These channels of y belong to the caller, and `sums` has `STRIP` elements for each row.
#[inline(always)]
unsafe fn outputs<S: Simd>(
    s: S,
    scan: &Scan<'_>,
    rows: Range<usize>,
    strip: Range<usize>,
    sums: &[f32],
) {
    for (t, sums) in rows.zip(sums.chunks_exact(STRIP)) {
        for i in strip.clone().step_by(S::LANES) {
            let n = (strip.end - i).min(S::LANES);
            // SAFETY: rows have `n` elements from `i`, and these of y are ours.
            unsafe {
                let x = load(s, scan.x.row(t).as_ptr().add(i), n);
                let d = load(s, scan.d.row(0).as_ptr().add(i), n);
                let sum = s.load(sums.as_ptr().add(i - strip.start));
                let y = s.fma(d, x, s.add(sum, sum));
                store(s, scan.y.columns(t, i..i + n).as_mut_ptr(), n, y);
            }
        }
    }
}

//! Root-mean-square normalisation, a row at a time.

use super::Cpu;
use super::simd::{Kernel, Simd};
use crate::ops::RmsNorm;

impl Cpu {
    pub(super) fn do_rms_norm(&self, op: RmsNorm<'_>) {
        let (x, y) = (op.x.view::<f32>(), op.y.view_mut::<f32>());
        let weight = op.weight.map(|w| w.view::<f32>());
        self.for_rows(x.rows(), 2 * x.cols(), |rows, _| {
            for r in rows {
                // SAFETY: rows are shared out, and each is written by one part.
                let y = unsafe { y.row(r) };
                let weight = weight.as_ref().map(|w| w.row(0));
                self.isa().launch(Row {
                    x: x.row(r),
                    weight,
                    eps: op.eps,
                    groups: op.groups,
                    y,
                });
            }
        });
    }
}

struct Row<'a> {
    x: &'a [f32],
    weight: Option<&'a [f32]>,
    eps: f32,
    groups: usize,
    y: &'a mut [f32],
}

impl Kernel for Row<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let width = self.x.len() / self.groups;
        for g in 0..self.groups {
            let part = g * width..(g + 1) * width;
            // One for each part, or one that all share.
            let weight = self.weight.map(|w| {
                let at = if w.len() == width { 0 } else { part.start };
                &w[at..at + width]
            });
            normalise(
                s,
                &self.x[part.clone()],
                weight,
                self.eps,
                &mut self.y[part],
            );
        }
    }
}

#[inline(always)]
fn normalise<S: Simd>(s: S, x: &[f32], weight: Option<&[f32]>, eps: f32, y: &mut [f32]) {
    const CHAINS: usize = 4;
    let n = x.len();
    assert!(y.len() == n && weight.is_none_or(|w| w.len() == n));
    let (x, y) = (x.as_ptr(), y.as_mut_ptr());
    let (whole, rest) = (n / S::LANES * S::LANES, n % S::LANES);
    // SAFETY: all slices have `n` elements; the last, shorter vector is masked.
    unsafe {
        // Vector i goes into sum i mod CHAINS, so that additions need not wait for each other.
        let mut sums = [s.splat(0.0); CHAINS];
        let unrolled = whole / (CHAINS * S::LANES) * (CHAINS * S::LANES);
        for i in (0..unrolled).step_by(CHAINS * S::LANES) {
            for (c, sum) in sums.iter_mut().enumerate() {
                let x = s.load(x.add(i + c * S::LANES));
                *sum = s.fma(x, x, *sum);
            }
        }
        for i in (unrolled..whole).step_by(S::LANES) {
            let x = s.load(x.add(i));
            sums[0] = s.fma(x, x, sums[0]);
        }
        if rest > 0 {
            let x = s.load_n(x.add(whole), rest);
            sums[1] = s.fma(x, x, sums[1]);
        }
        let sum = s.sum(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3])));
        let by = 1.0 / (sum / n as f32 + eps).sqrt();
        let by = s.splat(by);
        for i in (0..whole).step_by(S::LANES) {
            let scaled = s.mul(s.load(x.add(i)), by);
            let weight = weight.map_or(s.splat(1.0), |w| s.load(w.as_ptr().add(i)));
            s.store(y.add(i), s.mul(scaled, weight));
        }
        if rest > 0 {
            let scaled = s.mul(s.load_n(x.add(whole), rest), by);
            let weight = weight.map_or(s.splat(1.0), |w| s.load_n(w.as_ptr().add(whole), rest));
            s.store_n(y.add(whole), rest, s.mul(scaled, weight));
        }
    }
}

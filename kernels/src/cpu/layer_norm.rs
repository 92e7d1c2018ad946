//! Normalisation to mean zero and variance one, a row at a time.

use super::Cpu;
use super::simd::{Kernel, Simd, load, store};
use crate::ops::LayerNorm;

impl Cpu {
    pub(super) fn do_layer_norm(&self, op: LayerNorm<'_>) {
        let (x, y) = (op.x.view::<f32>(), op.y.view_mut::<f32>());
        let weight = op.weight.map(|w| w.view::<f32>());
        let bias = op.bias.map(|b| b.view::<f32>());
        self.for_rows(x.rows(), 3 * x.cols(), |rows, _| {
            for r in rows {
                // SAFETY: rows are shared out, and each is written by one part.
                let y = unsafe { y.row(r) };
                self.isa().launch(Row {
                    x: x.row(r),
                    weight: weight.as_ref().map(|w| w.row(0)),
                    bias: bias.as_ref().map(|b| b.row(0)),
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
    bias: Option<&'a [f32]>,
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
            let of = |v: &'_ [f32]| {
                let at = if v.len() == width { 0 } else { part.start };
                v[at..at + width].as_ptr()
            };
            let (weight, bias) = (self.weight.map(of), self.bias.map(of));
            let (x, y) = (&self.x[part.clone()], &mut self.y[part.clone()]);
            // SAFETY: weight and bias are `width` elements, as is the part.
            unsafe { normalise(s, x, (weight, bias), self.eps, y) };
        }
    }
}

/// Sums that do not wait for each other.
const CHAINS: usize = 4;

/// The mean of `f` over a row.
#[inline(always)]
fn mean<S: Simd>(s: S, x: &[f32], f: impl Fn(S::V) -> S::V) -> f32 {
    let whole = x.len() / S::LANES * S::LANES;
    let mut sums = [s.splat(0.0); CHAINS];
    // SAFETY: vectors below `whole` are whole, and the last one is masked.
    unsafe {
        for (i, at) in (0..whole).step_by(S::LANES).enumerate() {
            let sum = &mut sums[i % CHAINS];
            *sum = s.add(*sum, f(s.load(x.as_ptr().add(at))));
        }
        let rest = x.len() - whole;
        if rest > 0 {
            // Lanes without an element must not count, whatever `f` makes of a zero.
            let mut last = [0.0; 16];
            s.store(last.as_mut_ptr(), f(s.load_n(x.as_ptr().add(whole), rest)));
            sums[0] = s.add(sums[0], s.load_n(last.as_ptr(), rest));
        }
    }
    s.sum(s.add(s.add(sums[0], sums[1]), s.add(sums[2], sums[3]))) / x.len() as f32
}

/// # Safety
/// Weight and bias have as many elements as `x` and `y`.
#[inline(always)]
unsafe fn normalise<S: Simd>(
    s: S,
    x: &[f32],
    (weight, bias): (Option<*const f32>, Option<*const f32>),
    eps: f32,
    y: &mut [f32],
) {
    assert_eq!(x.len(), y.len());
    let centre = s.splat(mean(s, x, |x| x));
    let variance = mean(s, x, |x| {
        let distance = s.sub(x, centre);
        s.mul(distance, distance)
    });
    let by = s.splat(1.0 / (variance + eps).sqrt());
    for i in (0..x.len()).step_by(S::LANES) {
        let n = (x.len() - i).min(S::LANES);
        // SAFETY: `n` elements are there.
        unsafe {
            let distance = s.sub(load(s, x.as_ptr().add(i), n), centre);
            let mut out = s.mul(distance, by);
            if let Some(weight) = weight {
                out = s.mul(out, load(s, weight.add(i), n));
            }
            if let Some(bias) = bias {
                out = s.add(out, load(s, bias.add(i), n));
            }
            store(s, y.as_mut_ptr().add(i), n, out);
        }
    }
}

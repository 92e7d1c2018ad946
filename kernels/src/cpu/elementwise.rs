//! Loops over elements that do not meet each other.

use super::Cpu;
use super::math;
use super::simd::{Kernel, Simd};
use crate::ops::Activation;
use crate::tensor::{View, ViewMut};

/// A function of one or two numbers, the same in every lane.
pub(super) trait Map: Copy + Send + Sync {
    fn at<S: Simd>(self, s: S, a: S::V, b: S::V) -> S::V;
}

/// An activation of `a`, times `b` when there is a gate.
#[derive(Clone, Copy)]
pub(super) struct Activated {
    pub(super) act: Activation,
    pub(super) gated: bool,
}

/// The activation itself.
#[inline(always)]
pub(super) fn activated<S: Simd>(s: S, act: Activation, x: S::V) -> S::V {
    match act {
        Activation::Silu => math::silu(s, x),
        Activation::Gelu => math::gelu(s, x),
        Activation::GeluTanh => math::gelu_tanh(s, x),
        // Like `f32::max`, which drops a NaN.
        Activation::Relu => s.max(x, s.splat(0.0)),
        Activation::Relu2 => {
            let x = s.max(x, s.splat(0.0));
            s.mul(x, x)
        }
        Activation::Sigmoid => math::sigmoid(s, x),
        Activation::Identity => x,
    }
}

impl Map for Activated {
    #[inline(always)]
    fn at<S: Simd>(self, s: S, a: S::V, b: S::V) -> S::V {
        let y = activated(s, self.act, a);
        if self.gated { s.mul(y, b) } else { y }
    }
}

impl Cpu {
    /// y = f(a, b) for every element. Without `b`, f gets zeros.
    pub(super) fn map<F: Map>(
        &self,
        f: F,
        a: View<f32>,
        b: Option<View<f32>>,
        y: ViewMut<f32>,
        cost: usize,
    ) {
        self.for_rows(y.rows(), y.cols() * cost, |rows, _| {
            for r in rows {
                // SAFETY: rows are shared out, and each is written by one part.
                let y = unsafe { y.row(r) };
                let b = b.as_ref().map(|b| b.row(r));
                self.isa().launch(MapRow {
                    f,
                    a: a.row(r),
                    b,
                    y,
                });
            }
        });
    }
}

struct MapRow<'a, F> {
    f: F,
    a: &'a [f32],
    b: Option<&'a [f32]>,
    y: &'a mut [f32],
}

impl<F: Map> Kernel for MapRow<'_, F> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (n, whole) = (self.y.len(), self.y.len() / S::LANES * S::LANES);
        assert!(self.a.len() == n && self.b.is_none_or(|b| b.len() == n));
        let (a, y) = (self.a.as_ptr(), self.y.as_mut_ptr());
        // SAFETY: all rows have `n` elements; the last, shorter vector is masked.
        unsafe {
            for i in (0..whole).step_by(S::LANES) {
                let b = self.b.map_or(s.splat(0.0), |b| s.load(b.as_ptr().add(i)));
                s.store(y.add(i), self.f.at(s, s.load(a.add(i)), b));
            }
            if whole < n {
                let rest = n - whole;
                let b = self
                    .b
                    .map_or(s.splat(0.0), |b| s.load_n(b.as_ptr().add(whole), rest));
                s.store_n(
                    y.add(whole),
                    rest,
                    self.f.at(s, s.load_n(a.add(whole), rest), b),
                );
            }
        }
    }
}

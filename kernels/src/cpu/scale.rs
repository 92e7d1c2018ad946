//! Multiplication by a constant.

use super::Cpu;
use super::elementwise::Map;
use super::simd::Simd;
use crate::ops::Scale;

#[derive(Clone, Copy)]
struct By(f32);

impl Map for By {
    #[inline(always)]
    fn at<S: Simd>(self, s: S, a: S::V, _b: S::V) -> S::V {
        s.mul(a, s.splat(self.0))
    }
}

impl Cpu {
    pub(super) fn do_scale(&self, op: Scale<'_>) {
        self.map(By(op.by), op.x.view(), None, op.y.view_mut(), 1);
    }
}

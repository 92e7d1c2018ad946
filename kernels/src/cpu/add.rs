//! The elementwise sum.

use super::Cpu;
use super::elementwise::Map;
use super::simd::Simd;
use crate::ops::Add;

#[derive(Clone, Copy)]
struct Sum;

impl Map for Sum {
    #[inline(always)]
    fn at<S: Simd>(self, s: S, a: S::V, b: S::V) -> S::V {
        s.add(a, b)
    }
}

impl Cpu {
    pub(super) fn do_add(&self, op: Add<'_>) {
        let y = op.y.view_mut();
        self.map(Sum, op.a.view(), Some(op.b.view()), y, 1);
    }
}

//! Keys and values as pages keep them, widened while they are read.

use super::simd::{Float, Simd, widen};
use crate::formats::int8;
use crate::kv::int8_head;
use crate::tensor::{Element, View};

/// Rows ahead of the one that is read, which are asked for meanwhile.
const AHEAD: usize = 8;

/// Rows of heads, one a token.
pub(super) trait Kept: Copy + Send + Sync {
    /// Head `head` of row `row`, widened: as many elements as `to` has.
    fn load<S: Simd>(&self, s: S, row: usize, head: usize, to: &mut [f32]);
}

impl<T: Float> Kept for View<T> {
    #[inline(always)]
    fn load<S: Simd>(&self, s: S, row: usize, head: usize, to: &mut [f32]) {
        let (dim, first) = (to.len(), head * to.len());
        prefetch(s, self, row, first, dim);
        widen(s, &self.row(row)[first..][..dim], to);
    }
}

/// Heads of bytes, with a scale each.
#[derive(Clone, Copy)]
pub(super) struct Int8(pub View<u8>);

impl Kept for Int8 {
    #[inline(always)]
    fn load<S: Simd>(&self, s: S, row: usize, head: usize, to: &mut [f32]) {
        let each = int8_head(to.len());
        prefetch(s, &self.0, row, head * each, each);
        int8::widen(&self.0.row(row)[head * each..][..each], to);
    }
}

#[inline(always)]
fn prefetch<S: Simd, T: Element>(s: S, pages: &View<T>, row: usize, first: usize, len: usize) {
    let ahead = pages
        .pointer()
        .wrapping_add((row + AHEAD) * pages.stride() + first);
    for line in (0..len).step_by(64 / size_of::<T>()) {
        s.prefetch(ahead.wrapping_add(line));
    }
}

//! Causal attention over pages, with grouped queries, an optional window and first tokens that never
//! leave it (Xiao et al., 2023).
//!
//! For the row at position p of a sequence and query head h, with g = h / (heads / kv_heads):
//!
//! ```text
//! s[j]  = scale · q[h] · k[j, g]          for p - window < j ≤ p, and for j < keep_first
//! y[h]  = Σⱼ softmax(s)[j] · v[j, g]
//! ```
//!
//! Keys and values of the batch's own rows are in the pages already (`KvWrite`), so a row sees the
//! same numbers whether its predecessors came in this batch or in an earlier one.

use std::ops::Range;

use super::{Check, linear::write_row};
use crate::error::Result;
use crate::kv::read_row;
use crate::span::Ragged;
use crate::tensor::Tensor;

/// Attention of every row of the batch to its own sequence.
pub struct Attention<'a> {
    /// (T, heads · head_dim) F32.
    pub q: &'a Tensor,
    /// (pages · page_size, kv_heads · head_dim), floating point; or as many rows of heads in bytes: see
    /// [`KvType`](crate::KvType).
    pub k_pages: &'a Tensor,
    /// (pages · page_size, kv_heads · v_head_dim), floating point, or heads in bytes as the keys.
    pub v_pages: &'a Tensor,
    /// Query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Elements of one head of queries and keys.
    pub head_dim: usize,
    /// Elements of one head of values.
    pub v_head_dim: usize,
    /// Multiplies the scores.
    pub scale: f32,
    /// How many tokens a row sees, itself included; none sees all.
    pub window: Option<usize>,
    /// So many tokens at the start of the sequence are seen beside the window.
    pub keep_first: usize,
    /// Which rows belong to which sequence and pages.
    pub ragged: Ragged<'a>,
    /// (T, heads · v_head_dim) F32.
    pub y: &'a mut Tensor,
}

impl Attention<'_> {
    /// Shapes, types, pages and overlaps.
    pub fn check(&self) -> Result<()> {
        let c = Check("attention");
        c.f32(&[("q", self.q), ("y", self.y)])?;
        c.at_least("kv_heads", self.kv_heads, 1)?;
        c.equal("heads beyond whole groups", self.heads % self.kv_heads, 0)?;
        c.equal("columns of q", self.q.cols(), self.heads * self.head_dim)?;
        c.equal("columns of y", self.y.cols(), self.heads * self.v_head_dim)?;
        c.equal("rows of y", self.y.rows(), self.q.rows())?;
        c.value(self.window != Some(0), || {
            "a window of no tokens".to_string()
        })?;
        for (pages, dim) in [
            (self.k_pages, self.head_dim),
            (self.v_pages, self.v_head_dim),
        ] {
            c.heads(pages, self.kv_heads * dim, self.kv_heads)?;
            c.pages(&self.ragged, self.q.rows(), pages)?;
        }
        c.kept_alike(self.k_pages, self.v_pages)?;
        c.apart("y", self.y, &[self.q, self.k_pages, self.v_pages])
    }

    pub(crate) fn sight(&self) -> Sight {
        Sight {
            window: self.window,
            keep_first: self.keep_first,
        }
    }

    /// The plain loops.
    pub(crate) fn reference(&mut self) {
        let (dim, v_dim) = (self.head_dim, self.v_head_dim);
        let group = self.heads / self.kv_heads;
        let mut key = vec![0.0; self.kv_heads * dim];
        let mut value = vec![0.0; self.kv_heads * v_dim];
        for span in self.ragged.spans {
            for t in span.rows() {
                let [kept, recent] = self.sight().of(span.position + t - span.start);
                let seen = || kept.clone().chain(recent.clone());
                let mut scores = vec![Vec::with_capacity(seen().count()); self.heads];
                for j in seen() {
                    read_row(self.k_pages, self.ragged.page_row(span, j), dim, &mut key);
                    for (h, scores) in scores.iter_mut().enumerate() {
                        let q = &self.q.view::<f32>();
                        let q = &q.row(t)[h * dim..][..dim];
                        let k = &key[h / group * dim..][..dim];
                        let score = q.iter().zip(k).map(|(q, k)| q * k).sum::<f32>();
                        scores.push(self.scale * score);
                    }
                }
                let mut y = vec![0.0; self.heads * v_dim];
                for scores in &mut scores {
                    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    scores.iter_mut().for_each(|s| *s = (*s - max).exp());
                    let sum: f32 = scores.iter().sum();
                    scores.iter_mut().for_each(|s| *s /= sum);
                }
                for (i, j) in seen().enumerate() {
                    let row = self.ragged.page_row(span, j);
                    read_row(self.v_pages, row, v_dim, &mut value);
                    for (h, scores) in scores.iter().enumerate() {
                        let v = &value[h / group * v_dim..][..v_dim];
                        for (y, v) in y[h * v_dim..][..v_dim].iter_mut().zip(v) {
                            *y += scores[i] * v;
                        }
                    }
                }
                write_row(self.y, t, 0, &y);
            }
        }
    }
}

/// What a row sees of its sequence.
#[derive(Clone, Copy)]
pub(crate) struct Sight {
    window: Option<usize>,
    keep_first: usize,
}

impl Sight {
    /// Positions that the row at `position` sees: first ones that the window has left behind, and those
    /// from which on it sees all. The former are none where they would meet the latter.
    pub(crate) fn of(self, position: usize) -> [Range<usize>; 2] {
        let first = self.window.map_or(0, |w| (position + 1).saturating_sub(w));
        if first <= self.keep_first {
            [0..0, 0..position + 1]
        } else {
            [0..self.keep_first, first..position + 1]
        }
    }
}

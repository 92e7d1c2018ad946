//! Causal attention over pages, with grouped queries and an optional window.
//!
//! For the row at position p of a sequence and query head h, with g = h / (heads / kv_heads):
//!
//! ```text
//! s[j]  = scale · q[h] · k[j, g]          for max(0, p - window + 1) ≤ j ≤ p
//! y[h]  = Σⱼ softmax(s)[j] · v[j, g]
//! ```
//!
//! Keys and values of the batch's own rows are in the pages already (`KvWrite`), so a row sees the
//! same numbers whether its predecessors came in this batch or in an earlier one.

use super::{
    Check,
    linear::{read_row, write_row},
};
use crate::error::Result;
use crate::span::Ragged;
use crate::tensor::Tensor;

/// Attention of every row of the batch to its own sequence.
pub struct Attention<'a> {
    /// (T, heads · head_dim) F32.
    pub q: &'a Tensor,
    /// (pages · page_size, kv_heads · head_dim), floating point.
    pub k_pages: &'a Tensor,
    /// As `k_pages`.
    pub v_pages: &'a Tensor,
    /// Query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
    /// Multiplies the scores.
    pub scale: f32,
    /// How many tokens a row sees, itself included; none sees all.
    pub window: Option<usize>,
    /// Which rows belong to which sequence and pages.
    pub ragged: Ragged<'a>,
    /// (T, heads · head_dim) F32.
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
        c.equal("columns of y", self.y.cols(), self.heads * self.head_dim)?;
        c.equal("rows of y", self.y.rows(), self.q.rows())?;
        c.value(self.window != Some(0), || {
            "a window of no tokens".to_string()
        })?;
        for pages in [self.k_pages, self.v_pages] {
            c.float("pages", pages)?;
            c.equal(
                "columns of pages",
                pages.cols(),
                self.kv_heads * self.head_dim,
            )?;
            c.pages(&self.ragged, self.q.rows(), pages)?;
        }
        c.apart("y", self.y, &[self.q, self.k_pages, self.v_pages])
    }

    /// First position that the row at `position` sees.
    pub fn first_seen(&self, position: usize) -> usize {
        self.window
            .map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// The plain loops.
    pub(crate) fn reference(&mut self) {
        let (dim, group) = (self.head_dim, self.heads / self.kv_heads);
        let mut key = vec![0.0; self.k_pages.cols()];
        for span in self.ragged.spans {
            for t in span.rows() {
                let position = span.position + t - span.start;
                let seen = self.first_seen(position)..position + 1;
                let mut scores = vec![vec![0.0f32; seen.len()]; self.heads];
                for j in seen.clone() {
                    read_row(self.k_pages, self.ragged.page_row(span, j), &mut key);
                    for (h, scores) in scores.iter_mut().enumerate() {
                        let q = &self.q.view::<f32>();
                        let q = &q.row(t)[h * dim..][..dim];
                        let k = &key[h / group * dim..][..dim];
                        scores[j - seen.start] =
                            self.scale * q.iter().zip(k).map(|(q, k)| q * k).sum::<f32>();
                    }
                }
                let mut y = vec![0.0; self.heads * dim];
                for scores in &mut scores {
                    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    scores.iter_mut().for_each(|s| *s = (*s - max).exp());
                    let sum: f32 = scores.iter().sum();
                    scores.iter_mut().for_each(|s| *s /= sum);
                }
                for j in seen.clone() {
                    read_row(self.v_pages, self.ragged.page_row(span, j), &mut key);
                    for (h, scores) in scores.iter().enumerate() {
                        let v = &key[h / group * dim..][..dim];
                        for (y, v) in y[h * dim..][..dim].iter_mut().zip(v) {
                            *y += scores[j - seen.start] * v;
                        }
                    }
                }
                write_row(self.y, t, 0, &y);
            }
        }
    }
}

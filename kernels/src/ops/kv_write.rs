//! Puts keys and values of the batch into their sequences' pages, rounded to the pages' type: see
//! [`KvType`](crate::KvType).

use super::{Check, linear::write_row};
use crate::error::Result;
use crate::kv;
use crate::span::Ragged;
use crate::tensor::{DType, Tensor};

/// Keys and values on their way into pages.
pub struct KvWrite<'a> {
    /// (T, kv_heads · head_dim) F32.
    pub k: &'a Tensor,
    /// (T, kv_heads · v_head_dim) F32, of a width of its own.
    pub v: &'a Tensor,
    /// (pages · page_size, kv_heads · head_dim), floating point; or as many rows of heads in bytes.
    pub k_pages: &'a mut Tensor,
    /// (pages · page_size, kv_heads · v_head_dim), floating point, or heads in bytes as the keys.
    pub v_pages: &'a mut Tensor,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Which rows belong to which sequence and pages.
    pub ragged: Ragged<'a>,
}

impl KvWrite<'_> {
    /// Shapes, types and pages.
    pub fn check(&self) -> Result<()> {
        let c = Check("kv_write");
        c.f32(&[("k", self.k), ("v", self.v)])?;
        c.equal("rows of v", self.v.rows(), self.k.rows())?;
        for (x, pages) in [(self.k, &*self.k_pages), (self.v, &*self.v_pages)] {
            c.heads(pages, x.cols(), self.kv_heads)?;
            c.pages(&self.ragged, x.rows(), pages)?;
            c.apart("pages", pages, &[self.k, self.v])?;
        }
        c.kept_alike(self.k_pages, self.v_pages)
    }

    /// The plain loops; every backend on a CPU runs them.
    pub(crate) fn reference(&mut self) {
        let (k, v) = (self.k.view::<f32>(), self.v.view::<f32>());
        for span in self.ragged.spans {
            for t in span.rows() {
                let to = self.ragged.page_row(span, span.position + t - span.start);
                put(self.k_pages, to, self.kv_heads, k.row(t));
                put(self.v_pages, to, self.kv_heads, v.row(t));
            }
        }
    }
}

/// Writes a token's heads to row `r`.
fn put(pages: &mut Tensor, r: usize, heads: usize, x: &[f32]) {
    if pages.dtype() != DType::U8 {
        return write_row(pages, r, 0, x);
    }
    let rows = pages.view_mut::<u8>();
    // SAFETY: one row of this tensor at a time, and the caller is its only writer.
    let to = unsafe { rows.row(r) };
    kv::quantize(x, x.len() / heads, to);
}

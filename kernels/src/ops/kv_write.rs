//! Puts keys and values of the batch into their sequences' pages, rounded to the pages' type.

use super::{Check, linear::write_row};
use crate::error::Result;
use crate::span::Ragged;
use crate::tensor::Tensor;

/// Keys and values on their way into pages.
pub struct KvWrite<'a> {
    /// (T, kv_heads · head_dim) F32.
    pub k: &'a Tensor,
    /// (T, kv_heads · v_head_dim) F32, of a width of its own.
    pub v: &'a Tensor,
    /// (pages · page_size, kv_heads · head_dim), floating point.
    pub k_pages: &'a mut Tensor,
    /// (pages · page_size, kv_heads · v_head_dim), floating point.
    pub v_pages: &'a mut Tensor,
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
            c.float("pages", pages)?;
            c.equal("columns of pages", pages.cols(), x.cols())?;
            c.pages(&self.ragged, x.rows(), pages)?;
            c.apart("pages", pages, &[self.k, self.v])?;
        }
        Ok(())
    }

    /// The plain loops; every backend on a CPU runs them.
    pub(crate) fn reference(&mut self) {
        let (k, v) = (self.k.view::<f32>(), self.v.view::<f32>());
        for span in self.ragged.spans {
            for t in span.rows() {
                let to = self.ragged.page_row(span, span.position + t - span.start);
                write_row(self.k_pages, to, 0, k.row(t));
                write_row(self.v_pages, to, 0, v.row(t));
            }
        }
    }
}

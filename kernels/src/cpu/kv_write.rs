//! Keys and values into pages.

use super::Cpu;
use super::simd::{Float, Kernel, Simd, narrow, with_float};
use crate::ops::KvWrite;
use crate::span::Ragged;
use crate::tensor::{View, ViewMut};

impl Cpu {
    pub(super) fn do_kv_write(&self, op: KvWrite<'_>) {
        for (x, pages) in [(op.k, op.k_pages), (op.v, op.v_pages)] {
            let x = x.view::<f32>();
            with_float!(pages.dtype(), T => {
                let pages = pages.view_mut::<T>();
                self.for_rows(x.rows(), x.cols(), |rows, _| {
                    let ragged = op.ragged;
                    self.isa().launch(Write { x, rows, ragged, pages });
                });
            });
        }
    }
}

struct Write<'a, T> {
    x: View<f32>,
    rows: std::ops::Range<usize>,
    ragged: Ragged<'a>,
    pages: ViewMut<T>,
}

impl<T: Float> Kernel for Write<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let spans = self.ragged.spans;
        let mut at = spans.partition_point(|span| span.start + span.len <= self.rows.start);
        for t in self.rows {
            if !spans[at].rows().contains(&t) {
                at += 1;
            }
            let span = &spans[at];
            let to = self.ragged.page_row(span, span.position + t - span.start);
            // SAFETY: a sequence's positions have rows of their own in its own pages.
            narrow(s, self.x.row(t), unsafe { self.pages.row(to) });
        }
    }
}

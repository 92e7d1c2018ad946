//! Keys and values into pages.

use super::Cpu;
use super::simd::{Float, Kernel, Simd, narrow, with_float};
use crate::kv::quantize;
use crate::ops::KvWrite;
use crate::span::Ragged;
use crate::tensor::{DType, View, ViewMut};

impl Cpu {
    pub(super) fn do_kv_write(&self, op: KvWrite<'_>) {
        for (x, pages) in [(op.k, op.k_pages), (op.v, op.v_pages)] {
            let x = x.view::<f32>();
            if pages.dtype() == DType::U8 {
                let (pages, dim) = (pages.view_mut::<u8>(), x.cols() / op.kv_heads);
                self.for_rows(x.rows(), x.cols(), |rows, _| {
                    let ragged = op.ragged;
                    self.isa().launch(Quantize {
                        x,
                        rows,
                        ragged,
                        pages,
                        dim,
                    });
                });
                continue;
            }
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
        each(self.ragged, self.rows, |t, to| {
            // SAFETY: a sequence's positions have rows of their own in its own pages.
            narrow(s, self.x.row(t), unsafe { self.pages.row(to) });
        });
    }
}

/// The same to bytes, with a scale for each head of `dim` elements.
struct Quantize<'a> {
    x: View<f32>,
    rows: std::ops::Range<usize>,
    ragged: Ragged<'a>,
    pages: ViewMut<u8>,
    dim: usize,
}

impl Kernel for Quantize<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, _s: S) {
        each(self.ragged, self.rows, |t, to| {
            // SAFETY: a sequence's positions have rows of their own in its own pages.
            quantize(self.x.row(t), self.dim, unsafe { self.pages.row(to) });
        });
    }
}

/// Calls `f` with rows of the batch and their rows of the pages.
#[inline(always)]
fn each(ragged: Ragged<'_>, rows: std::ops::Range<usize>, mut f: impl FnMut(usize, usize)) {
    let spans = ragged.spans;
    let mut at = spans.partition_point(|span| span.start + span.len <= rows.start);
    for t in rows {
        if !spans[at].rows().contains(&t) {
            at += 1;
        }
        let span = &spans[at];
        f(t, ragged.page_row(span, span.position + t - span.start));
    }
}

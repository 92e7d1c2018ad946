//! The product with a weight: see `dot` for the order of its sums.

use std::marker::PhantomData;

use half::bf16;

use super::Cpu;
use super::dot::{By, COLUMNS, CopyX, Dot, PANEL_ROWS, Pairs, Place, Rows, STREAMED_ROWS, Widened};
use super::dot::{panel_len, x_pitch};
use super::scratch::{Plain, Scratch, SharedMut};
use super::simd::{Float, Kernel, dots_bf16, with_float};
use crate::ops::Linear;
use crate::tensor::{DType, Element, View, ViewMut};

impl Cpu {
    pub(super) fn do_linear(&self, mut op: Linear<'_>) {
        if op.w.format().dtype().is_none() {
            return op.reference();
        }
        let (x, w, bias) = (
            op.x.view::<f32>(),
            op.w.data(),
            op.bias.map(|b| b.view::<f32>()),
        );
        let y = op.y.view_mut::<f32>();
        let mut shared = self.shared();
        if dots_bf16(self.isa(), w.dtype(), op.activations) {
            let x = self.copy_x::<bf16>(x, true, &mut shared);
            self.products::<Pairs, _, _>(x, y.rows(), w.view::<bf16>(), bias, y);
            return;
        }
        let round = op.activations == DType::BF16;
        let x = if round || x.rows() > STREAMED_ROWS {
            self.copy_x::<f32>(x, round, &mut shared)
        } else {
            Rows {
                pointer: x.pointer(),
                pitch: x.stride(),
            }
        };
        with_float!(w.dtype(), T => {
            self.products::<Widened<T>, _, _>(x, y.rows(), w.view::<T>(), bias, y);
        });
    }

    /// A copy of x as a product takes it: see [`CopyX`].
    pub(super) fn copy_x<T: Float + Plain>(
        &self,
        x: View<f32>,
        round: bool,
        to: &mut Scratch,
    ) -> Rows<T> {
        let pitch = x_pitch(x.cols());
        let copy = to.take::<T>(x.rows() * pitch);
        let pointer = copy.as_ptr();
        let copy = SharedMut(copy.as_mut_ptr());
        self.for_rows(x.rows(), x.cols(), |rows, _| {
            let whole = &copy;
            // SAFETY: the copy has `pitch` elements for each row, and these rows are ours.
            let to = unsafe {
                std::slice::from_raw_parts_mut(whole.0.add(rows.start * pitch), rows.len() * pitch)
            };
            self.isa().launch(CopyX { x, rows, round, to });
        });
        Rows { pointer, pitch }
    }

    fn products<P, X: Plain, W: Element>(
        &self,
        x: Rows<X>,
        rows: usize,
        w: View<W>,
        bias: Option<View<f32>>,
        y: ViewMut<f32>,
    ) where
        for<'a> By<P, Dot<'a, X, W>>: Kernel<Out = ()>,
    {
        let columns = self.columns_a_part(w.rows(), rows);
        let parts = w.rows().div_ceil(columns);
        // Where the weight has few rows, the rows of x are shared out too.
        let cuts = if rows > STREAMED_ROWS {
            self.threads().div_ceil(parts.max(1))
        } else {
            1
        };
        let height = rows.div_ceil(cuts).max(1);
        let cuts = rows.div_ceil(height);
        self.pool().run(parts * cuts, |part, scratch| {
            let (first, n) = (part / parts * height, part % parts * columns);
            let panel = if rows > STREAMED_ROWS {
                panel_len(columns.min(PANEL_ROWS))
            } else {
                0
            };
            let dot = Dot {
                x: x.starting_at(first),
                rows: height.min(rows - first),
                place: Place::Same,
                w,
                columns: n..(n + columns).min(w.rows()),
                bias,
                y: y.starting_at(first),
                panel: scratch.take(panel),
            };
            self.isa().launch(By::<P, _>(dot, PhantomData));
        });
    }

    /// How many rows of a weight make a part: whole tiles, about as many parts for each thread.
    pub(super) fn columns_a_part(&self, columns: usize, rows: usize) -> usize {
        let threads = self.threads();
        let most = if rows > STREAMED_ROWS {
            // Panels of equal size.
            PANEL_ROWS
        } else {
            // Some parts a thread, so that a thread that is held up can be helped out.
            columns.div_ceil(4 * threads).max(8 * COLUMNS)
        };
        let rounds = columns.div_ceil(most * threads).max(1);
        columns
            .div_ceil(rounds * threads)
            .next_multiple_of(COLUMNS)
            .max(COLUMNS)
    }
}

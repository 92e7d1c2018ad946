//! The product with a weight: see `dot` for the order of its sums.

use std::marker::PhantomData;
use std::ops::Range;

use half::bf16;

use super::Cpu;
use super::blocks::BlockDot;
use super::dot::{By, COLUMNS, CopyX, Dot, PANEL_ROWS, Pairs, Place, Rows, STREAMED_ROWS, Widened};
use super::dot::{panel_len, x_pitch};
use super::fp8::{CodePairs, Codes};
use super::int8::Int8Dot;
use super::scratch::{Plain, Scratch, SharedMut};
use super::simd::{Float, Kernel, dots_bf16, with_float};
use crate::format::Format;
use crate::formats::unpack::Form;
use crate::matrix::Matrix;
use crate::ops::Linear;
use crate::tensor::{DType, Element, View, ViewMut};

/// Rows of a weight in blocks that are widened at once, where inputs are not rounded.
pub(super) const WIDENED_ROWS: usize = 16;

impl Cpu {
    pub(super) fn do_linear(&self, mut op: Linear<'_>) {
        if op.w.format().dtype().is_none() {
            return self.linear_in_blocks(&mut op);
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
            let w = (w.view::<bf16>(), op.w.cols());
            self.products::<Pairs, _, _>(x, y.rows(), w, bias, y);
            return;
        }
        let x = self.f32_rows(x, op.activations, &mut shared);
        with_float!(w.dtype(), T => {
            let w = (w.view::<T>(), op.w.cols());
            self.products::<Widened<T>, _, _>(x, y.rows(), w, bias, y);
        });
    }

    /// x where it lies, or a copy if it is rounded or many rows.
    pub(super) fn f32_rows(&self, x: View<f32>, activations: DType, to: &mut Scratch) -> Rows<f32> {
        let round = activations == DType::BF16;
        if round || x.rows() > STREAMED_ROWS {
            return self.copy_x::<f32>(x, round, to);
        }
        Rows {
            pointer: x.pointer(),
            pitch: x.stride(),
        }
    }

    fn linear_in_blocks(&self, op: &mut Linear<'_>) {
        let (x, w) = (op.x.view::<f32>(), op.w);
        let bias = op.bias.map(|b| b.view::<f32>());
        let y = op.y.view_mut::<f32>();
        let mut shared = self.shared();
        if w.format() == Format::Fp8 {
            let rows = (w.data().view::<u8>(), w.cols());
            if dots_bf16(self.isa(), DType::BF16, op.activations) {
                let x = self.copy_x::<bf16>(x, true, &mut shared);
                return self.products::<CodePairs, _, _>(x, y.rows(), rows, bias, y);
            }
            let x = self.f32_rows(x, op.activations, &mut shared);
            return self.products::<Codes, _, _>(x, y.rows(), rows, bias, y);
        }
        if op.activations == DType::BF16 && w.format() == Format::Int8 {
            let x = self.round_whole(x, &mut shared);
            return self.int8_products(&Int8Dot {
                x,
                rows: y.rows(),
                place: Place::Same,
                w: w.data().view::<u8>(),
                columns: 0..w.rows(),
                bias,
                y,
            });
        }
        if op.activations == DType::BF16 {
            let x = self.round_x(x, Form::of(w.format()), &mut shared);
            return self.block_products(&BlockDot {
                x,
                rows: y.rows(),
                place: Place::Same,
                format: w.format(),
                w: w.data().view::<u8>(),
                columns: 0..w.rows(),
                bias,
                y,
            });
        }
        let x = self.copy_x::<f32>(x, false, &mut shared);
        let parts = w.rows().div_ceil(WIDENED_ROWS);
        self.pool().run(parts, |part, scratch| {
            let columns = part * WIDENED_ROWS..((part + 1) * WIDENED_ROWS).min(w.rows());
            self.widened_dot(w, columns, scratch, |w, columns, panel| Dot {
                x,
                rows: y.rows(),
                place: Place::Same,
                w,
                k: w.cols(),
                bias: bias.map(|b| b.columns(columns.clone())),
                y: y.column_range(columns),
                columns: 0..w.rows(),
                panel,
            });
        });
    }

    /// Widens rows `columns` of a weight in blocks, and forms the product with those, as with f32.
    pub(super) fn widened_dot<'a>(
        &self,
        w: &Matrix,
        columns: Range<usize>,
        scratch: &'a mut Scratch,
        dot: impl FnOnce(View<f32>, Range<usize>, &'a mut [f32]) -> Dot<'a, f32, f32>,
    ) {
        let (k, panel) = (w.cols(), panel_len(WIDENED_ROWS));
        let mut room = scratch.split(&[4 * panel, 4 * columns.len() * k]);
        let panel = room.next::<f32>(panel);
        let rows = room.next::<f32>(columns.len() * k);
        let blocks = w.data().view::<u8>();
        for (n, row) in columns.clone().zip(rows.chunks_exact_mut(k.max(1))) {
            w.format().dequantize(blocks.row(n), row);
        }
        let view = View::of_rows(rows, columns.len(), k);
        let dot = dot(view, columns, panel);
        self.isa().launch(By::<Widened<f32>, _>(dot, PhantomData));
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
        (w, k): (View<W>, usize),
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
                k,
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

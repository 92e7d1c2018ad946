//! Products with the chosen experts: the choices of a batch are sorted by expert, and each expert's
//! weight is read once for all of its rows.

use std::marker::PhantomData;
use std::ops::Range;

use half::bf16;

use super::Cpu;
use super::blocks::BlockDot;
use super::dot::panel_len;
use super::dot::{By, Dot, PANEL_ROWS, Pairs, Place, Rows, STREAMED_ROWS, Widened};
use super::fp8::{CodePairs, Codes};
use super::int8::Int8Dot;
use super::linear::WIDENED_ROWS;
use super::scratch::{Plain, Scratch};
use super::simd::{Kernel, Simd, dots_bf16, with_float};
use crate::format::Format;
use crate::formats::unpack::Form;
use crate::matrix::Matrix;
use crate::ops::{Combine, ExpertLinear};
use crate::tensor::{DType, Element, View, ViewMut};

impl Cpu {
    pub(super) fn do_expert_linear(&self, op: ExpertLinear<'_>) {
        let (x, y) = (op.x.view::<f32>(), op.y.view_mut::<f32>());
        let experts = op.experts.view::<i32>();
        let mut lists = self.lists();
        let mut room = lists.split(&[4 * (op.w.len() + 1), 4 * op.w.len(), 4 * y.rows()]);
        let (ends, busy) = (room.next(op.w.len() + 1), room.next(op.w.len()));
        let sorted = Sorted::new(experts, ends, busy, room.next(y.rows()));
        // Two rows of x for different choices of one token, or one for all.
        let x_div = if x.rows() == experts.rows() {
            experts.cols().max(1)
        } else {
            1
        };
        let mut shared = self.shared();
        // Experts may be of several types; each goes its own way.
        for format in Format::ALL.into_iter().filter(|f| f.dtype().is_none()) {
            self.experts_in_blocks(&op, format, &sorted, x_div, (y, &mut shared));
        }
        for (dtype, dot) in [
            (DType::BF16, true),
            (DType::F32, false),
            (DType::F16, false),
            (DType::BF16, false),
        ] {
            let is_ours = |w: &Matrix| {
                let w = w.data().dtype();
                w == dtype && dots_bf16(self.isa(), w, op.activations) == dot
            };
            if !sorted.busy.iter().any(|e| is_ours(&op.w[*e as usize])) {
                continue;
            }
            if dot {
                let x = self.copy_x::<bf16>(x, true, &mut shared);
                self.by_experts::<Pairs, _, bf16>(x, op.w, is_ours, &sorted, x_div, y);
            } else {
                let x = self.copy_x::<f32>(x, op.activations == DType::BF16, &mut shared);
                with_float!(dtype, T => {
                    self.by_experts::<Widened<T>, _, T>(x, op.w, is_ours, &sorted, x_div, y);
                });
            }
        }
    }

    /// The products with experts in blocks of one format.
    fn experts_in_blocks(
        &self,
        op: &ExpertLinear<'_>,
        format: Format,
        sorted: &Sorted<'_>,
        x_div: usize,
        (y, shared): (ViewMut<f32>, &mut Scratch),
    ) {
        let is_ours = |e: &u32| op.w[*e as usize].format() == format;
        if !sorted.busy.iter().any(is_ours) {
            return;
        }
        let x = op.x.view::<f32>();
        if format == Format::Fp8 {
            let is_ours = |w: &Matrix| w.format() == format;
            if dots_bf16(self.isa(), DType::BF16, op.activations) {
                let x = self.copy_x::<bf16>(x, true, shared);
                self.by_experts::<CodePairs, _, u8>(x, op.w, is_ours, sorted, x_div, y);
            } else {
                let x = self.copy_x::<f32>(x, op.activations == DType::BF16, shared);
                self.by_experts::<Codes, _, u8>(x, op.w, is_ours, sorted, x_div, y);
            }
            return;
        }
        if op.activations == DType::BF16 && format == Format::Int8 {
            let x = self.round_whole(x, shared);
            let columns = y.cols().div_ceil(4 * self.threads()).next_multiple_of(8);
            let columns = columns.min(32);
            self.expert_parts(sorted, y.cols(), columns, |expert, columns, scratch| {
                if op.w[expert].format() != format {
                    return;
                }
                let choices = sorted.of(expert);
                let dot = Int8Dot {
                    x,
                    rows: choices.len(),
                    place: Place::Listed { choices, x_div },
                    w: op.w[expert].data().view::<u8>(),
                    columns,
                    bias: None,
                    y,
                };
                self.int8_dot(&dot, scratch);
            });
            return;
        }
        if op.activations == DType::BF16 {
            let x = self.round_x(x, Form::of(format), shared);
            let unit = self.panel_columns();
            let columns = if y.rows() > STREAMED_ROWS {
                unit
            } else {
                y.cols().div_ceil(4 * self.threads()).next_multiple_of(unit)
            };
            self.expert_parts(sorted, y.cols(), columns, |expert, columns, scratch| {
                if op.w[expert].format() != format {
                    return;
                }
                let choices = sorted.of(expert);
                let dot = BlockDot {
                    x,
                    rows: choices.len(),
                    place: Place::Listed { choices, x_div },
                    format,
                    w: op.w[expert].data().view::<u8>(),
                    columns,
                    bias: None,
                    y,
                };
                self.block_dot(&dot, scratch);
            });
            return;
        }
        let x = self.copy_x::<f32>(x, false, shared);
        self.expert_parts(
            sorted,
            y.cols(),
            WIDENED_ROWS,
            |expert, columns, scratch| {
                if op.w[expert].format() != format {
                    return;
                }
                let choices = sorted.of(expert);
                self.widened_dot(&op.w[expert], columns, scratch, |w, columns, panel| Dot {
                    x,
                    rows: choices.len(),
                    place: Place::Listed { choices, x_div },
                    w,
                    k: w.cols(),
                    bias: None,
                    y: y.column_range(columns),
                    columns: 0..w.rows(),
                    panel,
                });
            },
        );
    }

    /// Shares out the columns of all experts with choices.
    fn expert_parts(
        &self,
        sorted: &Sorted<'_>,
        cols: usize,
        columns: usize,
        f: impl Fn(usize, Range<usize>, &mut Scratch) + Sync,
    ) {
        let parts = cols.div_ceil(columns);
        self.pool().run(sorted.busy.len() * parts, |part, scratch| {
            let n = part % parts * columns;
            let expert = sorted.busy[part / parts] as usize;
            f(expert, n..(n + columns).min(cols), scratch);
        });
    }

    fn by_experts<P, X: Plain, W: Element>(
        &self,
        x: Rows<X>,
        w: &[Matrix],
        is_ours: impl Fn(&Matrix) -> bool + Sync,
        sorted: &Sorted<'_>,
        x_div: usize,
        y: ViewMut<f32>,
    ) where
        for<'a> By<P, Dot<'a, X, W>>: Kernel<Out = ()>,
    {
        let most = sorted
            .busy
            .iter()
            .map(|e| sorted.of(*e as usize).len())
            .max()
            .unwrap_or(0);
        let columns = self.columns_a_part(y.cols(), most);
        let parts = y.cols().div_ceil(columns);
        self.pool().run(sorted.busy.len() * parts, |part, scratch| {
            let expert = sorted.busy[part / parts] as usize;
            if !is_ours(&w[expert]) {
                return;
            }
            let n = part % parts * columns;
            let choices = sorted.of(expert);
            let panel = if choices.len() > STREAMED_ROWS {
                panel_len(columns.min(PANEL_ROWS))
            } else {
                0
            };
            let dot = Dot {
                x,
                rows: choices.len(),
                place: Place::Listed { choices, x_div },
                w: w[expert].data().view::<W>(),
                k: w[expert].cols(),
                columns: n..(n + columns).min(y.cols()),
                bias: None,
                y,
                panel: scratch.take(panel),
            };
            self.isa().launch(By::<P, _>(dot, PhantomData));
        });
    }

    pub(super) fn do_combine(&self, op: Combine<'_>) {
        let (x, weights) = (op.x.view::<f32>(), op.weights.view::<f32>());
        let y = op.y.view_mut::<f32>();
        self.for_rows(y.rows(), y.cols() * weights.cols(), |rows, _| {
            for t in rows {
                // SAFETY: rows are shared out, and each is written by one part.
                let y = unsafe { y.row(t) };
                self.isa().launch(Token {
                    x,
                    weights: weights.row(t),
                    t,
                    y,
                });
            }
        });
    }
}

/// The choices of a batch, expert by expert, in the order of the batch.
struct Sorted<'a> {
    /// Where each expert's choices end, after a zero.
    ends: &'a [u32],
    /// Experts with choices.
    busy: &'a [u32],
    choices: &'a [u32],
}

impl<'a> Sorted<'a> {
    fn new(
        experts: View<i32>,
        ends: &'a mut [u32],
        busy: &'a mut [u32],
        choices: &'a mut [u32],
    ) -> Sorted<'a> {
        let all = || {
            (0..experts.rows())
                .flat_map(|t| experts.row(t))
                .map(|e| *e as usize)
        };
        ends.fill(0);
        all().for_each(|e| ends[e + 1] += 1);
        let mut count = 0;
        for e in 0..busy.len() {
            if ends[e + 1] > 0 {
                busy[count] = e as u32;
                count += 1;
            }
            ends[e + 1] += ends[e];
        }
        // Each start moves on to its end, which is the next expert's start.
        for (choice, e) in all().enumerate() {
            choices[ends[e] as usize] = choice as u32;
            ends[e] += 1;
        }
        ends.copy_within(0..busy.len(), 1);
        ends[0] = 0;
        Sorted {
            ends,
            busy: &busy[..count],
            choices,
        }
    }

    fn of(&self, expert: usize) -> &'a [u32] {
        &self.choices[self.ends[expert] as usize..self.ends[expert + 1] as usize]
    }
}

/// The weighted sum of one token's rows.
struct Token<'a> {
    x: View<f32>,
    weights: &'a [f32],
    t: usize,
    y: &'a mut [f32],
}

impl Kernel for Token<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let first = self.t * self.weights.len();
        let n = self.y.len();
        for i in (0..n).step_by(S::LANES) {
            let rest = (n - i).min(S::LANES);
            let mut sum = s.splat(0.0);
            for (j, w) in self.weights.iter().enumerate() {
                let x = self.x.row(first + j).as_ptr().wrapping_add(i);
                // SAFETY: the row has `rest` elements from `i`.
                let x = unsafe {
                    if rest == S::LANES {
                        s.load(x)
                    } else {
                        s.load_n(x, rest)
                    }
                };
                sum = s.fma(s.splat(*w), x, sum);
            }
            // SAFETY: as above.
            unsafe {
                let y = self.y.as_mut_ptr().add(i);
                if rest == S::LANES {
                    s.store(y, sum)
                } else {
                    s.store_n(y, rest, sum)
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Tensor;

    #[test]
    fn choices_are_sorted_by_expert() {
        let mut experts = Tensor::host(DType::I32, 3, 2).unwrap();
        crate::reference::write(&[4.0, 1.0, 1.0, 0.0, 4.0, 1.0], &mut experts).unwrap();
        let (mut ends, mut busy, mut choices) = ([9; 6], [9; 5], [9; 6]);
        let sorted = Sorted::new(experts.view(), &mut ends, &mut busy, &mut choices);
        assert_eq!(sorted.busy, [0, 1, 4]);
        let of: Vec<&[u32]> = (0..5).map(|e| sorted.of(e)).collect();
        assert_eq!(of, [&[3][..], &[1, 2, 5], &[], &[], &[0, 4]]);
    }
}

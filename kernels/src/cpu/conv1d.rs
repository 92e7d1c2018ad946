//! The causal convolution: channels in lanes, shared out in blocks of columns.

use std::ops::Range;

use super::Cpu;
use super::elementwise::activated;
use super::simd::{Kernel, Simd};
use crate::ops::{Activation, Conv1d};
use crate::span::Ragged;
use crate::tensor::{View, ViewMut};

impl Cpu {
    pub(super) fn do_conv1d(&self, op: Conv1d<'_>) {
        let (x, w) = (op.x.view::<f32>(), op.w.view::<f32>());
        let bias = op.bias.map(|b| b.view::<f32>());
        let (state, y) = (op.conv_state.view_mut::<f32>(), op.y.view_mut::<f32>());
        let (act, ragged) = (op.act, op.ragged);
        self.for_columns(x.cols(), 2 * x.rows() * w.rows(), |columns, _| {
            self.isa().launch(Block {
                x,
                w,
                bias,
                act,
                state,
                ragged,
                y,
                columns,
            });
        });
    }
}

struct Block<'a> {
    x: View<f32>,
    w: View<f32>,
    bias: Option<View<f32>>,
    act: Activation,
    state: ViewMut<f32>,
    ragged: Ragged<'a>,
    y: ViewMut<f32>,
    columns: Range<usize>,
}

impl Kernel for Block<'_> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (taps, width) = (self.w.rows(), self.w.cols());
        let whole = self.columns.len() / S::LANES * S::LANES;
        let bias = self.bias.map(|b| b.row(0).as_ptr());
        for span in self.ragged.spans {
            // A slot belongs to one span, and these columns of each of its rows to us.
            let state = self.state.row_pointer(span.slot);
            let w = self.w.row(0).as_ptr();
            for t in 0..span.len {
                // Row t + k of the state followed by the inputs meets tap k.
                let source = |k: usize| {
                    if t + k < taps - 1 {
                        state.cast_const().wrapping_add((t + k) * width)
                    } else {
                        self.x.row(span.start + t + k - (taps - 1)).as_ptr()
                    }
                };
                // SAFETY: rows of x, w, y and of the state have `width` elements; the last, shorter
                // vector is masked.
                unsafe {
                    let y = self
                        .y
                        .columns(span.start + t, self.columns.clone())
                        .as_mut_ptr();
                    for (at, i) in self.columns.clone().step_by(S::LANES).enumerate() {
                        let n = self.columns.end - i;
                        let load = |p: *const f32| {
                            if at * S::LANES < whole {
                                s.load(p)
                            } else {
                                s.load_n(p, n)
                            }
                        };
                        let mut sum = s.splat(0.0);
                        for k in 0..taps {
                            let w = load(w.add(k * self.w.stride() + i));
                            sum = s.fma(w, load(source(k).add(i)), sum);
                        }
                        if let Some(bias) = bias {
                            sum = s.add(sum, load(bias.add(i)));
                        }
                        let out = activated(s, self.act, sum);
                        if at * S::LANES < whole {
                            s.store(y.add(at * S::LANES), out);
                        } else {
                            s.store_n(y.add(at * S::LANES), n, out);
                        }
                    }
                }
            }
            let kept = (taps - 1).saturating_sub(span.len);
            for k in 0..taps - 1 {
                // SAFETY: rows of the state and of x have these columns. A row is read before it is
                // written, as it moves to the front.
                unsafe {
                    let to = state.add(k * width + self.columns.start);
                    let from = if k < kept {
                        state.add((k + span.len) * width).cast_const()
                    } else {
                        self.x.row(span.start + span.len + k - (taps - 1)).as_ptr()
                    };
                    std::ptr::copy(from.add(self.columns.start), to, self.columns.len());
                }
            }
        }
    }
}

//! Copies, zeros and random weights.

use std::ops::Range;

use half::{bf16, f16};

use super::Cpu;
use super::simd::{Float, Kernel, Simd, narrow};
use crate::random;
use crate::tensor::{DType, Element, Tensor, ViewMut};

/// Values of a random row that are drawn at once.
const DRAWS: usize = 2048;

/// Runs `$body` with `$t` standing for a type of the size of `$dtype`'s elements.
macro_rules! with_element {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            DType::F32 => {
                type $t = f32;
                $body
            }
            DType::F16 => {
                type $t = f16;
                $body
            }
            DType::BF16 => {
                type $t = bf16;
                $body
            }
            DType::I32 => {
                type $t = i32;
                $body
            }
            DType::U8 => {
                type $t = u8;
                $body
            }
        }
    };
}

impl Cpu {
    pub(super) fn do_copy(&self, from: &Tensor, to: &mut Tensor) {
        with_element!(from.dtype(), T => {
            let (from, to) = (from.view::<T>(), to.view_mut::<T>());
            self.for_pieces(to, |r, columns, to| to.copy_from_slice(&from.row(r)[columns]));
        });
    }

    pub(super) fn do_clear(&self, tensor: &mut Tensor) {
        with_element!(tensor.dtype(), T => {
            let to = tensor.view_mut::<T>();
            self.for_pieces(to, |_, _, to| to.fill(T::default()));
        });
    }

    pub(super) fn do_fill_normal(&self, tensor: &mut Tensor, seed: u64, std: f32) {
        let isa = self.isa();
        match tensor.dtype() {
            DType::F32 => self.for_pieces(tensor.view_mut::<f32>(), |row, columns, to| {
                isa.launch(Draw {
                    seed,
                    row,
                    first: columns.start,
                    std,
                    to,
                });
            }),
            DType::F16 => self.for_pieces(tensor.view_mut::<f16>(), |row, columns, to| {
                isa.launch(Draw {
                    seed,
                    row,
                    first: columns.start,
                    std,
                    to,
                });
            }),
            DType::BF16 => self.for_pieces(tensor.view_mut::<bf16>(), |row, columns, to| {
                isa.launch(Draw {
                    seed,
                    row,
                    first: columns.start,
                    std,
                    to,
                });
            }),
            DType::U8 => unreachable!("weights in blocks are not drawn"),
            DType::I32 => self.for_pieces(tensor.view_mut::<i32>(), |row, columns, to| {
                let mut draws = [0.0; DRAWS];
                for (i, to) in to.chunks_mut(DRAWS).enumerate() {
                    let draws = &mut draws[..to.len()];
                    let first = columns.start + i * DRAWS;
                    random::fill_normal_columns(seed, row, first, std, draws);
                    to.iter_mut().zip(draws).for_each(|(t, d)| *t = *d as i32);
                }
            }),
        }
    }

    /// Shares out the elements of a tensor in pieces of rows: `f` gets the row, the columns and the
    /// elements.
    fn for_pieces<T: Element>(
        &self,
        to: ViewMut<T>,
        f: impl Fn(usize, Range<usize>, &mut [T]) + Sync,
    ) {
        // Wide rows are cut, narrow ones are taken together.
        let width = GRAIN.min(to.cols()).max(1);
        let pieces = to.cols().div_ceil(width);
        self.for_rows(to.rows() * pieces, width, |range, _| {
            for i in range {
                let (r, first) = (i / pieces, i % pieces * width);
                let columns = first..(first + width).min(to.cols());
                // SAFETY: pieces are disjoint, and each is written by one part.
                f(r, columns.clone(), unsafe { to.columns(r, columns) });
            }
        });
    }
}

/// Elements of a row that one thread takes at least.
const GRAIN: usize = 64 * 1024;

/// Columns of a random row from `first` on.
struct Draw<'a, T> {
    seed: u64,
    row: usize,
    first: usize,
    std: f32,
    to: &'a mut [T],
}

impl<T: Float> Kernel for Draw<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut draws = [0.0; DRAWS];
        for (i, to) in self.to.chunks_mut(DRAWS).enumerate() {
            let draws = &mut draws[..to.len()];
            let first = self.first + i * DRAWS;
            random::fill_normal_columns(self.seed, self.row, first, self.std, draws);
            narrow(s, draws, to);
        }
    }
}

//! Products with rows of whole numbers, of inputs rounded to bytes: `rounded` defines them to the bit.
//!
//! Sums of integers are exact in any order, so the compiler is left to find the widest instructions: pairs of
//! 16-bit products (with VNNI their sums too). Inputs are kept as 16 bits, and for many rows a row of the weight is
//! widened to as many once.

use std::ops::Range;

use super::Cpu;
use super::dot::{Place, Rows};
use super::scratch::{Scratch, SharedMut};
use super::simd::{Kernel, Simd};
use crate::formats::int8::scale;
use crate::rounded::round_block;
use crate::tensor::{View, ViewMut};

/// Rows of x from which on a row of the weight is widened first.
const WIDENED_ROWS: usize = 3;

/// Rows of x, rounded whole.
#[derive(Clone, Copy)]
pub(super) struct Whole {
    k: usize,
    codes: Rows<i16>,
    /// One a row.
    scales: Rows<f32>,
}

/// The products of some rows of x with rows `columns` of a weight.
pub(super) struct Int8Dot<'a> {
    pub(super) x: Whole,
    pub(super) rows: usize,
    pub(super) place: Place<'a>,
    /// The bytes of the weight's rows.
    pub(super) w: View<u8>,
    pub(super) columns: Range<usize>,
    pub(super) bias: Option<View<f32>>,
    /// Columns `columns` of the rows of y belong to this product alone.
    pub(super) y: ViewMut<f32>,
}

impl Cpu {
    /// x, each row rounded to bytes with one scale.
    pub(super) fn round_whole(&self, x: View<f32>, to: &mut Scratch) -> Whole {
        let k = x.cols();
        // An odd number of cache lines.
        let pitch = 32 * (k.div_ceil(32) | 1);
        let bytes = [2 * x.rows() * pitch, 4 * x.rows()];
        let mut room = to.split(&bytes);
        let codes = room.next::<i16>(x.rows() * pitch).as_mut_ptr();
        let scales = room.next::<f32>(x.rows()).as_mut_ptr();
        let whole = Whole {
            k,
            codes: Rows {
                pointer: codes,
                pitch,
            },
            scales: Rows {
                pointer: scales,
                pitch: 1,
            },
        };
        let (codes, scales) = (SharedMut(codes), SharedMut(scales));
        self.for_rows(x.rows(), k, |rows, scratch| {
            let (codes, scales) = (&codes, &scales);
            for r in rows {
                // SAFETY: there are a pitch of codes and a scale for each row, and these rows are ours.
                let (to, scale) = unsafe {
                    let to = codes.0.add(r * pitch);
                    (std::slice::from_raw_parts_mut(to, k), &mut *scales.0.add(r))
                };
                let bytes = scratch.take::<i8>(k);
                *scale = self.isa().launch(Round {
                    x: x.row(r),
                    bytes,
                    to,
                });
            }
        });
        whole
    }

    /// A product, in parts of the columns and of the rows.
    pub(super) fn int8_products(&self, dot: &Int8Dot<'_>) {
        let total = dot.columns.len();
        let columns = if dot.rows > 8 {
            32
        } else {
            total.div_ceil(4 * self.threads()).next_multiple_of(8)
        };
        let parts = total.div_ceil(columns.max(1));
        let cuts = if dot.rows > 8 {
            self.threads().div_ceil(parts.max(1))
        } else {
            1
        };
        let height = dot.rows.div_ceil(cuts).max(1);
        let cuts = dot.rows.div_ceil(height);
        self.pool().run(parts * cuts, |part, scratch| {
            let (first, n) = (part / parts * height, part % parts * columns);
            let x = Whole {
                codes: dot.x.codes.starting_at(first),
                scales: dot.x.scales.starting_at(first),
                ..dot.x
            };
            let part = Int8Dot {
                x,
                rows: height.min(dot.rows - first),
                columns: n..(n + columns).min(total),
                y: dot.y.starting_at(first),
                ..*dot
            };
            self.int8_dot(&part, scratch);
        });
    }

    /// One part, on one thread.
    pub(super) fn int8_dot(&self, dot: &Int8Dot<'_>, scratch: &mut Scratch) {
        let wide = scratch.take::<i16>(dot.x.k);
        self.isa().launch(Products { dot, wide });
    }
}

/// Rounds one row of x; its scale.
struct Round<'a> {
    x: &'a [f32],
    bytes: &'a mut [i8],
    to: &'a mut [i16],
}

impl Kernel for Round<'_> {
    type Out = f32;
    #[inline(always)]
    fn run<S: Simd>(self, _s: S) -> f32 {
        let scale = round_block(self.x, self.bytes);
        for (to, byte) in self.to.iter_mut().zip(self.bytes) {
            *to = i16::from(*byte);
        }
        scale
    }
}

struct Products<'a> {
    dot: &'a Int8Dot<'a>,
    wide: &'a mut [i16],
}

impl Kernel for Products<'_> {
    type Out = ();
    const BF16_DOT: bool = true;
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Products { dot, wide } = self;
        let k = dot.x.k;
        for n in dot.columns.clone() {
            let row = dot.w.row(n);
            let scale = scale(row);
            let codes = &row[..k];
            let bias = dot.bias.map_or(0.0, |b| b.row(0)[n]);
            if dot.rows >= WIDENED_ROWS {
                for (wide, code) in wide.iter_mut().zip(codes) {
                    *wide = i16::from(code.cast_signed());
                }
            } else {
                let next = row.as_ptr().wrapping_add(dot.w.stride());
                for line in (0..k).step_by(64) {
                    s.prefetch(next.wrapping_add(line));
                }
            }
            for r in 0..dot.rows {
                let (from, to) = dot.place.at(r);
                // SAFETY: rows of x have k codes and a scale.
                let (x, dx) = unsafe {
                    let x = dot.x.codes.pointer.add(from * dot.x.codes.pitch);
                    (
                        std::slice::from_raw_parts(x, k),
                        *dot.x.scales.pointer.add(from),
                    )
                };
                let mut sum = 0i32;
                if dot.rows >= WIDENED_ROWS {
                    for (x, w) in x.iter().zip(&*wide) {
                        sum += i32::from(*x) * i32::from(*w);
                    }
                } else {
                    for (x, w) in x.iter().zip(codes) {
                        sum += i32::from(*x) * i32::from(w.cast_signed());
                    }
                }
                // SAFETY: these columns of the row belong to this product, one slice at a time.
                let y = unsafe { dot.y.columns(to, n..n + 1) };
                y[0] = (sum as f32 * scale) * dx + bias;
            }
        }
    }
}

//! y = round(x) · Wᵀ + bias.
//!
//! Products are summed in f32. `round` is the identity for `activations: F32`; for BF16 each input
//! is rounded to nearest even first, which is what matrix units take. With a weight in blocks BF16 stands
//! for less: inputs are rounded to integers of 8 bits, as `rounded` has it. Of fp8 the sum is of codes, and its
//! row's scale is applied to it: `formats::fp8` has the formula.

use super::Check;
use crate::error::Result;
use crate::matrix::Matrix;
use crate::rounded::RoundedRow;
use crate::tensor::{DType, Tensor};

/// A matrix product with a weight.
pub struct Linear<'a> {
    /// (T, K) F32.
    pub x: &'a Tensor,
    /// (N, K) in any format.
    pub w: &'a Matrix,
    /// (1, N) F32.
    pub bias: Option<&'a Tensor>,
    /// F32 or BF16: the type that inputs are rounded to before they are multiplied; see above for blocks.
    pub activations: DType,
    /// (T, N) F32.
    pub y: &'a mut Tensor,
}

impl Linear<'_> {
    /// Shapes, types and overlaps.
    pub fn check(&self) -> Result<()> {
        let c = Check("linear");
        c.f32(&[("x", self.x), ("y", self.y)])?;
        c.equal("columns of x", self.x.cols(), self.w.cols())?;
        c.equal("rows of y", self.y.rows(), self.x.rows())?;
        c.equal("columns of y", self.y.cols(), self.w.rows())?;
        if let Some(bias) = self.bias {
            c.vector("bias", bias, self.w.rows())?;
        }
        c.apart("y", self.y, &[self.x])
    }

    /// The plain loops.
    pub(crate) fn reference(&mut self) {
        let x = self.x.view::<f32>();
        let y = self.y.view_mut::<f32>();
        let bias = self.bias.map(|b| b.view::<f32>());
        if rounds_to_blocks(self.w, self.activations) {
            for t in 0..x.rows() {
                let x = RoundedRow::new(x.row(t), self.w.format());
                for n in 0..self.w.rows() {
                    let bias = bias.map_or(0.0, |b| b.row(0)[n]);
                    // SAFETY: one thread, one slice at a time.
                    unsafe { y.row(t)[n] = x.product(self.w, n) + bias };
                }
            }
            return;
        }
        let mut w = vec![0.0; self.w.cols()];
        for n in 0..self.w.rows() {
            let scale = self.w.factors(n, &mut w);
            for t in 0..x.rows() {
                let sum: f32 = x
                    .row(t)
                    .iter()
                    .zip(&w)
                    .map(|(&x, w)| round(x, self.activations) * w)
                    .sum();
                // SAFETY: one thread, one slice at a time.
                unsafe { y.row(t)[n] = sum * scale + bias.map_or(0.0, |b| b.row(0)[n]) };
            }
        }
    }
}

/// Whether inputs of products with `w` are rounded to blocks of bytes.
pub(crate) fn rounds_to_blocks(w: &Matrix, activations: DType) -> bool {
    w.format().rounds_inputs() && activations == DType::BF16
}

/// Row `r` of a floating-point tensor, widened.
pub(crate) fn read_row(from: &Tensor, r: usize, to: &mut [f32]) {
    match from.dtype() {
        DType::F32 => to.copy_from_slice(from.view::<f32>().row(r)),
        DType::F16 => to
            .iter_mut()
            .zip(from.view::<half::f16>().row(r))
            .for_each(|(t, f)| *t = f.to_f32()),
        DType::BF16 => to
            .iter_mut()
            .zip(from.view::<half::bf16>().row(r))
            .for_each(|(t, f)| *t = f.to_f32()),
        DType::I32 => to
            .iter_mut()
            .zip(from.view::<i32>().row(r))
            .for_each(|(t, f)| *t = *f as f32),
        DType::U8 => to
            .iter_mut()
            .zip(from.view::<u8>().row(r))
            .for_each(|(t, f)| *t = f32::from(*f)),
    }
}

/// Writes `from` to columns `first..` of row `r`, rounding to nearest even.
pub(crate) fn write_row(to: &mut Tensor, r: usize, first: usize, from: &[f32]) {
    let columns = first..first + from.len();
    // SAFETY: one slice of this tensor at a time, and the caller is its only writer.
    unsafe {
        match to.dtype() {
            DType::F32 => to
                .view_mut::<f32>()
                .columns(r, columns)
                .copy_from_slice(from),
            DType::F16 => to
                .view_mut::<half::f16>()
                .columns(r, columns)
                .iter_mut()
                .zip(from)
                .for_each(|(t, f)| *t = half::f16::from_f32(*f)),
            DType::BF16 => to
                .view_mut::<half::bf16>()
                .columns(r, columns)
                .iter_mut()
                .zip(from)
                .for_each(|(t, f)| *t = half::bf16::from_f32(*f)),
            DType::I32 => to
                .view_mut::<i32>()
                .columns(r, columns)
                .iter_mut()
                .zip(from)
                .for_each(|(t, f)| *t = *f as i32),
            DType::U8 => to
                .view_mut::<u8>()
                .columns(r, columns)
                .iter_mut()
                .zip(from)
                .for_each(|(t, f)| *t = *f as u8),
        }
    }
}

/// `x` in the precision of `dtype`.
pub(crate) fn round(x: f32, dtype: DType) -> f32 {
    match dtype {
        DType::BF16 => half::bf16::from_f32(x).to_f32(),
        DType::F32 | DType::F16 | DType::I32 | DType::U8 => x,
    }
}

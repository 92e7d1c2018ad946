//! y[t] = the first i with the largest x[t, i] · by.
//!
//! Where no token can be taken from a row, because a product is NaN or the largest is not finite, y[t] is −1:
//! the row itself says what is wrong.

use super::Check;
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// Takes the likeliest token of each row of logits.
pub struct Likeliest<'a> {
    /// (T, V) F32.
    pub x: &'a Tensor,
    /// Multiplies every element before it is compared.
    pub by: f32,
    /// (T, 1) I32.
    pub y: &'a mut Tensor,
}

impl Likeliest<'_> {
    /// Most columns: so many that an f32 holds their numbers, as which results are read.
    pub const MOST: usize = 1 << 24;

    /// Shapes, types, and that a row has elements.
    pub fn check(&self) -> Result<()> {
        let c = Check("likeliest");
        c.f32(&[("x", self.x)])?;
        c.is("y", self.y, DType::I32)?;
        c.equal("rows of y", self.y.rows(), self.x.rows())?;
        c.equal("columns of y", self.y.cols(), 1)?;
        c.at_least("columns of x", self.x.cols(), 1)?;
        c.at_least("largest number of columns", Self::MOST, self.x.cols())?;
        c.apart("y", self.y, &[self.x])
    }

    /// The plain loops.
    pub(crate) fn reference(&mut self) {
        let (x, y) = (self.x.view::<f32>(), self.y.view_mut::<i32>());
        for t in 0..self.x.rows() {
            let mut best = (f32::NEG_INFINITY, -1);
            for (i, x) in x.row(t).iter().enumerate() {
                let x = x * self.by;
                if x.is_nan() {
                    best = (f32::NAN, -1);
                    break;
                }
                if x > best.0 {
                    best = (x, i as i32);
                }
            }
            // SAFETY: nobody else has a view of y.
            let y = unsafe { y.row(t) };
            y[0] = if best.0.is_finite() { best.1 } else { -1 };
        }
    }
}

//! y = x · by.

use super::{Check, linear::write_row};
use crate::error::Result;
use crate::tensor::Tensor;

/// Multiplication by a constant.
pub struct Scale<'a> {
    /// (T, D) F32.
    pub x: &'a Tensor,
    /// The constant.
    pub by: f32,
    /// (T, D) F32.
    pub y: &'a mut Tensor,
}

impl Scale<'_> {
    /// Shapes, types and overlaps.
    pub fn check(&self) -> Result<()> {
        let c = Check("scale");
        c.f32(&[("x", self.x), ("y", self.y)])?;
        c.equal("rows of y", self.y.rows(), self.x.rows())?;
        c.equal("columns of y", self.y.cols(), self.x.cols())?;
        c.apart("y", self.y, &[self.x])
    }

    /// The plain loops.
    pub(crate) fn reference(&mut self) {
        let x = self.x.view::<f32>();
        for t in 0..x.rows() {
            let y: Vec<f32> = x.row(t).iter().map(|x| x * self.by).collect();
            write_row(self.y, t, 0, &y);
        }
    }
}

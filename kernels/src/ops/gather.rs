//! y[i] = x[rows[i]].

use super::{Check, linear::write_row};
use crate::error::Result;
use crate::tensor::Tensor;

/// Picks rows, in the order given.
pub struct Gather<'a> {
    /// (T, D) F32.
    pub x: &'a Tensor,
    /// Row numbers of x.
    pub rows: &'a [usize],
    /// (rows, D) F32.
    pub y: &'a mut Tensor,
}

impl Gather<'_> {
    /// Shapes, and that every row exists.
    pub fn check(&self) -> Result<()> {
        let c = Check("gather");
        c.f32(&[("x", self.x), ("y", self.y)])?;
        c.equal("rows of y", self.y.rows(), self.rows.len())?;
        c.equal("columns of y", self.y.cols(), self.x.cols())?;
        for &row in self.rows {
            c.value(row < self.x.rows(), || {
                format!("row {row} of {}", self.x.rows())
            })?;
        }
        c.apart("y", self.y, &[self.x])
    }

    /// The plain loops.
    pub(crate) fn reference(&mut self) {
        for (i, &row) in self.rows.iter().enumerate() {
            write_row(self.y, i, 0, self.x.view::<f32>().row(row));
        }
    }
}

//! y = a + b.

use super::{Check, linear::write_row};
use crate::error::Result;
use crate::tensor::Tensor;

/// An elementwise sum.
pub struct Add<'a> {
    /// (T, D) F32.
    pub a: &'a Tensor,
    /// (T, D) F32.
    pub b: &'a Tensor,
    /// (T, D) F32.
    pub y: &'a mut Tensor,
}

impl Add<'_> {
    /// Shapes, types and overlaps.
    pub fn check(&self) -> Result<()> {
        let c = Check("add");
        c.f32(&[("a", self.a), ("b", self.b), ("y", self.y)])?;
        for (t, rows, cols) in [
            (self.b, "rows of b", "columns of b"),
            (&*self.y, "rows of y", "columns of y"),
        ] {
            c.equal(rows, t.rows(), self.a.rows())?;
            c.equal(cols, t.cols(), self.a.cols())?;
        }
        c.apart("y", self.y, &[self.a, self.b])
    }

    /// The plain loops.
    pub(crate) fn reference(&mut self) {
        let (a, b) = (self.a.view::<f32>(), self.b.view::<f32>());
        for t in 0..a.rows() {
            let y: Vec<f32> = a.row(t).iter().zip(b.row(t)).map(|(a, b)| a + b).collect();
            write_row(self.y, t, 0, &y);
        }
    }
}

//! y[t] = table[ids[t]], widened to f32.

use super::{Check, linear::write_row};
use crate::error::Result;
use crate::matrix::Matrix;
use crate::tensor::Tensor;

/// A table lookup.
pub struct Embed<'a> {
    /// T row numbers, each below the table's rows.
    pub ids: &'a [u32],
    /// (V, D) in any format.
    pub table: &'a Matrix,
    /// (T, D) F32.
    pub y: &'a mut Tensor,
}

impl Embed<'_> {
    /// Shapes, and that every id has a row.
    pub fn check(&self) -> Result<()> {
        let c = Check("embed");
        c.f32(&[("y", self.y)])?;
        c.equal("rows of y", self.y.rows(), self.ids.len())?;
        c.equal("columns of y", self.y.cols(), self.table.cols())?;
        for &id in self.ids {
            c.value((id as usize) < self.table.rows(), || {
                format!(
                    "token id {id} is outside the vocabulary of {}",
                    self.table.rows()
                )
            })?;
        }
        Ok(())
    }

    /// The plain loops.
    pub(crate) fn reference(&mut self) {
        let mut row = vec![0.0; self.table.cols()];
        for (t, &id) in self.ids.iter().enumerate() {
            self.table.read_row(id as usize, &mut row);
            write_row(self.y, t, 0, &row);
        }
    }
}

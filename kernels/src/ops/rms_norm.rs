//! y = x / √(mean(x²) + eps) · weight, over each row (Zhang and Sennrich, 2019).

use super::{Check, linear::write_row};
use crate::error::Result;
use crate::tensor::Tensor;

/// Root-mean-square normalisation of rows.
pub struct RmsNorm<'a> {
    /// (T, D) F32.
    pub x: &'a Tensor,
    /// (1, D) F32; none multiplies by one.
    pub weight: Option<&'a Tensor>,
    /// Added to the mean square.
    pub eps: f32,
    /// (T, D) F32.
    pub y: &'a mut Tensor,
}

impl RmsNorm<'_> {
    /// Shapes, types and overlaps.
    pub fn check(&self) -> Result<()> {
        let c = Check("rms_norm");
        c.f32(&[("x", self.x), ("y", self.y)])?;
        c.equal("rows of y", self.y.rows(), self.x.rows())?;
        c.equal("columns of y", self.y.cols(), self.x.cols())?;
        if let Some(weight) = self.weight {
            c.vector("weight", weight, self.x.cols())?;
        }
        c.apart("y", self.y, &[self.x])
    }

    /// The plain loops.
    pub(crate) fn reference(&mut self) {
        let x = self.x.view::<f32>();
        let weight = self.weight.map(|w| w.view::<f32>());
        for t in 0..x.rows() {
            let row = x.row(t);
            let mean = row.iter().map(|x| x * x).sum::<f32>() / row.len() as f32;
            let by = 1.0 / (mean + self.eps).sqrt();
            let y: Vec<f32> = (0..row.len())
                .map(|i| row[i] * by * weight.map_or(1.0, |w| w.row(0)[i]))
                .collect();
            write_row(self.y, t, 0, &y);
        }
    }
}

//! y = (x − mean(x)) / √(var(x) + eps) · weight + bias, over each of `groups` equal parts of a row by
//! itself (Ba, Kiros and Hinton, 2016; in parts: Wu and He, 2018). The variance is the mean of the
//! squared distances from the mean.

use super::{Check, linear::write_row, rms_norm::check_of_parts};
use crate::error::Result;
use crate::tensor::Tensor;

/// Normalisation of rows, or of equal parts of them, to mean zero and variance one.
pub struct LayerNorm<'a> {
    /// (T, D) F32.
    pub x: &'a Tensor,
    /// (1, D) F32, or (1, D / groups), which all parts share; none multiplies by one.
    pub weight: Option<&'a Tensor>,
    /// As `weight`; none adds nothing.
    pub bias: Option<&'a Tensor>,
    /// Added to the variance.
    pub eps: f32,
    /// Parts of a row.
    pub groups: usize,
    /// (T, D) F32.
    pub y: &'a mut Tensor,
}

impl LayerNorm<'_> {
    /// Shapes, types and overlaps.
    pub fn check(&self) -> Result<()> {
        let c = Check("layer_norm");
        c.f32(&[("x", self.x), ("y", self.y)])?;
        c.equal("rows of y", self.y.rows(), self.x.rows())?;
        c.equal("columns of y", self.y.cols(), self.x.cols())?;
        for vector in [("weight", self.weight), ("bias", self.bias)] {
            check_of_parts(&c, vector, self.x.cols(), self.groups)?;
        }
        c.apart("y", self.y, &[self.x])
    }

    /// The plain loops.
    pub(crate) fn reference(&mut self) {
        let x = self.x.view::<f32>();
        let weight = self.weight.map(|w| w.view::<f32>());
        let bias = self.bias.map(|b| b.view::<f32>());
        let width = x.cols() / self.groups;
        for t in 0..x.rows() {
            let mut y = Vec::with_capacity(x.cols());
            for g in 0..self.groups {
                let part = &x.row(t)[g * width..][..width];
                let mean = part.iter().sum::<f32>() / width as f32;
                let square = |x: &f32| (x - mean) * (x - mean);
                let variance = part.iter().map(square).sum::<f32>() / width as f32;
                let by = 1.0 / (variance + self.eps).sqrt();
                for (i, x) in (g * width..).zip(part) {
                    let weight = weight.map_or(1.0, |w| w.row(0)[i % w.cols()]);
                    let bias = bias.map_or(0.0, |b| b.row(0)[i % b.cols()]);
                    y.push((x - mean) * by * weight + bias);
                }
            }
            write_row(self.y, t, 0, &y);
        }
    }
}

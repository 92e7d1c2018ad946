//! y = x / √(mean(x²) + eps) · weight, over each of `groups` equal parts of a row by itself (Zhang and
//! Sennrich, 2019).

use super::{Check, linear::write_row};
use crate::error::Result;
use crate::tensor::Tensor;

/// Root-mean-square normalisation of rows, or of equal parts of them.
pub struct RmsNorm<'a> {
    /// (T, D) F32.
    pub x: &'a Tensor,
    /// (1, D) F32, or (1, D / groups), which all parts share; none multiplies by one.
    pub weight: Option<&'a Tensor>,
    /// Added to the mean square.
    pub eps: f32,
    /// Parts of a row.
    pub groups: usize,
    /// (T, D) F32.
    pub y: &'a mut Tensor,
}

/// Whether rows of `cols` elements have `groups` equal parts, and a vector one element for each of the
/// row or for each of a part.
pub(crate) fn check_of_parts(
    c: &Check,
    (what, vector): (&'static str, Option<&Tensor>),
    cols: usize,
    groups: usize,
) -> Result<()> {
    c.at_least("groups", groups, 1)?;
    c.equal("columns of x beyond whole groups", cols % groups, 0)?;
    let Some(vector) = vector else {
        return Ok(());
    };
    let shared = vector.cols() == cols / groups;
    c.vector(what, vector, if shared { cols / groups } else { cols })
}

impl RmsNorm<'_> {
    /// Shapes, types and overlaps.
    pub fn check(&self) -> Result<()> {
        let c = Check("rms_norm");
        c.f32(&[("x", self.x), ("y", self.y)])?;
        c.equal("rows of y", self.y.rows(), self.x.rows())?;
        c.equal("columns of y", self.y.cols(), self.x.cols())?;
        check_of_parts(&c, ("weight", self.weight), self.x.cols(), self.groups)?;
        c.apart("y", self.y, &[self.x])
    }

    /// The plain loops.
    pub(crate) fn reference(&mut self) {
        let x = self.x.view::<f32>();
        let weight = self.weight.map(|w| w.view::<f32>());
        let width = x.cols() / self.groups;
        for t in 0..x.rows() {
            let mut y = Vec::with_capacity(x.cols());
            for g in 0..self.groups {
                let part = &x.row(t)[g * width..][..width];
                let mean = part.iter().map(|x| x * x).sum::<f32>() / width as f32;
                let by = 1.0 / (mean + self.eps).sqrt();
                for (i, x) in (g * width..).zip(part) {
                    y.push(x * by * weight.map_or(1.0, |w| w.row(0)[i % w.cols()]));
                }
            }
            write_row(self.y, t, 0, &y);
        }
    }
}

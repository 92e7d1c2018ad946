//! Matrix products with the experts that a router chose, and the weighted sum of their results.
//!
//! With k = top_k, row t·k + j of y is x[t] · W[experts[t, j]]ᵀ; x may also have T·k rows already,
//! one for each choice. `Combine` adds the k rows of a token in the order of choice, so that a
//! token's result does not depend on its neighbours in the batch.

use super::{
    Check,
    linear::{round, rounds_to_blocks, write_row},
};
use crate::error::Result;
use crate::matrix::Matrix;
use crate::rounded::RoundedRow;
use crate::tensor::{DType, Tensor};

/// One product a chosen expert.
pub struct ExpertLinear<'a> {
    /// (T, K) or (T·k, K) F32.
    pub x: &'a Tensor,
    /// E matrices (N, K) of one shape.
    pub w: &'a [Matrix],
    /// (T, k) I32: expert numbers, each below E.
    pub experts: &'a Tensor,
    /// F32 or BF16: the type that inputs are rounded to before they are multiplied.
    pub activations: DType,
    /// (T·k, N) F32.
    pub y: &'a mut Tensor,
}

impl ExpertLinear<'_> {
    /// Shapes, types and overlaps.
    pub fn check(&self) -> Result<()> {
        let c = Check("expert_linear");
        c.f32(&[("x", self.x), ("y", self.y)])?;
        c.is("experts", self.experts, DType::I32)?;
        c.at_least("number of experts", self.w.len(), 1)?;
        for w in self.w {
            c.equal("rows of an expert", w.rows(), self.w[0].rows())?;
            c.equal("columns of an expert", w.cols(), self.x.cols())?;
        }
        let choices = self.experts.rows() * self.experts.cols();
        if self.x.rows() != self.experts.rows() {
            c.equal("rows of x", self.x.rows(), choices)?;
        }
        c.equal("rows of y", self.y.rows(), choices)?;
        c.equal("columns of y", self.y.cols(), self.w[0].rows())?;
        c.apart("y", self.y, &[self.x, self.experts])
    }

    /// Row of x that choice `j` of token `t` multiplies.
    pub fn x_row(&self, t: usize, j: usize) -> usize {
        if self.x.rows() == self.experts.rows() {
            t
        } else {
            t * self.experts.cols() + j
        }
    }

    /// The plain loops.
    pub(crate) fn reference(&mut self) {
        let mut w = vec![0.0; self.x.cols()];
        for t in 0..self.experts.rows() {
            for j in 0..self.experts.cols() {
                let expert = &self.w[self.experts.view::<i32>().row(t)[j] as usize];
                let x = self.x.view::<f32>();
                let x = x.row(self.x_row(t, j));
                let y: Vec<f32> = if rounds_to_blocks(expert, self.activations) {
                    let x = RoundedRow::new(x, expert.format());
                    (0..expert.rows()).map(|n| x.product(expert, n)).collect()
                } else {
                    (0..expert.rows())
                        .map(|n| {
                            let scale = expert.factors(n, &mut w);
                            let products = x.iter().zip(&w);
                            let sum: f32 =
                                products.map(|(&x, w)| round(x, self.activations) * w).sum();
                            sum * scale
                        })
                        .collect()
                };
                write_row(self.y, t * self.experts.cols() + j, 0, &y);
            }
        }
    }
}

/// `y[t] = Σⱼ weights[t, j] · x[t·k + j]`, in order of j.
pub struct Combine<'a> {
    /// (T·k, D) F32.
    pub x: &'a Tensor,
    /// (T, k) F32.
    pub weights: &'a Tensor,
    /// (T, D) F32.
    pub y: &'a mut Tensor,
}

impl Combine<'_> {
    /// Shapes, types and overlaps.
    pub fn check(&self) -> Result<()> {
        let c = Check("combine");
        c.f32(&[("x", self.x), ("weights", self.weights), ("y", self.y)])?;
        c.equal(
            "rows of x",
            self.x.rows(),
            self.weights.rows() * self.weights.cols(),
        )?;
        c.equal("rows of y", self.y.rows(), self.weights.rows())?;
        c.equal("columns of y", self.y.cols(), self.x.cols())?;
        c.apart("y", self.y, &[self.x, self.weights])
    }

    /// The plain loops.
    pub(crate) fn reference(&mut self) {
        let (x, weights) = (self.x.view::<f32>(), self.weights.view::<f32>());
        for t in 0..weights.rows() {
            let mut y = vec![0.0f32; x.cols()];
            for (j, w) in weights.row(t).iter().enumerate() {
                for (y, x) in y.iter_mut().zip(x.row(t * weights.cols() + j)) {
                    *y += w * x;
                }
            }
            write_row(self.y, t, 0, &y);
        }
    }
}

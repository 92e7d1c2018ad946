//! Chooses experts for each row.
//!
//! Scores are the softmax over all experts, or over the chosen ones only; the `top_k` largest win,
//! ties going to the lower number, and are listed from the largest down. With `normalize` the
//! weights are divided by their sum.

use super::Check;
use crate::error::Result;
use crate::tensor::{DType, Tensor};

/// How router logits become weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Score {
    /// Softmax over all experts.
    Softmax,
    /// Softmax over the chosen experts.
    SoftmaxTopK,
    /// The logistic function of each logit.
    Sigmoid,
}

/// A routing decision.
pub struct Route<'a> {
    /// (T, E) F32.
    pub logits: &'a Tensor,
    /// How logits become weights.
    pub score: Score,
    /// Whether the chosen weights are made to sum to one.
    pub normalize: bool,
    /// (T, top_k) I32: expert numbers.
    pub experts: &'a mut Tensor,
    /// (T, top_k) F32.
    pub weights: &'a mut Tensor,
}

impl Route<'_> {
    /// Shapes, types and overlaps.
    pub fn check(&self) -> Result<()> {
        let c = Check("route");
        c.f32(&[("logits", self.logits), ("weights", self.weights)])?;
        c.is("experts", self.experts, DType::I32)?;
        c.equal("rows of experts", self.experts.rows(), self.logits.rows())?;
        c.equal("rows of weights", self.weights.rows(), self.logits.rows())?;
        c.equal(
            "columns of weights",
            self.weights.cols(),
            self.experts.cols(),
        )?;
        c.at_least(
            "experts to choose from",
            self.logits.cols(),
            self.experts.cols(),
        )?;
        c.at_least("experts to choose", self.experts.cols(), 1)?;
        c.apart("experts", self.experts, &[self.logits, self.weights])?;
        c.apart("weights", self.weights, &[self.logits])
    }

    /// The plain loops; cheap enough that every CPU path runs them.
    pub(crate) fn reference(&mut self) {
        let logits = self.logits.view::<f32>();
        let (experts, weights) = (
            self.experts.view_mut::<i32>(),
            self.weights.view_mut::<f32>(),
        );
        let top_k = experts.cols();
        for t in 0..logits.rows() {
            let row = logits.row(t);
            // SAFETY: one thread, one slice of each tensor at a time.
            let (experts, weights) = unsafe { (experts.row(t), weights.row(t)) };
            for k in 0..top_k {
                let mut best: Option<usize> = None;
                for (e, logit) in row.iter().enumerate() {
                    let taken = experts[..k].contains(&(e as i32));
                    if !taken && best.is_none_or(|b| *logit > row[b]) {
                        best = Some(e);
                    }
                }
                experts[k] = best.expect("top_k is at most the number of experts") as i32;
            }
            let max = row[experts[0] as usize];
            match self.score {
                Score::Softmax => {
                    let sum: f32 = row.iter().map(|l| (l - max).exp()).sum();
                    for (w, e) in weights.iter_mut().zip(&*experts) {
                        *w = (row[*e as usize] - max).exp() / sum;
                    }
                }
                Score::SoftmaxTopK => {
                    let sum: f32 = experts.iter().map(|e| (row[*e as usize] - max).exp()).sum();
                    for (w, e) in weights.iter_mut().zip(&*experts) {
                        *w = (row[*e as usize] - max).exp() / sum;
                    }
                }
                Score::Sigmoid => {
                    for (w, e) in weights.iter_mut().zip(&*experts) {
                        *w = 1.0 / (1.0 + (-row[*e as usize]).exp());
                    }
                }
            }
            if self.normalize {
                let sum: f32 = weights.iter().sum();
                weights.iter_mut().for_each(|w| *w /= sum);
            }
        }
    }
}

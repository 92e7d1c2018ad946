//! Chooses experts for each row.
//!
//! Scores are the softmax over all experts, or over the chosen ones only, or the logistic function of
//! each logit; the `top_k` largest win, ties going to the lower number, and are listed from the
//! largest down. What a row is chosen by may differ from what it is weighed by:
//!
//! ```text
//! by[e]      = score[e] + choice_bias[e]        (the logit in place of the score when a softmax goes
//!                                                over the chosen ones)
//! of[g]      = the two largest by[e] of group g, added; only the `top` largest groups stay
//! chosen     = the top_k largest by[e] of the groups that stay
//! weight[e]  = score[e], over (Σ score + 10⁻²⁰) with `normalize`, times `scale`
//! ```
//!
//! The bias is that of Wang et al. (2024), the groups those of DeepSeek-V3 (2024).

use super::Check;
use crate::error::Result;
use crate::tensor::{DType, Tensor, View};

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
    /// (1, E) F32: added to the scores for the choice, not for the weights.
    pub choice_bias: Option<&'a Tensor>,
    /// (count, top): experts fall into `count` equal groups of neighbours, and only those of the `top`
    /// best groups may be chosen.
    pub groups: Option<(usize, usize)>,
    /// Whether the chosen weights are made to sum to one.
    pub normalize: bool,
    /// Multiplies the weights at the end.
    pub scale: f32,
    /// (T, top_k) I32: expert numbers.
    pub experts: &'a mut Tensor,
    /// (T, top_k) F32.
    pub weights: &'a mut Tensor,
}

/// The rules by which a row chooses.
#[derive(Clone, Copy)]
pub(crate) struct Rules {
    score: Score,
    choice_bias: Option<View<f32>>,
    groups: Option<(usize, usize)>,
    normalize: bool,
    scale: f32,
}

impl Route<'_> {
    /// Shapes, types and overlaps.
    pub fn check(&self) -> Result<()> {
        let c = Check("route");
        let choices = self.logits.cols();
        c.f32(&[("logits", self.logits), ("weights", self.weights)])?;
        c.is("experts", self.experts, DType::I32)?;
        c.equal("rows of experts", self.experts.rows(), self.logits.rows())?;
        c.equal("rows of weights", self.weights.rows(), self.logits.rows())?;
        c.equal(
            "columns of weights",
            self.weights.cols(),
            self.experts.cols(),
        )?;
        c.at_least("experts to choose from", choices, self.experts.cols())?;
        c.at_least("experts to choose", self.experts.cols(), 1)?;
        if let Some(bias) = self.choice_bias {
            c.vector("choice_bias", bias, choices)?;
        }
        if let Some((count, top)) = self.groups {
            c.at_least("groups", count, 1)?;
            c.equal("experts beyond whole groups", choices % count, 0)?;
            c.at_least("groups", count, top)?;
            c.at_least(
                "experts in the groups that stay",
                choices / count * top,
                self.experts.cols(),
            )?;
        }
        c.apart("experts", self.experts, &[self.logits, self.weights])?;
        c.apart("weights", self.weights, &[self.logits])
    }

    pub(crate) fn rules(&self) -> Rules {
        Rules {
            score: self.score,
            choice_bias: self.choice_bias.map(|b| b.view()),
            groups: self.groups,
            normalize: self.normalize,
            scale: self.scale,
        }
    }

    /// The plain loops.
    pub(crate) fn reference(&mut self) {
        let rules = self.rules();
        let logits = self.logits.view::<f32>();
        let (experts, weights) = (
            self.experts.view_mut::<i32>(),
            self.weights.view_mut::<f32>(),
        );
        let mut room = vec![0.0; rules.room(logits.cols())];
        for t in 0..logits.rows() {
            // SAFETY: one thread, one slice of each tensor at a time.
            let (experts, weights) = unsafe { (experts.row(t), weights.row(t)) };
            rules.choose(logits.row(t), &mut room, experts, weights);
        }
    }
}

impl Rules {
    /// Elements of room that a row with so many logits needs.
    pub(crate) fn room(&self, experts: usize) -> usize {
        experts + self.groups.map_or(0, |(count, _)| count)
    }

    /// One row's experts and weights; cheap enough that every CPU path runs these loops.
    pub(crate) fn choose(
        &self,
        logits: &[f32],
        room: &mut [f32],
        experts: &mut [i32],
        weights: &mut [f32],
    ) {
        let (by, groups) = room.split_at_mut(logits.len());
        self.choice(logits, by);
        let size = self.keep_groups(by, groups);
        for k in 0..experts.len() {
            let mut best: Option<usize> = None;
            for (e, score) in by.iter().enumerate() {
                let barred = size.is_some_and(|size| groups[e / size] == BARRED);
                let barred = barred || experts[..k].contains(&(e as i32));
                if !barred && best.is_none_or(|b| *score > by[b]) {
                    best = Some(e);
                }
            }
            experts[k] = best.expect("as many may be chosen as are") as i32;
        }
        self.weigh(logits, experts, weights);
    }

    /// What experts are chosen by. Without bias and groups the logits, whose order the scores share.
    fn choice(&self, logits: &[f32], by: &mut [f32]) {
        by.copy_from_slice(logits);
        if self.choice_bias.is_some() || self.groups.is_some() {
            match self.score {
                Score::Softmax => {
                    let (max, sum) = exponentials(logits.iter());
                    by.iter_mut().for_each(|x| *x = (*x - max).exp() / sum);
                }
                Score::SoftmaxTopK => {}
                Score::Sigmoid => by.iter_mut().for_each(|x| *x = sigmoid(*x)),
            }
        }
        if let Some(bias) = self.choice_bias {
            by.iter_mut().zip(bias.row(0)).for_each(|(x, b)| *x += b);
        }
    }

    /// Marks the groups that may not be chosen from, and says how many experts a group has.
    fn keep_groups(&self, by: &[f32], groups: &mut [f32]) -> Option<usize> {
        let (count, top) = self.groups?;
        let size = by.len() / count;
        for (group, by) in groups.iter_mut().zip(by.chunks_exact(size)) {
            let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
            for &x in by {
                if x > first {
                    (first, second) = (x, first);
                } else if x > second {
                    second = x;
                }
            }
            let score = if size == 1 { first } else { first + second };
            *group = score.min(f32::MAX);
        }
        // Marks go on while scores are still compared, so the worst are found one by one: of equal
        // ones the last.
        for _ in top..count {
            let mut worst: Option<usize> = None;
            for (g, score) in groups.iter().enumerate() {
                if *score != BARRED && worst.is_none_or(|w| *score <= groups[w]) {
                    worst = Some(g);
                }
            }
            if let Some(worst) = worst {
                groups[worst] = BARRED;
            }
        }
        Some(size)
    }

    fn weigh(&self, logits: &[f32], experts: &[i32], weights: &mut [f32]) {
        let chosen = || experts.iter().map(|e| &logits[*e as usize]);
        let softmax = |(max, sum): (f32, f32), weights: &mut [f32]| {
            for (w, logit) in weights.iter_mut().zip(chosen()) {
                *w = (logit - max).exp() / sum;
            }
        };
        match self.score {
            Score::Softmax => softmax(exponentials(logits.iter()), weights),
            Score::SoftmaxTopK => softmax(exponentials(chosen()), weights),
            Score::Sigmoid => {
                for (w, logit) in weights.iter_mut().zip(chosen()) {
                    *w = sigmoid(*logit);
                }
            }
        }
        if self.normalize {
            let sum = weights.iter().sum::<f32>() + 1e-20;
            weights.iter_mut().for_each(|w| *w /= sum);
        }
        weights.iter_mut().for_each(|w| *w *= self.scale);
    }
}

/// The score of a group that may not be chosen from: no score is so large.
const BARRED: f32 = f32::INFINITY;

/// The largest logit, and the sum of the exponentials of all relative to it.
fn exponentials<'a>(logits: impl Iterator<Item = &'a f32> + Clone) -> (f32, f32) {
    let max = logits.clone().copied().fold(f32::NEG_INFINITY, f32::max);
    (max, logits.map(|l| (l - max).exp()).sum())
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A row's experts and weights.
    fn choose(rules: Rules, logits: &[f32], bias: &[f32], top_k: usize) -> (Vec<i32>, Vec<f32>) {
        let mut tensor = Tensor::host(DType::F32, 1, bias.len()).unwrap();
        crate::reference::write(bias, &mut tensor).unwrap();
        let rules = Rules {
            choice_bias: (!bias.is_empty()).then(|| tensor.view()),
            ..rules
        };
        let (mut experts, mut weights) = (vec![0; top_k], vec![0.0; top_k]);
        let mut room = vec![f32::NAN; rules.room(logits.len())];
        rules.choose(logits, &mut room, &mut experts, &mut weights);
        (experts, weights)
    }

    const PLAIN: Rules = Rules {
        score: Score::Sigmoid,
        choice_bias: None,
        groups: None,
        normalize: false,
        scale: 1.0,
    };

    #[test]
    fn a_bias_moves_the_choice_and_not_the_weights() {
        let logits = [0.0, 2.0, 1.0, -1.0];
        let (experts, weights) = choose(PLAIN, &logits, &[], 2);
        assert_eq!(experts, [1, 2]);
        assert_eq!(weights, [sigmoid(2.0), sigmoid(1.0)]);
        let (experts, weights) = choose(PLAIN, &logits, &[0.0, 0.0, 0.0, 0.7], 2);
        assert_eq!(experts, [3, 1], "0.27 + 0.7 is more than 0.88");
        assert_eq!(weights, [sigmoid(-1.0), sigmoid(2.0)]);
        let softmax = Rules {
            score: Score::Softmax,
            ..PLAIN
        };
        let (experts, weights) = choose(softmax, &logits, &[0.0, 0.0, 0.0, 0.7], 2);
        assert_eq!(experts, [3, 1]);
        let sum: f32 = logits.iter().map(|l| l.exp()).sum();
        assert!((weights[0] - (-1.0f32).exp() / sum).abs() < 1e-6);
        let over_chosen = Rules {
            score: Score::SoftmaxTopK,
            ..PLAIN
        };
        // Logits and bias: 0, 2, 1, 1.5.
        let (experts, weights) = choose(over_chosen, &logits, &[0.0, 0.0, 0.0, 2.5], 2);
        assert_eq!(experts, [1, 3]);
        assert!((weights[0] - 1.0 / (1.0 + (-3.0f32).exp())).abs() < 1e-6);
    }

    #[test]
    fn groups_are_compared_by_their_two_best() {
        // The best expert of all is in a group whose second is poor.
        let logits = [4.0, -9.0, -9.0, 1.0, 1.0, 0.9, 0.5, 0.6, -9.0];
        let rules = |top| Rules {
            groups: Some((3, top)),
            ..PLAIN
        };
        assert_eq!(choose(rules(3), &logits, &[], 3).0, [0, 3, 4]);
        assert_eq!(choose(rules(2), &logits, &[], 3).0, [3, 4, 5]);
        assert_eq!(choose(rules(1), &logits, &[], 2).0, [3, 4]);
        // The bias counts for the group.
        let bias = [0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0];
        assert_eq!(choose(rules(1), &logits, &bias, 2).0, [1, 0]);
        // Negative scores of a group that stays win over any of one that does not.
        let bias = [-9.0, -9.0, -9.0, -2.0, -2.0, -2.0, -9.0, -9.0, -9.0];
        assert_eq!(choose(rules(1), &logits, &bias, 3).0, [3, 4, 5]);
        // Of equal groups the first stays, and what is no number or infinite breaks nothing.
        assert_eq!(choose(rules(1), &[0.0; 9], &[], 3).0, [0, 1, 2]);
        for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for top in 1..4 {
                let (experts, _) = choose(rules(top), &[odd; 9], &[odd; 9], 3);
                assert!(experts.iter().all(|e| (0..9).contains(e)));
            }
        }
    }

    #[test]
    fn weights_are_normalised_and_then_scaled() {
        let rules = Rules {
            normalize: true,
            scale: 2.5,
            ..PLAIN
        };
        let (_, weights) = choose(rules, &[0.3, 0.3, -4.0], &[], 2);
        assert_eq!(weights, [1.25, 1.25]);
        let (_, weights) = choose(rules, &[-200.0, -200.0, -200.0], &[], 2);
        assert_eq!(weights, [0.0, 0.0], "not a division by zero");
    }
}

//! The router's choice: a few comparisons a logit, by the plain loops.

use super::Cpu;
use crate::ops::Route;

impl Cpu {
    pub(super) fn do_route(&self, op: Route<'_>) {
        let (rules, logits) = (op.rules(), op.logits.view::<f32>());
        let (experts, weights) = (op.experts.view_mut::<i32>(), op.weights.view_mut::<f32>());
        let room = rules.room(logits.cols());
        let cost = logits.cols() * (4 + experts.cols());
        self.for_rows(logits.rows(), cost, |rows, scratch| {
            let room = scratch.take(room);
            for t in rows {
                // SAFETY: rows are shared out, and each is written by one part.
                let (experts, weights) = unsafe { (experts.row(t), weights.row(t)) };
                rules.choose(logits.row(t), room, experts, weights);
            }
        });
    }
}

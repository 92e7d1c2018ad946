//! A plan whose attention sees the last tokens only, whatever it saw before.

use crate::plan::{Plan, Step, StepKind};

impl Plan {
    /// The same plan with a window of at most `window` tokens in every layer of attention. Sequences of no more
    /// tokens give the same; of longer ones attention sees the last, and the rest stays in states of fixed size.
    /// Rows of a prefix stay in sight. Fails with what stands against it.
    pub fn attending_last(&self, window: usize) -> Result<Plan, String> {
        if window == 0 {
            return Err("a window must hold at least 1 token".into());
        }
        let mut plan = self.clone();
        let change = Change {
            window,
            keep_first: plan.embed.prefix,
        };
        for steps in plan.blocks.iter_mut().map(|b| &mut b.steps) {
            change.steps(steps)?;
        }
        for steps in plan.shared.iter_mut().map(|s| &mut s.steps) {
            change.steps(steps)?;
        }
        Ok(plan)
    }
}

#[derive(Clone, Copy)]
struct Change {
    window: usize,
    keep_first: usize,
}

impl Change {
    fn steps(self, steps: &mut [Step]) -> Result<(), String> {
        steps.iter_mut().try_for_each(|step| self.step(step))
    }

    fn step(self, step: &mut Step) -> Result<(), String> {
        match &mut step.kind {
            StepKind::Residual(steps)
            | StepKind::Let(_, steps)
            | StepKind::Keep(_, steps)
            | StepKind::Own(steps) => self.steps(steps),
            StepKind::Parallel(branches) => branches.iter_mut().try_for_each(|b| self.steps(b)),
            StepKind::Concat(_) | StepKind::Add(_) | StepKind::Use(_) => Ok(()),
            StepKind::Layer(spec) => {
                if let Some(changed) = spec.attending_last(self.window, self.keep_first) {
                    *spec = changed?;
                }
                Ok(())
            }
        }
    }
}

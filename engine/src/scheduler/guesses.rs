//! Tokens that are computed before they are known to follow.

use super::Scheduler;
use crate::batch::Span;
use crate::ids::{SeqId, SlotId, TokenId};
use crate::sequence::{Sequence, Status};

/// Tokens that a step computes again beside new guesses.
const MOST_AGAIN: usize = 4;

impl Scheduler {
    /// Tokens that may follow those of a running sequence, at most [`Scheduler::guesses`] of them. The coming step
    /// computes them with the others as far as there is room, and keeps those that are what its logits choose.
    pub fn guess(&mut self, id: SeqId, tokens: &[TokenId]) {
        let most = self.guesses(id);
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.guess.clear();
            sequence.guess.extend(tokens.iter().take(most));
        }
    }

    /// How many tokens may be guessed for a sequence in the coming step: none while its prompt is read, and no
    /// more than it can still generate.
    pub fn guesses(&self, id: SeqId) -> usize {
        self.sequences.get(&id).map_or(0, Sequence::guesses)
    }

    /// Whether the slot of a span must be what it was before the step, when `right` of its guesses were: rows
    /// that follow a wrong one have gone into it.
    pub fn returns(&self, span: &Span, right: usize) -> Option<SlotId> {
        span.slot.filter(|_| right < span.guessed)
    }
}

impl Sequence {
    /// See [`Scheduler::guesses`]. A sequence that computes again what followed a wrong guess does that first,
    /// unless it is little: so guesses never cost more than every second step.
    pub(super) fn guesses(&self) -> usize {
        let reading = self.computed < self.prompt_len;
        if self.status != Status::Running || reading || self.remaining() > MOST_AGAIN {
            return 0;
        }
        let left = self.limits.max_tokens - self.generated().len();
        left.saturating_sub(1)
    }
}

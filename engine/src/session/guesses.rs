//! Guesses at what follows: made before a step, settled after it. See [`crate::lookup`].

use super::{Engine, Error};
use crate::ids::SeqId;
use crate::lookup::{Guessed, Lookup};

impl Engine {
    /// Looks up what may follow each running sequence.
    pub(super) fn guess(&mut self) {
        self.guessing.clear();
        self.guessing.extend(self.scheduler.running());
        for id in &self.guessing {
            let most = self.scheduler.guesses(*id);
            let Some(sequence) = self.scheduler.sequence(*id).filter(|_| most > 0) else {
                self.scheduler.guess(*id, &[]);
                continue;
            };
            let lookup = self.lookups.entry(*id).or_insert_with(|| {
                let left = sequence.limits.max_tokens - sequence.generated().len();
                self.said.reserve(sequence.limits.max_tokens.min(1 << 16));
                self.guess.reserve(self.config.lookup);
                Lookup::new(self.config.lookup, sequence.tokens.len() + left)
            });
            lookup.guess(&sequence.tokens, most, &mut self.guess);
            self.scheduler.guess(*id, &self.guess);
        }
    }

    /// Counts right guesses, and gives back the state of before the step where one was wrong.
    pub(super) fn settle(&mut self) -> Result<(), Error> {
        let mut tokens = self.tokens.iter().peekable();
        for span in &self.batch.spans {
            let mut chosen = 0;
            while tokens.next_if(|(id, _)| *id == span.seq).is_some() {
                chosen += 1;
            }
            let right = chosen.max(1) - 1;
            if let Some(lookup) = self.lookups.get_mut(&span.seq) {
                lookup.done(span.guessed, right);
            }
            if let Some(slot) = self.scheduler.returns(span, right) {
                let (to, copies) = (slot.0 as usize, self.config.owned_slots());
                self.runner.state.copy_slot(to + copies, to)?;
            }
        }
        Ok(())
    }

    /// What came of guessing tokens of a sequence, until it is removed.
    pub fn guessed(&self, id: SeqId) -> Guessed {
        self.lookups
            .get(&id)
            .map_or(Guessed::default(), Lookup::guessed)
    }
}

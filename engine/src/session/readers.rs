//! Prompts that begin alike and come together: one is read, the others wait for it and go on from its state.

use super::Engine;
use crate::ids::SeqId;
use crate::prefix_cache::Awaited;
use crate::sequence::Sequence;

/// Tokens that both begin with.
fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

impl Engine {
    /// Holds a queued sequence back whose prompt begins like one that is being read, if that saves as many tokens as the
    /// policy wants, and has that one's state kept where the two part. A sequence waits once: if the state is not there
    /// then, it reads.
    pub(super) fn waits_for_reader(&mut self, id: SeqId) -> bool {
        let (Some(cache), Some(sequence)) = (&mut self.cache, self.scheduler.sequence(id)) else {
            return false;
        };
        let Some(worth) = cache.policy.wait else {
            return false;
        };
        // Rows that are not computed have no logits to give.
        if cache.awaits.contains_key(&id) || sequence.prompt_logits {
            return false;
        }
        // The last token of a prompt is always computed.
        let tokens = &sequence.tokens[..sequence.tokens.len() - 1];
        let ahead = |reader: &Sequence| {
            let shared = common(tokens, &reader.tokens[..reader.prompt_len]);
            (reader.computed < shared && shared >= worth).then_some(shared)
        };
        let running = self.scheduler.running();
        let readers = running.filter_map(|of| Some((ahead(self.scheduler.sequence(of)?)?, of)));
        let Some((shared, reader)) =
            readers.max_by_key(|(shared, of)| (*shared, std::cmp::Reverse(*of)))
        else {
            return false;
        };
        let known = cache
            .find(&sequence.tokens)
            .1
            .map_or(0, |found| found.tokens);
        if shared < known + worth {
            return false;
        }
        let awaited = Awaited {
            reader,
            tokens: shared,
        };
        cache.awaits.insert(id, Some(awaited));
        cache.told.waited += 1;
        self.scheduler.hold(id, true);
        let cuts = self.scheduler.sequence(reader).map(|s| s.cuts.clone());
        let mut cuts = cuts.unwrap_or_default();
        if let Err(at) = cuts.binary_search(&shared) {
            cuts.insert(at, shared);
            self.scheduler.cut_at(reader, cuts);
        }
        true
    }

    /// Lets those go on whose reader has come as far, or does not read any more.
    pub(super) fn end_waits(&mut self) {
        let Some(cache) = &mut self.cache else { return };
        for (id, awaits) in &mut cache.awaits {
            let Some(of) = awaits else { continue };
            let reads = self.scheduler.running().any(|running| running == of.reader)
                && self
                    .scheduler
                    .sequence(of.reader)
                    .is_some_and(|reader| reader.computed < of.tokens);
            if !reads {
                *awaits = None;
                self.scheduler.hold(*id, false);
            }
        }
    }
}

//! Entering the queue, entering the steps, leaving both.

use super::{Refused, Scheduler, insert_running};
use crate::ids::{PageId, SeqId, SlotId};
use crate::sequence::{Place, Sequence, SequenceRequest, Status};

/// No slot is free, and no finished sequence has one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoSlot;

impl Scheduler {
    pub(super) fn check(&self, request: &SequenceRequest) -> Result<(), Refused> {
        let (prompt, max_tokens) = (request.prompt.len(), request.limits.max_tokens);
        let context = self.config.context;
        if prompt == 0 {
            return Err(Refused::EmptyPrompt);
        }
        if prompt.saturating_add(max_tokens) > context {
            return Err(Refused::TooLong {
                prompt,
                max_tokens,
                context,
            });
        }
        if let Some(pool) = &self.pools.pages {
            let (wanted, pages) = (
                self.pools.most_pages(most_computed(prompt, max_tokens)),
                pool.total(),
            );
            if wanted > pages {
                return Err(Refused::TooManyPages {
                    prompt,
                    max_tokens,
                    wanted,
                    pages,
                });
            }
        }
        Ok(())
    }

    pub(super) fn enqueue(
        &mut self,
        request: SequenceRequest,
        computed: usize,
        pages: &[PageId],
        slot: Option<SlotId>,
    ) -> SeqId {
        let mut sequence = Sequence::new(SeqId(self.next_id), request);
        self.next_id += 1;
        sequence.computed = computed;
        sequence.pages.extend_from_slice(pages);
        sequence.slot = slot;
        let place = sequence.place();
        if sequence.holds_state() {
            self.idle.push(place.id);
        }
        self.sequences.insert(place.id, sequence);
        self.waiting.push_back(place);
        place.id
    }

    /// Admits the first of the queue, if there is room; at any time but during a step.
    pub fn admit_first(&mut self) -> bool {
        assert!(!self.in_flight, "a step is under way");
        let Some(id) = self.next_in_line() else {
            return false;
        };
        let outstanding = self.outstanding();
        loop {
            let wanted = self.wanted_by(id);
            let pages = wanted.pages + outstanding + self.spare_pages();
            if self.pools.free_pages() >= pages && self.pools.free_slots() >= wanted.slots {
                break;
            }
            match self.idle_victim(id) {
                Some(i) if self.running.is_empty() || self.is_finished(self.idle[i]) => {
                    self.give_up_state(self.idle[i]);
                }
                _ => return false,
            }
        }
        let place = self.sequences[&id].place();
        let at = self.waiting.binary_search(&place).expect("it waits");
        self.waiting.remove(at);
        self.idle.retain(|idle| *idle != id);
        let sequence = self.sequences.get_mut(&id).expect("queued sequences exist");
        if sequence.slot.is_none() {
            sequence.slot = self.pools.alloc_slot();
        }
        sequence.status = Status::Running;
        self.held.remove(&id);
        self.pools.reserve(sequence);
        insert_running(&mut self.running, place);
        true
    }

    /// The first of the queue that is not held back, if one more sequence may run beside those that are held
    /// back before it: their places stay free.
    pub fn next_in_line(&self) -> Option<SeqId> {
        let free = self.running_limit.saturating_sub(self.running.len());
        // With nobody running there is nobody to wait for.
        let held = |place: &Place| !self.running.is_empty() && self.held.contains(&place.id);
        let mut line = self.waiting.iter().take(free);
        line.find(|place| !held(place)).map(|place| place.id)
    }

    /// Lets others of the queue pass by a sequence of it, or no longer.
    pub fn hold(&mut self, id: SeqId, held: bool) {
        let waits = |s: &Sequence| matches!(s.status, Status::Waiting | Status::Preempted);
        if held && self.sequences.get(&id).is_some_and(waits) {
            self.held.insert(id);
        } else {
            self.held.remove(&id);
        }
    }

    /// Gives a queued sequence that has no state the state of its first `computed` tokens: pages, of which it
    /// becomes a user, and, where the model has slots, a slot to copy theirs into, before anything
    /// else is asked of the scheduler; it is none where the model has none. Without a free slot all stays as it is.
    pub fn seed(
        &mut self,
        id: SeqId,
        computed: usize,
        pages: &[PageId],
    ) -> Result<Option<SlotId>, NoSlot> {
        assert!(!self.in_flight, "a step is under way");
        let sequence = &self.sequences[&id];
        assert!(
            !sequence.holds_state()
                && matches!(sequence.status, Status::Waiting | Status::Preempted),
            "{id:?} is no stateless sequence of the queue"
        );
        assert!(
            computed > 0
                && computed < sequence.tokens.len()
                && pages.len() == self.pools.pages_for(computed),
            "{} pages and {computed} computed tokens of {}",
            pages.len(),
            sequence.tokens.len()
        );
        if self.pools.slots.is_some() && !self.free_a_slot() {
            return Err(NoSlot);
        }
        let slot = self.pools.alloc_slot();
        self.pools.retain(pages);
        let sequence = self.sequences.get_mut(&id).expect("looked up above");
        sequence.computed = computed;
        sequence.pages.extend_from_slice(pages);
        sequence.slot = slot;
        sequence.status = Status::Waiting;
        if sequence.holds_state() {
            self.idle.push(id);
        }
        Ok(slot)
    }

    /// Where chunks of a sequence must end from now on: see [`SequenceRequest::cuts`].
    pub fn cut_at(&mut self, id: SeqId, cuts: Vec<usize>) {
        debug_assert!(cuts.is_sorted(), "{cuts:?}");
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.cuts = cuts;
        }
    }

    /// Takes a sequence out of the queue or from the running ones.
    pub(super) fn leave_line(&mut self, id: SeqId) {
        let sequence = &self.sequences[&id];
        let place = sequence.place();
        match sequence.status {
            Status::Finished(_) => {}
            Status::Running => {
                let i = self.running.binary_search(&place).expect("it runs");
                self.running.remove(i);
            }
            Status::Waiting | Status::Preempted => {
                let i = self.waiting.binary_search(&place).expect("it waits");
                self.waiting.remove(i);
                self.held.remove(&id);
                self.idle.retain(|idle| *idle != id);
            }
        }
    }
}

/// Tokens whose state is ever needed: the last one sampled is not fed again.
fn most_computed(prompt: usize, max_tokens: usize) -> usize {
    prompt.saturating_add(max_tokens.saturating_sub(1))
}

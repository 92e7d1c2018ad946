//! Which tokens next: queue, admission, the rows of each step, and whose state must give way.
//!
//! **Line.** Everything goes by [`Place`]: by arrival, forks behind their parent. Sequences are admitted from
//! the front of the queue only, where those that are held back ([`Scheduler::hold`]) are passed by. One enters when a place among the running, a slot, and pages for all its
//! tokens are free, after what the running ones still need and one page to spare for each of them.
//!
//! **Rows.** Every running sequence that decodes gets its row. No more sequences run than leave a prompt its
//! rows beside that (see [`Scheduler::running_limit`]). What is left of the budget goes to prompts: in one
//! step the oldest prompt is served first, in the next the one with the fewest tokens to compute, and in both
//! the others follow by fewest tokens, each taking what it can. So a short prompt does not wait behind a long
//! one, and a long one gets its full rows at least every second step once it is the oldest.
//!
//! **Pages.** They are taken as tokens need them, oldest sequence first. When none is free, state is taken
//! back in this order: that of finished sequences, that of sequences in the queue, that of the running
//! sequence that arrived last. The latter is preempted: it goes back to its place in the queue and computes
//! its tokens again, prompt and generated alike. A sequence never takes from an older running one; it sits out
//! the step instead. Hence the oldest running sequence always advances, and so all of them end.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

mod config;
mod guesses;
mod line;
mod rows;

pub use config::{BadConfig, Chunk, ForkRefused, Refused, SchedulerConfig};
pub use line::NoSlot;

use crate::batch::{Batch, Logits};
use crate::ids::{PageId, SeqId, SlotId, TokenId};
use crate::pages::PagePool;
use crate::pools::Pools;
use crate::sequence::{Place, Reason, Sequence, SequenceRequest, Status};
use crate::slots::SlotPool;

/// What [`Scheduler::next`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing to do.
    Idle,
    /// The batch is to be run, then [`Scheduler::done`] to be called.
    Run,
    /// There is work, but pages or slots held outside the scheduler are in its way. The numbers are what must
    /// be free for the first sequence in line; release some and call again. It never happens otherwise.
    Short(Wanted),
}

/// Free pages and slots that would be of use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Free pages.
    pub pages: usize,
    /// Free slots.
    pub slots: usize,
}

/// What happened to a sequence in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// It has a new token.
    Token {
        /// The sequence.
        id: SeqId,
        /// The token.
        token: TokenId,
    },
    /// It is at its end. Take or remove it, now or later.
    Finished {
        /// The sequence.
        id: SeqId,
        /// Why.
        reason: Reason,
    },
}

/// A second sequence, as [`Scheduler::fork`] makes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fork {
    /// The new sequence.
    pub id: SeqId,
    /// A slot to copy (from, to), before anything else is asked of the scheduler.
    pub copy: Option<(SlotId, SlotId)>,
}

/// See the top of this file.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    running_limit: usize,
    pools: Pools,
    sequences: BTreeMap<SeqId, Sequence>,
    /// In order of place.
    waiting: VecDeque<Place>,
    /// Those of them that others pass by.
    held: BTreeSet<SeqId>,
    /// In order of place.
    running: Vec<Place>,
    /// Those that hold state and do not run: finished, or in the queue.
    idle: Vec<SeqId>,
    next_id: u64,
    /// Which prompt the coming step serves first.
    oldest_first: bool,
    in_flight: bool,
    preemptions: u64,
    /// Rows of each running sequence in the step being made.
    rows: Vec<usize>,
    /// Prompts in the order they are served: tokens to compute, index in `running`.
    prompts: Vec<(usize, usize)>,
}

impl Scheduler {
    /// A scheduler with nothing to do, or all that is wrong with its sizes.
    pub fn new(config: SchedulerConfig) -> Result<Self, BadConfig> {
        let faults = config.faults();
        if !faults.is_empty() {
            return Err(BadConfig(faults));
        }
        let one_prompt = match config.chunk {
            Chunk::AtMost(_) => 1,
            Chunk::Every(rows) => rows,
        };
        Ok(Self {
            running_limit: config
                .max_sequences
                .min(config.token_budget - one_prompt + 1),
            pools: Pools {
                pages: config
                    .pages
                    .map(|pages| PagePool::new(pages, config.page_size)),
                slots: config.slots.map(SlotPool::new),
                reach: config.reach,
                rows: config.token_budget,
            },
            config,
            sequences: BTreeMap::new(),
            waiting: VecDeque::new(),
            held: BTreeSet::new(),
            running: Vec::new(),
            idle: Vec::new(),
            next_id: 0,
            oldest_first: true,
            in_flight: false,
            preemptions: 0,
            rows: Vec::new(),
            prompts: Vec::new(),
        })
    }

    /// Puts a sequence at the end of the queue.
    pub fn submit(&mut self, request: SequenceRequest) -> Result<SeqId, Refused> {
        self.check(&request)?;
        Ok(self.enqueue(request, 0, &[], None))
    }

    /// Puts a sequence at the end of the queue whose first `computed` tokens have their state already in these
    /// pages and this slot, which become the sequence's own. If it is refused they stay the caller's.
    ///
    /// The prompt is all its tokens, computed or not. Pages may be shared with other users.
    pub fn adopt(
        &mut self,
        request: SequenceRequest,
        computed: usize,
        pages: &[PageId],
        slot: Option<SlotId>,
    ) -> Result<SeqId, Refused> {
        self.check(&request)?;
        if computed >= request.prompt.len() {
            return Err(Refused::NothingLeft {
                computed,
                tokens: request.prompt.len(),
            });
        }
        let expected = self.pools.pages_for(computed);
        if pages.len() != expected {
            return Err(Refused::StatePages {
                computed,
                expected,
                found: pages.len(),
            });
        }
        let expected = usize::from(self.pools.slots.is_some() && computed > 0);
        if usize::from(slot.is_some()) != expected {
            return Err(Refused::StateSlots {
                computed,
                expected,
                found: 1 - expected,
            });
        }
        Ok(self.enqueue(request, computed, pages, slot))
    }

    /// Makes a second sequence with the tokens and the state of this one; from here they go their own ways.
    ///
    /// Pages are shared until one of the two writes. If no slot is free, the new one starts without state and
    /// computes its tokens again. Not to be called between `next` and `done`.
    pub fn fork(&mut self, id: SeqId) -> Result<Fork, ForkRefused> {
        assert!(
            !self.in_flight,
            "a fork in the middle of a step has no defined state"
        );
        let parent = self.sequences.get(&id).ok_or(ForkRefused::Unknown(id))?;
        if parent.is_finished() {
            return Err(ForkRefused::Finished(id));
        }
        let (computed, from, status) = (parent.computed, parent.slot, parent.status);
        let mut child = parent.stateless_copy(SeqId(self.next_id));
        self.next_id += 1;
        if computed > 0 && (from.is_none() || self.free_a_slot()) {
            child.computed = computed;
            child.slot = self.pools.alloc_slot();
            child.pages.extend_from_slice(&self.sequences[&id].pages);
            self.pools.retain(&child.pages);
        }
        let fork = Fork {
            id: child.id,
            copy: from.zip(child.slot),
        };
        let place = child.place();
        if status == Status::Running
            && child.computed > 0
            && self.running.len() < self.running_limit
        {
            child.status = Status::Running;
            self.pools.reserve(&mut child);
            insert_running(&mut self.running, place);
        } else {
            if child.holds_state() {
                self.idle.push(child.id);
            }
            insert_waiting(&mut self.waiting, place);
        }
        self.sequences.insert(child.id, child);
        Ok(fork)
    }

    /// Fills the batch of the next step. After [`Step::Run`], call `done` or `failed` before calling it again.
    pub fn next(&mut self, batch: &mut Batch) -> Step {
        assert!(!self.in_flight, "the step before is not done");
        batch.reset();
        while self.admit_first() {}
        let Some(oldest) = self.running.first() else {
            return match self.waiting.front() {
                None => Step::Idle,
                Some(first) => Step::Short(self.wanted_by(first.id)),
            };
        };
        let oldest = oldest.id;
        self.share_rows();
        let mut i = 0;
        while i < self.running.len() {
            if self.rows[i] > 0 && !self.secure(i, self.rows[i], batch) {
                self.rows[i] = 0;
            }
            i += 1;
        }
        if self.rows.iter().all(|&rows| rows == 0) {
            // Those whose turn it was wait for pages of the oldest: so it is the oldest's turn.
            let rows = self.piece(&self.sequences[&oldest], self.config.token_budget);
            if !self.secure(0, rows, batch) {
                return Step::Short(self.wanted_by(oldest));
            }
            self.rows[0] = rows;
        }
        self.fill(batch);
        self.in_flight = true;
        Step::Run
    }

    /// Takes note that the step is done. `sampled` has a token for each span with `sample`, in their order, and
    /// behind it one for each guess of the span that was right; those of sequences that ended meanwhile may be left
    /// out. What happened is appended to `events`.
    ///
    /// Where a guess was wrong, the slot of the span must be again what it was before the step
    /// (see [`Scheduler::returns`]): its rows are then computed once more, without the wrong ones.
    pub fn done(&mut self, batch: &Batch, sampled: &[(SeqId, TokenId)], events: &mut Vec<Event>) {
        assert!(self.in_flight, "no step is under way");
        self.in_flight = false;
        let mut tokens = 0;
        for span in &batch.spans {
            let first = tokens;
            while tokens - first <= span.guessed
                && sampled
                    .get(tokens)
                    .is_some_and(|(id, _)| *id == span.seq && span.sample)
            {
                tokens += 1;
            }
            let found = &sampled[first..tokens];
            let Some(sequence) = self.sequences.get_mut(&span.seq) else {
                continue;
            };
            sequence.guess.clear();
            // None scheduled: its state was taken back during the step.
            let scheduled = std::mem::take(&mut sequence.scheduled);
            let wrong = span.guessed - found.len().saturating_sub(1);
            if scheduled > 0 && wrong > 0 {
                if !self.pools.keeps_slots() {
                    sequence.computed += scheduled - wrong;
                }
                self.pools.shrink(sequence);
            } else {
                sequence.computed += scheduled;
            }
            self.pools.trim(sequence);
            if sequence.status != Status::Running {
                continue;
            }
            if span.logits == Logits::All {
                sequence.scored = sequence.scored.max(sequence.computed);
            }
            if span.sample {
                let id = span.seq;
                assert!(!found.is_empty(), "no token for {id:?}");
                for &(_, token) in found {
                    sequence.tokens.push(token);
                    events.push(Event::Token { id, token });
                }
            }
            let reason = if span.sample && sequence.ends_with_stop() {
                Reason::Stop
            } else if sequence.is_full() {
                Reason::Length
            } else {
                continue;
            };
            self.finish(span.seq, reason);
            events.push(Event::Finished {
                id: span.seq,
                reason,
            });
        }
        assert!(
            tokens == sampled.len(),
            "a token for a sequence that wants none, or out of order"
        );
    }

    /// Takes note that the step went wrong: its sequences end as [`Reason::Failed`], their state is given up.
    pub fn failed(&mut self, batch: &Batch, events: &mut Vec<Event>) {
        assert!(self.in_flight, "no step is under way");
        self.in_flight = false;
        for span in &batch.spans {
            if self.finish(span.seq, Reason::Failed) {
                events.push(Event::Finished {
                    id: span.seq,
                    reason: Reason::Failed,
                });
            }
            self.give_up_state(span.seq);
        }
    }

    /// Ends a sequence, for instance at a stop string. Its state is kept until it is taken or removed, or the
    /// memory is needed. False if there is no such sequence or it is at its end already.
    pub fn finish(&mut self, id: SeqId, reason: Reason) -> bool {
        let Some(sequence) = self.sequences.get(&id) else {
            return false;
        };
        if sequence.is_finished() {
            return false;
        }
        self.leave_line(id);
        let sequence = self.sequences.get_mut(&id).expect("looked up above");
        sequence.status = Status::Finished(reason);
        if sequence.holds_state() {
            self.idle.push(id);
        }
        true
    }

    /// Ends a sequence nobody waits for any more and gives its state back at once; at any time, even during a
    /// step. Its tokens stay until it is removed. False as for `finish`.
    pub fn cancel(&mut self, id: SeqId) -> bool {
        let ended = self.finish(id, Reason::Cancelled);
        if ended {
            self.give_up_state(id);
        }
        ended
    }

    /// Forgets a sequence, whatever it is doing, and gives its state back. False if there is no such sequence.
    pub fn remove(&mut self, id: SeqId) -> bool {
        if !self.sequences.contains_key(&id) {
            return false;
        }
        self.leave_line(id);
        self.give_up_state(id);
        self.sequences.remove(&id);
        true
    }

    /// Hands a sequence over with its state: pages and slot are the caller's to release, or to be adopted
    /// again. Between `next` and `done` only sequences outside the batch can be taken.
    pub fn take(&mut self, id: SeqId) -> Option<Sequence> {
        let scheduled = self.sequences.get(&id)?.scheduled;
        assert!(
            scheduled == 0,
            "{id:?} has {scheduled} rows in the step under way"
        );
        self.leave_line(id);
        self.idle.retain(|idle| *idle != id);
        self.sequences.remove(&id)
    }

    /// How many pages and slots should be free so that all running sequences can advance and the first of the
    /// queue can enter without taking state back. A cache that holds pages of its own makes room by this.
    pub fn wanted(&self) -> Wanted {
        let mut wanted = Wanted {
            pages: self.outstanding(),
            slots: 0,
        };
        if let Some(first) = self.next_in_line() {
            let first = self.wanted_by(first);
            wanted.pages += first.pages + self.spare_pages();
            wanted.slots += first.slots;
        }
        wanted
    }

    /// A sequence that was not taken or removed.
    pub fn sequence(&self, id: SeqId) -> Option<&Sequence> {
        self.sequences.get(&id)
    }

    /// All sequences not taken or removed, in the order of their ids.
    pub fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        self.sequences.values()
    }

    /// The running sequences, oldest first.
    pub fn running(&self) -> impl ExactSizeIterator<Item = SeqId> {
        self.running.iter().map(|place| place.id)
    }

    /// The queue, first to enter first.
    pub fn waiting(&self) -> impl ExactSizeIterator<Item = SeqId> {
        self.waiting.iter().map(|place| place.id)
    }

    /// How many sequences can run at once: `max_sequences`, or fewer if the budget could not hold a row of
    /// each beside a prompt's rows (one, or one chunk if chunks are fixed).
    pub fn running_limit(&self) -> usize {
        self.running_limit
    }

    /// How often a running sequence was preempted.
    pub fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// From here on sequences keep all their pages, seen or not.
    pub fn keep_pages(&mut self) {
        self.pools.reach = None;
    }

    /// The sizes given at the start.
    pub fn config(&self) -> &SchedulerConfig {
        &self.config
    }

    /// The pages, if the model has attention.
    pub fn pages(&self) -> Option<&PagePool> {
        self.pools.pages.as_ref()
    }

    /// The pages, for users beside the sequences: a cache, a sequence being restored.
    pub fn pages_mut(&mut self) -> Option<&mut PagePool> {
        self.pools.pages.as_mut()
    }

    /// The slots, if the model has any.
    pub fn slots(&self) -> Option<&SlotPool> {
        self.pools.slots.as_ref()
    }

    /// The slots, for users beside the sequences.
    pub fn slots_mut(&mut self) -> Option<&mut SlotPool> {
        self.pools.slots.as_mut()
    }
}

/// State: what is needed, and who gives way.
impl Scheduler {
    /// Pages the running sequences still need for the tokens they have.
    fn outstanding(&self) -> usize {
        self.running
            .iter()
            .map(|place| self.wanted_by(place.id).pages)
            .sum()
    }

    /// Pages kept free at an admission, so that the newcomer is not preempted at the next page border.
    fn spare_pages(&self) -> usize {
        if self.pools.pages.is_some() {
            self.running.len()
        } else {
            0
        }
    }

    /// What a sequence still needs for the tokens it has.
    fn wanted_by(&self, id: SeqId) -> Wanted {
        let sequence = &self.sequences[&id];
        Wanted {
            pages: self.pools.pages_until(sequence, sequence.tokens.len()),
            slots: usize::from(self.pools.slots.is_some() && sequence.slot.is_none()),
        }
    }

    fn is_finished(&self, id: SeqId) -> bool {
        self.sequences[&id].is_finished()
    }

    /// Which of the idle gives way first: the finished, first ended first; then the queued, last in line first.
    fn idle_victim(&self, except: SeqId) -> Option<usize> {
        if let Some(i) = self.idle.iter().position(|&id| self.is_finished(id)) {
            return Some(i);
        }
        let queued = self
            .idle
            .iter()
            .enumerate()
            .filter(|(_, id)| **id != except);
        queued
            .max_by_key(|(_, id)| self.sequences[id].place())
            .map(|(i, _)| i)
    }

    /// Whether a slot is free, if need be because a finished sequence gives way.
    fn free_a_slot(&mut self) -> bool {
        while self.pools.free_slots() == 0 {
            let Some(&id) = self.idle.iter().find(|&&id| self.is_finished(id)) else {
                return false;
            };
            self.give_up_state(id);
        }
        true
    }

    /// Gives the state of a sequence back, if it has any; all its tokens are to be computed again.
    fn give_up_state(&mut self, id: SeqId) {
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return;
        };
        self.pools.release(sequence);
        sequence.computed = 0;
        sequence.scheduled = 0;
        self.idle.retain(|idle| *idle != id);
    }
}

impl Sequence {
    fn ends_with_stop(&self) -> bool {
        self.tokens
            .last()
            .is_some_and(|token| self.limits.stop.contains(token))
    }

    /// Whether all that was asked for is there.
    fn is_full(&self) -> bool {
        let wanted = self.limits.max_tokens;
        if wanted == 0 {
            self.remaining() == 0
        } else {
            self.generated().len() >= wanted
        }
    }
}

fn insert_running(running: &mut Vec<Place>, place: Place) {
    running.insert(running.partition_point(|other| *other < place), place);
}

fn insert_waiting(waiting: &mut VecDeque<Place>, place: Place) {
    waiting.insert(waiting.partition_point(|other| *other < place), place);
}

#[cfg(test)]
mod tests;

//! Which tokens next: queue, admission, the rows of each step, and whose state must give way.
//!
//! **Line.** Everything goes by [`Place`]: by arrival, forks behind their parent. Sequences are admitted from
//! the front of the queue only. One enters when a place among the running, a slot, and pages for all its
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

use std::collections::{BTreeMap, VecDeque};
use std::fmt;

use crate::batch::{Batch, Logits, Span};
use crate::ids::{PageId, SeqId, SlotId, TokenId};
use crate::pages::PagePool;
use crate::pools::Pools;
use crate::sequence::{Place, Reason, Sequence, SequenceRequest, Status};
use crate::slots::SlotPool;

/// The sizes the scheduler works within.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Tokens in a page.
    pub page_size: u32,
    /// Pages in the pool; `None` for a model without attention.
    pub pages: Option<u32>,
    /// Slots in the pool; `None` for a model without fixed-size state.
    pub slots: Option<u32>,
    /// Rows in a step at most.
    pub token_budget: usize,
    /// Sequences running at once at most.
    pub max_sequences: usize,
    /// How prompts are cut.
    pub chunk: Chunk,
    /// Tokens in a sequence at most, prompt and generated.
    pub context: usize,
}

/// How prompts are cut into the rows of several steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// At most so many rows of a prompt in a step, cut wherever the budget ends.
    AtMost(usize),
    /// Cut at the multiples of this number from the prompt's start and nowhere else, so that the cuts do not
    /// depend on who else is running. The budget must hold one such chunk.
    Every(usize),
}

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

/// Why a configuration cannot work: all faults of it, one a line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct BadConfig(pub Vec<String>);

impl fmt::Display for BadConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

/// Why a sequence was not accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum Refused {
    #[error("the prompt is empty")]
    EmptyPrompt,
    #[error(
        "{prompt} prompt tokens and {max_tokens} to generate do not fit a context of {context}"
    )]
    TooLong {
        prompt: usize,
        max_tokens: usize,
        context: usize,
    },
    #[error(
        "{prompt} prompt tokens and {max_tokens} to generate need {wanted} pages, there are {pages}"
    )]
    TooManyPages {
        prompt: usize,
        max_tokens: usize,
        wanted: usize,
        pages: usize,
    },
    #[error("the state is of {computed} tokens of {tokens}, at least one must be left to compute")]
    NothingLeft { computed: usize, tokens: usize },
    #[error("the state of {computed} tokens fills {expected} pages, found {found}")]
    StatePages {
        computed: usize,
        expected: usize,
        found: usize,
    },
    #[error("the state of {computed} tokens has {expected} slots, found {found}")]
    StateSlots {
        computed: usize,
        expected: usize,
        found: usize,
    },
}

/// Why a sequence was not forked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum ForkRefused {
    #[error("there is no sequence {}", .0.0)]
    Unknown(SeqId),
    #[error("sequence {} is finished", .0.0)]
    Finished(SeqId),
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
            },
            config,
            sequences: BTreeMap::new(),
            waiting: VecDeque::new(),
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
        self.admit();
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

    /// Takes note that the step is done. `sampled` has a token for each span with `sample`, in their order;
    /// those of sequences that ended meanwhile may be left out. What happened is appended to `events`.
    pub fn done(&mut self, batch: &Batch, sampled: &[(SeqId, TokenId)], events: &mut Vec<Event>) {
        assert!(self.in_flight, "no step is under way");
        self.in_flight = false;
        let mut sampled = sampled.iter().peekable();
        for span in &batch.spans {
            let token = sampled.next_if(|(id, _)| *id == span.seq && span.sample);
            let Some(sequence) = self.sequences.get_mut(&span.seq) else {
                continue;
            };
            // None scheduled: its state was taken back during the step.
            sequence.computed += std::mem::take(&mut sequence.scheduled);
            if sequence.status != Status::Running {
                continue;
            }
            if span.logits == Logits::All {
                sequence.scored = sequence.scored.max(sequence.computed);
            }
            if span.sample {
                let id = span.seq;
                let &(_, token) = token.unwrap_or_else(|| panic!("no token for {id:?}"));
                sequence.tokens.push(token);
                events.push(Event::Token { id, token });
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
            sampled.next().is_none(),
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
        if let Some(first) = self.waiting.front()
            && self.running.len() < self.running_limit
        {
            let first = self.wanted_by(first.id);
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

/// Entering and leaving.
impl Scheduler {
    fn check(&self, request: &SequenceRequest) -> Result<(), Refused> {
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
                pool.pages_for(most_computed(prompt, max_tokens)),
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

    fn enqueue(
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

    /// Admits from the front of the queue while there is room.
    fn admit(&mut self) {
        let mut outstanding = self.outstanding();
        while self.running.len() < self.running_limit
            && let Some(&Place { id, .. }) = self.waiting.front()
        {
            loop {
                let wanted = self.wanted_by(id);
                let pages = wanted.pages + outstanding + self.spare_pages();
                if self.pools.free_pages() >= pages && self.pools.free_slots() >= wanted.slots {
                    outstanding += wanted.pages;
                    break;
                }
                match self.idle_victim(id) {
                    Some(i) if self.running.is_empty() || self.is_finished(self.idle[i]) => {
                        self.give_up_state(self.idle[i]);
                    }
                    _ => return,
                }
            }
            let place = self.waiting.pop_front().expect("looked at above");
            self.idle.retain(|idle| *idle != id);
            let sequence = self.sequences.get_mut(&id).expect("queued sequences exist");
            if sequence.slot.is_none() {
                sequence.slot = self.pools.alloc_slot();
            }
            sequence.status = Status::Running;
            self.pools.reserve(sequence);
            insert_running(&mut self.running, place);
        }
    }

    /// Takes a sequence out of the queue or from the running ones.
    fn leave_line(&mut self, id: SeqId) {
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
                self.idle.retain(|idle| *idle != id);
            }
        }
    }
}

/// The rows of a step.
impl Scheduler {
    /// Decides how many rows each running sequence gets, if it gets its pages.
    fn share_rows(&mut self) {
        let Self {
            running,
            sequences,
            rows,
            prompts,
            ..
        } = self;
        rows.clear();
        prompts.clear();
        for (i, place) in running.iter().enumerate() {
            let sequence = &sequences[&place.id];
            rows.push(usize::from(sequence.is_decoding()));
            if !sequence.is_decoding() {
                prompts.push((sequence.remaining(), i));
            }
        }
        if prompts.is_empty() {
            return;
        }
        let rest = if self.oldest_first {
            &mut prompts[1..]
        } else {
            &mut prompts[..]
        };
        rest.sort_unstable();
        self.oldest_first = !self.oldest_first;
        let mut left = self.config.token_budget - self.rows.iter().sum::<usize>();
        for &(_, i) in &self.prompts {
            let rows = self.piece(&self.sequences[&self.running[i].id], left);
            self.rows[i] = rows;
            left -= rows;
        }
    }

    /// The rows a sequence takes when `left` are to be had.
    fn piece(&self, sequence: &Sequence, left: usize) -> usize {
        let (computed, remaining) = (sequence.computed, sequence.remaining());
        let to_cut = sequence
            .cut
            .and_then(|cut| cut.checked_sub(computed))
            .filter(|&rows| rows > 0);
        let most = remaining.min(to_cut.unwrap_or(remaining));
        match self.config.chunk {
            Chunk::AtMost(rows) => most.min(rows).min(left),
            Chunk::Every(rows) => {
                let whole = most.min(rows - computed % rows);
                if whole <= left { whole } else { 0 }
            }
        }
    }

    /// Gets the pages for the next rows of a running sequence, at the cost of those behind it if need be.
    /// None of these has a row in the batch yet, since the older ones ask first.
    fn secure(&mut self, i: usize, rows: usize, batch: &mut Batch) -> bool {
        let id = self.running[i].id;
        loop {
            let sequence = self
                .sequences
                .get_mut(&id)
                .expect("running sequences exist");
            let end = sequence.computed + rows;
            let need = self.pools.pages_to_reach(sequence, end);
            let free = self.pools.free_pages();
            if need <= free {
                self.pools.grow(sequence, end, &mut batch.copies);
                return true;
            }
            if need > free + self.could_give_up(i) {
                return false;
            }
            match self.idle_victim(id) {
                Some(victim) => self.give_up_state(self.idle[victim]),
                None => self.preempt_last(),
            }
        }
    }

    /// An upper bound on the pages that others would give up for this running sequence: 0 if there are none
    /// behind it.
    fn could_give_up(&self, i: usize) -> usize {
        let behind = self.running[i + 1..].iter().map(|place| place.id);
        behind
            .chain(self.idle.iter().copied())
            .map(|id| self.sequences[&id].pages.len())
            .sum()
    }

    fn preempt_last(&mut self) {
        let place = self.running.pop().expect("there is a later one");
        self.rows.pop();
        self.give_up_state(place.id);
        let sequence = self
            .sequences
            .get_mut(&place.id)
            .expect("running sequences exist");
        sequence.status = Status::Preempted;
        insert_waiting(&mut self.waiting, place);
        self.preemptions += 1;
    }

    /// Writes the rows decided on into the batch: decoding sequences first.
    fn fill(&mut self, batch: &mut Batch) {
        for decoding in [true, false] {
            for (place, &rows) in self.running.iter().zip(&self.rows) {
                let sequence = self
                    .sequences
                    .get_mut(&place.id)
                    .expect("running sequences exist");
                if rows > 0 && sequence.is_decoding() == decoding {
                    push_span(batch, sequence, rows);
                }
            }
            if decoding {
                batch.decodes = batch.spans.len();
            }
        }
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
            pages: self.pools.pages_to_reach(sequence, sequence.tokens.len()),
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

impl SchedulerConfig {
    fn faults(&self) -> Vec<String> {
        let Self {
            page_size,
            pages,
            slots,
            token_budget,
            max_sequences,
            chunk,
            context,
        } = self;
        let mut faults = Vec::new();
        let chunk_size = match *chunk {
            Chunk::AtMost(rows) | Chunk::Every(rows) => rows,
        };
        for (name, is_zero) in [
            ("page_size", *page_size == 0),
            ("pages", *pages == Some(0)),
            ("slots", *slots == Some(0)),
            ("token_budget", *token_budget == 0),
            ("max_sequences", *max_sequences == 0),
            ("chunk", chunk_size == 0),
            ("context", *context == 0),
        ] {
            if is_zero {
                faults.push(format!("{name} is 0, expected at least 1"));
            }
        }
        if let Chunk::Every(rows) = *chunk
            && rows > *token_budget
        {
            faults.push(format!(
                "token_budget is {token_budget}, expected a chunk of {rows} to fit"
            ));
        }
        faults
    }
}

/// Tokens whose state is ever needed: the last one sampled is not fed again.
fn most_computed(prompt: usize, max_tokens: usize) -> usize {
    prompt.saturating_add(max_tokens.saturating_sub(1))
}

fn insert_running(running: &mut Vec<Place>, place: Place) {
    running.insert(running.partition_point(|other| *other < place), place);
}

fn insert_waiting(waiting: &mut VecDeque<Place>, place: Place) {
    waiting.insert(waiting.partition_point(|other| *other < place), place);
}

fn push_span(batch: &mut Batch, sequence: &mut Sequence, rows: usize) {
    let (position, end) = (sequence.computed, sequence.computed + rows);
    let sample = end == sequence.tokens.len() && sequence.limits.max_tokens > 0;
    let all = sequence.prompt_logits && position < sequence.prompt_len && end > sequence.scored;
    let (start, first_page) = (batch.tokens.len(), batch.pages.len());
    batch
        .tokens
        .extend_from_slice(&sequence.tokens[position..end]);
    batch.pages.extend_from_slice(&sequence.pages);
    if position == 0 {
        batch.clear.extend(sequence.slot);
    }
    sequence.scheduled = rows;
    batch.spans.push(Span {
        seq: sequence.id,
        slot: sequence.slot,
        start,
        len: rows,
        position,
        pages: first_page..batch.pages.len(),
        logits: if all {
            Logits::All
        } else if sample {
            Logits::Last
        } else {
            Logits::None
        },
        sample,
        fresh: position == 0,
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sequence::Limits;

    const CONFIG: SchedulerConfig = SchedulerConfig {
        page_size: 4,
        pages: Some(100),
        slots: Some(10),
        token_budget: 16,
        max_sequences: 8,
        chunk: Chunk::AtMost(16),
        context: 1000,
    };

    fn scheduler(config: SchedulerConfig) -> Scheduler {
        Scheduler::new(config).unwrap()
    }

    fn request(prompt: usize, max_tokens: usize) -> SequenceRequest {
        SequenceRequest {
            prompt: (0..prompt as TokenId).collect(),
            limits: Limits {
                max_tokens,
                stop: Vec::new(),
            },
            ..Default::default()
        }
    }

    /// The rows of a step: sequence, position, length.
    type Rows = Vec<(u64, usize, usize)>;

    /// Runs a step that samples `token` wherever one is wanted.
    fn step(scheduler: &mut Scheduler, batch: &mut Batch, token: TokenId) -> (Rows, Vec<Event>) {
        let mut events = Vec::new();
        if scheduler.next(batch) == Step::Run {
            let sampled: Vec<_> = batch
                .spans
                .iter()
                .filter(|s| s.sample)
                .map(|s| (s.seq, token))
                .collect();
            scheduler.done(batch, &sampled, &mut events);
        }
        (
            batch
                .spans
                .iter()
                .map(|s| (s.seq.0, s.position, s.len))
                .collect(),
            events,
        )
    }

    fn rows(scheduler: &mut Scheduler) -> Rows {
        step(scheduler, &mut Batch::new(), 7).0
    }

    #[test]
    fn all_faults_of_a_configuration_are_named() {
        let check = |config: SchedulerConfig, expected: &str| {
            assert_eq!(Scheduler::new(config).unwrap_err().to_string(), expected);
        };
        check(
            SchedulerConfig {
                page_size: 0,
                pages: Some(0),
                context: 0,
                ..CONFIG
            },
            "page_size is 0, expected at least 1\npages is 0, expected at least 1\ncontext is 0, expected at least 1",
        );
        check(
            SchedulerConfig {
                chunk: Chunk::Every(17),
                ..CONFIG
            },
            "token_budget is 16, expected a chunk of 17 to fit",
        );
    }

    #[test]
    fn no_more_run_than_leave_a_prompt_its_rows() {
        for (chunk, max_sequences, limit) in [
            (Chunk::AtMost(4), 8, 8),
            (Chunk::AtMost(4), 30, 16),
            (Chunk::Every(4), 30, 13),
            (Chunk::Every(16), 30, 1),
        ] {
            let config = SchedulerConfig {
                chunk,
                max_sequences,
                ..CONFIG
            };
            assert_eq!(scheduler(config).running_limit(), limit, "{chunk:?}");
        }
    }

    #[test]
    fn what_cannot_run_is_refused_with_its_numbers() {
        let small = SchedulerConfig {
            pages: Some(3),
            context: 50,
            ..CONFIG
        };
        for (prompt, max_tokens, message) in [
            (0, 5, "the prompt is empty"),
            (
                41,
                10,
                "41 prompt tokens and 10 to generate do not fit a context of 50",
            ),
            (
                1,
                usize::MAX,
                "1 prompt tokens and 18446744073709551615 to generate do not fit a context of 50",
            ),
            (
                4,
                10,
                "4 prompt tokens and 10 to generate need 4 pages, there are 3",
            ),
        ] {
            let refused = scheduler(small.clone())
                .submit(request(prompt, max_tokens))
                .unwrap_err();
            assert_eq!(refused.to_string(), message);
        }
        // The last token sampled needs no page.
        assert!(scheduler(small).submit(request(4, 9)).is_ok());
    }

    #[test]
    fn a_limit_nobody_means_to_reach_costs_nothing() {
        let config = SchedulerConfig {
            pages: None,
            context: usize::MAX,
            ..CONFIG
        };
        let mut scheduler = scheduler(config);
        let id = scheduler.submit(request(2, usize::MAX)).unwrap();
        assert_eq!(rows(&mut scheduler), [(0, 0, 2)]);
        assert_eq!(rows(&mut scheduler), [(0, 2, 1)]);
        assert!(scheduler.sequence(id).unwrap().tokens.capacity() < 100_000);
    }

    #[test]
    fn decode_rows_come_first_and_a_short_prompt_passes_a_long_one() {
        let mut scheduler = scheduler(CONFIG);
        scheduler.submit(request(1, 9)).unwrap();
        assert_eq!(rows(&mut scheduler), [(0, 0, 1)]);
        scheduler.submit(request(100, 9)).unwrap();
        scheduler.submit(request(4, 9)).unwrap();
        // Fewest tokens first in this step, the oldest prompt first in the next.
        assert_eq!(rows(&mut scheduler), [(0, 1, 1), (1, 0, 11), (2, 0, 4)]);
        scheduler.submit(request(4, 9)).unwrap();
        assert_eq!(rows(&mut scheduler), [(0, 2, 1), (2, 4, 1), (1, 11, 14)]);
        assert_eq!(
            rows(&mut scheduler),
            [(0, 3, 1), (2, 5, 1), (1, 25, 10), (3, 0, 4)]
        );
    }

    #[test]
    fn short_prompts_without_end_do_not_starve_a_long_one() {
        for chunk in [Chunk::AtMost(8), Chunk::Every(8)] {
            let mut scheduler = scheduler(SchedulerConfig {
                chunk,
                token_budget: 15,
                ..CONFIG
            });
            let mut batch = Batch::new();
            let long = scheduler.submit(request(160, 1)).unwrap();
            let mut steps = 0;
            while !scheduler.sequence(long).unwrap().is_finished() {
                scheduler.submit(request(8, 1)).unwrap();
                scheduler.submit(request(8, 1)).unwrap();
                step(&mut scheduler, &mut batch, 7);
                steps += 1;
            }
            assert!(steps <= 2 * 160 / 8, "{chunk:?}: {steps} steps");
        }
    }

    #[test]
    fn fixed_chunks_end_at_multiples_whoever_else_runs() {
        let mut scheduler = scheduler(SchedulerConfig {
            chunk: Chunk::Every(6),
            ..CONFIG
        });
        scheduler.submit(request(15, 9)).unwrap();
        scheduler.submit(request(13, 9)).unwrap();
        scheduler.submit(request(2, 9)).unwrap();
        assert_eq!(rows(&mut scheduler), [(0, 0, 6), (1, 0, 6), (2, 0, 2)]);
        assert_eq!(rows(&mut scheduler), [(2, 2, 1), (0, 6, 6), (1, 6, 6)]);
        assert_eq!(rows(&mut scheduler), [(2, 3, 1), (0, 12, 3), (1, 12, 1)]);
    }

    #[test]
    fn a_chunk_ends_where_a_snapshot_is_wanted() {
        let mut scheduler = scheduler(CONFIG);
        scheduler
            .submit(SequenceRequest {
                cut: Some(8),
                ..request(11, 9)
            })
            .unwrap();
        assert_eq!(rows(&mut scheduler), [(0, 0, 8)]);
        assert_eq!(rows(&mut scheduler), [(0, 8, 3)]);
    }

    #[test]
    fn the_latest_is_preempted_and_computes_prompt_and_generated_again() {
        let mut scheduler = scheduler(SchedulerConfig {
            pages: Some(5),
            ..CONFIG
        });
        scheduler.submit(request(7, 8)).unwrap();
        let second = scheduler.submit(request(6, 6)).unwrap();
        let third = scheduler.submit(request(1, 1)).unwrap();
        assert_eq!(rows(&mut scheduler), [(0, 0, 7), (1, 0, 6)]);
        assert_eq!(rows(&mut scheduler), [(0, 7, 1), (1, 6, 1)]);
        // The first takes the fifth page; the second still has room in its own, then sits out.
        assert_eq!(rows(&mut scheduler), [(0, 8, 1), (1, 7, 1)]);
        for position in 9..12 {
            assert_eq!(rows(&mut scheduler), [(0, position, 1)]);
        }
        // The first needs one more.
        assert_eq!(rows(&mut scheduler), [(0, 12, 1)]);
        assert_eq!(
            scheduler.sequence(second).unwrap().status,
            Status::Preempted
        );
        assert!(
            scheduler.waiting().eq([second, third]),
            "it stands where it stood"
        );
        assert_eq!(rows(&mut scheduler), [(0, 13, 1)]);
        assert_eq!(rows(&mut scheduler), [(1, 0, 9), (2, 0, 1)]);
        assert_eq!(scheduler.preemptions(), 1);
    }

    #[test]
    fn state_of_finished_sequences_gives_way_first() {
        let mut scheduler = scheduler(SchedulerConfig {
            pages: Some(2),
            slots: Some(1),
            ..CONFIG
        });
        let first = scheduler.submit(request(8, 1)).unwrap();
        scheduler.submit(request(8, 1)).unwrap();
        assert_eq!(rows(&mut scheduler), [(0, 0, 8)]);
        assert!(scheduler.sequence(first).unwrap().holds_state());
        assert_eq!(rows(&mut scheduler), [(1, 0, 8)]);
        assert!(!scheduler.sequence(first).unwrap().holds_state());
        assert_eq!(scheduler.preemptions(), 0);
    }

    #[test]
    fn a_fork_copies_the_page_it_would_write_and_no_other() {
        let mut scheduler = scheduler(CONFIG);
        let mut batch = Batch::new();
        let parent = scheduler.submit(request(6, 9)).unwrap();
        step(&mut scheduler, &mut batch, 7);
        let fork = scheduler.fork(parent).unwrap();
        assert_eq!(fork.copy, Some((SlotId(0), SlotId(1))));
        step(&mut scheduler, &mut batch, 7);
        assert_eq!(
            batch.copies,
            [(PageId(1), PageId(2))],
            "the parent writes first; the page is then the fork's"
        );
        let pages = |id| scheduler.sequence(id).unwrap().pages.clone();
        assert_eq!(
            (pages(parent), pages(fork.id)),
            (vec![PageId(0), PageId(2)], vec![PageId(0), PageId(1)])
        );
        assert_eq!(
            scheduler.fork(SeqId(9)).unwrap_err().to_string(),
            "there is no sequence 9"
        );
    }

    #[test]
    fn a_fork_without_a_slot_computes_its_tokens_again() {
        let mut scheduler = scheduler(SchedulerConfig {
            slots: Some(1),
            ..CONFIG
        });
        let parent = scheduler.submit(request(6, 2)).unwrap();
        let behind = scheduler.submit(request(1, 1)).unwrap();
        rows(&mut scheduler);
        let fork = scheduler.fork(parent).unwrap();
        assert_eq!(fork.copy, None);
        assert!(
            scheduler.waiting().eq([fork.id, behind]),
            "a fork stands before later arrivals"
        );
        rows(&mut scheduler);
        assert_eq!(rows(&mut scheduler), [(2, 0, 7)]);
    }

    #[test]
    fn a_sequence_ends_by_its_limits() {
        let length = |id| Event::Finished {
            id,
            reason: Reason::Length,
        };
        let stop = |id| Event::Finished {
            id,
            reason: Reason::Stop,
        };
        let token = |id| Event::Token { id, token: 7 };
        let id = SeqId(0);
        for (max_tokens, stop_tokens, expected) in [
            (0, vec![], vec![length(id)]),
            (2, vec![], vec![token(id), token(id), length(id)]),
            (2, vec![7], vec![token(id), stop(id)]),
            (1, vec![3, 7], vec![token(id), stop(id)]),
        ] {
            let mut scheduler = scheduler(CONFIG);
            let limits = Limits {
                max_tokens,
                stop: stop_tokens,
            };
            scheduler
                .submit(SequenceRequest {
                    limits,
                    ..request(3, 0)
                })
                .unwrap();
            let mut found = Vec::new();
            loop {
                let (rows, events) = step(&mut scheduler, &mut Batch::new(), 7);
                found.extend(events);
                if rows.is_empty() {
                    break;
                }
            }
            assert_eq!(found, expected);
        }
    }

    #[test]
    fn logits_are_asked_for_where_they_are_used() {
        let check = |request: SequenceRequest, expected: &[(Logits, bool)]| {
            let mut scheduler = scheduler(SchedulerConfig {
                token_budget: 4,
                ..CONFIG
            });
            scheduler.submit(request).unwrap();
            let mut batch = Batch::new();
            for &expected in expected {
                step(&mut scheduler, &mut batch, 7);
                assert_eq!((batch.spans[0].logits, batch.spans[0].sample), expected);
            }
        };
        let all = |request| SequenceRequest {
            prompt_logits: true,
            ..request
        };
        check(
            request(6, 2),
            &[
                (Logits::None, false),
                (Logits::Last, true),
                (Logits::Last, true),
            ],
        );
        check(
            request(6, 0),
            &[(Logits::None, false), (Logits::None, false)],
        );
        check(
            all(request(6, 2)),
            &[
                (Logits::All, false),
                (Logits::All, true),
                (Logits::Last, true),
            ],
        );
        check(
            all(request(6, 0)),
            &[(Logits::All, false), (Logits::All, false)],
        );
    }

    #[test]
    fn a_wrong_state_is_refused_and_stays_the_callers() {
        let mut scheduler = scheduler(CONFIG);
        let page = scheduler.pages_mut().unwrap().alloc().unwrap();
        let slot = scheduler.slots_mut().unwrap().alloc();
        for (computed, pages, slot, message) in [
            (
                6,
                &[page][..],
                slot,
                "the state is of 6 tokens of 6, at least one must be left to compute",
            ),
            (
                5,
                &[page],
                slot,
                "the state of 5 tokens fills 2 pages, found 1",
            ),
            (
                4,
                &[page],
                None,
                "the state of 4 tokens has 1 slots, found 0",
            ),
            (0, &[], slot, "the state of 0 tokens has 0 slots, found 1"),
        ] {
            let refused = scheduler
                .adopt(request(6, 1), computed, pages, slot)
                .unwrap_err();
            assert_eq!(refused.to_string(), message);
        }
        let id = scheduler.adopt(request(6, 1), 4, &[page], slot).unwrap();
        assert_eq!(rows(&mut scheduler), [(0, 4, 2)]);
        let taken = scheduler.take(id).unwrap();
        assert_eq!(
            (taken.computed, taken.pages.len(), taken.slot),
            (6, 2, slot)
        );
        assert_eq!(
            (scheduler.take(id).is_none(), scheduler.remove(id)),
            (true, false)
        );
    }

    #[test]
    fn pages_held_outside_are_asked_for() {
        let mut scheduler = scheduler(SchedulerConfig {
            pages: Some(3),
            ..CONFIG
        });
        let held = scheduler.pages_mut().unwrap().alloc().unwrap();
        scheduler.submit(request(12, 1)).unwrap();
        let wanted = Wanted { pages: 3, slots: 1 };
        assert_eq!(
            (scheduler.wanted(), scheduler.next(&mut Batch::new())),
            (wanted, Step::Short(wanted))
        );
        scheduler.pages_mut().unwrap().release(held);
        assert_eq!(rows(&mut scheduler), [(0, 0, 12)]);
    }

    #[test]
    fn what_is_cancelled_during_a_step_is_left_alone() {
        let mut scheduler = scheduler(CONFIG);
        let (mut batch, mut events) = (Batch::new(), Vec::new());
        let ids = [(); 3].map(|()| scheduler.submit(request(2, 5)).unwrap());
        assert_eq!(scheduler.next(&mut batch), Step::Run);
        assert!(scheduler.cancel(ids[0]) && scheduler.remove(ids[1]) && !scheduler.cancel(ids[0]));
        scheduler.done(&batch, &[(ids[0], 7), (ids[2], 7)], &mut events);
        assert_eq!(
            events,
            [Event::Token {
                id: ids[2],
                token: 7
            }]
        );
        assert_eq!(
            (
                scheduler.pages().unwrap().used(),
                scheduler.slots().unwrap().used()
            ),
            (1, 1)
        );
    }

    #[test]
    fn steps_reuse_their_memory() {
        let mut scheduler = scheduler(CONFIG);
        let mut batch = Batch::new();
        let ids = [(); 8].map(|()| scheduler.submit(request(2, 90)).unwrap());
        step(&mut scheduler, &mut batch, 7);
        let memory = |scheduler: &Scheduler, batch: &Batch| {
            let sequences = ids.map(|id| scheduler.sequence(id).unwrap());
            let sequences = sequences.map(|s| (s.tokens.as_ptr(), s.pages.as_ptr()));
            (
                sequences,
                scheduler.rows.as_ptr(),
                batch.tokens.as_ptr(),
                batch.spans.as_ptr(),
            )
        };
        let before = memory(&scheduler, &batch);
        for _ in 0..80 {
            step(&mut scheduler, &mut batch, 7);
        }
        assert_eq!(memory(&scheduler, &batch), before);
    }
}

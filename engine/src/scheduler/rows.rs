//! The rows of a step: who gets how many, their pages, and the batch of them.

use super::{Chunk, Scheduler, insert_waiting};
use crate::batch::{Batch, Logits, Span};
use crate::ids::PageId;
use crate::sequence::{Place, Sequence, Status};

impl Scheduler {
    /// Decides how many rows each running sequence gets, if it gets its pages.
    pub(super) fn share_rows(&mut self) {
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
        let mut left = self.config.token_budget - rows.iter().sum::<usize>();
        if prompts.is_empty() {
            return self.share_guesses(left);
        }
        let rest = if self.oldest_first {
            &mut prompts[1..]
        } else {
            &mut prompts[..]
        };
        rest.sort_unstable();
        self.oldest_first = !self.oldest_first;
        for &(_, i) in &self.prompts {
            let rows = self.piece(&self.sequences[&self.running[i].id], left);
            self.rows[i] = rows;
            left -= rows;
        }
        self.share_guesses(left);
    }

    /// Adds rows for guesses, of those that are left to sequences whose own tokens all have theirs. Guesses take
    /// pages that nobody else will want: never state.
    fn share_guesses(&mut self, mut left: usize) {
        if self
            .running
            .iter()
            .all(|place| self.sequences[&place.id].guess.is_empty())
        {
            return;
        }
        let taking = self.running.iter().zip(&self.rows).filter(|(_, r)| **r > 0);
        let wanted = taking.map(|(place, rows)| {
            let sequence = &self.sequences[&place.id];
            let end = sequence.computed + rows;
            self.pools.pages_to_reach(sequence, end)
        });
        let mut spare = self.pools.free_pages().saturating_sub(wanted.sum());
        for i in 0..self.running.len() {
            let sequence = &self.sequences[&self.running[i].id];
            let own = self.rows[i];
            let mut guessed = 0;
            if own > 0 && own == sequence.remaining() && sequence.guesses() > 0 {
                let most = self.room(sequence) - own;
                guessed = sequence.guess.len().min(most).min(left);
                let end = sequence.computed + own;
                let held = self.pools.pages_for(end);
                let more = self.pools.pages_for(end + guessed) - held;
                if more > spare {
                    let page_size = self.config.page_size as usize;
                    guessed = guessed.min((held + spare) * page_size - end);
                }
                spare -= self.pools.pages_for(end + guessed) - held;
                left -= guessed;
                self.rows[i] += guessed;
            }
            let sequence = self.sequences.get_mut(&self.running[i].id);
            sequence
                .expect("running sequences exist")
                .guess
                .truncate(guessed);
        }
    }

    /// Most rows of a sequence in a step, whether it has as many tokens or not.
    fn room(&self, sequence: &Sequence) -> usize {
        let computed = sequence.computed;
        let to_cut = sequence.next_cut().map(|cut| cut - computed);
        let in_chunk = match self.config.chunk {
            Chunk::AtMost(rows) => rows,
            Chunk::Every(rows) => rows - computed % rows,
        };
        to_cut.unwrap_or(in_chunk).min(in_chunk)
    }

    /// The rows a sequence takes when `left` are to be had.
    pub(super) fn piece(&self, sequence: &Sequence, left: usize) -> usize {
        let most = sequence.remaining().min(self.room(sequence));
        match self.config.chunk {
            Chunk::AtMost(_) => most.min(left),
            Chunk::Every(_) if most <= left => most,
            Chunk::Every(_) => 0,
        }
    }

    /// Gets the pages for the next rows of a running sequence, at the cost of those behind it if need be.
    /// None of these has a row in the batch yet, since the older ones ask first.
    pub(super) fn secure(&mut self, i: usize, rows: usize, batch: &mut Batch) -> bool {
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
            .map(|id| self.sequences[&id].live_pages().count())
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
    pub(super) fn fill(&mut self, batch: &mut Batch) {
        // Page tables grow from step to step, up to what was reserved when their sequences were admitted.
        let reserved = |place: &Place| self.sequences[&place.id].pages.capacity();
        batch.pages.reserve(self.running.iter().map(reserved).sum());
        for decoding in [true, false] {
            for (place, &rows) in self.running.iter().zip(&self.rows) {
                let sequence = self
                    .sequences
                    .get_mut(&place.id)
                    .expect("running sequences exist");
                let single = sequence.is_decoding() && rows == 1;
                if rows > 0 && single == decoding {
                    push_span(batch, sequence, rows);
                }
            }
            if decoding {
                batch.decodes = batch.spans.len();
            }
        }
    }
}

fn push_span(batch: &mut Batch, sequence: &mut Sequence, rows: usize) {
    let (position, end) = (sequence.computed, sequence.computed + rows);
    let guessed = end.saturating_sub(sequence.tokens.len());
    let own = end - guessed;
    let sample = own == sequence.tokens.len() && sequence.limits.max_tokens > 0;
    let all = sequence.prompt_logits && position < sequence.prompt_len && end > sequence.scored;
    let (start, first_page) = (batch.tokens.len(), batch.pages.len());
    batch
        .tokens
        .extend_from_slice(&sequence.tokens[position..own]);
    batch.tokens.extend_from_slice(&sequence.guess[..guessed]);
    // Nothing is seen of pages that are gone; what is read beside it is the sequence's own.
    let any = sequence.live_pages().last();
    let there = |page: &PageId| {
        if page.is_there() {
            *page
        } else {
            any.unwrap_or(*page)
        }
    };
    batch.pages.extend(sequence.pages.iter().map(there));
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
        guessed,
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

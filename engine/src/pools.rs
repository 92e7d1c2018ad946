//! The two pools as the scheduler uses them: what a sequence needs, and either pool may be missing.

use crate::ids::{PageId, SlotId};
use crate::pages::PagePool;
use crate::sequence::Sequence;
use crate::slots::SlotPool;
use strata_layers::Reach;

/// Tokens a sequence gets room for when it starts to run: longer ones grow, so that a limit nobody means to
/// reach costs nothing.
const RESERVED_TOKENS: usize = 1 << 16;

#[derive(Debug)]
pub(crate) struct Pools {
    pub(crate) pages: Option<PagePool>,
    pub(crate) slots: Option<SlotPool>,
    /// What is seen of a sequence, if pages of the rest are given back.
    pub(crate) reach: Option<Reach>,
    /// Most rows of a step.
    pub(crate) rows: usize,
}

impl Pools {
    pub(crate) fn pages_for(&self, tokens: usize) -> usize {
        self.pages.as_ref().map_or(0, |pool| pool.pages_for(tokens))
    }

    pub(crate) fn free_pages(&self) -> usize {
        self.pages.as_ref().map_or(0, PagePool::free)
    }

    pub(crate) fn free_slots(&self) -> usize {
        self.slots.as_ref().map_or(0, SlotPool::free)
    }

    pub(crate) fn alloc_slot(&mut self) -> Option<SlotId> {
        self.slots.as_mut().and_then(SlotPool::alloc)
    }

    /// The page that must be copied before the next token of a sequence is written: shared, and filled in part.
    pub(crate) fn shared_tail(&self, sequence: &Sequence) -> Option<usize> {
        let pool = self.pages.as_ref()?;
        let tail = sequence.computed / pool.page_size();
        let shared = sequence
            .pages
            .get(tail)
            .is_some_and(|&page| pool.is_shared(page));
        shared.then_some(tail)
    }

    /// Most pages that a sequence of `tokens` tokens has at once.
    pub(crate) fn most_pages(&self, tokens: usize) -> usize {
        let all = self.pages_for(tokens);
        self.reach.map_or(all, |r| {
            let seen = r.window.saturating_add(self.rows);
            // The first page of either run may be seen in part.
            let held = self
                .pages_for(r.keep_first)
                .saturating_add(self.pages_for(seen));
            all.min(held.saturating_add(2))
        })
    }

    /// Pages that a sequence still needs for the tokens up to `end`, if others are given back meanwhile.
    pub(crate) fn pages_until(&self, sequence: &Sequence, end: usize) -> usize {
        let needed = self.pages_to_reach(sequence, end);
        if self.reach.is_none() {
            return needed;
        }
        let held = sequence.live_pages().count();
        needed.min((self.most_pages(end) + 1).saturating_sub(held))
    }

    /// Gives back the pages whose tokens no later one sees.
    pub(crate) fn trim(&mut self, sequence: &mut Sequence) {
        let (Some(pool), Some(reach)) = (&mut self.pages, self.reach) else {
            return;
        };
        // The next token sees itself too.
        let seen = (sequence.computed + 1).saturating_sub(reach.window);
        let kept = pool.pages_for(reach.keep_first);
        let gone = (seen / pool.page_size()).min(sequence.pages.len());
        // Those before are gone already.
        for page in sequence.pages[kept.min(gone)..gone].iter_mut().rev() {
            if !page.is_there() {
                break;
            }
            pool.release(std::mem::replace(page, PageId::GONE));
        }
    }

    /// Pages to be had before the tokens up to `end`, more than are computed, can be written.
    pub(crate) fn pages_to_reach(&self, sequence: &Sequence, end: usize) -> usize {
        let more = self.pages_for(end) - sequence.pages.len();
        more + usize::from(self.shared_tail(sequence).is_some())
    }

    /// Gets these pages. There must be enough.
    pub(crate) fn grow(
        &mut self,
        sequence: &mut Sequence,
        end: usize,
        copies: &mut Vec<(PageId, PageId)>,
    ) {
        let (tail, length) = (self.shared_tail(sequence), self.pages_for(end));
        let Some(pool) = &mut self.pages else { return };
        let alloc = |pool: &mut PagePool| pool.alloc().expect("as many are free as are needed");
        if let Some(tail) = tail {
            let copy = alloc(pool);
            let shared = std::mem::replace(&mut sequence.pages[tail], copy);
            pool.release(shared);
            copies.push((shared, copy));
        }
        sequence.pages.resize_with(length, || alloc(pool));
    }

    /// Whether sequences have state that cannot be shortened.
    pub(crate) fn keeps_slots(&self) -> bool {
        self.slots.is_some()
    }

    /// Gives back the pages behind those of the computed tokens.
    pub(crate) fn shrink(&mut self, sequence: &mut Sequence) {
        let Some(pool) = &mut self.pages else { return };
        let needed = pool.pages_for(sequence.computed);
        for page in sequence.pages.drain(needed..).rev() {
            pool.release(page);
        }
    }

    pub(crate) fn retain(&mut self, pages: &[PageId]) {
        if let Some(pool) = &mut self.pages {
            let live = pages.iter().filter(|p| p.is_there());
            live.for_each(|&page| pool.retain(page));
        }
    }

    pub(crate) fn release(&mut self, sequence: &mut Sequence) {
        if let Some(pool) = &mut self.pages {
            // The last page first, so that pages are handed out again in the order they had.
            for page in sequence.pages.drain(..).rev().filter(|p| p.is_there()) {
                pool.release(page);
            }
        }
        if let (Some(pool), Some(slot)) = (&mut self.slots, sequence.slot.take()) {
            pool.release(slot);
        }
    }

    /// Makes room for the life of a sequence, so that its steps do not allocate.
    pub(crate) fn reserve(&self, sequence: &mut Sequence) {
        let left = sequence
            .limits
            .max_tokens
            .saturating_sub(sequence.generated().len());
        let tokens = left.min(RESERVED_TOKENS);
        let pages = self.pages_for(sequence.tokens.len() + tokens);
        sequence.tokens.reserve(tokens);
        sequence
            .pages
            .reserve(pages.saturating_sub(sequence.pages.len()));
    }
}

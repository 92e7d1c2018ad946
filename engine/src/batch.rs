//! What the runner receives: the tokens of one step, and where the state of each sequence lies.

use std::ops::Range;

use crate::ids::{PageId, SeqId, SlotId, TokenId};

/// One step. Before its rows run, the runner does `copies` in their order, then zeroes the slots in `clear`.
///
/// Rows of one sequence stand together and in order; sequences that decode come first. The engine keeps one
/// batch and fills it again for every step, so its vectors stop growing.
#[derive(Debug, Default)]
pub struct Batch {
    /// The input rows of all spans, one after the other.
    pub tokens: Vec<TokenId>,
    /// One for each sequence that takes part, in the order of their rows.
    pub spans: Vec<Span>,
    /// How many of the spans, from the first on, are single rows of sequences that decode: no guess among them.
    pub decodes: usize,
    /// The page tables of all spans, one after the other.
    pub pages: Vec<PageId>,
    /// Pages to copy (from, to) before the step, in this order: a target may be the source of an earlier copy.
    pub copies: Vec<(PageId, PageId)>,
    /// Slots to zero before the step.
    pub clear: Vec<SlotId>,
}

/// The rows of one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Whose rows.
    pub seq: SeqId,
    /// Its slot, in a model that keeps one.
    pub slot: Option<SlotId>,
    /// Its first row in the batch.
    pub start: usize,
    /// How many rows.
    pub len: usize,
    /// The position of the first row in the sequence; as many tokens are in its pages and slot already.
    pub position: usize,
    /// Its pages, as a range of [`Batch::pages`]: enough for `position + len` tokens. None without attention.
    pub pages: Range<usize>,
    /// How many of its rows, the last ones, are tokens that are only guessed.
    pub guessed: usize,
    /// Which rows need logits.
    pub logits: Logits,
    /// Whether the logits of the last row that is no guess choose the next token, and those of each guess that was
    /// right the one after it. If so, [`done`] wants one token, and one more for each right guess.
    ///
    /// [`done`]: crate::scheduler::Scheduler::done
    pub sample: bool,
    /// Whether the sequence begins here: there is no earlier state, and its slot is in [`Batch::clear`].
    pub fresh: bool,
}

/// Which rows of a span need logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Logits {
    /// No row: the prompt goes on.
    None,
    /// The last row that is no guess, and all guesses: they choose tokens.
    Last,
    /// Every row. Rows that were computed anew after a preemption may come a second time.
    All,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Empties the batch and keeps its memory.
    pub fn reset(&mut self) {
        let Self {
            tokens,
            spans,
            decodes,
            pages,
            copies,
            clear,
        } = self;
        tokens.clear();
        spans.clear();
        *decodes = 0;
        pages.clear();
        copies.clear();
        clear.clear();
    }

    /// How many rows.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// The tokens of a span.
    pub fn tokens_of(&self, span: &Span) -> &[TokenId] {
        &self.tokens[span.start..span.start + span.len]
    }

    /// The page table of a span.
    pub fn pages_of(&self, span: &Span) -> &[PageId] {
        &self.pages[span.pages.clone()]
    }
}

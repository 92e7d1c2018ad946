//! Where each sequence lies in a ragged batch.

use std::ops::Range;

/// One sequence's rows in a batch: a prompt chunk (many rows) or a decode step (one row).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// First row of the batch that belongs to the sequence.
    pub start: usize,
    /// Number of rows, at least one.
    pub len: usize,
    /// Position of the first row in its sequence, counted from zero.
    pub position: usize,
    /// Row of the sequence in every slot tensor. Unused by models without fixed-size state.
    pub slot: usize,
    /// The sequence's pages, as a range of [`Ragged::page_table`], in order of position; they cover
    /// at least `position + len` tokens. Empty for models without attention.
    pub pages: Range<usize>,
}

impl Span {
    /// The rows of the batch that belong to the sequence.
    pub fn rows(&self) -> Range<usize> {
        self.start..self.start + self.len
    }
}

/// A ragged batch as an operation sees it: spans in order of their rows, without gaps.
#[derive(Debug, Clone, Copy)]
pub struct Ragged<'a> {
    /// One entry a sequence.
    pub spans: &'a [Span],
    /// Page numbers of all sequences, one after another.
    pub page_table: &'a [u32],
    /// Tokens that fit in one page.
    pub page_size: usize,
}

impl Ragged<'_> {
    /// Number of rows of the batch.
    pub fn rows(&self) -> usize {
        self.spans.last().map_or(0, |s| s.start + s.len)
    }

    /// Row of a page tensor that holds the token at `position` of the sequence of `span`.
    pub fn page_row(&self, span: &Span, position: usize) -> usize {
        let page = self.page_table[span.pages.start + position / self.page_size];
        page as usize * self.page_size + position % self.page_size
    }
}

//! What an engine is doing and holds, for those who watch it.

use super::Engine;
use crate::ids::{SeqId, TokenId};

/// How much of a pool is in use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Used {
    /// In use.
    pub used: usize,
    /// All there are.
    pub total: usize,
    /// Bytes of each.
    pub bytes: usize,
}

/// A state that is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kept {
    /// After how many tokens.
    pub tokens: usize,
    /// Whether it is in memory.
    pub in_memory: bool,
    /// Whether it is in a file.
    pub in_file: bool,
    /// Whether somebody asked for it.
    pub marked: bool,
}

impl Engine {
    /// Pages of keys and values; none if the model has no attention.
    pub fn pages_used(&self) -> Used {
        let each = self.config.page_bytes(&self.network().graph);
        self.scheduler.pages().map_or(Used::default(), |pool| Used {
            used: pool.used(),
            total: pool.total(),
            bytes: each,
        })
    }

    /// Slots of running sequences; none if the model has no fixed-size state.
    pub fn slots_used(&self) -> Used {
        self.scheduler.slots().map_or(Used::default(), |pool| Used {
            used: pool.used(),
            total: pool.total(),
            bytes: self.network().graph.slot_bytes(),
        })
    }

    /// The states of the prefix cache, shortest first.
    pub fn kept_states(&self) -> Vec<Kept> {
        let Some(cache) = &self.cache else {
            return Vec::new();
        };
        let prefix = self.prefix().len();
        let kept = cache.tree.loads().map(|(node, held)| Kept {
            tokens: cache.tree.depth(node).saturating_sub(prefix),
            in_memory: held.memory.is_some(),
            in_file: held.file.is_some(),
            marked: held.marked,
        });
        let mut kept: Vec<Kept> = kept.collect();
        kept.sort_by_key(|k| (k.tokens, k.marked));
        kept
    }

    /// Gives up the state after exactly these tokens, and the marks of all states before it: nobody asks for them
    /// any more. What other prompts share of them stays until room is needed.
    pub fn forget_prompt(&mut self, tokens: &[TokenId]) {
        let all: Vec<TokenId> = self.prefix().chain(tokens.iter().copied()).collect();
        let Some(cache) = &mut self.cache else { return };
        let path = cache.tree.walk(&all).path;
        for node in &path {
            if let Some(held) = cache.tree.load_mut(*node) {
                held.marked = false;
            }
        }
        let last = path.last().filter(|n| cache.tree.depth(**n) == all.len());
        if let Some(state) = last.and_then(|node| cache.let_go(*node)) {
            self.release(&state.pages);
        }
    }

    /// The running sequences, oldest first.
    pub fn running(&self) -> impl ExactSizeIterator<Item = SeqId> {
        self.scheduler.running()
    }

    /// How many wait for their turn.
    pub fn waiting(&self) -> usize {
        self.scheduler.waiting().len()
    }

    /// Most sequences that run at once.
    pub fn running_limit(&self) -> usize {
        self.scheduler.running_limit()
    }

    /// Rows of the last step that were prompt.
    pub fn prompt_rows(&self) -> usize {
        let of_prompt = |span: &crate::batch::Span| {
            let prompt = self.sequence(span.seq).map_or(0, |s| s.prompt_len);
            prompt.saturating_sub(span.position).min(span.len)
        };
        self.batch.spans.iter().map(of_prompt).sum()
    }
}

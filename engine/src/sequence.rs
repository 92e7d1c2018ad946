//! The engine's record of one generation.

use crate::ids::{PageId, SeqId, SlotId, TokenId};

/// What someone wants generated.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SequenceRequest {
    /// The tokens to begin with; at least one.
    pub prompt: Vec<TokenId>,
    /// When to end.
    pub limits: Limits,
    /// Whether the logits of every prompt row are wanted, not only those that choose a token.
    pub prompt_logits: bool,
    /// Positions at which a chunk of the prompt must end, in ascending order, so that the state there can be
    /// copied.
    pub cuts: Vec<usize>,
}

/// When a generation ends by itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Tokens to generate at most. With 0 the prompt is computed and nothing is sampled.
    pub max_tokens: usize,
    /// Tokens that end the generation; the one met stays in the sequence.
    pub stop: Vec<TokenId>,
}

/// What a sequence is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// In the queue.
    Waiting,
    /// In the steps: it has its slot, and gets pages as it grows.
    Running,
    /// In the queue again, its state given to an older sequence: its tokens will be computed anew.
    Preempted,
    /// At its end. It keeps its state until it is taken or removed, or the memory is needed.
    Finished(Reason),
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// A stop token or a stop string.
    Stop,
    /// `max_tokens` were generated.
    Length,
    /// Its user went away.
    Cancelled,
    /// The step that held it went wrong.
    Failed,
}

/// The place in line: by arrival; a fork stands behind the sequence it came from, before later arrivals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The number of the submission; forks inherit it.
    pub arrival: u64,
    /// The sequence itself.
    pub id: SeqId,
}

/// One generation: its tokens, and the state that stands for the first of them.
///
/// Between two steps these hold, and the scheduler keeps them: `pages` are exactly as many as `computed`
/// tokens fill; `slot` has seen exactly the first `computed` tokens; at least one token is not computed yet,
/// unless the sequence is finished.
#[derive(Debug)]
pub struct Sequence {
    /// Its name.
    pub id: SeqId,
    /// See [`Place`].
    pub arrival: u64,
    /// The prompt, then what was generated.
    pub tokens: Vec<TokenId>,
    /// How many of the tokens are prompt.
    pub prompt_len: usize,
    /// How many of the tokens have their state in the pages and the slot.
    pub computed: usize,
    /// Its pages, in the order of its tokens. The last may be filled in part; any may be shared; those whose tokens
    /// nothing sees any more may be [`PageId::GONE`].
    pub pages: Vec<PageId>,
    /// Its slot, while it has state in a model that keeps one.
    pub slot: Option<SlotId>,
    /// What it is doing.
    pub status: Status,
    /// When it ends.
    pub limits: Limits,
    /// See [`SequenceRequest::prompt_logits`].
    pub prompt_logits: bool,
    /// See [`SequenceRequest::cuts`].
    pub cuts: Vec<usize>,
    /// Tokens that may follow, to be computed with the others in the coming step: see [`Scheduler::guess`].
    ///
    /// [`Scheduler::guess`]: crate::scheduler::Scheduler::guess
    pub(crate) guess: Vec<TokenId>,
    /// Rows in the step that is running now.
    pub(crate) scheduled: usize,
    /// Tokens whose logits were asked for by `prompt_logits` and computed.
    pub(crate) scored: usize,
}

impl Sequence {
    pub(crate) fn new(id: SeqId, request: SequenceRequest) -> Self {
        Self {
            id,
            arrival: id.0,
            prompt_len: request.prompt.len(),
            tokens: request.prompt,
            computed: 0,
            pages: Vec::new(),
            slot: None,
            status: Status::Waiting,
            limits: request.limits,
            prompt_logits: request.prompt_logits,
            cuts: request.cuts,
            guess: Vec::new(),
            scheduled: 0,
            scored: 0,
        }
    }

    /// A second sequence with the same tokens and no state.
    pub(crate) fn stateless_copy(&self, id: SeqId) -> Self {
        Self {
            id,
            arrival: self.arrival,
            tokens: self.tokens.clone(),
            prompt_len: self.prompt_len,
            computed: 0,
            pages: Vec::new(),
            slot: None,
            status: Status::Waiting,
            limits: self.limits.clone(),
            prompt_logits: self.prompt_logits,
            cuts: self.cuts.clone(),
            guess: Vec::new(),
            scheduled: 0,
            scored: self.scored,
        }
    }

    /// Its place in line.
    pub fn place(&self) -> Place {
        Place {
            arrival: self.arrival,
            id: self.id,
        }
    }

    /// What was generated so far.
    pub fn generated(&self) -> &[TokenId] {
        &self.tokens[self.prompt_len..]
    }

    /// Tokens still to be computed before the next can be sampled.
    pub fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Whether its next row is that of a token it generated itself, all before it being computed.
    pub fn is_decoding(&self) -> bool {
        self.computed > 0 && self.remaining() == 1 && self.tokens.len() > self.prompt_len
    }

    /// The first position behind what is computed at which a chunk must end.
    pub fn next_cut(&self) -> Option<usize> {
        let next = self.cuts.partition_point(|cut| *cut <= self.computed);
        self.cuts.get(next).copied()
    }

    /// Whether it is at its end.
    pub fn is_finished(&self) -> bool {
        matches!(self.status, Status::Finished(_))
    }

    /// Its pages, but those that were given back because nothing sees them any more.
    pub fn live_pages(&self) -> impl Iterator<Item = PageId> {
        self.pages.iter().copied().filter(|p| p.is_there())
    }

    /// Whether pages or a slot are its own.
    pub fn holds_state(&self) -> bool {
        !self.pages.is_empty() || self.slot.is_some()
    }
}

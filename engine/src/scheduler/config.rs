//! The sizes the scheduler works within, and its refusals.

use std::fmt;

use strata_layers::Reach;

use crate::ids::SeqId;

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
    /// What is seen of a sequence, if pages of the rest are to be given back.
    pub reach: Option<Reach>,
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

impl SchedulerConfig {
    pub(super) fn faults(&self) -> Vec<String> {
        let Self {
            page_size,
            pages,
            slots,
            token_budget,
            max_sequences,
            chunk,
            context,
            reach: _,
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

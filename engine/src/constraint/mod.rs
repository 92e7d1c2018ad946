//! Output that follows a form: a JSON schema, a regular expression, a grammar or a list of choices.
//!
//! A [`Source`] is compiled against the tokens of one model ([`Vocabulary`]) into a [`Constraint`], which is part of
//! [`SamplingParams`]. Before each token a [`Follower`] says which tokens the form allows: the logits of all others
//! become minus infinity before anything else is done to them. Where the form allows the end, and only there, the
//! model's end tokens are allowed; where it allows nothing else, they are what is left, so the generation ends.
//!
//! A follower is brought to the tokens that were generated, whatever it saw before: so sequences may be preempted,
//! guessed ahead (a guess that the form does not allow is no token that the sampler chooses), forked and restored.
//!
//! Forms are read and compiled by the `llguidance` crate. What it may spend is limited, by its own limits on work and
//! memory, by the size of a source, and by the clock: a form that explodes is an error.
//!
//! [`SamplingParams`]: crate::sampler::SamplingParams

mod compile;
mod follow;
mod vocabulary;

use std::fmt;
use std::sync::Arc;

use serde_json::Value;

use compile::Compiled;
pub(crate) use compile::with_whitespace;
pub use follow::Follower;
pub use vocabulary::Vocabulary;

/// A form that text must have.
#[derive(Debug, Clone, PartialEq)]
pub enum Source {
    /// JSON that is valid under a schema (draft 2020-12 and older, as far as `llguidance` knows them; what it does
    /// not know is an error). Between two parts of it there is a space, a line end with an indentation, or nothing.
    JsonSchema(Value),
    /// Text that a regular expression matches from its beginning to its end.
    Regex(String),
    /// Text that the rule `start` of a Lark grammar derives.
    Grammar(String),
    /// One of these texts.
    Choice(Vec<String>),
}

impl Source {
    /// Any JSON object.
    pub fn json_object() -> Self {
        Source::JsonSchema(serde_json::json!({"type": "object"}))
    }

    /// What it is, for messages.
    pub fn kind(&self) -> &'static str {
        match self {
            Source::JsonSchema(_) => "JSON schema",
            Source::Regex(_) => "regular expression",
            Source::Grammar(_) => "grammar",
            Source::Choice(_) => "choices",
        }
    }
}

/// A form that the output of one model is held to. Clones share it.
#[derive(Clone)]
pub struct Constraint(Arc<Compiled>);

impl Constraint {
    /// What it was made from.
    pub fn source(&self) -> &Source {
        &self.0.source
    }

    /// Where it stands before the first token.
    pub fn begin(&self) -> Follower {
        Follower::new(self.clone())
    }

    /// What `llguidance` has to say about it, such as keywords that it takes less strictly than they are meant.
    pub fn warnings(&self) -> &[String] {
        &self.0.warnings
    }
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Constraint").field(self.source()).finish()
    }
}

impl PartialEq for Constraint {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
            || (Arc::ptr_eq(&self.0.vocabulary, &other.0.vocabulary)
                && self.source() == other.source())
    }
}

/// Why there is no constraint, or no way on under it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A source is larger than what is compiled.
    #[error("{kind}: {found} {unit}, at most {most} are compiled; {help}")]
    TooLarge {
        /// [`Source::kind`].
        kind: &'static str,
        /// How large it is.
        found: usize,
        /// The most there may be.
        most: usize,
        /// Of what.
        unit: &'static str,
        /// What to do.
        help: &'static str,
    },
    /// A source says nothing that can be compiled.
    #[error("{kind}: {reason}; {help}")]
    Refused {
        /// [`Source::kind`].
        kind: &'static str,
        /// What is wrong with it.
        reason: String,
        /// What to do.
        help: &'static str,
    },
    /// A source was not compiled in time.
    #[error(
        "{kind}: it is not compiled after {seconds} seconds; make it smaller: fewer alternatives, smaller counts, less nesting"
    )]
    Slow {
        /// [`Source::kind`].
        kind: &'static str,
        /// How long it was waited for.
        seconds: u64,
    },
    /// The model names no token that ends a text, so that no constraint could end one.
    #[error(
        "the model names no end token, without which constrained output cannot end; name one as eos_token_id in its generation_config.json"
    )]
    NoEnd,
    /// The tokens cannot be put in order.
    #[error("the vocabulary cannot be used for constrained output: {0}")]
    Vocabulary(String),
    /// The text leaves the form.
    #[error(
        "token {token} at generated token {position} is not what the {kind} allows: the sequence was generated without it, or with another"
    )]
    Left {
        /// [`Source::kind`].
        kind: &'static str,
        /// The token.
        token: u32,
        /// Its place among the generated tokens.
        position: usize,
    },
    /// The form became too much to follow.
    #[error(
        "{kind}: it cannot be followed beyond generated token {position}: {reason}; make it simpler: fewer alternatives that begin alike, smaller counts"
    )]
    Lost {
        /// [`Source::kind`].
        kind: &'static str,
        /// How many tokens were generated.
        position: usize,
        /// Why.
        reason: String,
    },
}

#[cfg(test)]
mod tests;

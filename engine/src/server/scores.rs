//! Log-probabilities of a prompt's tokens, for those who ask to have the prompt back.

use std::sync::Arc;

use crate::ids::TokenId;
use crate::sampler::{Sampled, log_probabilities};

/// What is known of a prompt's tokens so far.
pub struct Scores {
    prompt: Arc<Vec<TokenId>>,
    top: usize,
    /// For each token from the second.
    found: Vec<Option<Sampled>>,
}

impl Scores {
    /// Of a prompt, with so many of the likeliest tokens at each place.
    pub fn new(prompt: Arc<Vec<TokenId>>, top: usize) -> Self {
        let found = vec![None; prompt.len().saturating_sub(1)];
        Scores { prompt, top, found }
    }

    /// Takes the logits that follow the token at `position`.
    pub fn row(&mut self, position: usize, logits: &[f32]) {
        let (Some(found), Some(next)) =
            (self.found.get_mut(position), self.prompt.get(position + 1))
        else {
            return;
        };
        let (logprob, top) = log_probabilities(logits, *next, self.top);
        *found = Some(Sampled {
            token: *next,
            logprob: Some(logprob),
            top,
        });
    }

    /// The tokens from the second; nothing if a row is missing.
    pub fn finish(self) -> Vec<Sampled> {
        let all: Option<Vec<Sampled>> = self.found.into_iter().collect();
        all.unwrap_or_default()
    }
}

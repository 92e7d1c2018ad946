//! Where one sequence stands in its form.

use llguidance::Matcher;
use toktrie::SimpleVob;

use super::{Constraint, Error, compile};
use crate::ids::TokenId;

/// Where one sequence stands in its form.
pub struct Follower {
    constraint: Constraint,
    matcher: Matcher,
    /// The tokens that brought it here.
    said: Vec<TokenId>,
}

impl Follower {
    pub(super) fn new(constraint: Constraint) -> Self {
        Follower {
            matcher: at_start(&constraint),
            constraint,
            said: Vec::new(),
        }
    }

    /// Makes the logits (V) of all tokens minus infinity that may not follow `generated`.
    pub fn restrict(&mut self, generated: &[TokenId], logits: &mut [f32]) -> Result<(), Error> {
        let allowed = self.allowed(generated)?;
        let known = allowed.len().min(logits.len());
        for (token, logit) in logits[..known].iter_mut().enumerate() {
            if !allowed.is_allowed(token as TokenId) {
                *logit = f32::NEG_INFINITY;
            }
        }
        logits[known..].fill(f32::NEG_INFINITY);
        Ok(())
    }

    /// Whether the form is complete after `generated`: the text may end here.
    pub fn may_end(&mut self, generated: &[TokenId]) -> Result<bool, Error> {
        self.follow(generated)?;
        if self.matcher.is_stopped() {
            return Ok(true);
        }
        let accepting = self.matcher.is_accepting();
        accepting.map_err(|error| self.lost(&error.to_string()))
    }

    /// The tokens that may follow.
    fn allowed(&mut self, generated: &[TokenId]) -> Result<SimpleVob, Error> {
        self.follow(generated)?;
        let allowed = self.matcher.compute_mask_or_eos();
        let mut allowed = allowed.map_err(|error| self.lost(&error.to_string()))?;
        if generated.is_empty() {
            let first = &self.constraint.0.vocabulary.first;
            for (token, twin) in first {
                let may = twin.is_some_and(|twin| allowed.is_allowed(twin));
                allowed.set(*token as usize, may);
            }
        }
        Ok(allowed)
    }

    /// Comes to stand behind `generated`, from wherever it stood.
    pub fn follow(&mut self, generated: &[TokenId]) -> Result<(), Error> {
        if !generated.starts_with(&self.said) {
            self.matcher = at_start(&self.constraint);
            self.said.clear();
        }
        for (position, &token) in generated.iter().enumerate().skip(self.said.len()) {
            let vocabulary = &self.constraint.0.vocabulary;
            let ends = vocabulary.eos.contains(&token);
            if self.matcher.is_stopped() && !self.matcher.is_error() {
                // At the end, which may be said again.
                if !ends {
                    return Err(self.left(token, position));
                }
            } else {
                let twins = &vocabulary.first;
                let twin = twins.iter().find(|(t, _)| position == 0 && *t == token);
                let consumed = twin.and_then(|(_, twin)| *twin).unwrap_or(token);
                match self.matcher.try_consume_tokens(&[consumed]) {
                    Ok(1) => {}
                    Ok(_) => return Err(self.left(token, position)),
                    Err(error) => return Err(self.lost(&error.to_string())),
                }
            }
            self.said.push(token);
        }
        Ok(())
    }

    fn left(&self, token: TokenId, position: usize) -> Error {
        Error::Left {
            kind: self.constraint.source().kind(),
            token,
            position,
        }
    }

    fn lost(&self, reason: &str) -> Error {
        Error::Lost {
            kind: self.constraint.source().kind(),
            position: self.said.len(),
            reason: if reason.contains("NoExtensionBias") {
                "no token of the model's vocabulary goes on from here".into()
            } else {
                compile::plain(reason)
            },
        }
    }
}

impl std::fmt::Debug for Follower {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Follower")
            .field("constraint", &self.constraint)
            .field("said", &self.said.len())
            .finish()
    }
}

/// A copy with caches of its own: what one sequence does costs no other anything.
fn at_start(constraint: &Constraint) -> Matcher {
    let start = constraint.0.start.lock();
    start
        .unwrap_or_else(std::sync::PoisonError::into_inner)
        .deep_clone()
}

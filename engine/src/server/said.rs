//! What came of a job: its choices put together, its tokens counted, and tokens as clients read them.

use serde_json::{Map, Value, json};

use super::Server;
use super::error::ApiError;
use super::job::{Cached, End, Event, Ticket};
use crate::generation::StopReason;
use crate::ids::TokenId;
use crate::sampler::Sampled;

/// The least log-probability that is told: JSON has no infinity.
const LEAST: f32 = -9999.0;

/// What a choice has said.
#[derive(Debug, Default)]
pub struct Said {
    /// Its text.
    pub text: String,
    /// Its tokens, with the end token if there was one.
    pub tokens: Vec<Sampled>,
    /// How it ended.
    pub reason: Option<StopReason>,
    /// See [`End::prompt_scores`].
    pub prompt_scores: Vec<Sampled>,
}

/// The tokens of a request.
#[derive(Debug, Default)]
pub struct Usage {
    /// Tokens of prompts, each counted once.
    pub prompt: usize,
    /// Tokens that were generated.
    pub generated: usize,
    /// What of the prompts was known, in their order.
    pub cached: Vec<Cached>,
}

impl Usage {
    /// Adds a choice's; `leads` says whether it is its prompt's first.
    pub fn add(&mut self, end: &End, leads: bool) {
        self.generated += end.generated;
        if leads {
            self.prompt += end.cached.prompt;
            self.cached.push(end.cached.clone());
        }
    }

    /// Prompt tokens that were not computed again.
    pub fn cached_tokens(&self) -> usize {
        self.cached.iter().map(|c| c.resumed_at).sum()
    }

    /// As completions tell it.
    pub fn json(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt + self.generated,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens()},
        })
    }

    /// What was known of the prompt and why no more; a list where there are several prompts.
    pub fn strata(&self) -> Value {
        match &self.cached[..] {
            [one] => json!(one),
            many => json!(many),
        }
    }
}

/// Waits for all `count` choices of a job, `n` for each prompt.
pub async fn collect(
    ticket: &mut Ticket,
    count: usize,
    n: usize,
) -> Result<(Vec<Said>, Usage), ApiError> {
    let mut all: Vec<Said> = (0..count).map(|_| Said::default()).collect();
    let mut usage = Usage::default();
    let mut ended = 0;
    // Prompts' first choices may end in any order.
    let mut cached: Vec<Option<Cached>> = vec![None; count.div_ceil(n)];
    while ended < count {
        match ticket.next().await? {
            Event::Token {
                choice,
                sampled,
                text,
            } => {
                all[choice].text.push_str(&text);
                all[choice].tokens.push(sampled);
            }
            Event::End { choice, end } => {
                ended += 1;
                usage.add(&end, choice % n == 0);
                if choice % n == 0 {
                    cached[choice / n] = Some(end.cached);
                }
                let said = &mut all[choice];
                said.text.push_str(&end.rest);
                said.reason = Some(end.reason);
                said.prompt_scores = end.prompt_scores;
            }
            Event::Accepted | Event::Failed(_) => {}
        }
    }
    usage.cached = cached.into_iter().flatten().collect();
    Ok((all, usage))
}

/// OpenAI's word for the end of an answer.
pub fn finish_reason(reason: StopReason) -> &'static str {
    match reason {
        StopReason::Eos | StopReason::Stop | StopReason::Interrupted => "stop",
        StopReason::Length => "length",
    }
}

impl Server {
    /// The text of a token by itself. Bytes that are no whole character become U+FFFD.
    pub fn token_text(&self, token: TokenId) -> String {
        let Some(tokenizer) = &self.model.tokenizer else {
            return token.to_string();
        };
        let bytes = tokenizer.token_bytes(token);
        if bytes.is_empty() {
            return tokenizer.token_text(token).unwrap_or_default();
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The bytes of a token.
    fn token_bytes(&self, token: TokenId) -> Vec<u8> {
        let tokenizer = self.model.tokenizer.as_ref();
        tokenizer.map_or(Vec::new(), |t| t.token_bytes(token))
    }

    /// A token that is no end token, as chat tells its log-probability.
    pub fn chat_logprob(&self, sampled: &Sampled) -> Value {
        let one = |token: TokenId, logprob: f32| {
            json!({
                "token": self.token_text(token), "bytes": self.token_bytes(token),
                "logprob": logprob.max(LEAST),
            })
        };
        let mut told = one(sampled.token, sampled.logprob.unwrap_or(LEAST));
        let top = sampled.top.iter().map(|(token, lp)| one(*token, *lp));
        told["top_logprobs"] = top.collect();
        told
    }

    /// Whether a token ends every answer of this model.
    pub fn is_end(&self, token: TokenId) -> bool {
        self.eos.contains(&token)
    }
}

/// Log-probabilities as completions tell them: columns, and where in the text each token begins.
#[derive(Debug, Default)]
pub struct Columns {
    tokens: Vec<String>,
    logprobs: Vec<Option<f32>>,
    top: Vec<Value>,
    offsets: Vec<usize>,
    /// Characters of the text so far.
    at: usize,
}

impl Columns {
    /// Adds a token; one without a log-probability is the first of a prompt.
    pub fn push(&mut self, server: &Server, sampled: &Sampled) {
        let text = server.token_text(sampled.token);
        self.offsets.push(self.at);
        self.at += text.chars().count();
        self.tokens.push(text);
        self.logprobs.push(sampled.logprob.map(|lp| lp.max(LEAST)));
        self.top.push(match sampled.logprob {
            None => Value::Null,
            Some(_) => {
                let pairs = sampled.top.iter();
                let pairs =
                    pairs.map(|(t, lp)| (server.token_text(*t), Value::from(lp.max(LEAST))));
                Value::Object(pairs.collect::<Map<_, _>>())
            }
        });
    }

    /// What was pushed since it was last taken.
    pub fn take(&mut self) -> Value {
        let empty = Columns {
            at: self.at,
            ..Columns::default()
        };
        let taken = std::mem::replace(self, empty);
        json!({
            "tokens": taken.tokens, "token_logprobs": taken.logprobs,
            "top_logprobs": taken.top, "text_offset": taken.offsets,
        })
    }

    /// Whether nothing was pushed since.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }
}

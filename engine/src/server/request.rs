//! What all requests for text have in common: the model, how tokens are chosen, how many, and when to end.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;

use serde_json::{Map, Value};

use super::Server;
use super::constraint::{Calling, Promise};
use super::error::ApiError;
use super::fields::Fields;
use super::job::Choice;
use crate::ids::TokenId;
use crate::prefix_cache::thousands;
use crate::sampler::SamplingParams;
use crate::text::describe;

/// Most choices of a request, over all its prompts.
pub const MOST_CHOICES: usize = 128;
/// Most texts that end an answer.
const MOST_STOPS: usize = 16;
/// Most of the likeliest tokens that are told.
pub const MOST_TOP: usize = 20;

/// What a request asks for, beside its prompt.
#[derive(Debug, Clone)]
pub struct Asked {
    /// How tokens are chosen; the seed is that of the first choice.
    pub sampling: SamplingParams,
    /// Choices for each prompt.
    pub n: usize,
    /// Texts that end an answer.
    pub stops: Vec<String>,
    /// Tokens that end it.
    pub eos: Vec<TokenId>,
    /// Whether events are wanted as they come.
    pub stream: bool,
    /// Whether the last event is to tell the tokens.
    pub include_usage: bool,
    /// Whether ids of tokens are wanted beside their text.
    pub token_ids: bool,
    /// Functions that answers may call.
    pub calling: Option<Calling>,
}

impl Asked {
    /// Reads the fields that all requests share. Faults are left with `fields`.
    pub fn read(server: &Server, fields: &Fields<'_>) -> Self {
        let defaults = server.model.generation.sampling();
        let top_p = fields.number("top_p", 0.0..=1.0);
        let top_k = fields.get("top_k").and_then(|value| match value.as_i64() {
            Some(-1) => Some(0), // how some clients ask for all
            _ => fields.count("top_k", 0..=usize::MAX),
        });
        let min_p = fields.number("min_p", 0.0..=1.0);
        // Asking for a truncation asks for sampling.
        let truncates = top_p.is_some_and(|p| p < 1.0)
            || top_k.is_some_and(|k| k > 0)
            || min_p.is_some_and(|p| p > 0.0);
        let temperature = fields.number("temperature", 0.0..=2.0);
        let temperature = temperature.unwrap_or_else(|| match defaults.temperature {
            0.0 if truncates => server.model.generation.temperature.unwrap_or(1.0),
            temperature => temperature,
        });
        let penalty = |key, default| fields.number(key, -2.0..=2.0).unwrap_or(default);
        let sampling = SamplingParams {
            temperature,
            top_k: top_k.unwrap_or(defaults.top_k),
            // Nothing is left of a mass of 0 but the likeliest token.
            top_p: top_p.unwrap_or(defaults.top_p).max(f32::MIN_POSITIVE),
            min_p: min_p.unwrap_or(defaults.min_p),
            repetition_penalty: fields
                .number("repetition_penalty", 0.1..=10.0)
                .unwrap_or(defaults.repetition_penalty),
            presence_penalty: penalty("presence_penalty", defaults.presence_penalty),
            frequency_penalty: penalty("frequency_penalty", defaults.frequency_penalty),
            logit_bias: logit_bias(server, fields),
            seed: fields.seed("seed").unwrap_or_else(random),
            logprobs: None,
            constraint: None,
        };
        let options = fields.object("stream_options");
        let include_usage = options.is_some_and(|options| {
            let path = fields.path("stream_options");
            let options = Fields::new(&path, options, fields.faults());
            options.flag("include_usage").unwrap_or(false)
        });
        let ignore_eos = fields.flag("ignore_eos").unwrap_or(false);
        Asked {
            sampling,
            n: fields.count("n", 1..=MOST_CHOICES).unwrap_or(1),
            stops: stops(fields),
            eos: if ignore_eos {
                Vec::new()
            } else {
                server.model.eos()
            },
            stream: fields.flag("stream").unwrap_or(false),
            include_usage,
            token_ids: fields.flag("return_token_ids").unwrap_or(false),
            calling: None,
        }
    }

    /// Holds the answers to what was promised. A form ends by itself, at an end token.
    pub fn hold_to(&mut self, promise: Promise, server: &Server) {
        if promise.constraint.is_some() {
            self.eos = server.model.eos();
        }
        self.sampling.constraint = promise.constraint;
        self.calling = promise.calling;
    }

    /// The choices of these prompts, each of up to so many tokens: `n` for each prompt, one after the other, all but
    /// the first waiting until that has read the prompt.
    pub fn choices(
        &self,
        prompts: Vec<(Vec<TokenId>, usize)>,
        score_prompt: Option<usize>,
    ) -> Result<Vec<Choice>, ApiError> {
        if prompts.len().saturating_mul(self.n) > MOST_CHOICES {
            return Err(ApiError::field(
                "n",
                format!(
                    "{} prompts and {} choices of each are more than {MOST_CHOICES} in one request",
                    prompts.len(),
                    self.n
                ),
            ));
        }
        let mut choices = Vec::new();
        for (prompt, max_tokens) in prompts {
            let (prompt, first) = (Arc::new(prompt), choices.len());
            for i in 0..self.n {
                let seed = self.sampling.seed.wrapping_add(i as u64);
                choices.push(Choice {
                    prompt: prompt.clone(),
                    max_tokens,
                    stops: self.stops.clone(),
                    eos: self.eos.clone(),
                    sampling: SamplingParams {
                        seed,
                        ..self.sampling.clone()
                    },
                    score_prompt,
                    shown: self
                        .calling
                        .as_ref()
                        .map_or(Vec::new(), |c| c.marks.clone()),
                    after: (i > 0).then_some(first),
                });
            }
        }
        Ok(choices)
    }
}

impl Server {
    /// Refuses a model that is not here.
    pub fn check_model(&self, fields: &Fields<'_>) -> Result<(), ApiError> {
        match fields.text("model") {
            Some(name) if !self.options.names.iter().any(|known| known == name) => {
                let known = self.options.names.join("`, `");
                let shown: String = name.chars().take(200).collect();
                let message =
                    format!("there is no model `{shown}` here; this server runs `{known}`");
                let error = ApiError::missing(message).with_code("model_not_found");
                Err(ApiError {
                    param: Some("model".into()),
                    ..error
                })
            }
            _ => Ok(()),
        }
    }

    /// How many tokens may follow a prompt: what was asked for (by the name `param`), if it fits, else `default` or
    /// what the context has left.
    pub fn room(
        &self,
        prompt: usize,
        param: &str,
        wanted: Option<usize>,
        default: usize,
    ) -> Result<usize, ApiError> {
        let context = self.context;
        let too_long = |message: String| {
            Err(ApiError::field(param, message).with_code("context_length_exceeded"))
        };
        let told = |n| thousands(n);
        let cap = self.options.max_tokens.unwrap_or(usize::MAX);
        if let Some(wanted) = wanted
            && wanted > cap
        {
            let message =
                format!("{wanted} tokens are wanted; this server generates at most {cap}");
            return Err(ApiError::field(param, message));
        }
        if prompt == 0 {
            return Err(ApiError::invalid(
                "the prompt has no token; give at least one",
            ));
        }
        if prompt >= context && wanted != Some(0) || prompt > context {
            return too_long(format!(
                "the prompt has {} tokens and the context {}; shorten the prompt, or start the server with a larger --context (the model was made for {})",
                told(prompt),
                told(context),
                told(self.model.plan.context)
            ));
        }
        match wanted {
            Some(wanted) if wanted > context - prompt => too_long(format!(
                "{} tokens of prompt and {} to generate are more than the context of {}; at most {} can follow this prompt",
                told(prompt),
                told(wanted),
                told(context),
                told(context - prompt)
            )),
            Some(wanted) => Ok(wanted),
            // Beyond what the model was made for nobody goes unasked.
            None => Ok(default
                .min(context - prompt)
                .min(self.model.plan.context.max(1))
                .min(cap)),
        }
    }
}

/// A text or several.
fn stops(fields: &Fields<'_>) -> Vec<String> {
    let stops = match fields.get("stop") {
        None => Vec::new(),
        Some(Value::String(stop)) => vec![stop.clone()],
        Some(Value::Array(list)) if list.len() <= MOST_STOPS => {
            let texts: Option<Vec<String>> =
                list.iter().map(|s| s.as_str().map(String::from)).collect();
            texts.unwrap_or_else(|| {
                fields.fault("stop", "expected a string or a list of strings");
                Vec::new()
            })
        }
        Some(other) => {
            let expected = format!("expected a string or a list of up to {MOST_STOPS}");
            fields.fault("stop", format!("{expected}, found {}", describe(other)));
            Vec::new()
        }
    };
    if stops.iter().any(String::is_empty) {
        fields.fault("stop", "an empty string would end every answer");
    }
    stops
}

/// `{"42": -100}`: added to the logits of tokens.
fn logit_bias(server: &Server, fields: &Fields<'_>) -> Vec<(u32, f32)> {
    let empty = Map::new();
    let object = fields.object("logit_bias").unwrap_or(&empty);
    let vocab = server.model.network.graph.vocab;
    let mut biases = Vec::new();
    for (token, bias) in object {
        let id = token.parse().ok().filter(|id| (*id as usize) < vocab);
        let bias = bias.as_f64().filter(|b| (-100.0..=100.0).contains(b));
        match (id, bias) {
            (Some(id), Some(bias)) => biases.push((id, bias as f32)),
            _ => {
                let token: String = token.chars().take(40).collect();
                fields.fault(
                    "logit_bias",
                    format!(
                        "{token:?}: expected the id of one of {vocab} tokens, and a number from -100 to 100"
                    ),
                );
            }
        }
    }
    biases
}

/// A number that nobody can foresee.
pub fn random() -> u64 {
    // Each state of this kind has keys of its own.
    RandomState::new().build_hasher().finish()
}

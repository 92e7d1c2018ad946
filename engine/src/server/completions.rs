//! `POST /v1/completions`: texts that go on from prompts.

use std::sync::Arc;

use axum::body::Body;
use axum::http::Response;
use serde_json::{Map, Value, json};

use super::Server;
use super::error::{ApiError, json_response};
use super::fields::{Faults, Fields};
use super::job::End;
use super::request::{Asked, MOST_TOP};
use super::said::{Columns, Said, Usage, collect, finish_reason};
use super::stream::{self, Sse, Telling};
use crate::ids::TokenId;
use crate::sampler::Sampled;
use crate::text::describe;

/// Tokens of an answer when nobody says how many, as OpenAI has it.
const DEFAULT_TOKENS: usize = 16;

/// A prompt as it was sent.
enum Prompt {
    Text(String),
    Tokens(Vec<TokenId>),
}

/// What one request wants, read and checked.
struct Completion {
    asked: Asked,
    prompts: Vec<(Vec<TokenId>, usize)>,
    /// The prompts' texts, if they are to be told again.
    echo: Option<Vec<String>>,
}

/// Answers a request.
pub async fn complete(
    server: Arc<Server>,
    body: Map<String, Value>,
) -> Result<Response<Body>, ApiError> {
    let reader = server.clone();
    let completion = server.blocking(move || read(&reader, &body)).await?;
    let Completion {
        asked,
        prompts,
        echo,
    } = completion;
    let scored = echo.as_ref().and(asked.sampling.logprobs);
    let prompt_ids: Vec<Vec<TokenId>> = match &echo {
        Some(_) => prompts.iter().map(|(prompt, _)| prompt.clone()).collect(),
        None => Vec::new(),
    };
    let choices = asked.choices(prompts, scored)?;
    let count = choices.len();
    let name = server.name("cmpl");
    let head = Head {
        server: server.clone(),
        name: name.clone(),
        created: server.now(),
        asked,
        echo,
        prompt_ids,
    };
    let mut ticket = server.submit(name, choices).await?;
    if head.asked.stream {
        let columns = (0..count).map(|_| Columns::default()).collect();
        let telling = Told {
            head,
            columns,
            usage: Usage::default(),
        };
        return Ok(stream::answer(ticket, count, telling));
    }
    let (said, usage) = collect(&mut ticket, count, head.asked.n).await?;
    let choices: Vec<Value> = (0..)
        .zip(&said)
        .map(|(i, said)| head.choice(i, said))
        .collect();
    let mut answer = head.object(choices);
    answer["usage"] = usage.json();
    answer["strata"] = usage.strata();
    Ok(json_response(&answer))
}

fn read(server: &Server, body: &Map<String, Value>) -> Result<Completion, ApiError> {
    let faults = Faults::default();
    let fields = Fields::new("", body, &faults);
    server.check_model(&fields)?;
    let mut asked = Asked::read(server, &fields);
    asked.sampling.logprobs = fields.count("logprobs", 0..=MOST_TOP);
    let echo = fields.flag("echo").unwrap_or(false);
    let wanted = fields.count("max_tokens", 0..=usize::MAX);
    if fields.get("suffix").is_some() {
        fields.fault(
            "suffix",
            "text cannot be filled in before a suffix here; leave it out",
        );
    }
    if let Some(best_of) = fields.count("best_of", 1..=MOST_TOP)
        && best_of != asked.n
    {
        fields.fault(
            "best_of",
            "only as many choices as are told are made; leave it out",
        );
    }
    if echo && asked.stream && asked.sampling.logprobs.is_some() {
        fields.fault(
            "echo",
            "the log-probabilities of a prompt are known at its end only; leave out stream, echo or logprobs",
        );
    }
    if wanted == Some(0) && !echo {
        fields.fault("max_tokens", "0 makes sense with echo only");
    }
    let prompts = read_prompts(server, &fields);
    faults.finish()?;
    let max_tokens = wanted
        .or(Some(DEFAULT_TOKENS).filter(|n| server.options.max_tokens.is_none_or(|cap| *n <= cap)));
    let mut tokenised = Vec::new();
    let mut texts = Vec::new();
    for prompt in prompts {
        let tokens = match &prompt {
            Prompt::Text(text) => server.encode(text, true)?,
            Prompt::Tokens(tokens) => tokens.clone(),
        };
        let room = server.room(tokens.len(), "max_tokens", max_tokens, usize::MAX)?;
        if echo {
            texts.push(match prompt {
                Prompt::Text(text) => text,
                Prompt::Tokens(tokens) => server.decode(&tokens)?,
            });
        }
        tokenised.push((tokens, room));
    }
    Ok(Completion {
        asked,
        prompts: tokenised,
        echo: echo.then_some(texts),
    })
}

/// A text, texts, token ids, or lists of token ids.
fn read_prompts(server: &Server, fields: &Fields<'_>) -> Vec<Prompt> {
    const EXPECTED: &str = "expected a string, a list of strings, token ids, or lists of token ids";
    let vocab = server.model.network.graph.vocab;
    let id = |value: &Value| {
        let id = value.as_u64().and_then(|id| TokenId::try_from(id).ok());
        id.filter(|id| (*id as usize) < vocab)
    };
    let ids = |path: &str, list: &Vec<Value>| -> Vec<TokenId> {
        let found: Vec<TokenId> = list.iter().map_while(id).collect();
        if let Some(wrong) = list.get(found.len()) {
            let what = format!(
                "[{}]: expected the id of one of {vocab} tokens, found {}",
                found.len(),
                describe(wrong)
            );
            fields.faults().add(path, what);
        }
        found
    };
    match fields.get("prompt") {
        Some(Value::String(text)) => vec![Prompt::Text(text.clone())],
        Some(Value::Array(list)) => match list.first() {
            Some(Value::Number(_)) => vec![Prompt::Tokens(ids("prompt", list))],
            Some(Value::String(_) | Value::Array(_)) => {
                let prompt = |(i, value): (usize, &Value)| match value {
                    Value::String(text) => Some(Prompt::Text(text.clone())),
                    Value::Array(list) => Some(Prompt::Tokens(ids(&format!("prompt[{i}]"), list))),
                    other => {
                        let what = format!("{EXPECTED}, found {}", describe(other));
                        fields.fault(&format!("prompt[{i}]"), what);
                        None
                    }
                };
                list.iter().enumerate().filter_map(prompt).collect()
            }
            Some(other) => {
                fields.fault(
                    "prompt[0]",
                    format!("{EXPECTED}, found {}", describe(other)),
                );
                Vec::new()
            }
            None => {
                fields.fault("prompt", "the list is empty");
                Vec::new()
            }
        },
        Some(other) => {
            fields.fault("prompt", format!("{EXPECTED}, found {}", describe(other)));
            Vec::new()
        }
        None => {
            fields.fault("prompt", format!("{EXPECTED}, found none"));
            Vec::new()
        }
    }
}

/// What is the same for all that a request is told.
struct Head {
    server: Arc<Server>,
    name: String,
    created: u64,
    asked: Asked,
    echo: Option<Vec<String>>,
    /// The prompts' tokens, if they are told again.
    prompt_ids: Vec<Vec<TokenId>>,
}

impl Head {
    fn object(&self, choices: Vec<Value>) -> Value {
        json!({
            "id": self.name, "object": "text_completion", "created": self.created,
            "model": self.server.options.names[0], "system_fingerprint": super::FINGERPRINT,
            "choices": choices,
        })
    }

    fn choice(&self, index: usize, said: &Said) -> Value {
        let prompt = index / self.asked.n;
        let echo = self
            .echo
            .as_ref()
            .map_or("", |texts| texts[prompt].as_str());
        let logprobs = self.asked.sampling.logprobs.map(|_| {
            let mut columns = Columns::default();
            if let Some(first) = self.prompt_ids.get(prompt).and_then(|ids| ids.first()) {
                columns.push(&self.server, &Sampled::plain(*first));
            }
            let ends = |t: &&Sampled| !self.server.is_end(t.token);
            let tokens = said.tokens.iter().filter(ends);
            for token in said.prompt_scores.iter().chain(tokens) {
                columns.push(&self.server, token);
            }
            columns.take()
        });
        let mut choice = json!({
            "index": index, "text": format!("{echo}{}", said.text), "logprobs": logprobs,
            "finish_reason": said.reason.map(finish_reason),
        });
        if self.asked.token_ids {
            choice["token_ids"] = said.tokens.iter().map(|t| t.token).collect();
        }
        choice
    }
}

/// The same as it comes.
struct Told {
    head: Head,
    columns: Vec<Columns>,
    usage: Usage,
}

impl Told {
    fn chunk(&mut self, index: usize, text: &str, ids: &[TokenId], end: Option<&End>) -> Value {
        let logprobs = Some(&mut self.columns[index]).filter(|columns| !columns.is_empty());
        let mut choice = json!({
            "index": index, "text": text, "logprobs": logprobs.map(Columns::take),
            "finish_reason": end.map(|end| finish_reason(end.reason)),
        });
        if self.head.asked.token_ids {
            choice["token_ids"] = json!(ids);
        }
        let mut object = self.head.object(vec![choice]);
        if let Some(end) = end {
            object["strata"] = json!(end.cached);
        }
        object
    }
}

impl Telling for Told {
    fn begin(&mut self, out: &mut Sse) {
        for index in 0..self.columns.len() {
            let prompt = index / self.head.asked.n;
            let echo = self.head.echo.as_ref().map(|texts| texts[prompt].clone());
            if let Some(echo) = echo {
                out.data(&self.chunk(index, &echo, &[], None));
            }
        }
    }

    fn token(&mut self, choice: usize, sampled: Sampled, text: &str, out: &mut Sse) {
        if self.head.asked.sampling.logprobs.is_some() && !self.head.server.is_end(sampled.token) {
            self.columns[choice].push(&self.head.server, &sampled);
        }
        let silent = text.is_empty() && self.columns[choice].is_empty();
        if !silent || self.head.asked.token_ids {
            out.data(&self.chunk(choice, text, &[sampled.token], None));
        }
    }

    fn end(&mut self, choice: usize, end: End, out: &mut Sse) {
        self.usage
            .add(&end, choice.is_multiple_of(self.head.asked.n));
        out.data(&self.chunk(choice, &end.rest, &[], Some(&end)));
    }

    fn finish(&mut self, out: &mut Sse) {
        if self.head.asked.include_usage {
            let mut object = self.head.object(Vec::new());
            object["usage"] = self.usage.json();
            out.data(&object);
        }
        out.done();
    }
}

//! `POST /v1/chat/completions`, and questions about documents, which are answered in the same form.

use std::sync::Arc;

use axum::body::Body;
use axum::http::Response;
use serde_json::{Map, Value, json};

use super::Server;
use super::constraint::{self, Calling, Wanted};
use super::error::{ApiError, json_response};
use super::fields::{Faults, Fields};
use super::job::End;
use super::messages;
use super::request::{Asked, MOST_TOP};
use super::said::{Said, Usage, collect, finish_reason};
use super::stream::{self, Sse, Telling};
use crate::generation::StopReason;
use crate::ids::TokenId;
use crate::sampler::Sampled;
use crate::tools::{Call, Calls, Piece, ToolChoice};

/// What one request wants, read and checked.
struct Chat {
    asked: Asked,
    prompt: Vec<TokenId>,
    max_tokens: usize,
}

/// Answers a conversation.
pub async fn chat(
    server: Arc<Server>,
    body: Map<String, Value>,
) -> Result<Response<Body>, ApiError> {
    let reader = server.clone();
    let chat = server.blocking(move || read(&reader, &body)).await?;
    answer(server, chat).await
}

/// Answers a question about a document.
pub async fn ask(
    server: Arc<Server>,
    document: String,
    body: Map<String, Value>,
) -> Result<Response<Body>, ApiError> {
    let reader = server.clone();
    let chat = server
        .blocking(move || read_question(&reader, &document, &body))
        .await?;
    answer(server, chat).await
}

fn read(server: &Server, body: &Map<String, Value>) -> Result<Chat, ApiError> {
    let faults = Faults::default();
    let fields = Fields::new("", body, &faults);
    server.check_model(&fields)?;
    let (mut asked, wanted) = read_common(server, &fields);
    let messages = messages::read(&fields, "messages");
    let form = Wanted::of_chat(&fields);
    let document = fields.text("document");
    faults.finish()?;
    if document.is_some() && !form.tools.is_empty() && form.choice != ToolChoice::None {
        let message = "a document stands where functions would be described; leave one of them out";
        return Err(ApiError::field("tools", message));
    }
    asked.hold_to(constraint::of_request(server, &form)?, server);
    let tools = asked.calling.as_ref().map_or(&[][..], |c| &c.tools);
    let prompt = match document {
        Some(id) => server.encode_about(&*server.ready_document(id)?, &messages)?,
        None => server.encode_chat(&messages, tools)?,
    };
    finish(server, asked, prompt, wanted)
}

fn read_question(
    server: &Server,
    document: &str,
    body: &Map<String, Value>,
) -> Result<Chat, ApiError> {
    let document = server.ready_document(document)?;
    let faults = Faults::default();
    let fields = Fields::new("", body, &faults);
    server.check_model(&fields)?;
    let (asked, wanted) = read_common(server, &fields);
    let question = fields.text("question").unwrap_or_default();
    if fields.get("question").is_none() || question.trim().is_empty() && faults.finish().is_ok() {
        fields.fault("question", "expected a question about the document");
    }
    faults.finish()?;
    let message = json!({"role": "user", "content": question});
    let prompt = server.encode_about(&document, &[message])?;
    finish(server, asked, prompt, wanted)
}

/// What a conversation and a question share: how tokens are chosen, and how many are wanted, by which name.
fn read_common(server: &Server, fields: &Fields<'_>) -> (Asked, (&'static str, Option<usize>)) {
    let mut asked = Asked::read(server, fields);
    let top = fields.count("top_logprobs", 0..=MOST_TOP);
    let logprobs = fields.flag("logprobs").unwrap_or(false);
    if top.is_some_and(|top| top > 0) && !logprobs {
        fields.fault("top_logprobs", "is of no use without logprobs");
    }
    asked.sampling.logprobs = logprobs.then(|| top.unwrap_or(0));
    let newer = fields.count("max_completion_tokens", 1..=usize::MAX);
    let older = fields.count("max_tokens", 1..=usize::MAX);
    let wanted = match newer {
        Some(_) => ("max_completion_tokens", newer),
        None => ("max_tokens", older),
    };
    (asked, wanted)
}

fn finish(
    server: &Server,
    asked: Asked,
    prompt: Vec<TokenId>,
    (param, wanted): (&str, Option<usize>),
) -> Result<Chat, ApiError> {
    let default = server.model.generation.max_new_tokens.unwrap_or(usize::MAX);
    let max_tokens = server.room(prompt.len(), param, wanted, default)?;
    Ok(Chat {
        asked,
        prompt,
        max_tokens,
    })
}

async fn answer(server: Arc<Server>, chat: Chat) -> Result<Response<Body>, ApiError> {
    let Chat {
        asked,
        prompt,
        max_tokens,
    } = chat;
    let choices = asked.choices(vec![(prompt, max_tokens)], None)?;
    let count = choices.len();
    let name = server.name("chatcmpl");
    let head = Head {
        server: server.clone(),
        name: name.clone(),
        created: server.now(),
        asked,
    };
    let mut ticket = server.submit(name, choices).await?;
    if head.asked.stream {
        let reader = |calling: &Calling| vec![calling.reader(); count];
        let telling = Told {
            calls: head.asked.calling.as_ref().map(reader),
            head,
            choices: count,
            usage: Usage::default(),
        };
        return Ok(stream::answer(ticket, count, telling));
    }
    let (said, usage) = collect(&mut ticket, count, count).await?;
    let choices = (0..).zip(&said).map(|(i, said)| head.choice(i, said));
    let mut answer = head.object("chat.completion", choices.collect());
    answer["usage"] = usage.json();
    answer["strata"] = usage.strata();
    Ok(json_response(&answer))
}

/// What is the same for all that a request is told.
struct Head {
    server: Arc<Server>,
    name: String,
    created: u64,
    asked: Asked,
}

impl Head {
    fn object(&self, kind: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.name, "object": kind, "created": self.created,
            "model": self.server.options.names[0], "system_fingerprint": super::FINGERPRINT,
            "choices": choices,
        })
    }

    /// Log-probabilities of tokens, if they are wanted.
    fn logprobs(&self, tokens: &[Sampled]) -> Value {
        if self.asked.sampling.logprobs.is_none() {
            return Value::Null;
        }
        let tokens = tokens.iter().filter(|t| !self.server.is_end(t.token));
        let content: Vec<Value> = tokens.map(|t| self.server.chat_logprob(t)).collect();
        json!({"content": content, "refusal": null})
    }

    /// A call of a function.
    fn call(&self, call: &Call) -> Value {
        json!({
            "id": self.server.name("call"), "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        })
    }

    fn choice(&self, index: usize, said: &Said) -> Value {
        let mut message = json!({"role": "assistant", "content": said.text, "refusal": null});
        let mut called = false;
        if let Some(calling) = &self.asked.calling {
            let (text, calls) = calling.read(&said.text);
            called = !calls.is_empty();
            if called {
                let text = text.trim();
                message["content"] = (!text.is_empty()).then_some(text).into();
                message["tool_calls"] = calls.iter().map(|call| self.call(call)).collect();
            }
        }
        let mut choice = json!({
            "index": index, "message": message, "logprobs": self.logprobs(&said.tokens),
            "finish_reason": said.reason.map(|reason| finished(reason, called)),
        });
        if self.asked.token_ids {
            choice["token_ids"] = said.tokens.iter().map(|t| t.token).collect();
        }
        choice
    }
}

/// How an answer ended, which may have called functions.
fn finished(reason: StopReason, called: bool) -> &'static str {
    match finish_reason(reason) {
        "stop" if called => "tool_calls",
        word => word,
    }
}

/// The same as it comes.
struct Told {
    head: Head,
    choices: usize,
    /// Of each choice, if functions may be called.
    calls: Option<Vec<Calls>>,
    usage: Usage,
}

impl Told {
    fn called(&self, choice: usize) -> bool {
        self.calls.as_ref().is_some_and(|c| c[choice].found() > 0)
    }

    /// The deltas of a text; with `last`, of the rest of it, too.
    fn deltas(&mut self, choice: usize, text: &str, last: bool) -> Vec<Value> {
        let Some(calls) = &mut self.calls else {
            return match text {
                "" => Vec::new(),
                text => vec![json!({"content": text})],
            };
        };
        let calls = &mut calls[choice];
        let mut number = calls.found();
        let mut pieces = calls.push(text);
        if last {
            pieces.extend(calls.finish());
        }
        let delta = |piece| match piece {
            Piece::Text(text) => json!({"content": text}),
            Piece::Call(call) => {
                let mut call = self.head.call(&call);
                call["index"] = number.into();
                number += 1;
                json!({"tool_calls": [call]})
            }
        };
        pieces.into_iter().map(delta).collect()
    }

    fn chunk(&self, index: usize, delta: Value, tokens: &[Sampled], end: Option<&End>) -> Value {
        let logprobs = if tokens.is_empty() {
            Value::Null
        } else {
            self.head.logprobs(tokens)
        };
        let mut choice = json!({
            "index": index, "delta": delta, "logprobs": logprobs,
            "finish_reason": end.map(|end| finished(end.reason, self.called(index))),
        });
        if self.head.asked.token_ids {
            choice["token_ids"] = tokens.iter().map(|t| t.token).collect();
        }
        let mut object = self.head.object("chat.completion.chunk", vec![choice]);
        if let Some(end) = end {
            object["strata"] = json!(end.cached);
        }
        object
    }
}

impl Telling for Told {
    fn begin(&mut self, out: &mut Sse) {
        for index in 0..self.choices {
            let delta = json!({"role": "assistant", "content": ""});
            out.data(&self.chunk(index, delta, &[], None));
        }
    }

    fn token(&mut self, choice: usize, sampled: Sampled, text: &str, out: &mut Sse) {
        let wanted = self.head.asked.token_ids || self.head.asked.sampling.logprobs.is_some();
        let mut deltas = self.deltas(choice, text, false);
        if deltas.is_empty() && wanted {
            deltas.push(json!({"content": ""}));
        }
        let mut tokens = vec![sampled];
        for delta in deltas {
            out.data(&self.chunk(choice, delta, &std::mem::take(&mut tokens), None));
        }
    }

    fn end(&mut self, choice: usize, end: End, out: &mut Sse) {
        self.usage.add(&end, choice == 0);
        for delta in self.deltas(choice, &end.rest, true) {
            out.data(&self.chunk(choice, delta, &[], None));
        }
        out.data(&self.chunk(choice, json!({}), &[], Some(&end)));
    }

    fn finish(&mut self, out: &mut Sse) {
        if self.head.asked.include_usage {
            let mut object = self.head.object("chat.completion.chunk", Vec::new());
            object["usage"] = self.usage.json();
            out.data(&object);
        }
        out.done();
    }
}

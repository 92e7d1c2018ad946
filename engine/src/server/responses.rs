//! `POST /v1/responses`: OpenAI's newer interface, with its events by their names.
//!
//! The last conversations are kept in memory, so that `previous_response_id` can go on from them.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use axum::body::Body;
use axum::http::Response;
use serde_json::{Map, Value, json};

use super::Server;
use super::constraint::{self, Calling, Wanted};
use super::error::{ApiError, json_response};
use super::fields::{Faults, Fields};
use super::job::End;
use super::messages;
use super::metrics::lock;
use super::request::{Asked, MOST_TOP};
use super::said::{Usage, collect};
use super::stream::{self, Sse, Telling};
use crate::generation::StopReason;
use crate::ids::TokenId;
use crate::sampler::Sampled;
use crate::text::describe;
use crate::tools::{Call, Calls, Piece};

/// Most bytes of conversations that are kept.
const MOST_BYTES: usize = 64 << 20;

/// Conversations by the response that ended them, oldest first.
#[derive(Default)]
pub struct Past(Mutex<VecDeque<(String, Vec<Value>, usize)>>);

impl Past {
    fn keep(&self, id: &str, conversation: Vec<Value>) {
        let size = |m: &Value| m.to_string().len() + 256;
        let bytes: usize = conversation.iter().map(size).sum();
        let mut past = lock(&self.0);
        past.push_back((id.into(), conversation, bytes));
        while past.iter().map(|(_, _, bytes)| bytes).sum::<usize>() > MOST_BYTES {
            past.pop_front();
        }
    }

    fn find(&self, id: &str) -> Option<Vec<Value>> {
        let past = lock(&self.0);
        let found = past.iter().find(|(known, _, _)| known == id);
        found.map(|(_, conversation, _)| conversation.clone())
    }
}

/// What one request wants, read and checked.
struct Wish {
    asked: Asked,
    prompt: Vec<TokenId>,
    max_tokens: usize,
    /// What is told again with the answer.
    echo: Value,
    /// The conversation without instructions, if it is to be kept.
    conversation: Option<Vec<Value>>,
}

/// Answers a request.
pub async fn respond(
    server: Arc<Server>,
    body: Map<String, Value>,
) -> Result<Response<Body>, ApiError> {
    let reader = server.clone();
    let wish = server.blocking(move || read(&reader, &body)).await?;
    let Wish {
        asked,
        prompt,
        max_tokens,
        echo,
        conversation,
    } = wish;
    let choices = asked.choices(vec![(prompt, max_tokens)], None)?;
    let name = server.name("resp");
    let head = Head {
        server: server.clone(),
        message: server.name("msg"),
        created: server.now(),
        name: name.clone(),
        echo,
        logprobs: asked.sampling.logprobs.is_some(),
        calling: asked.calling.clone(),
        conversation,
    };
    let mut ticket = server.submit(name, choices).await?;
    if asked.stream {
        let telling = Told {
            reader: head.calling.as_ref().map(Calling::reader),
            head,
            number: 0,
            text: String::new(),
            calls: Vec::new(),
            tokens: Vec::new(),
            usage: Usage::default(),
            reason: StopReason::Interrupted,
        };
        return Ok(stream::answer(ticket, 1, telling));
    }
    let (mut said, usage) = collect(&mut ticket, 1, 1).await?;
    let said = said.pop().unwrap_or_default();
    let reason = said.reason.unwrap_or(StopReason::Interrupted);
    let (text, calls) = match &head.calling {
        Some(calling) => calling.read(&said.text),
        None => (said.text, Vec::new()),
    };
    let calls: Vec<Value> = calls.iter().map(|call| head.call(call)).collect();
    let mut output = Vec::new();
    if calls.is_empty() || !text.trim().is_empty() {
        let part = head.part(&text, &said.tokens);
        output.push(head.item(status(reason), vec![part]));
    }
    output.extend(calls.iter().cloned());
    let answer = head.whole(output, reason, &usage);
    head.keep(&text, &calls);
    Ok(json_response(&answer))
}

fn read(server: &Server, body: &Map<String, Value>) -> Result<Wish, ApiError> {
    let faults = Faults::default();
    let fields = Fields::new("", body, &faults);
    server.check_model(&fields)?;
    let mut asked = Asked::read(server, &fields);
    asked.n = 1;
    let top = fields.count("top_logprobs", 0..=MOST_TOP);
    let include = fields.list("include");
    let logprobs =
        include.is_some_and(|list| list.iter().any(|i| i == "message.output_text.logprobs"));
    asked.sampling.logprobs = logprobs.then(|| top.unwrap_or(0));
    let wanted = fields.count("max_output_tokens", 1..=usize::MAX);
    let store = fields.flag("store").unwrap_or(true);
    let instructions = fields.text("instructions");
    let input = read_input(&fields);
    let form = Wanted::of_response(&fields);
    if fields.flag("background") == Some(true) {
        fields.fault(
            "background",
            "answers are told while the client waits; leave it out",
        );
    }
    if fields.text("truncation").is_some_and(|t| t != "disabled") {
        fields.fault(
            "truncation",
            "nothing is cut from a conversation here; leave it out",
        );
    }
    let previous = fields.text("previous_response_id");
    faults.finish()?;
    asked.hold_to(constraint::of_request(server, &form)?, server);
    let mut conversation = match previous {
        None => Vec::new(),
        Some(id) => server.past.find(id).ok_or_else(|| {
            let id: String = id.chars().take(80).collect();
            let message = format!(
                "there is no response {id} here: the last ones are kept in memory while the server runs, if `store` was not false"
            );
            let error = ApiError::field("previous_response_id", message);
            error.with_code("previous_response_not_found")
        })?,
    };
    conversation.extend(input);
    let mut messages = Vec::new();
    if let Some(instructions) = instructions {
        messages.push(json!({"role": "system", "content": instructions}));
    }
    messages.extend(conversation.iter().cloned());
    let tools = asked.calling.as_ref().map_or(&[][..], |c| &c.tools);
    let prompt = server.encode_chat(&messages, tools)?;
    let default = server.model.generation.max_new_tokens.unwrap_or(usize::MAX);
    let max_tokens = server.room(prompt.len(), "max_output_tokens", wanted, default)?;
    let echo = json!({
        "instructions": instructions,
        "max_output_tokens": wanted,
        "metadata": body.get("metadata").filter(|m| m.is_object()).cloned().unwrap_or(json!({})),
        "parallel_tool_calls": form.parallel,
        "previous_response_id": previous,
        "reasoning": {"effort": null, "summary": null},
        "store": store,
        "temperature": asked.sampling.temperature,
        "text": body.get("text").filter(|t| t.is_object()).cloned().unwrap_or(json!({"format": {"type": "text"}})),
        "tool_choice": body.get("tool_choice").cloned().unwrap_or("auto".into()),
        "tools": body.get("tools").cloned().unwrap_or(json!([])),
        "top_p": asked.sampling.top_p,
        "truncation": "disabled",
        "user": null,
    });
    Ok(Wish {
        asked,
        prompt,
        max_tokens,
        echo,
        conversation: store.then_some(conversation),
    })
}

/// A text, or items: messages, calls of functions and their results.
fn read_input(fields: &Fields<'_>) -> Vec<Value> {
    const EXPECTED: &str = "expected a string or a list of items";
    let items = match fields.get("input") {
        Some(Value::String(text)) => return vec![json!({"role": "user", "content": text})],
        Some(Value::Array(items)) if !items.is_empty() => items,
        Some(other) => {
            fields.fault("input", format!("{EXPECTED}, found {}", describe(other)));
            return Vec::new();
        }
        None => {
            fields.fault("input", format!("{EXPECTED}, found none"));
            return Vec::new();
        }
    };
    let mut read = Vec::new();
    for (i, item) in items.iter().enumerate() {
        let path = fields.path(&format!("input[{i}]"));
        let Some(object) = item.as_object() else {
            let what = format!("expected an item, found {}", describe(item));
            fields.faults().add(path, what);
            continue;
        };
        let item_fields = Fields::new(&path, object, fields.faults());
        match item_fields.text("type").unwrap_or("message") {
            "message" => read.extend(messages::read_message(&path, item, fields)),
            "function_call" => read.push(json!({
                "role": "assistant", "content": null,
                "tool_calls": [{
                    "id": item_fields.text("call_id"), "type": "function",
                    "function": {
                        "name": item_fields.text("name"), "arguments": item_fields.text("arguments"),
                    },
                }],
            })),
            "function_call_output" => read.push(json!({
                "role": "tool", "tool_call_id": item_fields.text("call_id"),
                "content": item_fields.text("output"),
            })),
            // What a model thought is not told to it again.
            "reasoning" => {}
            other => {
                let other: String = other.chars().take(40).collect();
                let expected = "expected message, function_call or function_call_output";
                item_fields.fault("type", format!("{expected}, found {other:?}"));
            }
        }
    }
    read
}

/// What is the same for all that a request is told.
struct Head {
    server: Arc<Server>,
    name: String,
    /// The name of the answer's one message.
    message: String,
    created: u64,
    echo: Value,
    logprobs: bool,
    calling: Option<Calling>,
    conversation: Option<Vec<Value>>,
}

impl Head {
    fn object(&self, status: &str, output: Vec<Value>, usage: Value) -> Value {
        let mut object = json!({
            "id": self.name, "object": "response", "created_at": self.created, "status": status,
            "error": null, "incomplete_details": null,
            "model": self.server.options.names[0], "output": output, "usage": usage,
        });
        if let (Some(object), Some(echo)) = (object.as_object_mut(), self.echo.as_object()) {
            object.extend(echo.clone());
        }
        object
    }

    fn part(&self, text: &str, tokens: &[Sampled]) -> Value {
        json!({
            "type": "output_text", "text": text, "annotations": [],
            "logprobs": self.logprobs_of(tokens),
        })
    }

    fn logprobs_of(&self, tokens: &[Sampled]) -> Vec<Value> {
        let told = tokens
            .iter()
            .filter(|t| self.logprobs && !self.server.is_end(t.token));
        told.map(|t| self.server.chat_logprob(t)).collect()
    }

    fn item(&self, status: &str, content: Vec<Value>) -> Value {
        json!({
            "id": self.message, "type": "message", "status": status, "role": "assistant",
            "content": content,
        })
    }

    /// A call of a function, as an item.
    fn call(&self, call: &Call) -> Value {
        json!({
            "id": self.server.name("fc"), "type": "function_call", "status": "completed",
            "call_id": self.server.name("call"), "name": call.name, "arguments": call.arguments,
        })
    }

    fn whole(&self, output: Vec<Value>, reason: StopReason, usage: &Usage) -> Value {
        let status = status(reason);
        let told = json!({
            "input_tokens": usage.prompt,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens()},
            "output_tokens": usage.generated,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.prompt + usage.generated,
        });
        let mut object = self.object(status, output, told);
        if status == "incomplete" {
            object["incomplete_details"] = json!({"reason": "max_output_tokens"});
        }
        object["strata"] = usage.strata();
        object
    }

    fn keep(&self, text: &str, calls: &[Value]) {
        if let Some(conversation) = &self.conversation {
            let mut conversation = conversation.clone();
            let mut message = json!({"role": "assistant", "content": text});
            if !calls.is_empty() {
                let call = |call: &Value| {
                    json!({
                        "id": call["call_id"], "type": "function",
                        "function": {"name": call["name"], "arguments": call["arguments"]},
                    })
                };
                message["tool_calls"] = calls.iter().map(call).collect();
            }
            conversation.push(message);
            self.server.past.keep(&self.name, conversation);
        }
    }
}

fn status(reason: StopReason) -> &'static str {
    match reason {
        StopReason::Length => "incomplete",
        StopReason::Eos | StopReason::Stop | StopReason::Interrupted => "completed",
    }
}

/// The same as it comes.
struct Told {
    head: Head,
    /// Of the next event.
    number: u64,
    /// If functions may be called.
    reader: Option<Calls>,
    /// Text that is no call.
    text: String,
    /// Calls, as items.
    calls: Vec<Value>,
    tokens: Vec<Sampled>,
    usage: Usage,
    reason: StopReason,
}

impl Told {
    /// Takes more of the text, with `last` all there is; what of it is no call.
    fn take(&mut self, text: &str, last: bool) -> String {
        let Some(reader) = &mut self.reader else {
            self.text.push_str(text);
            return text.into();
        };
        let mut pieces = reader.push(text);
        if last {
            pieces.extend(reader.finish());
        }
        let mut said = String::new();
        for piece in pieces {
            match piece {
                Piece::Text(text) => said.push_str(&text),
                Piece::Call(call) => self.calls.push(self.head.call(&call)),
            }
        }
        self.text.push_str(&said);
        said
    }

    /// The events of a call, item `index`.
    fn tell_call(&mut self, index: usize, call: &Value, out: &mut Sse) {
        let mut begun = call.clone();
        begun["status"] = "in_progress".into();
        begun["arguments"] = "".into();
        let added = json!({"output_index": index, "item": begun});
        self.event("response.output_item.added", added, out);
        let about = |key: &str| json!({"item_id": call["id"], "output_index": index, key: call["arguments"]});
        self.event(
            "response.function_call_arguments.delta",
            about("delta"),
            out,
        );
        self.event(
            "response.function_call_arguments.done",
            about("arguments"),
            out,
        );
        let done = json!({"output_index": index, "item": call});
        self.event("response.output_item.done", done, out);
    }

    fn event(&mut self, name: &str, mut value: Value, out: &mut Sse) {
        value["type"] = name.into();
        value["sequence_number"] = self.number.into();
        self.number += 1;
        out.event(name, &value);
    }

    /// An event about the answer's text.
    fn about_text(&mut self, name: &str, key: &str, value: Value, out: &mut Sse) {
        let event = json!({
            "item_id": self.head.message, "output_index": 0, "content_index": 0, key: value,
        });
        self.event(name, event, out);
    }

    fn delta(&mut self, text: &str, tokens: &[Sampled], out: &mut Sse) {
        let logprobs = self.head.logprobs_of(tokens);
        let event = json!({
            "item_id": self.head.message, "output_index": 0, "content_index": 0, "delta": text,
            "logprobs": logprobs,
        });
        self.event("response.output_text.delta", event, out);
    }
}

impl Telling for Told {
    fn begin(&mut self, out: &mut Sse) {
        for name in ["response.created", "response.in_progress"] {
            let object = self.head.object("in_progress", Vec::new(), Value::Null);
            self.event(name, json!({"response": object}), out);
        }
        let item = self.head.item("in_progress", Vec::new());
        let added = json!({"output_index": 0, "item": item});
        self.event("response.output_item.added", added, out);
        let part = self.head.part("", &[]);
        self.about_text("response.content_part.added", "part", part, out);
    }

    fn token(&mut self, _choice: usize, sampled: Sampled, text: &str, out: &mut Sse) {
        let text = self.take(text, false);
        if !text.is_empty() || self.head.logprobs {
            self.delta(&text, std::slice::from_ref(&sampled), out);
        }
        if self.head.logprobs {
            self.tokens.push(sampled);
        }
    }

    fn end(&mut self, _choice: usize, end: End, out: &mut Sse) {
        self.usage.add(&end, true);
        self.reason = end.reason;
        let rest = self.take(&end.rest, true);
        if !rest.is_empty() {
            self.delta(&rest, &[], out);
        }
    }

    fn finish(&mut self, out: &mut Sse) {
        let text = json!(self.text);
        self.about_text("response.output_text.done", "text", text, out);
        let part = self.head.part(&self.text, &self.tokens);
        self.about_text("response.content_part.done", "part", part.clone(), out);
        let item = self.head.item(status(self.reason), vec![part]);
        let done = json!({"output_index": 0, "item": item});
        self.event("response.output_item.done", done, out);
        let calls = std::mem::take(&mut self.calls);
        for (i, call) in calls.iter().enumerate() {
            self.tell_call(i + 1, call, out);
        }
        let output = [vec![item], calls.clone()].concat();
        let whole = self.head.whole(output, self.reason, &self.usage);
        let name = format!("response.{}", status(self.reason));
        self.event(&name, json!({"response": whole}), out);
        self.head.keep(&self.text, &calls);
    }

    fn fail(&mut self, error: &ApiError, out: &mut Sse) {
        let event = json!({
            "code": error.code, "message": error.message, "param": error.param,
        });
        self.event("error", event, out);
    }
}

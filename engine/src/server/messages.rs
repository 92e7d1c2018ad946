//! Conversations: messages as clients send them, as the chat template wants them, as tokens.

use std::sync::Arc;

use serde_json::{Value, json};

use super::Server;
use super::error::ApiError;
use super::fields::Fields;
use super::reading::{Reading, Status};
use crate::document::{self, STAND_IN, Worded, Wording};
use crate::ids::TokenId;
use crate::text::describe;
use crate::tools::Tool;

/// Kinds of parts that are text.
const TEXT_PARTS: [&str; 3] = ["text", "input_text", "output_text"];

/// Reads the messages of a list, as a chat template wants them. Faults are left with `fields`.
pub fn read(fields: &Fields<'_>, key: &str) -> Vec<Value> {
    if fields.get(key).is_none() {
        fields.fault(key, "expected a list of messages, found none");
        return Vec::new();
    }
    let empty = Vec::new();
    let list = fields.list(key).unwrap_or(&empty);
    if list.is_empty() && fields.list(key).is_some() {
        fields.fault(key, "the list is empty; expected at least one message");
    }
    let path = fields.path(key);
    let read = |(i, value): (usize, &Value)| read_message(&format!("{path}[{i}]"), value, fields);
    list.iter().enumerate().filter_map(read).collect()
}

/// Reads one message; `path` is where it stands.
pub fn read_message(path: &str, value: &Value, fields: &Fields<'_>) -> Option<Value> {
    let faults = fields.faults();
    let Some(object) = value.as_object() else {
        faults.add(
            path,
            format!("expected an object, found {}", describe(value)),
        );
        return None;
    };
    let fields = Fields::new(path, object, faults);
    let role = match fields.text("role") {
        // What developers say is what the system says.
        Some("developer") => "system",
        Some(role @ ("system" | "user" | "assistant" | "tool" | "function")) => role,
        Some(other) => {
            let other: String = other.chars().take(40).collect();
            let expected = "expected system, developer, user, assistant or tool";
            fields.fault("role", format!("{expected}, found {other:?}"));
            return None;
        }
        None => {
            if fields.get("role").is_none() {
                fields.fault(
                    "role",
                    "expected system, developer, user, assistant or tool",
                );
            }
            return None;
        }
    };
    let calls = fields.list("tool_calls");
    let content = match fields.get("content") {
        None if role == "assistant" && calls.is_some() => Value::Null,
        None => {
            fields.fault(
                "content",
                "expected a string or a list of text parts, found none",
            );
            return None;
        }
        Some(content) => Value::String(text_of(&fields, content)?),
    };
    let mut message = json!({"role": role, "content": content});
    for key in ["name", "tool_call_id"] {
        if let Some(text) = fields.text(key) {
            message[key] = text.into();
        }
    }
    if let Some(calls) = calls {
        message["tool_calls"] = Value::Array(calls.clone());
    }
    Some(message)
}

/// The text of a message: a string, or parts of text.
pub fn text_of(fields: &Fields<'_>, content: &Value) -> Option<String> {
    const EXPECTED: &str = "expected a string or a list of text parts";
    let parts = match content {
        Value::String(text) => return Some(text.clone()),
        Value::Array(parts) => parts,
        other => {
            fields.fault("content", format!("{EXPECTED}, found {}", describe(other)));
            return None;
        }
    };
    let mut texts = Vec::new();
    for (i, part) in parts.iter().enumerate() {
        let path = fields.path(&format!("content[{i}]"));
        let kind = part["type"].as_str();
        match (kind, part["text"].as_str()) {
            (Some(kind), Some(text)) if TEXT_PARTS.contains(&kind) => texts.push(text),
            (Some("refusal"), _) => texts.push(part["refusal"].as_str().unwrap_or_default()),
            (Some(kind), _) if !TEXT_PARTS.contains(&kind) => {
                let kind: String = kind.chars().take(40).collect();
                let what = format!("this model reads text, not parts of type {kind:?}");
                fields.faults().add(path, what);
            }
            _ => fields
                .faults()
                .add(path, format!("{EXPECTED}, found {}", describe(part))),
        }
    }
    Some(texts.join("\n"))
}

impl Server {
    /// The tokens of a conversation in which functions may be called, under the model's chat template.
    pub fn encode_chat(
        &self,
        messages: &[Value],
        tools: &[Tool],
    ) -> Result<Vec<TokenId>, ApiError> {
        let text = self.render(messages, tools)?;
        self.encode(&text, false)
    }

    fn render(&self, messages: &[Value], tools: &[Tool]) -> Result<String, ApiError> {
        if !self.model.has_chat_template() {
            return Err(ApiError::invalid(format!(
                "{} has no chat template; use /v1/completions with the whole text",
                self.model.name
            )));
        }
        let rendered = self.model.render_chat_with(messages, tools, true);
        rendered.map_err(|error| ApiError::field("messages", error.to_string()))
    }

    /// The tokens of a conversation about a document, which stands where the system message would.
    pub fn encode_about(
        &self,
        document: &Reading,
        messages: &[Value],
    ) -> Result<Vec<TokenId>, ApiError> {
        let wording = Worded {
            model: &self.model,
            chat: document.notes.chat,
        };
        let unsteady = |error: document::Error| ApiError::field("document", error.to_string());
        if let [message] = messages
            && message["role"] == "user"
            && let Some(question) = message["content"].as_str()
        {
            return document.placed.prompt(&wording, question).map_err(unsteady);
        }
        if !document.notes.chat {
            let message = "without a chat template a document takes one question at a time";
            return Err(ApiError::field("messages", message));
        }
        if messages.iter().any(|m| m["role"] == "system") {
            let message = "a document stands where the system message would; leave that out";
            return Err(ApiError::field("messages", message));
        }
        let mut whole = vec![json!({"role": "system", "content": STAND_IN})];
        whole.extend(messages.iter().cloned());
        let after = document::behind(&wording as &dyn Wording, &self.render(&whole, &[])?);
        let after = after.map_err(unsteady)?;
        document
            .placed
            .followed_by(&wording, &after)
            .map_err(unsteady)
    }

    /// A document that can be asked.
    pub fn ready_document(&self, id: &str) -> Result<Arc<Reading>, ApiError> {
        let document = self.library.get(id)?;
        match document.status() {
            Status::Ready => Ok(document),
            Status::Queued | Status::Reading | Status::Failed | Status::Deleted => {
                let told = document.json();
                let message = format!(
                    "document {id} is {}: {} of {} tokens are read{}",
                    told["status"].as_str().unwrap_or_default(),
                    told["read_tokens"],
                    told["tokens"],
                    told["error"]
                        .as_str()
                        .map_or(String::new(), |e| format!("; {e}")),
                );
                let error = ApiError::new(axum::http::StatusCode::CONFLICT, message);
                Err(error.with_code("document_not_ready"))
            }
        }
    }
}

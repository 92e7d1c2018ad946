//! Tools: functions that a model may call. What its chat template is given, what holds its text to calls of them, and
//! calls read from its text.
//!
//! Models write calls as JSON, `{"name": …, "arguments": {…}}`, between marks that they were trained with. Which marks
//! is found in the chat template, which shows them to the model; where it knows no tools, a plain system text describes
//! them, and [`Format::default`] is what it asks for.

mod conversation;
mod parse;

use serde_json::{Value, json};

pub use conversation::prepare;
pub use parse::{Call, Calls, Piece};

use crate::constraint::{self, Source};
use crate::ids::TokenId;
use crate::text::Tokenizer;

/// Most calls of one answer that a constraint allows.
const MOST_CALLS: usize = 16;

/// A function that the model may call.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// What it is for.
    pub description: Option<String>,
    /// The schema of its arguments.
    pub parameters: Value,
}

impl Tool {
    /// As chat templates want it.
    pub fn json(&self) -> Value {
        let mut function = json!({"name": self.name});
        if let Some(description) = &self.description {
            function["description"] = description.as_str().into();
        }
        function["parameters"] = self.schema();
        json!({"type": "function", "function": function})
    }

    /// The schema of its arguments, which are an object.
    fn schema(&self) -> Value {
        let empty = self.parameters.as_object().is_none_or(|o| o.is_empty());
        if empty {
            return json!({"type": "object", "properties": {}, "additionalProperties": false});
        }
        let mut schema = self.parameters.clone();
        let says = ["type", "$ref", "anyOf", "allOf", "oneOf"];
        if says.iter().all(|key| schema.get(key).is_none()) {
            schema["type"] = "object".into();
        }
        schema
    }
}

/// Which tools are to be called.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum ToolChoice {
    /// As the model likes.
    #[default]
    Auto,
    /// None.
    None,
    /// At least one.
    Required,
    /// This one, once.
    Named(String),
}

/// How calls stand in a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Format {
    /// Before a call, or a list of them.
    pub begin: &'static str,
    /// Behind it; empty where calls go on to the end of the text.
    pub end: &'static str,
    /// Whether all calls are a list between one pair of marks.
    pub list: bool,
}

/// The marks there are. A template that has several of them has the first.
const FORMATS: [Format; 4] = [
    Format {
        begin: "<tool_calls>",
        end: "</tool_calls>",
        list: true,
    },
    Format {
        begin: "<tool_call>",
        end: "</tool_call>",
        list: false,
    },
    Format {
        begin: "<TOOLCALL>",
        end: "</TOOLCALL>",
        list: true,
    },
    Format {
        begin: "<|tool_call|>",
        end: "",
        list: true,
    },
];

impl Default for Format {
    fn default() -> Self {
        FORMATS[1]
    }
}

impl Format {
    /// The one that a chat template shows.
    pub fn of_template(template: &str) -> Self {
        let found = FORMATS.into_iter().find(|f| template.contains(f.begin));
        found.unwrap_or_default()
    }

    /// Its marks that are special tokens of a model: they are no text, and must be shown nevertheless.
    pub fn special_marks(&self, tokenizer: &Tokenizer) -> Vec<TokenId> {
        let marks = [self.begin, self.end].into_iter();
        let ids = marks.filter_map(|mark| tokenizer.token_id(mark));
        ids.filter(|id| tokenizer.is_special(*id)).collect()
    }
}

/// Whether a chat template shows tools to the model.
pub fn knows_tools(template: &str) -> bool {
    template.contains("tools")
}

/// What an answer is to be: the model's own choice between text and calls is not held to anything.
#[derive(Debug, Clone, PartialEq)]
pub struct Form<'a> {
    /// What may be called.
    pub tools: &'a [Tool],
    /// Which of it.
    pub choice: &'a ToolChoice,
    /// Whether several calls may come at once.
    pub parallel: bool,
    /// The schema of an answer that is no call.
    pub answer: Option<&'a Value>,
}

impl Form<'_> {
    /// What holds the text to it; nothing where any text will do.
    pub fn source(&self, format: Format, tokenizer: &Tokenizer) -> Option<Source> {
        let named = |tool: &&Tool| match self.choice {
            ToolChoice::Auto | ToolChoice::Required => true,
            ToolChoice::Named(name) => tool.name == *name,
            ToolChoice::None => false,
        };
        let tools: Vec<&Tool> = self.tools.iter().filter(named).collect();
        let called = match self.choice {
            ToolChoice::Auto => false,
            ToolChoice::None | ToolChoice::Required | ToolChoice::Named(_) => true,
        };
        match self.answer {
            answer if tools.is_empty() => answer.cloned().map(Source::JsonSchema),
            None if !called => None,
            answer => {
                let answer = answer.filter(|_| !called);
                let many = self.parallel && !matches!(self.choice, ToolChoice::Named(_));
                Some(Source::Grammar(grammar(
                    &tools, many, answer, format, tokenizer,
                )))
            }
        }
    }
}

/// A grammar of calls, or of an answer instead.
fn grammar(
    tools: &[&Tool],
    many: bool,
    answer: Option<&Value>,
    format: Format,
    tokenizer: &Tokenizer,
) -> String {
    let quoted = |text: &str| Value::from(text).to_string();
    let mark = |text: &str| match tokenizer.token_id(text) {
        _ if text.is_empty() => String::new(),
        Some(id) if tokenizer.is_special(id) => format!("<[{id}]>"),
        Some(_) | None => quoted(text),
    };
    let (begin, end) = (mark(format.begin), mark(format.end));
    let more = MOST_CALLS - 1;
    let mut lines = vec![match answer {
        Some(_) => "start: calls | answer".to_string(),
        None => "start: calls".to_string(),
    }];
    lines.push(match (format.list, many) {
        (true, true) => format!(
            r#"calls: {begin} "\n"? "[" "\n"? call ("," (" " | "\n")? call)~0..{more} "\n"? "]" "\n"? {end}"#
        ),
        (true, false) => format!(r#"calls: {begin} "\n"? "[" "\n"? call "\n"? "]" "\n"? {end}"#),
        (false, true) => format!("calls: one (\"\\n\"? one)~0..{more}"),
        (false, false) => "calls: one".into(),
    });
    if !format.list {
        lines.push(format!(r#"one: {begin} "\n"? call "\n"? {end}"#));
    }
    let calls: Vec<String> = (0..tools.len()).map(|i| format!("call_{i}")).collect();
    lines.push(format!("call: {}", calls.join(" | ")));
    for (i, tool) in tools.iter().enumerate() {
        let head = format!("{{\"name\": {}, \"arguments\": ", quoted(&tool.name));
        let schema = constraint::with_whitespace(tool.schema());
        lines.push(format!(
            "call_{i}: {} arguments_{i} \"}}\"\narguments_{i}: %json {schema}",
            quoted(&head)
        ));
    }
    if let Some(answer) = answer {
        let schema = constraint::with_whitespace(answer.clone());
        lines.push(format!("answer: %json {schema}"));
    }
    lines.join("\n")
}

/// What a model is told of tools whose chat template tells it nothing.
pub fn described(tools: &[Tool], format: Format) -> String {
    let functions: Vec<String> = tools
        .iter()
        .map(|tool| tool.json()["function"].to_string())
        .collect();
    let Format { begin, end, list } = format;
    let call = r#"{"name": "the function's name", "arguments": {"argument": "value"}}"#;
    let call = if list {
        format!("[{call}]")
    } else {
        call.into()
    };
    format!(
        "You can call these functions, each described by a JSON object:\n{}\n\nTo call one, write\n{begin}{call}{end}\nand nothing else. Its result comes with the next message.",
        functions.join("\n")
    )
}

#[cfg(test)]
mod tests;

//! What a request asks of the form of an answer: JSON, a schema, calls of tools.

use serde_json::{Map, Value, json};

use super::Server;
use super::error::ApiError;
use super::fields::Fields;
use crate::constraint::Constraint;
use crate::ids::TokenId;
use crate::text::describe;
use crate::tools::{self, Call, Calls, Form, Piece, Tool, ToolChoice};

/// What a request asks of the form of its answer.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Wanted {
    /// The form of the text.
    pub format: Format,
    /// What the model may call.
    pub tools: Vec<Tool>,
    /// Which of them.
    pub choice: ToolChoice,
    /// Whether several calls may come at once.
    pub parallel: bool,
}

/// The form of a text.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum Format {
    /// Any.
    #[default]
    Text,
    /// A JSON object.
    JsonObject,
    /// JSON by a schema.
    JsonSchema {
        /// Its name.
        name: String,
        /// The schema.
        schema: Value,
    },
}

impl Wanted {
    /// Reads `response_format`, `tools`, `tool_choice` and `parallel_tool_calls` of a chat completion.
    pub fn of_chat(fields: &Fields<'_>) -> Self {
        let format = fields.object("response_format").map(|object| {
            let path = fields.path("response_format");
            let format = Fields::new(&path, object, fields.faults());
            // The schema stands in an object of its own.
            let schema_path = format.path("json_schema");
            let inner = match format.text("type") {
                Some("json_schema") => format.object("json_schema"),
                _ => None,
            };
            let inner = inner.map(|o| Fields::new(&schema_path, o, fields.faults()));
            read_format(&format, inner.as_ref().unwrap_or(&format))
        });
        Wanted {
            format: format.unwrap_or_default(),
            ..Wanted::of_tools(fields, true)
        }
    }

    /// Reads `text.format`, `tools`, `tool_choice` and `parallel_tool_calls` of a response.
    pub fn of_response(fields: &Fields<'_>) -> Self {
        let path = fields.path("text");
        let format_path = format!("{path}.format");
        let text = fields.object("text");
        let format = text
            .and_then(|text| Fields::new(&path, text, fields.faults()).object("format"))
            .map(|object| {
                let format = Fields::new(&format_path, object, fields.faults());
                read_format(&format, &format)
            });
        Wanted {
            format: format.unwrap_or_default(),
            ..Wanted::of_tools(fields, false)
        }
    }

    /// `nested` says whether a function stands in an object `function` of its tool.
    fn of_tools(fields: &Fields<'_>, nested: bool) -> Self {
        let empty = Vec::new();
        let list = fields.list("tools").unwrap_or(&empty);
        let tools = list.iter().enumerate().filter_map(|(i, tool)| {
            let path = fields.path(&format!("tools[{i}]"));
            read_tool(&path, tool, nested, fields)
        });
        let tools: Vec<Tool> = tools.collect();
        let choice = read_choice(fields, nested);
        if let ToolChoice::Named(name) = &choice
            && !tools.iter().any(|tool| tool.name == *name)
        {
            fields.fault("tool_choice", format!("there is no tool {name:?}"));
        }
        if choice == ToolChoice::Required && tools.is_empty() {
            fields.fault("tool_choice", "a call is required, and there are no tools");
        }
        Wanted {
            format: Format::Text,
            tools,
            choice,
            parallel: fields.flag("parallel_tool_calls").unwrap_or(true),
        }
    }
}

fn read_format(format: &Fields<'_>, schema: &Fields<'_>) -> Format {
    match format.text("type") {
        Some("text") => Format::Text,
        Some("json_object") => Format::JsonObject,
        Some("json_schema") => match schema.object("schema") {
            Some(object) => Format::JsonSchema {
                name: schema.text("name").unwrap_or("answer").into(),
                schema: Value::Object(object.clone()),
            },
            None => {
                schema.fault("schema", "expected a JSON schema");
                Format::Text
            }
        },
        Some(other) => {
            let expected = "expected text, json_object or json_schema";
            let other: String = other.chars().take(40).collect();
            format.fault("type", format!("{expected}, found {other:?}"));
            Format::Text
        }
        None => {
            if format.get("type").is_none() {
                format.fault("type", "expected text, json_object or json_schema");
            }
            Format::Text
        }
    }
}

fn read_tool(path: &str, tool: &Value, nested: bool, fields: &Fields<'_>) -> Option<Tool> {
    let faults = fields.faults();
    let Some(object) = tool.as_object() else {
        faults.add(
            path,
            format!("expected an object, found {}", describe(tool)),
        );
        return None;
    };
    let outer = Fields::new(path, object, faults);
    match outer.text("type") {
        Some("function") => {}
        Some(other) => {
            let other: String = other.chars().take(40).collect();
            outer.fault(
                "type",
                format!("only functions can be called here, not {other:?}"),
            );
            return None;
        }
        None => {
            outer.fault("type", "expected function");
            return None;
        }
    }
    let inner_path = outer.path("function");
    let function = if nested {
        let Some(object) = outer.object("function") else {
            outer.fault("function", "expected an object with the function's name");
            return None;
        };
        Fields::new(&inner_path, object, faults)
    } else {
        outer
    };
    let Some(name) = function.text("name").filter(|name| !name.is_empty()) else {
        function.fault("name", "expected the function's name");
        return None;
    };
    let parameters = function.object("parameters").cloned();
    Some(Tool {
        name: name.into(),
        description: function.text("description").map(Into::into),
        parameters: Value::Object(parameters.unwrap_or_else(Map::new)),
    })
}

fn read_choice(fields: &Fields<'_>, nested: bool) -> ToolChoice {
    match fields.get("tool_choice") {
        None => ToolChoice::Auto,
        Some(Value::String(word)) => match word.as_str() {
            "auto" => ToolChoice::Auto,
            "none" => ToolChoice::None,
            "required" => ToolChoice::Required,
            _ => {
                fields.fault("tool_choice", "expected auto, none, required or a function");
                ToolChoice::Auto
            }
        },
        Some(value) => {
            let function = if nested { &value["function"] } else { value };
            match function["name"].as_str() {
                Some(name) => ToolChoice::Named(name.into()),
                None => {
                    fields.fault("tool_choice", "expected auto, none, required or a function");
                    ToolChoice::Auto
                }
            }
        }
    }
}

/// What holds an answer to what is wanted of it, and what its text is read for.
#[derive(Debug, Clone, Default)]
pub struct Promise {
    /// The form of the text.
    pub constraint: Option<Constraint>,
    /// What is told to the model, and found in its text.
    pub calling: Option<Calling>,
}

/// Functions that an answer may call.
#[derive(Debug, Clone)]
pub struct Calling {
    /// The functions.
    pub tools: Vec<Tool>,
    /// How calls stand in the text.
    format: tools::Format,
    /// Special tokens that are part of calls.
    pub marks: Vec<TokenId>,
}

impl Calling {
    /// What finds calls in one answer.
    pub fn reader(&self) -> Calls {
        let names = self.tools.iter().map(|tool| tool.name.clone());
        Calls::new(self.format, names.collect())
    }

    /// The text and the calls of a whole answer.
    pub fn read(&self, text: &str) -> (String, Vec<Call>) {
        let mut reader = self.reader();
        let mut pieces = reader.push(text);
        pieces.extend(reader.finish());
        let (mut said, mut calls) = (String::new(), Vec::new());
        for piece in pieces {
            match piece {
                Piece::Text(text) => said.push_str(&text),
                Piece::Call(call) => calls.push(call),
            }
        }
        (said, calls)
    }
}

/// What can be promised of an answer. Compiling takes a while: not for the threads that speak HTTP.
pub fn of_request(server: &Server, wanted: &Wanted) -> Result<Promise, ApiError> {
    let called = !wanted.tools.is_empty() && wanted.choice != ToolChoice::None;
    let object = json!({"type": "object"});
    let answer = match &wanted.format {
        Format::Text => None,
        Format::JsonObject => Some(&object),
        Format::JsonSchema { schema, .. } => Some(schema),
    };
    if !called && answer.is_none() {
        return Ok(Promise::default());
    }
    let tokenizer = server.tokenizer()?;
    let format = server.model.tool_format();
    let form = Form {
        tools: if called { &wanted.tools } else { &[] },
        choice: &wanted.choice,
        parallel: wanted.parallel,
        answer,
    };
    let param = if answer.is_some() {
        "response_format"
    } else {
        "tools"
    };
    let constraint = match form.source(format, tokenizer) {
        None => None,
        Some(source) => {
            let compiled = server.model.constrain(&source);
            Some(compiled.map_err(|e| ApiError::field(param, e.to_string()))?)
        }
    };
    let calling = called.then(|| Calling {
        tools: wanted.tools.clone(),
        format,
        marks: format.special_marks(tokenizer),
    });
    Ok(Promise {
        constraint,
        calling,
    })
}

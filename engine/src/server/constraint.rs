//! What a request asks of the form of an answer: JSON, a schema, calls of tools.

use serde_json::{Map, Value};

use super::error::ApiError;
use super::fields::Fields;
use crate::text::describe;

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
    /// This one.
    Named(String),
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

/// What holds an answer to what is wanted of it.
pub fn of_request(wanted: &Wanted) -> Result<(), ApiError> {
    let not_yet = |param: &str, what: &str| {
        let message = format!("{what} cannot be promised by this server yet; leave `{param}` out");
        Err(ApiError::field(param, message).with_code("not_supported"))
    };
    match wanted.format {
        Format::Text => {}
        Format::JsonObject | Format::JsonSchema { .. } => {
            return not_yet("response_format", "answers of a given form");
        }
    }
    if !wanted.tools.is_empty() && wanted.choice != ToolChoice::None {
        return not_yet("tools", "calls of tools");
    }
    Ok(())
}

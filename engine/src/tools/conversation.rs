//! Conversations with calls in them, as chat templates want them.

use serde_json::{Value, json};

use super::{Format, Tool, described};

/// The messages of a conversation for a template that knows tools, or for one that does not: there, tools are described
/// in the system message, calls stand in the text of who made them, and results are the user's.
pub fn prepare(messages: &[Value], tools: &[Tool], format: Format, knows: bool) -> Vec<Value> {
    if knows {
        return messages.iter().map(with_objects).collect();
    }
    let mut out: Vec<Value> = messages.iter().map(|m| as_text(m, format)).collect();
    if !tools.is_empty() {
        let told = described(tools, format);
        match out.first_mut() {
            Some(first) if first["role"] == "system" => {
                let before = first["content"].as_str().unwrap_or_default().trim_end();
                first["content"] = format!("{before}\n\n{told}").trim().into();
            }
            _ => out.insert(0, json!({"role": "system", "content": told})),
        }
    }
    out
}

/// Arguments come as JSON in a string; templates print objects.
fn with_objects(message: &Value) -> Value {
    let mut message = message.clone();
    let calls = message.get_mut("tool_calls").and_then(Value::as_array_mut);
    for call in calls.into_iter().flatten() {
        if let Some(arguments) = call.pointer_mut("/function/arguments")
            && let Some(Ok(object @ Value::Object(_))) =
                arguments.as_str().map(serde_json::from_str::<Value>)
        {
            *arguments = object;
        }
    }
    message
}

fn as_text(message: &Value, format: Format) -> Value {
    let content = message["content"].as_str().unwrap_or_default();
    match message["role"].as_str() {
        Some("tool" | "function") => {
            let name = message["name"].as_str();
            let of = name.map_or(String::new(), |name| format!(" of {name}"));
            json!({"role": "user", "content": format!("Result{of}: {content}")})
        }
        Some("assistant") if message["tool_calls"].is_array() => {
            let message = with_objects(message);
            let calls = message["tool_calls"].as_array();
            let calls: Vec<String> = calls
                .into_iter()
                .flatten()
                .map(|call| {
                    let function = &call["function"];
                    json!({"name": function["name"], "arguments": function["arguments"]})
                        .to_string()
                })
                .collect();
            let Format { begin, end, list } = format;
            let calls = match (calls.is_empty(), list) {
                (true, _) => Vec::new(),
                (false, true) => vec![format!("{begin}[{}]{end}", calls.join(", "))],
                (false, false) => calls.iter().map(|c| format!("{begin}{c}{end}")).collect(),
            };
            let said = Some(content.to_string()).filter(|c| !c.is_empty());
            let text: Vec<String> = said.into_iter().chain(calls).collect();
            json!({"role": "assistant", "content": text.join("\n")})
        }
        _ => message.clone(),
    }
}

//! What `tokenizer_config.json` and the files beside it say: special tokens, added tokens, templates.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::SpecialTokens;
use crate::text::{Error, TextFiles, describe};

impl SpecialTokens {
    /// Takes every `*_token` that is a string or an object with `content`, and the lists of further ones.
    pub(super) fn read(&mut self, path: &Path, object: &Map<String, Value>) -> Result<(), Error> {
        for (name, value) in object
            .iter()
            .filter(|(name, _)| name.ends_with("_token") && !name.starts_with("add_"))
        {
            let text = match value {
                Value::String(text) => text,
                Value::Object(token) => match token.get("content") {
                    Some(Value::String(text)) => text,
                    _ => {
                        return Err(wrong_type(
                            path,
                            name,
                            value,
                            "a string or an object with \"content\"",
                        ));
                    }
                },
                Value::Null | Value::Bool(_) => continue,
                Value::Number(_) | Value::Array(_) => {
                    return Err(wrong_type(
                        path,
                        name,
                        value,
                        "a string or an object with \"content\"",
                    ));
                }
            };
            self.named.insert(name.clone(), text.clone());
        }
        for list in ["additional_special_tokens", "extra_special_tokens"] {
            let tokens = object
                .get(list)
                .and_then(Value::as_array)
                .into_iter()
                .flatten();
            let text = |token: &Value| {
                token
                    .as_str()
                    .or_else(|| token.get("content")?.as_str())
                    .map(str::to_owned)
            };
            self.unnamed.extend(tokens.filter_map(text));
        }
        Ok(())
    }
}

pub(super) fn wrong_type(path: &Path, key: &str, found: &Value, expected: &str) -> Error {
    Error::File {
        path: path.into(),
        found: format!("{key} is {}", describe(found)),
        expected: expected.into(),
        help: "Correct the file or fetch it again.".into(),
    }
}

/// `added_tokens_decoder`: id to token.
pub(super) fn added_tokens(
    path: &Path,
    config: &Map<String, Value>,
) -> Result<Vec<(u32, AddedToken)>, Error> {
    let tokens = match config.get("added_tokens_decoder") {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(tokens)) => tokens,
        Some(other) => {
            return Err(wrong_type(
                path,
                "added_tokens_decoder",
                other,
                "an object from ids to tokens",
            ));
        }
    };
    let read = |(id, token): (&String, &Value)| {
        let key = || format!("added_tokens_decoder.{id}");
        let wrong = || {
            wrong_type(
                path,
                &key(),
                token,
                "an object with \"content\", under a token id",
            )
        };
        let id = id.parse().map_err(|_| wrong())?;
        let content = token
            .get("content")
            .and_then(Value::as_str)
            .ok_or_else(wrong)?;
        let flag = |name: &str| token.get(name).and_then(Value::as_bool).unwrap_or(false);
        let special = flag("special");
        let normalized = token
            .get("normalized")
            .and_then(Value::as_bool)
            .unwrap_or(!special);
        let token = AddedToken::from(content, special)
            .single_word(flag("single_word"))
            .lstrip(flag("lstrip"))
            .rstrip(flag("rstrip"))
            .normalized(normalized);
        Ok((id, token))
    };
    tokens.iter().map(read).collect()
}

/// The folder of named templates.
const MORE_TEMPLATES: &str = "additional_chat_templates";

/// Chat templates by name; files come before the configuration's, as in transformers.
pub(super) fn templates(
    files: &(impl TextFiles + ?Sized),
    path: &Path,
    config: &Map<String, Value>,
) -> Result<BTreeMap<String, String>, Error> {
    let mut templates = BTreeMap::new();
    if let Some(text) = files.read("chat_template.jinja")? {
        templates.insert("default".to_owned(), text);
    }
    for file in files.list(MORE_TEMPLATES) {
        if let Some(name) = file.strip_suffix(".jinja") {
            let text = files.read(&format!("{MORE_TEMPLATES}/{file}"))?;
            templates.extend(text.map(|text| (name.to_owned(), text)));
        }
    }
    if !templates.is_empty() {
        return Ok(templates);
    }
    let expected = "a template, or a list of objects with \"name\" and \"template\"";
    match config.get("chat_template") {
        None | Some(Value::Null) => Ok(BTreeMap::new()),
        Some(Value::String(text)) => Ok(BTreeMap::from([("default".into(), text.clone())])),
        Some(Value::Array(list)) => list
            .iter()
            .map(|entry| {
                let field = |key| entry.get(key).and_then(Value::as_str).map(str::to_owned);
                let wrong = || wrong_type(path, "an entry of chat_template", entry, expected);
                Ok((
                    field("name").ok_or_else(wrong)?,
                    field("template").ok_or_else(wrong)?,
                ))
            })
            .collect(),
        Some(Value::Object(named)) => named
            .iter()
            .map(|(name, text)| match text {
                Value::String(text) => Ok((name.clone(), text.clone())),
                other => Err(wrong_type(
                    path,
                    &format!("chat_template.{name}"),
                    other,
                    "a template",
                )),
            })
            .collect(),
        Some(other) => Err(wrong_type(path, "chat_template", other, expected)),
    }
}

//! Text in and text out: tokens, chat templates, streamed text and stop strings.

pub mod chat_template;
pub mod detokenize;
pub mod stop;
pub mod tokenizer;

pub use chat_template::{Chat, ChatTemplate};
pub use detokenize::Detokenizer;
pub use stop::{Passed, StopStrings};
pub use tokenizer::{Bytes, EncodeOptions, SpecialTokens, Tokenizer};

use std::path::{Path, PathBuf};

/// What is wrong with a file, a prompt or a template, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read.
    #[error("{path}: cannot be read: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{path}: {found}; expected {expected}. {help}")]
    File {
        /// The file.
        path: PathBuf,
        /// What it holds.
        found: String,
        /// What it should hold.
        expected: String,
        /// What to do.
        help: String,
    },
    /// The directory has no tokenizer, and the model is not known to read bytes.
    #[error(
        "{directory}: no tokenizer.json; expected one beside config.json. Fetch it from the model's page, or convert the older vocabulary files with transformers' `AutoTokenizer.from_pretrained(...).save_pretrained(...)`"
    )]
    NoTokenizer {
        /// The directory.
        directory: PathBuf,
    },
    /// The tokenizer failed on a text or on ids.
    #[error("the tokenizer failed to {action}: {reason}")]
    Tokenizer {
        /// "encode" or "decode".
        action: &'static str,
        /// What it said.
        reason: String,
    },
    /// A chat template does not compile or render.
    #[error("chat template{}: {reason}", line.map(|line| format!(", line {line}")).unwrap_or_default())]
    Template {
        /// Line of the template, from 1, where known.
        line: Option<usize>,
        /// What is wrong.
        reason: String,
    },
    /// A stop string has no characters.
    #[error("stop string {index} is empty: it would stop before the first token; leave it out")]
    EmptyStop {
        /// Its place in the list, from 0.
        index: usize,
    },
}

/// Reads a text file; `None` if there is none.
fn read_if_there(path: &Path) -> Result<Option<String>, Error> {
    match std::fs::read(path) {
        Ok(bytes) => match String::from_utf8(bytes) {
            Ok(text) => Ok(Some(text)),
            Err(error) => Err(Error::File {
                path: path.into(),
                found: format!("byte {} is no UTF-8", error.utf8_error().valid_up_to()),
                expected: "UTF-8 text".into(),
                help: "The file is damaged: fetch it again.".into(),
            }),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::Read {
            path: path.into(),
            source,
        }),
    }
}

/// Reads a JSON object; `None` if there is no such file.
pub(crate) fn read_object(
    path: &Path,
) -> Result<Option<serde_json::Map<String, serde_json::Value>>, Error> {
    let Some(text) = read_if_there(path)? else {
        return Ok(None);
    };
    let wrong = |found: String| Error::File {
        path: path.into(),
        found,
        expected: "a JSON object".into(),
        help: "The file is damaged: fetch it again.".into(),
    };
    match serde_json::from_str(&text) {
        Ok(serde_json::Value::Object(object)) => Ok(Some(object)),
        Ok(other) => Err(wrong(format!("holds {}", describe(&other)))),
        Err(error) => Err(wrong(error.to_string())),
    }
}

/// A JSON value in few words.
pub(crate) fn describe(value: &serde_json::Value) -> String {
    use serde_json::Value;
    match value {
        Value::Null => "null".into(),
        Value::Array(items) => format!("a list of {}", items.len()),
        Value::Object(_) => "an object".into(),
        Value::String(text) if text.len() > 60 => "a long string".into(),
        Value::Bool(_) | Value::Number(_) | Value::String(_) => value.to_string(),
    }
}

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

/// The text files of a model: a directory on disk, or files that the binary holds.
pub trait TextFiles {
    /// The text of a file; `None` if there is none.
    fn read(&self, name: &str) -> Result<Option<String>, Error>;

    /// What to call a file in messages.
    fn path(&self, name: &str) -> PathBuf;

    /// The names of all files in a folder below.
    fn list(&self, folder: &str) -> Vec<String>;
}

impl TextFiles for Path {
    fn read(&self, name: &str) -> Result<Option<String>, Error> {
        let path = self.join(name);
        match std::fs::read(&path) {
            Ok(bytes) => match String::from_utf8(bytes) {
                Ok(text) => Ok(Some(text)),
                Err(error) => Err(Error::File {
                    path,
                    found: format!("byte {} is no UTF-8", error.utf8_error().valid_up_to()),
                    expected: "UTF-8 text".into(),
                    help: "The file is damaged: fetch it again.".into(),
                }),
            },
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(Error::Read { path, source }),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.join(name)
    }

    fn list(&self, folder: &str) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.join(folder)) else {
            return Vec::new();
        };
        let names = entries.flatten().map(|e| e.file_name().into_string());
        names.filter_map(Result::ok).collect()
    }
}

/// Reads a JSON object; `None` if there is no such file.
pub(crate) fn read_object(
    files: &(impl TextFiles + ?Sized),
    name: &str,
) -> Result<Option<serde_json::Map<String, serde_json::Value>>, Error> {
    let Some(text) = files.read(name)? else {
        return Ok(None);
    };
    let wrong = |found: String| Error::File {
        path: files.path(name),
        found,
        expected: "a JSON object".into(),
        help: "The file is damaged: fetch it again.".into(),
    };
    match serde_json::from_str(&without_bare_numbers(&text)) {
        Ok(serde_json::Value::Object(object)) => Ok(Some(object)),
        Ok(other) => Err(wrong(format!("holds {}", describe(&other)))),
        Err(error) => Err(wrong(error.to_string())),
    }
}

/// Python writes numbers that are none bare. Nothing that is read here asks for one, so they are null.
fn without_bare_numbers(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let (mut rest, mut quoted) = (text, false);
    while let Some(c) = rest.chars().next() {
        let bare = ["NaN", "Infinity", "-Infinity"];
        let found = bare.iter().find(|b| !quoted && rest.starts_with(**b));
        let taken = match (found, c) {
            (Some(bare), _) => {
                out.push_str("null");
                rest = &rest[bare.len()..];
                continue;
            }
            // An escaped character cannot end the text.
            (None, '\\') if quoted => 1 + rest[1..].chars().next().map_or(0, char::len_utf8),
            (None, _) => c.len_utf8(),
        };
        quoted ^= c == '"';
        out.push_str(&rest[..taken]);
        rest = &rest[taken..];
    }
    out
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

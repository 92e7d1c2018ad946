//! From a source to a constraint, within limits.

use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use llguidance::Matcher;
use llguidance::api::TopLevelGrammar;
use serde_json::{Value, json};

use super::{Constraint, Error, Source, Vocabulary};

/// Most bytes of a source. A schema of this size has some thousand properties.
const MOST_BYTES: usize = 256 << 10;
/// Most levels of a schema's JSON.
const MOST_LEVELS: usize = 64;
/// Most texts to choose from.
const MOST_CHOICES: usize = 10_000;
/// So long a source may take. What the library may do is limited in units of its work, which is about a second's.
const PATIENCE: Duration = Duration::from_secs(20);
/// Expressions are walked by recursion. Only what is used of it is ever committed.
const STACK: usize = 64 << 20;
/// What may stand between two parts of JSON: no more, lest a model go on with it for ever.
const WHITESPACE: &str = r" |\n[ \t]{0,40}";

pub(super) struct Compiled {
    pub(super) source: Source,
    pub(super) vocabulary: Arc<Vocabulary>,
    /// At the beginning. Behind a lock, as copying one is said to touch its caches.
    pub(super) start: Mutex<Matcher>,
    pub(super) warnings: Vec<String>,
}

impl Vocabulary {
    /// Makes a constraint of a source, or says what is wrong with it. Takes milliseconds, at most some seconds.
    pub fn compile(self: &Arc<Self>, source: &Source) -> Result<Constraint, Error> {
        let kind = source.kind();
        check_size(source)?;
        let (send, receive) = sync_channel(1);
        let (vocabulary, task) = (self.clone(), source.clone());
        let refused = move |reason: String| Error::Refused {
            kind,
            reason,
            help: help(kind),
        };
        let thread = std::thread::Builder::new().name("constraint".into());
        let spawned = thread.stack_size(STACK).spawn(move || {
            let compiled = vocabulary.compile_now(task).map_err(refused);
            send.send(compiled).ok(); // nobody waits any more
        });
        spawned.map_err(|error| refused(format!("no thread to compile it: {error}")))?;
        match receive.recv_timeout(PATIENCE) {
            Ok(compiled) => compiled.map(|c| Constraint(Arc::new(c))),
            Err(RecvTimeoutError::Timeout) => Err(Error::Slow {
                kind,
                seconds: PATIENCE.as_secs(),
            }),
            Err(RecvTimeoutError::Disconnected) => Err(refused("the compiler panicked".into())),
        }
    }

    fn compile_now(self: Arc<Self>, source: Source) -> Result<Compiled, String> {
        let grammar = match &source {
            Source::JsonSchema(schema) => {
                let schema = match schema {
                    Value::Bool(true) => json!({}),
                    Value::Object(_) => schema.clone(),
                    other => {
                        let found = crate::text::describe(other);
                        return Err(format!("expected an object, found {found}"));
                    }
                };
                TopLevelGrammar::from_json_schema(with_whitespace(schema))
            }
            Source::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Source::Grammar(grammar) => TopLevelGrammar::from_lark(grammar.clone()),
            Source::Choice(texts) => {
                let texts: Vec<String> = texts.iter().map(|text| escape(text)).collect();
                TopLevelGrammar::from_regex(&texts.join("|"))
            }
        };
        let parser = self.factory.create_parser(grammar);
        let mut start = Matcher::new(parser);
        // The first tokens show what can never be followed, and warm the caches.
        let first = start.deep_clone().compute_mask();
        if let Some(error) = start.get_error() {
            return Err(plain(&error));
        }
        if let Err(error) = first {
            let mut tried = start.deep_clone();
            let empty = tried.is_accepting().unwrap_or(false);
            return Err(match empty {
                true => "it allows the empty text only".into(),
                false => format!("no text has this form ({})", plain(&error.to_string())),
            });
        }
        let warnings = start.grammar_warnings();
        Ok(Compiled {
            source,
            vocabulary: self,
            start: Mutex::new(start),
            warnings,
        })
    }
}

fn check_size(source: &Source) -> Result<(), Error> {
    let kind = source.kind();
    let too_large = |found, most, unit, help| {
        Err(Error::TooLarge {
            kind,
            found,
            most,
            unit,
            help,
        })
    };
    let bytes = match source {
        Source::JsonSchema(schema) => {
            let levels = levels(schema);
            if levels > MOST_LEVELS {
                let help = "put inner schemas under \"$defs\" and refer to them by \"$ref\"";
                return too_large(levels, MOST_LEVELS, "levels", help);
            }
            schema.to_string().len()
        }
        Source::Regex(text) | Source::Grammar(text) => text.len(),
        Source::Choice(texts) => {
            if texts.len() > MOST_CHOICES {
                let help = "let the model write a text and look it up";
                return too_large(texts.len(), MOST_CHOICES, "texts", help);
            }
            if texts.iter().all(String::is_empty) {
                return Err(Error::Refused {
                    kind,
                    reason: "there is no text to choose".into(),
                    help: "give at least one text that is not empty",
                });
            }
            texts.iter().map(String::len).sum()
        }
    };
    if bytes > MOST_BYTES {
        return too_large(bytes, MOST_BYTES, "bytes", "leave out what is not needed");
    }
    Ok(())
}

/// How deep lists and objects stand within each other. The stack is a list: depth comes from outside.
fn levels(value: &Value) -> usize {
    let mut stack = vec![(value, 1)];
    let mut most = 0;
    while let Some((value, level)) = stack.pop() {
        most = most.max(level);
        match value {
            Value::Array(items) => stack.extend(items.iter().map(|v| (v, level + 1))),
            Value::Object(items) => stack.extend(items.values().map(|v| (v, level + 1))),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
        }
    }
    most
}

/// A schema with our whitespace, unless its own `x-guidance` says something about that.
pub(crate) fn with_whitespace(mut schema: Value) -> Value {
    if let Some(object) = schema.as_object_mut() {
        let options = object.entry("x-guidance").or_insert_with(|| json!({}));
        if let Some(options) = options.as_object_mut()
            && !options.contains_key("whitespace_flexible")
        {
            let pattern = options.entry("whitespace_pattern");
            pattern.or_insert_with(|| WHITESPACE.into());
        }
    }
    schema
}

/// A regular expression that matches `text` alone.
fn escape(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            _ => {
                if c.is_ascii_punctuation() {
                    out.push('\\');
                }
                out.push(c);
            }
        }
    }
    out
}

/// The library's message without what follows its first lines.
pub(super) fn plain(error: &str) -> String {
    let end = error.find("\n<").unwrap_or(error.len());
    let lines: Vec<&str> = error[..end].lines().map(str::trim).collect();
    let mut text = lines.join("; ");
    if text.chars().count() > 400 {
        text = text.chars().take(400).collect::<String>() + " …";
    }
    text
}

fn help(kind: &str) -> &'static str {
    match kind {
        "JSON schema" => "change or leave out what is named, or allow more than one value",
        "regular expression" => {
            "write it in the syntax of Rust's regex crate, without anchors and look-around, with small counts"
        }
        "grammar" => "write it in Lark's syntax, with a rule `start`",
        _ => "give texts that differ",
    }
}

//! `config.json`, read as the Python world writes it.
//!
//! Bare `NaN`, `Infinity` and `-Infinity` are numbers, and so are the texts "Infinity", "-Infinity" and
//! "NaN" and the form `{"__float__": "Infinity"}`. Of a key given twice the last one counts. Every
//! value knows its line and column.

use std::collections::HashMap;
use std::iter::Peekable;
use std::str::Chars;

use strata_layers::yaml::{Entry, Value};
use strata_layers::{Faults, Mark, Node};

use crate::cards;
use crate::error::{Error, Result};
use crate::files::ModelFiles;
use crate::gguf;

/// Most bytes of a config. Those of published models have some thousands.
const MAX_BYTES: usize = 4 << 20;
/// Deepest nesting.
const MAX_DEPTH: usize = 64;

/// A JSON mapping whose values know their places.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    file: String,
    root: Node,
    /// Further files of the model, for keys that this one lacks.
    also: Vec<Config>,
}

impl Config {
    /// The `config.json` of a model, and what else the cards say that a model may have beside it; of a
    /// GGUF file, what its metadata says in the same words.
    pub fn open(files: &ModelFiles) -> Result<Self> {
        if let Some(gguf) = files.gguf() {
            return Ok(gguf::find(gguf)?.config_of(gguf)?);
        }
        let Some(name) = Config::name_in(files) else {
            return Err(Error::file(
                files.name(),
                "there is no config.json; the folder of a model from Hugging Face has one",
            ));
        };
        let text = files.text(name)?.unwrap_or_default();
        let mut config = Config::parse(&text, &files.label(name))?;
        for name in cards::beside_config() {
            if let Some(text) = files.text(name)? {
                config.also.push(Config::parse(&text, &files.label(name))?);
            }
        }
        Ok(config)
    }

    /// The name of the config among a model's files: config.json, or what a card names in its place.
    pub fn name_in(files: &ModelFiles) -> Option<&'static str> {
        cards::config_names().find(|name| files.exists(name))
    }

    /// Reads JSON text. `file` is its name for messages.
    pub fn parse(text: &str, file: &str) -> std::result::Result<Self, Faults> {
        let mut faults = Faults::new(file);
        let root = parse(text, &mut faults);
        faults.or(root.map(|root| Config::from_node(root, file)))
    }

    /// A config made by code: the entries of a mapping.
    pub(crate) fn from_node(root: Node, file: &str) -> Self {
        Config {
            file: file.into(),
            root,
            also: Vec::new(),
        }
    }

    /// The files that it was read from, config.json first: of a key in several the first counts.
    pub(crate) fn files(&self) -> impl Iterator<Item = &Config> {
        std::iter::once(self).chain(&self.also)
    }

    /// Its name for messages.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// The value under a key.
    pub fn get(&self, key: &str) -> Option<&Node> {
        self.root.get(key)
    }

    /// All entries, in the order of the file.
    pub fn entries(&self) -> &[Entry] {
        match &self.root.value {
            Value::Map(entries) => entries,
            _ => &[],
        }
    }

    /// Puts the mapping that is this JSON text under a key.
    pub fn set(&mut self, key: &str, json: &str) -> std::result::Result<(), Faults> {
        let value = Config::parse(json, key)?.root;
        self.remove(key);
        if let Value::Map(entries) = &mut self.root.value {
            let (key, at) = (key.into(), value.at);
            entries.push(Entry { key, at, value });
        }
        Ok(())
    }

    /// Takes out a key and what is under it.
    pub fn remove(&mut self, key: &str) {
        if let Value::Map(entries) = &mut self.root.value {
            entries.retain(|e| e.key != key);
        }
    }

    /// The config as the text of a config.json.
    pub fn json(&self) -> String {
        let mut out = serde_json::to_string_pretty(&json_of(&self.root.value)).unwrap_or_default();
        out.push('\n');
        out
    }

    /// The texts under a key that holds one or a list of them.
    pub fn texts(&self, key: &str) -> Vec<&str> {
        match self.get(key).map(|n| &n.value) {
            Some(Value::Text(text)) => vec![text],
            Some(Value::List(list)) => list
                .iter()
                .filter_map(|n| match &n.value {
                    Value::Text(text) => Some(text.as_str()),
                    _ => None,
                })
                .collect(),
            _ => Vec::new(),
        }
    }
}

/// A value as JSON; numbers that JSON lacks as mappings that transformers reads as the numbers again.
fn json_of(value: &Value) -> serde_json::Value {
    use serde_json::Value as Json;
    match value {
        Value::Null => Json::Null,
        Value::Bool(b) => Json::from(*b),
        Value::Int(i) => Json::from(*i),
        Value::Float(f) if !f.is_finite() => {
            let name = match () {
                () if f.is_nan() => "NaN",
                () if *f > 0.0 => "Infinity",
                () => "-Infinity",
            };
            serde_json::json!({ "__float__": name })
        }
        Value::Float(f) => Json::from(*f),
        Value::Text(t) => Json::from(t.as_str()),
        Value::List(list) => list.iter().map(|n| json_of(&n.value)).collect(),
        Value::Map(entries) => {
            let entry = |e: &Entry| (e.key.clone(), json_of(&e.value.value));
            Json::Object(entries.iter().map(entry).collect())
        }
    }
}

/// The fault was added when there is no value.
fn parse(text: &str, faults: &mut Faults) -> Option<Node> {
    if text.len() > MAX_BYTES {
        let message = format!(
            "the file has {} bytes, more than the {MAX_BYTES} that are read",
            text.len()
        );
        faults.add(Mark::default(), message);
        return None;
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut json = Json {
        chars: text.chars().peekable(),
        at: Mark { line: 1, column: 1 },
    };
    let node = json.document();
    node.map_err(|message| faults.add(json.at, message)).ok()
}

struct Json<'a> {
    chars: Peekable<Chars<'a>>,
    at: Mark,
}

type Read<T> = std::result::Result<T, String>;

impl Json<'_> {
    fn document(&mut self) -> Read<Node> {
        let node = self.value(0)?;
        self.space();
        if let Some(c) = self.chars.peek() {
            return Err(format!("found {c:?} after the end"));
        }
        match node.value {
            Value::Map(_) => Ok(node),
            other => {
                self.at = node.at;
                Err(format!("found {}, expected a mapping", other.describe()))
            }
        }
    }

    fn next(&mut self) -> Option<char> {
        let c = self.chars.next()?;
        if c == '\n' {
            self.at.line = self.at.line.saturating_add(1);
            self.at.column = 1;
        } else {
            self.at.column = self.at.column.saturating_add(1);
        }
        Some(c)
    }

    fn space(&mut self) {
        while self
            .chars
            .peek()
            .is_some_and(|c| matches!(c, ' ' | '\t' | '\n' | '\r'))
        {
            self.next();
        }
    }

    /// Takes `wanted` if it comes next.
    fn take(&mut self, wanted: char) -> bool {
        self.space();
        let here = self.chars.peek() == Some(&wanted);
        if here {
            self.next();
        }
        here
    }

    fn expected<T>(&mut self, what: &str) -> Read<T> {
        Err(match self.chars.peek() {
            Some(c) => format!("found {c:?}, expected {what}"),
            None => format!("the file ends where {what} is expected"),
        })
    }

    fn value(&mut self, depth: usize) -> Read<Node> {
        self.space();
        if depth > MAX_DEPTH {
            return Err(format!("values are nested more than {MAX_DEPTH} deep"));
        }
        let at = self.at;
        let value = match self.chars.peek() {
            Some('{') => self.map(depth)?,
            Some('[') => self.list(depth)?,
            Some('"') => {
                let text = self.text()?;
                infinite(&text).map_or(Value::Text(text), Value::Float)
            }
            Some(c) if c.is_ascii_alphanumeric() || "+-.".contains(*c) => self.word(at)?,
            _ => return self.expected("a value"),
        };
        Ok(Node { value, at })
    }

    fn map(&mut self, depth: usize) -> Read<Value> {
        self.next();
        let mut entries: Vec<Entry> = Vec::new();
        let mut places: HashMap<String, usize> = HashMap::new();
        if self.take('}') {
            return Ok(Value::Map(entries));
        }
        loop {
            self.space();
            if self.chars.peek() != Some(&'"') {
                return self.expected("a key in double quotes");
            }
            let at = self.at;
            let key = self.text()?;
            if !self.take(':') {
                return self.expected(&format!("`:` after the key {key:?}"));
            }
            let value = self.value(depth + 1)?;
            let entry = Entry { key, at, value };
            match places.get(&entry.key) {
                Some(&place) => entries[place] = entry,
                None => {
                    places.insert(entry.key.clone(), entries.len());
                    entries.push(entry);
                }
            }
            if self.take('}') {
                break;
            }
            if !self.take(',') {
                return self.expected("`,` or `}`");
            }
        }
        match &entries[..] {
            [only] if only.key == "__float__" => match only.value.value {
                Value::Float(f) => Ok(Value::Float(f)),
                _ => Ok(Value::Map(entries)),
            },
            _ => Ok(Value::Map(entries)),
        }
    }

    fn list(&mut self, depth: usize) -> Read<Value> {
        self.next();
        let mut list = Vec::new();
        if self.take(']') {
            return Ok(Value::List(list));
        }
        loop {
            list.push(self.value(depth + 1)?);
            if self.take(']') {
                return Ok(Value::List(list));
            }
            if !self.take(',') {
                return self.expected("`,` or `]`");
            }
        }
    }

    fn text(&mut self) -> Read<String> {
        self.next();
        let mut text = String::new();
        loop {
            match self.next() {
                Some('"') => return Ok(text),
                Some('\\') => text.push(self.escape()?),
                Some(c) if c >= ' ' => text.push(c),
                Some(c) => return Err(format!("found {c:?} inside a text; write it as an escape")),
                None => return Err("the file ends inside a text".into()),
            }
        }
    }

    fn escape(&mut self) -> Read<char> {
        Ok(match self.next() {
            Some('n') => '\n',
            Some('t') => '\t',
            Some('r') => '\r',
            Some('b') => '\u{8}',
            Some('f') => '\u{c}',
            Some(c @ ('"' | '\\' | '/')) => c,
            Some('u') => {
                let first = self.hex()?;
                // The two halves of a character beyond 16 bits follow each other.
                if (0xd800..0xdc00).contains(&first) && self.chars.clone().take(2).eq(['\\', 'u']) {
                    self.next();
                    self.next();
                    let second = self.hex()?;
                    let low = second.wrapping_sub(0xdc00) & 0x3ff;
                    char::from_u32(0x10000 + ((first - 0xd800) << 10) + low)
                } else {
                    char::from_u32(first)
                }
                .unwrap_or(char::REPLACEMENT_CHARACTER)
            }
            Some(c) => return Err(format!("there is no escape \\{c}")),
            None => return Err("the file ends inside a text".into()),
        })
    }

    fn hex(&mut self) -> Read<u32> {
        let mut code = 0;
        for _ in 0..4 {
            let digit = self.next().and_then(|c| c.to_digit(16));
            code = code * 16 + digit.ok_or("\\u must be followed by four hexadecimal digits")?;
        }
        Ok(code)
    }

    /// `true`, `null`, a number.
    fn word(&mut self, at: Mark) -> Read<Value> {
        let mut word = String::new();
        while let Some(c) = self.chars.peek()
            && (c.is_ascii_alphanumeric() || "+-._".contains(*c))
        {
            word.push(*c);
            self.next();
        }
        let number = |word: &str| {
            let digit = word
                .trim_start_matches('-')
                .starts_with(|c: char| c.is_ascii_digit());
            word.parse::<f64>().ok().filter(|_| digit)
        };
        match word.as_str() {
            "null" => Ok(Value::Null),
            "true" => Ok(Value::Bool(true)),
            "false" => Ok(Value::Bool(false)),
            _ => match infinite(&word).or_else(|| number(&word)) {
                Some(f) => Ok(word.parse().map_or(Value::Float(f), Value::Int)),
                None => {
                    self.at = at;
                    let word: String = word.chars().take(40).collect();
                    Err(format!("found `{word}`, expected a value"))
                }
            },
        }
    }
}

fn infinite(text: &str) -> Option<f64> {
    match text {
        "Infinity" => Some(f64::INFINITY),
        "-Infinity" => Some(f64::NEG_INFINITY),
        "NaN" => Some(f64::NAN),
        _ => None,
    }
}

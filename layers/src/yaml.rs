//! YAML as a tree in which every value knows its line and column.
//!
//! Plans and cards are read from this tree rather than straight into structs, for two reasons: all
//! faults of a file are reported together, each with its place, and a value that a card computed
//! still points at the line of the card that asked for it.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_saphyr::Spanned;

/// A place in a file, both counted from one. Zero stands for "no place": a value made by code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, PartialOrd, Ord)]
pub struct Mark {
    /// Line.
    pub line: u32,
    /// Column.
    pub column: u32,
}

/// A value and where it stands.
#[derive(Debug, Clone, Default)]
pub struct Node {
    /// What it is.
    pub value: Value,
    /// Where it is written.
    pub at: Mark,
}

/// What a YAML node can be.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum Value {
    /// `null`, `~` or nothing.
    #[default]
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// A number with a fraction or an exponent.
    Float(f64),
    /// Anything else without structure.
    Text(String),
    /// A sequence.
    List(Vec<Node>),
    /// A mapping, in the order of the file.
    Map(Vec<Entry>),
}

/// One entry of a mapping.
#[derive(Debug, Clone)]
pub struct Entry {
    /// The key.
    pub key: String,
    /// Where the key stands.
    pub at: Mark,
    /// Its value.
    pub value: Node,
}

/// Two nodes are equal when their values are, wherever they stand.
impl PartialEq for Node {
    fn eq(&self, other: &Self) -> bool {
        self.value == other.value
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Self) -> bool {
        (&self.key, &self.value) == (&other.key, &other.value)
    }
}

impl Value {
    /// A word for messages: `a list`, `the number 3`, `"text"`.
    pub fn describe(&self) -> String {
        match self {
            Value::Null => "nothing".into(),
            Value::Bool(b) => b.to_string(),
            Value::Int(i) => i.to_string(),
            Value::Float(f) => print_float(*f),
            Value::Text(t) if t.chars().count() > 40 => {
                format!("{:?}…", t.chars().take(40).collect::<String>())
            }
            Value::Text(t) => format!("{t:?}"),
            Value::List(_) => "a list".into(),
            Value::Map(_) => "a mapping".into(),
        }
    }
}

impl From<Value> for Node {
    fn from(value: Value) -> Self {
        Node {
            value,
            at: Mark::default(),
        }
    }
}

impl Node {
    /// A mapping made by code.
    pub fn map<'a>(entries: impl IntoIterator<Item = (&'a str, Value)>) -> Value {
        let entry = |(key, value): (&str, Value)| Entry {
            key: key.into(),
            at: Mark::default(),
            value: value.into(),
        };
        Value::Map(
            entries
                .into_iter()
                .filter(|(_, v)| *v != Value::Null)
                .map(entry)
                .collect(),
        )
    }

    /// The value under `key`, if this is a mapping that has it.
    pub fn get(&self, key: &str) -> Option<&Node> {
        match &self.value {
            Value::Map(entries) => entries.iter().find(|e| e.key == key).map(|e| &e.value),
            _ => None,
        }
    }
}

/// Most nodes that a file may unfold to, aliases included. The plan of a model with a thousand blocks
/// of their own stays below a tenth of it.
const MAX_NODES: usize = 200_000;
/// Deepest nesting.
const MAX_DEPTH: usize = 64;
/// Most bytes of text.
const MAX_BYTES: usize = 8 << 20;

/// Reads one YAML document. `file` is its name for messages. Bombs of any kind end in a fault.
pub fn parse(text: &str, file: &str) -> Result<Node, Faults> {
    let mut faults = Faults::new(file);
    if text.len() > MAX_BYTES {
        faults.add(
            Mark::default(),
            format!(
                "the file has {} bytes, more than the {MAX_BYTES} that are read",
                text.len()
            ),
        );
        return Err(faults);
    }
    let budget = serde_saphyr::budget! {
        max_nodes: MAX_NODES,
        max_depth: MAX_DEPTH,
        max_total_scalar_bytes: 4 * MAX_BYTES,
        max_documents: 1,
    };
    let options = serde_saphyr::options! { budget: budget, with_snippet: false };
    match serde_saphyr::from_str_with_options::<Node>(text, options) {
        Ok(node) => Ok(node),
        Err(error) => {
            let at = error.location().map(|l| mark(&l)).unwrap_or_default();
            let message = error.without_snippet().to_string();
            // The parser repeats the place at the end of its message; ours stands in front.
            let cut = message.find(" at line ").unwrap_or(message.len());
            let message = if message.starts_with("budget breached") {
                format!(
                    "the file unfolds to more than is read: {MAX_NODES} values, {MAX_DEPTH} deep, in one document"
                )
            } else {
                message[..cut].to_string()
            };
            faults.add(at, message);
            Err(faults)
        }
    }
}

fn mark(location: &serde_saphyr::Location) -> Mark {
    let narrow = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
    Mark {
        line: narrow(location.line()),
        column: narrow(location.column()),
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Value>::deserialize(deserializer)?;
        Ok(Node {
            at: mark(&spanned.defined),
            value: spanned.value,
        })
    }
}

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Values;
        impl<'de> Visitor<'de> for Values {
            type Value = Value;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a YAML value")
            }
            fn visit_unit<E>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }
            fn visit_none<E>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }
            fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
                Ok(Value::Bool(v))
            }
            fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
                Ok(Value::Int(v))
            }
            fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
                Ok(i64::try_from(v).map_or(Value::Float(v as f64), Value::Int))
            }
            fn visit_i128<E>(self, v: i128) -> Result<Value, E> {
                Ok(i64::try_from(v).map_or(Value::Float(v as f64), Value::Int))
            }
            fn visit_u128<E>(self, v: u128) -> Result<Value, E> {
                Ok(i64::try_from(v).map_or(Value::Float(v as f64), Value::Int))
            }
            fn visit_f64<E>(self, v: f64) -> Result<Value, E> {
                Ok(Value::Float(v))
            }
            fn visit_str<E>(self, v: &str) -> Result<Value, E> {
                Ok(Value::Text(v.into()))
            }
            fn visit_some<D: Deserializer<'de>>(self, d: D) -> Result<Value, D::Error> {
                d.deserialize_any(self)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Value, A::Error> {
                let mut list = Vec::new();
                while let Some(node) = seq.next_element()? {
                    list.push(node);
                }
                Ok(Value::List(list))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
                let mut entries = Vec::new();
                while let Some(key) = map.next_key::<Spanned<String>>()? {
                    let at = mark(&key.defined);
                    entries.push(Entry {
                        key: key.value,
                        at,
                        value: map.next_value()?,
                    });
                }
                Ok(Value::Map(entries))
            }
        }
        deserializer.deserialize_any(Values)
    }
}

/// One thing that is wrong with a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// Where.
    pub at: Mark,
    /// What was found, what was expected, what to do.
    pub message: String,
}

/// All that is wrong with a file, in order of place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Faults {
    file: String,
    list: Vec<Fault>,
}

impl Faults {
    /// No faults yet of `file`, which is named in messages.
    pub fn new(file: &str) -> Self {
        Faults {
            file: file.into(),
            list: Vec::new(),
        }
    }

    /// Adds one; the same fault at the same place is kept once.
    pub fn add(&mut self, at: Mark, message: impl Into<String>) {
        let fault = Fault {
            at,
            message: message.into(),
        };
        if !self.list.contains(&fault) {
            self.list.push(fault);
        }
    }

    /// The faults so far.
    pub fn list(&self) -> &[Fault] {
        &self.list
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// The file that the places are in.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// Takes the faults of another reading of the same file.
    pub fn extend(&mut self, other: Faults) {
        other
            .list
            .into_iter()
            .for_each(|f| self.add(f.at, f.message));
    }

    /// `value` if there are no faults.
    pub fn or<T>(mut self, value: Option<T>) -> Result<T, Faults> {
        self.list.sort_by_key(|f| f.at);
        match value {
            Some(value) if self.list.is_empty() => Ok(value),
            Some(_) => Err(self),
            None => {
                assert!(!self.list.is_empty(), "a value is missing without a fault");
                Err(self)
            }
        }
    }
}

/// Most faults that are printed one by one.
const SHOWN: usize = 40;

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, fault) in self.list.iter().take(SHOWN).enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            match fault.at {
                Mark { line: 0, .. } => write!(f, "{}: {}", self.file, fault.message)?,
                Mark { line, column } => {
                    write!(f, "{}:{line}:{column}: {}", self.file, fault.message)?;
                }
            }
        }
        if self.list.len() > SHOWN {
            write!(f, "\n… and {} more", self.list.len() - SHOWN)?;
        }
        Ok(())
    }
}

impl std::error::Error for Faults {}

/// Writes a tree as YAML that reads back as the same tree: short mappings of plain values on one
/// line, everything else in block style.
pub fn print(node: &Node) -> String {
    let mut out = String::new();
    match &node.value {
        Value::Map(entries) => print_map(entries, 0, &mut out),
        Value::List(list) => print_list(list, 0, &mut out),
        scalar => {
            out.push_str(&print_scalar(scalar));
            out.push('\n');
        }
    }
    out
}

/// Longest line that a mapping may take in flow style.
const LINE: usize = 110;

fn print_map(entries: &[Entry], indent: usize, out: &mut String) {
    for (i, entry) in entries.iter().enumerate() {
        if i > 0 {
            out.push_str(&" ".repeat(indent));
        }
        out.push_str(&print_text(&entry.key));
        out.push(':');
        print_value(&entry.value, indent, out);
    }
}

fn print_list(list: &[Node], indent: usize, out: &mut String) {
    for (i, node) in list.iter().enumerate() {
        if i > 0 {
            out.push_str(&" ".repeat(indent));
        }
        out.push('-');
        match &node.value {
            Value::Map(entries) if !entries.is_empty() => {
                out.push(' ');
                print_map(entries, indent + 2, out);
            }
            _ => print_value(node, indent, out),
        }
    }
}

/// What follows a key or a dash, with its line's end.
fn print_value(node: &Node, indent: usize, out: &mut String) {
    let column = out.len() - out.rfind('\n').map_or(0, |i| i + 1);
    let flow = print_flow(node);
    match (&node.value, flow) {
        (_, Some(flow)) if column + 1 + flow.len() <= LINE || !is_nested(node) => {
            out.push(' ');
            out.push_str(&flow);
            out.push('\n');
        }
        (Value::Map(entries), _) => {
            out.push('\n');
            out.push_str(&" ".repeat(indent + 2));
            print_map(entries, indent + 2, out);
        }
        (Value::List(list), _) => {
            out.push('\n');
            out.push_str(&" ".repeat(indent + 2));
            print_list(list, indent + 2, out);
        }
        (scalar, _) => {
            out.push(' ');
            out.push_str(&print_scalar(scalar));
            out.push('\n');
        }
    }
}

fn is_nested(node: &Node) -> bool {
    match &node.value {
        Value::Map(entries) => !entries.is_empty(),
        Value::List(list) => !list.is_empty(),
        _ => false,
    }
}

/// The value on one line; none for lists that hold mappings or more than one text, which are easier
/// to edit a line each.
fn print_flow(node: &Node) -> Option<String> {
    Some(match &node.value {
        Value::Map(entries) => {
            let parts: Option<Vec<String>> = entries
                .iter()
                .map(|e| Some(format!("{}: {}", print_text(&e.key), print_flow(&e.value)?)))
                .collect();
            format!("{{{}}}", parts?.join(", "))
        }
        Value::List(list) => {
            let texts = list
                .iter()
                .filter(|n| matches!(n.value, Value::Text(_)))
                .count();
            if texts > 2 || list.iter().any(|n| matches!(n.value, Value::Map(_))) {
                return None;
            }
            let parts: Option<Vec<String>> = list.iter().map(print_flow).collect();
            format!("[{}]", parts?.join(", "))
        }
        scalar => print_scalar(scalar),
    })
}

fn print_scalar(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(b) => b.to_string(),
        Value::Int(i) => i.to_string(),
        Value::Float(f) => print_float(*f),
        Value::Text(t) => print_text(t),
        Value::List(_) => "[]".into(),
        Value::Map(_) => "{}".into(),
    }
}

/// The shortest digits that read back as the same number, always with a point: some readers of YAML
/// take `1e-6` for text.
fn print_float(f: f64) -> String {
    if f.is_nan() {
        return ".nan".into();
    }
    if f.is_infinite() {
        return if f > 0.0 { ".inf" } else { "-.inf" }.into();
    }
    let text = format!("{f:?}");
    match text.split_once('e') {
        Some((digits, exponent)) if !digits.contains('.') => format!("{digits}.0e{exponent}"),
        _ => text,
    }
}

/// Plain where YAML would read the same text back, else quoted.
fn print_text(text: &str) -> String {
    let plain = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_./@*-".contains(c))
        && ![
            "true", "false", "null", "yes", "no", "on", "off", "y", "n", "nan", "inf",
        ]
        .contains(&text.to_ascii_lowercase().as_str());
    if plain {
        return text.into();
    }
    let mut quoted = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => quoted.push_str("\\\""),
            '\\' => quoted.push_str("\\\\"),
            '\n' => quoted.push_str("\\n"),
            '\t' => quoted.push_str("\\t"),
            c if c.is_control() => quoted.push_str(&format!("\\u{:04x}", c as u32)),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_knows_its_place() {
        let node = parse("a: 1\nb:\n  - x: 2.5\n  - {y: [true, text]}\n", "t").unwrap();
        assert_eq!(node.get("a").unwrap().at, Mark { line: 1, column: 4 });
        let Value::List(list) = &node.get("b").unwrap().value else {
            panic!()
        };
        assert_eq!(list[0].get("x").unwrap().at, Mark { line: 3, column: 8 });
        let Value::Map(entries) = &list[1].value else {
            panic!()
        };
        assert_eq!(entries[0].at, Mark { line: 4, column: 6 });
    }

    #[test]
    fn aliases_point_at_what_they_repeat() {
        let node = parse("a: &n {eps: 1.0e-6}\nb: *n\n", "t").unwrap();
        assert_eq!(node.get("b").unwrap().get("eps").unwrap().at.line, 1);
    }

    #[test]
    fn printing_and_reading_give_the_same_tree() {
        for text in [
            "a: 1\nb: {c: 1.0e-6, d: [1, 2]}\ne:\n  - x: {}\n  - y: \"no\"\n  - z: null\n",
            "s: [\"a: b\", \"=1\", \"\", \"a\\nb\"]\nempty: []\nf: 100000000000.0\ni: -3\n",
            "deep:\n  - residual:\n      - norm: {eps: 0.1}\n      - parallel:\n          - - a: {}\n          - - b: {}\n",
        ] {
            let node = parse(text, "t").unwrap();
            let again =
                parse(&print(&node), "t").unwrap_or_else(|e| panic!("{e}\n{}", print(&node)));
            assert_eq!(node, again, "{}", print(&node));
        }
    }

    #[test]
    fn bombs_are_faults() {
        let mut aliases = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for i in 1..12 {
            let list = vec![format!("*a{}", i - 1); 10].join(", ");
            aliases.push_str(&format!("a{i}: &a{i} [{list}]\n"));
        }
        for bomb in [
            aliases,
            "[".repeat(100_000),
            "- ".repeat(50_000),
            "a: b: c".into(),
            "x: [".into(),
        ] {
            assert!(
                parse(&bomb, "bomb").is_err(),
                "{}",
                &bomb[..20.min(bomb.len())]
            );
        }
    }

    #[test]
    fn duplicate_keys_are_faults_with_their_line() {
        let faults = parse("a: 1\nb: 2\na: 3\n", "dup.yaml").unwrap_err();
        assert!(faults.to_string().starts_with("dup.yaml:3:"), "{faults}");
    }
}

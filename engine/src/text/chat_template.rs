//! Chat templates, rendered as transformers' `apply_chat_template` renders them.
//!
//! What stays different: tuples print as lists, `~` prints 1e20 in full, `| safe` changes nothing, going
//! through `none` is going through nothing where Python refuses, and `cycler`, `joiner` and `lipsum` are missing.
//!
//! Templates come with a model and are not trusted: rendering has a budget of work and memory, and a
//! template sees nothing but the conversation.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, ValueKind};
use minijinja::{Environment, ErrorKind, State, Value};
use serde_json::{Map, Value as Json};

use super::{Error, SpecialTokens};

/// Work for one rendering, in units of one instruction or 64 bytes of text: about a second, and 320 MB of text.
///
/// One hole is known, in minijinja 3.1.0: a list doubled by `+` more than 32 times is copied without being charged.
const FUEL: u64 = 5_000_000;

/// Bytes of stack, reserved and not touched, for dropping lists nested as deeply as the fuel allows.
const STACK: usize = 1 << 30;

/// Name under which the time travels to `strftime_now`; no template can write it.
const NOW: &str = " now";

/// What a template is rendered with.
#[derive(Clone, Debug, Default)]
pub struct Chat<'a> {
    /// Objects with `role` and `content`; keys with null are left out, as in transformers.
    pub messages: &'a [Json],
    /// Tools as JSON schemas.
    pub tools: Option<&'a [Json]>,
    /// Documents as objects, usually with `title` and `text`.
    pub documents: Option<&'a [Json]>,
    /// Ends with what begins the assistant's answer.
    pub add_generation_prompt: bool,
    /// `bos_token`, `eos_token` and their like.
    pub special_tokens: Option<&'a SpecialTokens>,
    /// Further variables, such as `enable_thinking`; they override the special tokens.
    pub extra: Map<String, Json>,
    /// What `strftime_now` says, in UTC; the present if `None`.
    pub now: Option<SystemTime>,
}

/// A compiled template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
}

impl ChatTemplate {
    /// Compiles `source`; an error names the line.
    pub fn new(source: &str) -> Result<Self, Error> {
        let mut environment = environment()?;
        let source = without_generation(&source.replace("\r\n", "\n").replace('\r', "\n"));
        environment
            .add_template_owned("chat", source)
            .map_err(template_error)?;
        Ok(Self { environment })
    }

    /// The prompt. An error is the template's own `raise_exception`, a fault of the template, or of the messages.
    pub fn render(&self, chat: &Chat) -> Result<String, Error> {
        if chat.messages.is_empty() {
            return refuse("the conversation is empty; give at least one message");
        }
        let messages: Option<Vec<Json>> = chat.messages.iter().map(message).collect();
        let Some(messages) = messages else {
            return refuse("every message must be an object with \"role\" and \"content\"");
        };
        let mut variables: Vec<(String, Value)> = Vec::new();
        let mut set = |name: &str, value: Value| variables.push((name.into(), value));
        for (name, text) in chat
            .special_tokens
            .into_iter()
            .flat_map(SpecialTokens::iter)
        {
            set(name, Value::from(text));
        }
        for (name, value) in &chat.extra {
            set(name, Value::from(Serde(value)));
        }
        set("messages", Value::from(Serde(messages)));
        set(
            "tools",
            chat.tools
                .map_or(Value::from(()), |tools| Value::from(Serde(tools))),
        );
        set(
            "documents",
            chat.documents
                .map_or(Value::from(()), |documents| Value::from(Serde(documents))),
        );
        set(
            "add_generation_prompt",
            Value::from(chat.add_generation_prompt),
        );
        let now = chat
            .now
            .unwrap_or_else(SystemTime::now)
            .duration_since(SystemTime::UNIX_EPOCH);
        set(NOW, Value::from(now.map_or(0, |time| time.as_secs())));
        let variables: BTreeMap<_, _> = variables.into_iter().collect();
        let render = || {
            let template = self
                .environment
                .get_template("chat")
                .map_err(template_error)?;
            template.render(variables).map_err(template_error)
        };
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new()
                .stack_size(STACK)
                .spawn_scoped(scope, render);
            let thread =
                thread.or_else(|error| refuse(&format!("no memory to render it in: {error}")))?;
            thread
                .join()
                .unwrap_or_else(|_| refuse("it made the template engine panic"))
        })
    }
}

fn refuse<T>(reason: &str) -> Result<T, Error> {
    Err(Error::Template {
        line: None,
        reason: reason.into(),
    })
}

fn template_error(error: minijinja::Error) -> Error {
    let reason = match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => {
            "it does more work than any chat needs; it loops, or is meant to harm".into()
        }
        (_, Some(detail)) => detail.into(),
        (kind, None) => kind.to_string(),
    };
    Error::Template {
        line: error.line(),
        reason,
    }
}

/// A message as templates expect it: without nulls, its reasoning under every name in use.
fn message(message: &Json) -> Option<Json> {
    let mut fields: Map<String, Json> = message
        .as_object()?
        .iter()
        .filter(|(_, value)| !value.is_null())
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect();
    let reasoning = ["reasoning_content", "thinking", "reasoning"]
        .iter()
        .find_map(|name| fields.get(*name))
        .cloned();
    if let Some(reasoning) = reasoning {
        if !fields.contains_key("thinking") {
            fields.shift_insert(0, "thinking".into(), reasoning.clone());
        }
        fields.insert("reasoning_content".into(), reasoning);
    }
    Some(Json::Object(fields))
}

fn environment() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
        .map_err(template_error)?;
    environment.set_syntax(syntax);
    environment.set_fuel(Some(FUEL));
    environment.set_debug(false);
    environment.set_unknown_method_callback(method);
    environment.set_formatter(|out, state, value| Ok(out.write_str(&python_str(state, value)?)?));
    environment.add_filter("tojson", tojson);
    environment.add_filter("string", |state: &State, value: Value| {
        Ok::<_, minijinja::Error>(python_str(state, &value)?.into_owned())
    });
    environment.add_function(
        "raise_exception",
        |state: &State, message: Value| -> Result<Value, minijinja::Error> {
            let message = python_str(state, &message)?.into_owned();
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        },
    );
    environment.add_function("strftime_now", |state: &State, format: Cow<'_, str>| {
        let now = state
            .lookup(NOW)
            .and_then(|now| u64::try_from(now).ok())
            .unwrap_or_default();
        strftime(&format, now)
    });
    // Jinja's tests, where minijinja's differ.
    environment.add_test("sequence", |value: &Value| match value.kind() {
        ValueKind::Seq | ValueKind::Map | ValueKind::String | ValueKind::Undefined => true,
        ValueKind::Iterable => value.len().is_some(), // such as two lists put together
        _ => false,
    });
    environment.add_test("iterable", |value: &Value| {
        !value.is_none() && value.try_iter().is_ok()
    });
    environment.add_test("number", |value: &Value| {
        matches!(value.kind(), ValueKind::Number | ValueKind::Bool)
    });
    Ok(environment)
}

/// Methods of Python's strings that pycompat does not have.
fn method(
    state: &mut State,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, minijinja::Error> {
    let text = value.as_str();
    let argument = |index: usize| args.get(index).and_then(Value::as_str);
    match (name, text, argument(0)) {
        ("removeprefix", Some(text), Some(prefix)) => {
            Ok(text.strip_prefix(prefix).unwrap_or(text).into())
        }
        ("removesuffix", Some(text), Some(suffix)) => {
            Ok(text.strip_suffix(suffix).unwrap_or(text).into())
        }
        ("partition", Some(text), Some(by)) if !by.is_empty() => {
            let (before, by, after) = text
                .split_once(by)
                .map_or((text, "", ""), |(before, after)| (before, by, after));
            Ok(texts([before, by, after]))
        }
        ("rpartition", Some(text), Some(by)) if !by.is_empty() => {
            let (before, by, after) = text
                .rsplit_once(by)
                .map_or(("", "", text), |(before, after)| (before, by, after));
            Ok(texts([before, by, after]))
        }
        ("rsplit", Some(text), Some(by)) if !by.is_empty() => {
            let most = args
                .get(1)
                .and_then(|most| usize::try_from(most.clone()).ok());
            let mut parts: Vec<&str> = match most {
                Some(most) => text.rsplitn(most.saturating_add(1), by).collect(),
                None => text.rsplit(by).collect(),
            };
            parts.reverse();
            Ok(texts(parts))
        }
        ("isdigit" | "isdecimal" | "isnumeric", Some(text), None) => {
            Ok((!text.is_empty() && text.chars().all(char::is_numeric)).into())
        }
        _ => minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args),
    }
}

fn texts<'a>(texts: impl IntoIterator<Item = &'a str>) -> Value {
    texts
        .into_iter()
        .map(Value::from)
        .collect::<Vec<_>>()
        .into()
}

/// `json.dumps`, as transformers gives it to templates: nothing escaped for HTML, Python's separators.
fn tojson(
    state: &State,
    value: &Value,
    ensure_ascii: Option<bool>,
    args: Kwargs,
) -> Result<String, minijinja::Error> {
    let indent: Option<Value> = args
        .get::<Option<Value>>("indent")?
        .filter(|indent| !indent.is_none());
    let indent = match &indent {
        None => None,
        Some(width) => match (width.as_str(), i64::try_from(width.clone())) {
            (Some(text), _) => Some(text.to_owned()),
            // Wider than this serves nothing but filling memory.
            (None, Ok(width)) if width <= 1024 => {
                Some(" ".repeat(usize::try_from(width).unwrap_or(0)))
            }
            _ => {
                return Err(minijinja::Error::new(
                    ErrorKind::InvalidOperation,
                    "tojson: indent must be a small number or a string",
                ));
            }
        },
    };
    let separators: Option<Vec<String>> = args.get("separators")?;
    let (item, key) = match separators.as_deref() {
        None => (
            if indent.is_some() { "," } else { ", " }.to_owned(),
            ": ".to_owned(),
        ),
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => {
            return Err(minijinja::Error::new(
                ErrorKind::InvalidOperation,
                "tojson: separators must be a pair",
            ));
        }
    };
    let ensure_ascii = match ensure_ascii {
        Some(ensure) => ensure,
        None => args.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
    };
    let sort_keys = args.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    args.assert_all_used()?;
    let mut dumps = Dumps {
        state,
        out: String::new(),
        indent,
        item,
        key,
        ensure_ascii,
        sort_keys,
    };
    dumps.value(value, 0)?;
    Ok(dumps.out)
}

struct Dumps<'a> {
    state: &'a State<'a, 'a>,
    out: String,
    indent: Option<String>,
    item: String,
    key: String,
    ensure_ascii: bool,
    sort_keys: bool,
}

impl Dumps<'_> {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), minijinja::Error> {
        charge(self.state, value, depth)?;
        let wrong = |what: String| {
            Err(minijinja::Error::new(
                ErrorKind::InvalidOperation,
                format!("tojson: {what}"),
            ))
        };
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self
                .out
                .push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&number(value)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                self.items(("[", "]"), value.try_iter()?, depth, |dumps, item| {
                    dumps.value(&item, depth + 1)
                })?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.items(("{", "}"), keys.into_iter(), depth, |dumps, key| {
                    dumps.string(&match key.kind() {
                        ValueKind::None => "null".into(),
                        ValueKind::Bool => if key.is_true() { "true" } else { "false" }.into(),
                        _ => python_str(dumps.state, &key)?,
                    });
                    dumps.out.push_str(&dumps.key.clone());
                    dumps.value(&value.get_item(&key)?, depth + 1)
                })?;
            }
            ValueKind::Undefined => return wrong("the value is undefined".into()),
            other => return wrong(format!("a {other} has no JSON form")),
        }
        Ok(())
    }

    fn items(
        &mut self,
        (open, close): (&str, &str),
        items: impl Iterator<Item = Value>,
        depth: usize,
        mut write: impl FnMut(&mut Self, Value) -> Result<(), minijinja::Error>,
    ) -> Result<(), minijinja::Error> {
        self.out.push_str(open);
        let mut any = false;
        for (index, item) in items.enumerate() {
            any = true;
            if index > 0 {
                self.out.push_str(&self.item.clone());
            }
            self.line(depth + 1);
            write(self, item)?;
        }
        if any {
            self.line(depth);
        }
        self.out.push_str(close);
        Ok(())
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            (0..depth).for_each(|_| self.out.push_str(indent));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && c > '~') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// Python's `str(value)`.
fn python_str<'a>(state: &State, value: &'a Value) -> Result<Cow<'a, str>, minijinja::Error> {
    Ok(match value.kind() {
        ValueKind::String => Cow::Borrowed(value.as_str().unwrap_or_default()),
        ValueKind::Number => Cow::Owned(number(value)),
        ValueKind::Seq | ValueKind::Map | ValueKind::Iterable => {
            let mut out = String::new();
            python_repr(state, value, 0, &mut out)?;
            Cow::Owned(out)
        }
        _ => Cow::Owned(value.to_string()),
    })
}

/// Python's `repr(value)`.
fn python_repr(
    state: &State,
    value: &Value,
    depth: usize,
    out: &mut String,
) -> Result<(), minijinja::Error> {
    charge(state, value, depth)?;
    match value.kind() {
        ValueKind::String => quote(value.as_str().unwrap_or_default(), out),
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            for (index, item) in value.try_iter()?.enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                python_repr(state, &item, depth + 1, out)?;
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (index, key) in value.try_iter()?.enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                python_repr(state, &key, depth + 1, out)?;
                out.push_str(": ");
                python_repr(state, &value.get_item(&key)?, depth + 1, out)?;
            }
            out.push('}');
        }
        ValueKind::Undefined => out.push_str("Undefined"),
        _ => out.push_str(&python_str(state, value)?),
    }
    Ok(())
}

/// Takes the fuel for printing a value: a list a template doubled 99 times would never end.
fn charge(state: &State, value: &Value, depth: usize) -> Result<(), minijinja::Error> {
    if depth > 200 {
        return Err(minijinja::Error::new(
            ErrorKind::InvalidOperation,
            "values are nested too deeply to print",
        ));
    }
    state.consume_fuel(1 + value.as_str().map_or(0, |text| text.len() as u64 / 64))
}

fn quote(text: &str, out: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c == quote => out.extend(['\\', c]),
            c if c < ' ' || c == '\u{7f}' => out.push_str(&format!("\\x{:02x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push(quote);
}

/// A number as Python prints it.
fn number(value: &Value) -> String {
    match f64::try_from(value.clone()) {
        Ok(float) if !value.is_integer() => python_float(float),
        _ => value.to_string(),
    }
}

fn python_float(float: f64) -> String {
    if !float.is_finite() {
        return match float {
            f64::INFINITY => "inf".into(),
            f64::NEG_INFINITY => "-inf".into(),
            _ => "nan".into(),
        };
    }
    let scientific = format!("{float:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    match exponent.parse::<i32>() {
        Ok(exponent) if float != 0.0 && !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.abs())
        }
        _ => format!("{float:?}"),
    }
}

/// `time.strftime` in UTC for the directives that calendars and clocks need.
fn strftime(format: &str, now: u64) -> String {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = [
        "Thursday",
        "Friday",
        "Saturday",
        "Sunday",
        "Monday",
        "Tuesday",
        "Wednesday",
    ];
    let (days, seconds) = (now / 86_400, now % 86_400);
    let (year, month, day) = date(days);
    let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[(days % 7) as usize]);
    let hour12 = (hour + 11) % 12 + 1;
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let directive = chars.next();
        // `%-d` is `%d` without its zero.
        let (directive, bare) = if directive == Some('-') {
            (chars.next(), true)
        } else {
            (directive, false)
        };
        let two = |value: u64| {
            if bare {
                value.to_string()
            } else {
                format!("{value:02}")
            }
        };
        out += &match directive {
            Some('Y') => year.to_string(),
            Some('y') => two(year % 100),
            Some('m') => two(month),
            Some('d') => two(day),
            Some('e') => format!("{day:2}"),
            Some('H') => two(hour),
            Some('I') => two(hour12),
            Some('M') => two(minute),
            Some('S') => two(second),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.into(),
            Some('B') => month_name.into(),
            Some('b' | 'h') => month_name[..3].into(),
            Some('A') => day_name.into(),
            Some('a') => day_name[..3].into(),
            Some('j') => format!("{:03}", days - days_before(year) + 1),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('R') => format!("{hour:02}:{minute:02}"),
            Some('D') => format!("{month:02}/{day:02}/{:02}", year % 100),
            Some('s') => now.to_string(),
            Some('%') => "%".into(),
            Some('Z' | 'z' | 'f') | None => String::new(),
            Some(other) => format!("%{other}"),
        };
    }
    out
}

/// Days from 1970-01-01 to the first of `year`.
fn days_before(year: u64) -> u64 {
    let leaps = |year: u64| year / 4 - year / 100 + year / 400;
    (year - 1970) * 365 + leaps(year - 1) - leaps(1969)
}

/// Year, month and day, the latter two from 1.
fn date(days: u64) -> (u64, u64, u64) {
    let mut year = 1970 + days / 366;
    while days_before(year + 1) <= days {
        year += 1;
    }
    let leap = days_before(year + 1) - days_before(year) == 366;
    let mut rest = days - days_before(year);
    let lengths = [
        31,
        if leap { 29 } else { 28 },
        31,
        30,
        31,
        30,
        31,
        31,
        30,
        31,
        30,
        31,
    ];
    let mut month = 1;
    for length in lengths {
        if rest < length {
            break;
        }
        rest -= length;
        month += 1;
    }
    (year, month, rest + 1)
}

/// `{% generation %}` marks the assistant's text for training; here it is a scope like any other.
fn without_generation(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    let opens = |pair: &[u8]| matches!(pair, b"{%" | b"{#" | b"{{");
    while let Some(at) = rest.as_bytes().windows(2).position(opens) {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let close = match &tag[..2] {
            "{%" => "%}",
            "{#" => "#}",
            _ => "}}",
        };
        let end = end_of_tag(tag, close);
        let (tag, after) = tag.split_at(end);
        let word = tag
            .trim_start_matches(['{', '%', '-', '+'])
            .trim_end_matches(['}', '%', '-', '+'])
            .trim();
        match word {
            "generation" if close == "%}" => out.push_str(&tag.replace("generation", "with")),
            "endgeneration" if close == "%}" => {
                out.push_str(&tag.replace("endgeneration", "endwith"))
            }
            _ => out.push_str(tag),
        }
        rest = after;
        if word == "raw" && close == "%}" {
            let (raw, after) = rest.split_at(rest.find("endraw").unwrap_or(rest.len()));
            out.push_str(raw);
            rest = after;
        }
    }
    out + rest
}

/// Bytes of the tag that `source` begins with; a closing mark within a string does not end it.
fn end_of_tag(source: &str, close: &str) -> usize {
    let mut quote = None;
    let mut escaped = false;
    for (at, c) in source.char_indices().skip(2) {
        match quote {
            Some(open) => {
                quote = Some(open).filter(|open| escaped || c != *open);
                escaped = c == '\\' && !escaped;
            }
            None if source[at..].starts_with(close) => return at + close.len(),
            None if close != "#}" && (c == '\'' || c == '"') => quote = Some(c),
            None => {}
        }
    }
    source.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(template: &str) -> Result<String, Error> {
        let messages = [serde_json::json!({"role": "user", "content": "Hi", "reasoning": "Hm"})];
        let now = Some(SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_709_214_305));
        ChatTemplate::new(template)?.render(&Chat {
            messages: &messages,
            now,
            ..Default::default()
        })
    }

    #[test]
    fn faults_name_the_line_and_the_reason() {
        let check = |template: &str, line: Option<usize>, expected: &str| match render(template) {
            Err(Error::Template {
                line: found,
                reason,
            }) => {
                assert_eq!(
                    (found, reason.contains(expected)),
                    (line, true),
                    "{template}: {reason}"
                );
            }
            other => panic!("{template}: {other:?}"),
        };
        check(
            "{{ raise_exception('Roles must alternate') }}",
            Some(1),
            "Roles must alternate",
        );
        check("\n\n{% if %}", Some(3), "unexpected");
        check("{% generation %}", Some(1), "end");
        check("{{ messages[0].tool.name }}", Some(1), "");
        check("{{ missing | tojson }}", Some(1), "undefined");
        check("{% include 'other' %}", Some(1), "");
        check("{{ [1] | tojson(indent=100000000000) }}", Some(1), "indent");
        check("{{ [1] | tojson(colour='red') }}", Some(1), "colour");
        let nobody = ChatTemplate::new("x").and_then(|template| template.render(&Chat::default()));
        assert!(
            nobody
                .expect_err("no messages")
                .to_string()
                .contains("the conversation is empty")
        );
    }

    #[test]
    fn template_bombs_end_in_an_error() {
        let bombs = [
            "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}",
            "{% for a in range(1000000000) %}{% endfor %}",
            "{% set ns = namespace(x='x') %}{% for a in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "{{ 'x' * 10000000000 }}",
            "{{ 'xxxxxxxx'.replace('x', 'y' * 1000000).replace('y', 'z' * 1000000) }}",
            "{{ 'x'.format() | indent(1000000000000) }}",
            "{% macro again(n) %}{{ again(n + 1) }}{% endmacro %}{{ again(0) }}",
            "{% set ns = namespace(x=1) %}{% for a in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x | tojson }}",
            "{% set ns = namespace(x=1) %}{% for a in range(99) %}{% for b in range(99999) %}{% set ns.x = [ns.x] %}{% endfor %}{% endfor %}",
            "{% set ns = namespace(x=1, y=1) %}{% for a in range(99999) %}{% set ns.x = {'k': ns.x} %}{% set ns.y = {'k': ns.y} %}{% endfor %}{{ ns.x == ns.y }}{{ ns.x | tojson }}",
        ];
        for bomb in bombs {
            assert!(render(bomb).is_err(), "{bomb}");
        }
        assert!(
            ChatTemplate::new(&format!(
                "{{{{ {}1{} }}}}",
                "(".repeat(100_000),
                ")".repeat(100_000)
            ))
            .is_err()
        );
        assert!(ChatTemplate::new(&"{% if x %}".repeat(100_000)).is_err());
    }

    #[test]
    fn reasoning_goes_by_every_name() {
        let template = "{{ messages[0] | tojson }}";
        let expected = r#"{"thinking": "Hm", "role": "user", "content": "Hi", "reasoning": "Hm", "reasoning_content": "Hm"}"#;
        assert_eq!(render(template).expect("renders"), expected);
    }

    #[test]
    fn dates_print_as_strftime_prints_them() {
        // 2024-02-29 13:45:05 UTC, a leap day.
        let check = |format: &str, expected: &str| {
            assert_eq!(
                render(&format!("{{{{ strftime_now('{format}') }}}}")).expect(format),
                expected
            );
        };
        check("%d %B %Y", "29 February 2024");
        check("%a %A %b %-d %y %m", "Thu Thursday Feb 29 24 02");
        check("%H:%M:%S %I %p %j %F %%", "13:45:05 01 PM 060 2024-02-29 %");
        assert_eq!(strftime("%F %a", 0), "1970-01-01 Thu");
        assert_eq!(
            strftime("%F %-m %e", 951_782_400 - 86_400 * 20),
            "2000-02-09 2  9"
        );
        assert_eq!(strftime("%F %j", 1_735_603_200), "2024-12-31 366");
    }

    /// One file of tests/golden/chat: every conversation as transformers rendered it.
    fn golden(path: &std::path::Path) -> Vec<String> {
        let read = |path: &std::path::Path| std::fs::read_to_string(path).expect("a golden file");
        let template = read(path);
        let golden: Json =
            serde_json::from_str(&read(&path.with_extension("json"))).expect("golden JSON");
        let template = match ChatTemplate::new(&template) {
            Ok(template) => template,
            Err(error) => return vec![format!("{}: {error}", path.display())],
        };
        let special_tokens = SpecialTokens::from_object(
            path,
            golden["special_tokens"].as_object().expect("an object"),
        )
        .expect("special tokens");
        let list = |value: &'static Json| value.as_array().map(Vec::as_slice);
        let golden: &'static Json = Box::leak(Box::new(golden));
        let cases = golden["cases"].as_object().expect("cases").iter();
        cases
            .filter_map(|(name, case)| {
                let chat = Chat {
                    messages: list(&case["messages"]).unwrap_or_default(),
                    tools: list(&case["tools"]),
                    documents: list(&case["documents"]),
                    add_generation_prompt: case["add_generation_prompt"] == true,
                    special_tokens: Some(&special_tokens),
                    extra: case["extra"].as_object().cloned().unwrap_or_default(),
                    now: None,
                };
                match (template.render(&chat), case["text"].as_str()) {
                    (Ok(found), Some(expected)) if found == expected => None,
                    (Err(_), None) => None,
                    (found, expected) => Some(format!(
                        "{}: {name}\nexpected {expected:?}\nfound    {found:?}\n",
                        path.display()
                    )),
                }
            })
            .collect()
    }

    #[test]
    fn conversations_render_as_in_transformers() {
        let directory =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/chat");
        let mut paths: Vec<_> = std::fs::read_dir(directory)
            .expect("the golden files")
            .map(|entry| entry.expect("an entry").path())
            .filter(|path| {
                path.extension()
                    .is_some_and(|extension| extension == "jinja")
            })
            .collect();
        paths.sort();
        let differences: Vec<String> = paths.iter().flat_map(|path| golden(path)).collect();
        assert!(
            differences.is_empty(),
            "{} differ\n{}",
            differences.len(),
            differences.join("\n")
        );
        assert!(!paths.is_empty());
    }
}

//! The values of a card that begin with `=`: Jinja expressions over the keys of `config.json`.

use std::collections::{BTreeMap, BTreeSet};

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Environment, UndefinedBehavior, Value as Jinja};
use strata_layers::Mark;
use strata_layers::param::list_of;
use strata_layers::yaml::{Entry, Value};

use crate::config::Config;
use crate::gguf::kinds_of;

/// Instructions that one expression may take.
const FUEL: u64 = 20_000;

/// What expressions see.
pub(crate) struct Scope {
    environment: Environment<'static>,
    values: BTreeMap<String, Jinja>,
    /// Each value and where it is from, for messages.
    told: BTreeMap<String, String>,
    /// What lacks the keys that are nowhere.
    source: String,
}

/// A value and how it came about.
pub(crate) struct Computed {
    pub value: Value,
    pub told: String,
}

impl Scope {
    pub fn new(config: &Config) -> Self {
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.set_fuel(Some(FUEL));
        environment.add_function("ceil_div", ceil_div);
        environment.add_function("places", places);
        let mut scope = Scope {
            environment,
            values: BTreeMap::new(),
            told: BTreeMap::new(),
            source: match config.file().rsplit('/').next() {
                Some(file) if file.ends_with(".gguf") => format!("the metadata of {file}"),
                _ => "config.json".into(),
            },
        };
        for config in config.files() {
            let file = config.file().rsplit('/').next().unwrap_or_default();
            for entry in config.entries() {
                let (key, value) = (&entry.key, &entry.value.value);
                if scope.has(key) {
                    continue;
                }
                let line = entry.value.at.line;
                let place = match line {
                    0 => file.to_string(),
                    line => format!("line {line} of {file}"),
                };
                let told = format!("{key} = {} ({place})", value.describe());
                scope.values.insert(key.clone(), jinja(value));
                scope.told.insert(key.clone(), told);
            }
        }
        scope
    }

    /// Lets expressions ask which tensors the blocks of a GGUF file have.
    pub fn add_kinds(&mut self, tensors: BTreeSet<String>) {
        let kinds = move |blocks: usize, suffixes: Kwargs| {
            let mut list = Vec::new();
            for kind in suffixes.args() {
                list.push((kind.to_string(), suffixes.get::<String>(kind)?));
            }
            Ok::<_, minijinja::Error>(kinds_of(&tensors, blocks, &list))
        };
        self.environment.add_function("kinds", kinds);
        self.environment.add_function("rows", rows);
    }

    /// Lets expressions ask which of a model's blocks have a weight: `blocks(n, 'attention.q', 8, 0)` is a
    /// list of n numbers, 8 where they have it and 0 where they do not.
    pub fn add_blocks(&mut self, weights: BTreeSet<String>) {
        let blocks = move |count: usize, weight: String, with: Jinja, without: Jinja| {
            let of = |i: usize| match weights.contains(&format!("blocks.{i}.{weight}")) {
                true => with.clone(),
                false => without.clone(),
            };
            // Blocks that have no weight are none.
            (0..count.min(weights.len())).map(of).collect::<Vec<_>>()
        };
        self.environment.add_function("blocks", blocks);
    }

    pub fn has(&self, key: &str) -> bool {
        self.values.contains_key(key)
    }

    /// Gives a key a value that config.json does not hold.
    pub fn set(&mut self, key: &str, value: &Value, why: &str) {
        self.values.insert(key.into(), jinja(value));
        self.told
            .insert(key.into(), format!("{key} = {} ({why})", value.describe()));
    }

    /// The names that an expression reads.
    pub fn reads(&self, text: &str) -> Vec<String> {
        let Ok(expression) = self.environment.compile_expression(text) else {
            return Vec::new();
        };
        let mut names: Vec<String> = expression.undeclared_variables(false).into_iter().collect();
        names.retain(|n| !self.environment.globals().any(|(global, _)| global == n));
        names.sort();
        names
    }

    /// The value of an expression, given without its `=`; else what is wrong with it.
    pub fn evaluate(&self, text: &str) -> Result<Computed, String> {
        let expression = self
            .environment
            .compile_expression(text)
            .map_err(|e| unreadable(text, &e))?;
        let names = self.reads(text);
        let (known, missing): (Vec<_>, Vec<_>) = names.iter().partition(|n| self.has(n));
        let known = list_of(
            known
                .iter()
                .filter_map(|n| self.told.get(*n))
                .map(String::as_str),
        );
        let told = match known.as_str() {
            "nothing" => format!("`={}`", text.trim()),
            known => format!("`={}` with {known}", text.trim()),
        };
        let value = expression.eval(&self.values);
        let lacks = || {
            let keys = list_of(missing.iter().map(|n| n.as_str()));
            format!("{} has no {keys}: {told}", self.source)
        };
        match value {
            Ok(value) if value.is_undefined() && !missing.is_empty() => Err(lacks()),
            Ok(value) => match plain(&value) {
                Some(value) => Ok(Computed { value, told }),
                None => Err(format!("{told} is no value that a plan can hold")),
            },
            Err(_) if !missing.is_empty() => Err(lacks()),
            Err(e) => Err(format!("{told}: {}", reason(&e))),
        }
    }
}

/// Whether a text is an expression at all; else what is wrong with it.
pub(crate) fn check(text: &str) -> Result<(), String> {
    match Environment::new().compile_expression(text) {
        Ok(_) => Ok(()),
        Err(e) => Err(unreadable(text, &e)),
    }
}

fn unreadable(text: &str, error: &minijinja::Error) -> String {
    format!("`={}`: {}", text.trim(), reason(error))
}

fn reason(error: &minijinja::Error) -> String {
    let kind = error.kind().to_string();
    error.detail().map_or(kind, str::to_string)
}

fn ceil_div(a: i64, b: i64) -> Result<i64, minijinja::Error> {
    let fault = || {
        let message = format!("ceil_div({a}, {b}) has no result");
        minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, message)
    };
    // As in Python, where it is -(-a // b).
    let floor = a.checked_neg().ok_or_else(fault)?;
    let quotient = floor
        .checked_div_euclid(b)
        .filter(|_| b > 0)
        .ok_or_else(fault)?;
    quotient.checked_neg().ok_or_else(fault)
}

/// Where in a list some values stand, from 0.
fn places(list: Vec<Jinja>, values: Rest<Jinja>) -> Vec<usize> {
    let places = list.iter().enumerate();
    let found = places.filter(|(_, item)| values.contains(item));
    found.map(|(place, _)| place).collect()
}

/// A mapping for each place of some lists: `rows(a=[1, 2], b=[3, 4])[0]` is `{a: 1, b: 3}`.
fn rows(lists: Kwargs) -> Result<Vec<BTreeMap<String, Jinja>>, minijinja::Error> {
    let mut out: Vec<BTreeMap<String, Jinja>> = Vec::new();
    for name in lists.args() {
        for (place, value) in lists.get::<Vec<Jinja>>(name)?.into_iter().enumerate() {
            if out.len() <= place {
                out.push(BTreeMap::new());
            }
            out[place].insert(name.into(), value);
        }
    }
    Ok(out)
}

fn jinja(value: &Value) -> Jinja {
    match value {
        Value::Null => Jinja::from(()),
        Value::Bool(b) => Jinja::from(*b),
        Value::Int(i) => Jinja::from(*i),
        Value::Float(f) => Jinja::from(*f),
        Value::Text(t) => Jinja::from(t.as_str()),
        Value::List(list) => Jinja::from_iter(list.iter().map(|n| jinja(&n.value))),
        // Pairs alone would make a list of lists.
        Value::Map(entries) => Jinja::from(
            entries
                .iter()
                .map(|e| (e.key.clone(), jinja(&e.value.value)))
                .collect::<BTreeMap<String, Jinja>>(),
        ),
    }
}

/// The value as YAML has it. Integral results are whole numbers, also when they were divided.
fn plain(value: &Jinja) -> Option<Value> {
    const EXACT: f64 = (1_u64 << 53) as f64;
    Some(match value.kind() {
        ValueKind::None => Value::Null,
        ValueKind::Bool => Value::Bool(value.is_true()),
        ValueKind::Number => match i64::try_from(value.clone()) {
            Ok(i) => Value::Int(i),
            Err(_) => match f64::try_from(value.clone()).ok()? {
                f if f.fract() == 0.0 && f.abs() < EXACT => Value::Int(f as i64),
                f => Value::Float(f),
            },
        },
        ValueKind::String => Value::Text(value.as_str()?.into()),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Option<Vec<Value>> = value.try_iter().ok()?.map(|v| plain(&v)).collect();
            Value::List(items?.into_iter().map(Into::into).collect())
        }
        ValueKind::Map => {
            let keys = value.try_iter().ok()?;
            let entry = |key: Jinja| {
                let value = plain(&value.get_item(&key).ok()?)?;
                let (key, value) = (key.as_str()?.to_string(), value.into());
                let at = Mark::default();
                Some(Entry { key, at, value })
            };
            let entries: Option<Vec<Entry>> = keys.map(entry).collect();
            Value::Map(entries?)
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_compute_with_the_keys_of_the_config() {
        let text = r#"{"h": 64, "r": "auto", "n": null, "e": 1e-6, "big": 1e30, "l": ["a", "b"], "z": 0, "s": "x", "m": {"a": 7, "k": {"n": 3}}}"#;
        let scope = Scope::new(&Config::parse(text, "config.json").unwrap());
        let check = |expression: &str, expected: &str| {
            let shown = match scope.evaluate(expression) {
                Ok(computed) => computed.value.describe(),
                Err(why) => why,
            };
            assert!(shown.contains(expected), "{expression}: {shown}");
        };
        check("h * 2", "128");
        check("h / 2", "32");
        check("h // 3", "21");
        check("h / 3", "21.33");
        check("ceil_div(h, 16) if r == 'auto' else r", "4");
        check("ceil_div(65, 16)", "5");
        check("n", "nothing");
        check("3 if n is none else n", "3");
        check("e", "1.0e-6");
        check("big * h", "e31");
        check("'s' ~ (3 % 2)", "\"s1\"");
        check("l", "a list");
        check("m.k.n", "3");
        check("m.k.q|default(7)", "7");
        check("m.k.q is defined", "false");
        check("h if h is defined else q", "64");
        check("q", "config.json has no q: `=q`");
        check(
            "h * q",
            "config.json has no q: `=h * q` with h = 64 (line 1 of config.json)",
        );
        check("q.r.s", "config.json has no q");
        check("h // z", "with h = 64 (line 1 of config.json) and z = 0");
        check("ceil_div(h, 0)", "has no result");
        check("h * n", "n = nothing");
        check("places(l, 'b', 'q')|length", "1");
        check("places(l, 'b')[0]", "1");
        check("places([2, 5, 8], h // 8)[0]", "2");
        check("places([2, 5], h)[0]", "places([2, 5], h)[0]");
        check("places(h, 'b')", "places(h, 'b')");
        check("([2] + range(5, 12, 3)|list)[3]", "11");
        check("'M-E'|list == ['M', '-', 'E']", "true");
        check("(['m'] * h)|length", "64");
        check("h ** -0.5", "0.125");
        check("(n or q|default(none) or l)[0]", "\"a\"");
        check("m.a", "7");
        check("m.b|default(3)", "3");
        check("(m or {}).a", "7");
        check("(m or {}).a|default(3)", "7");
        check("(n or {}).a|default(3)", "3");
        check("h +", "`=h +`: ");
        check("range(1000000)|list|length", "range(1000000)");
        check("s * 1000000000000", "out of fuel");
    }
}

//! Reading a request: bytes to an object, and its fields one by one, so that all that is wrong is told together.
//!
//! Fields that nobody asks for are ignored, as OpenAI's server does; null is as good as missing.

use std::cell::RefCell;
use std::fmt::Display;
use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::ApiError;
use crate::text::describe;

/// Deepest nesting of a body.
const MOST_DEPTH: usize = 64;
/// Most values of a body: a number takes two bytes of a body, and thirty-two in memory.
const MOST_VALUES: usize = 2_000_000;

/// The object that a body holds.
pub fn parse(bytes: &[u8]) -> Result<Map<String, Value>, ApiError> {
    check_shape(bytes)?;
    if bytes.trim_ascii().is_empty() {
        return Err(ApiError::invalid(
            "the body is empty; expected a JSON object",
        ));
    }
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(object)) => Ok(object),
        Ok(other) => Err(ApiError::invalid(format!(
            "the body is {}; expected a JSON object",
            describe(&other)
        ))),
        Err(error) => Err(ApiError::invalid(format!("the body is no JSON: {error}"))),
    }
}

/// Refuses what would take much more memory than its bytes, before anything is built from it.
fn check_shape(bytes: &[u8]) -> Result<(), ApiError> {
    let (mut depth, mut values, mut quoted, mut escaped) = (0_usize, 1_usize, false, false);
    for (at, byte) in bytes.iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            _ if quoted => {}
            b'[' | b'{' => {
                depth += 1;
                values += 1;
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            b',' => values += 1,
            _ => {}
        }
        if depth > MOST_DEPTH {
            return Err(ApiError::invalid(format!(
                "the body is nested more than {MOST_DEPTH} levels deep at byte {at}"
            )));
        }
        if values > MOST_VALUES {
            return Err(ApiError::invalid(format!(
                "the body holds more than {MOST_VALUES} values at byte {at}"
            )));
        }
    }
    Ok(())
}

/// All that is wrong with a request: the fields, and what is wrong with each.
#[derive(Debug, Default)]
pub struct Faults(RefCell<Vec<(String, String)>>);

impl Faults {
    /// Takes note of a fault.
    pub fn add(&self, path: impl Into<String>, what: impl Into<String>) {
        self.0.borrow_mut().push((path.into(), what.into()));
    }

    /// An error, if there is a fault.
    pub fn finish(&self) -> Result<(), ApiError> {
        let faults = self.0.borrow();
        let Some((first, _)) = faults.first() else {
            return Ok(());
        };
        let told: Vec<String> = faults
            .iter()
            .map(|(path, what)| format!("{path}: {what}"))
            .collect();
        Err(ApiError::field(first, told.join("\n")))
    }
}

/// An object of a request, and where in it that is.
#[derive(Clone, Copy)]
pub struct Fields<'a> {
    path: &'a str,
    object: &'a Map<String, Value>,
    faults: &'a Faults,
}

impl<'a> Fields<'a> {
    /// Of the whole request (`path` is empty), or of an object in it.
    pub fn new(path: &'a str, object: &'a Map<String, Value>, faults: &'a Faults) -> Self {
        Fields {
            path,
            object,
            faults,
        }
    }

    /// Where a field is.
    pub fn path(&self, key: &str) -> String {
        if self.path.is_empty() {
            key.into()
        } else {
            format!("{}.{key}", self.path)
        }
    }

    /// What is wrong so far.
    pub fn faults(&self) -> &'a Faults {
        self.faults
    }

    /// Takes note of a fault of a field.
    pub fn fault(&self, key: &str, what: impl Into<String>) {
        self.faults.add(self.path(key), what);
    }

    /// A field that is not null.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    fn read<T>(
        &self,
        key: &str,
        expected: impl Display,
        read: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Option<T> {
        let value = self.get(key)?;
        let read = read(value);
        if read.is_none() {
            self.fault(
                key,
                format!("expected {expected}, found {}", describe(value)),
            );
        }
        read
    }

    /// A text.
    pub fn text(&self, key: &str) -> Option<&'a str> {
        self.read(key, "a string", Value::as_str)
    }

    /// True or false.
    pub fn flag(&self, key: &str) -> Option<bool> {
        self.read(key, "true or false", Value::as_bool)
    }

    /// A list.
    pub fn list(&self, key: &str) -> Option<&'a Vec<Value>> {
        self.read(key, "a list", Value::as_array)
    }

    /// An object.
    pub fn object(&self, key: &str) -> Option<&'a Map<String, Value>> {
        self.read(key, "an object", Value::as_object)
    }

    /// A number within a range.
    pub fn number(&self, key: &str, range: RangeInclusive<f64>) -> Option<f32> {
        let expected = format!("a number from {} to {}", range.start(), range.end());
        let number = |value: &Value| value.as_f64().filter(|n| range.contains(n));
        self.read(key, expected, number).map(|n| n as f32)
    }

    /// A whole number within a range.
    pub fn count(&self, key: &str, range: RangeInclusive<usize>) -> Option<usize> {
        let expected = match *range.end() {
            usize::MAX => format!("a whole number, {} or more", range.start()),
            end => format!("a whole number from {} to {end}", range.start()),
        };
        let count = |value: &Value| {
            let count = usize::try_from(value.as_u64()?).ok()?;
            range.contains(&count).then_some(count)
        };
        self.read(key, expected, count)
    }

    /// Any whole number, as the key of random draws.
    pub fn seed(&self, key: &str) -> Option<u64> {
        let seed = |value: &Value| value.as_u64().or_else(|| Some(value.as_i64()? as u64));
        self.read(key, "a whole number", seed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bodies_are_objects_of_modest_depth_and_size() {
        let deep = format!("{{\"a\":{}1{}}}", "[".repeat(70), "]".repeat(70));
        let many = format!("[{}1]", "0,".repeat(MOST_VALUES));
        for (body, says) in [
            (&b""[..], "empty"),
            (b"[1]", "a list of 1"),
            (b"{\"a\":", "no JSON"),
            (b"{\"a\": \"\xff\"}", "no JSON"),
            (deep.as_bytes(), "64 levels deep at byte"),
            (many.as_bytes(), "more than 2000000 values"),
        ] {
            let error = parse(body).unwrap_err().message;
            assert!(error.contains(says), "{says:?} is missing from {error}");
        }
        let quoted = format!("{{\"a\": \"{}\\\"[\"}}", "[".repeat(200));
        assert_eq!(parse(quoted.as_bytes()).unwrap().len(), 1);
    }

    #[test]
    fn all_faults_are_told_with_their_paths() {
        let object = parse(br#"{"n": "two", "t": 3, "ok": null, "top": 1.5, "s": -7}"#).unwrap();
        let faults = Faults::default();
        let fields = Fields::new("a[0]", &object, &faults);
        assert_eq!(fields.count("n", 1..=8), None);
        assert_eq!(fields.number("t", 0.0..=2.0), None);
        assert_eq!(fields.count("top", 0..=usize::MAX), None);
        assert_eq!((fields.flag("ok"), fields.text("absent")), (None, None));
        assert_eq!(fields.seed("s"), Some(-7_i64 as u64));
        let error = faults.finish().unwrap_err();
        assert_eq!(
            error.message,
            "a[0].n: expected a whole number from 1 to 8, found \"two\"\n\
             a[0].t: expected a number from 0 to 2, found 3\n\
             a[0].top: expected a whole number, 0 or more, found 1.5"
        );
        assert_eq!(error.param.as_deref(), Some("a[0].n"));
    }
}

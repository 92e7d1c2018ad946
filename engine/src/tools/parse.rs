//! Calls in a text, as it comes.

use serde_json::Value;

use super::Format;

/// A call of a function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// The function.
    pub name: String,
    /// Its arguments, as JSON.
    pub arguments: String,
}

/// A part of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Text that is no call.
    Text(String),
    /// A call.
    Call(Call),
}

/// Finds calls in a text that comes in pieces. What only looks like a call, and names none of the functions that
/// there are, is text: nothing is lost.
#[derive(Debug, Clone)]
pub struct Calls {
    format: Format,
    names: Vec<String>,
    /// Text that may belong to a mark, or that stands behind the first one.
    held: String,
    inside: bool,
    /// Where the next look for the mark at the end begins.
    looked: usize,
    found: usize,
}

impl Calls {
    /// For calls of functions with these names.
    pub fn new(format: Format, names: Vec<String>) -> Self {
        Calls {
            format,
            names,
            held: String::new(),
            inside: false,
            looked: 0,
            found: 0,
        }
    }

    /// How many calls there were.
    pub fn found(&self) -> usize {
        self.found
    }

    /// Takes more of the text; what is settled by it.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        self.held.push_str(text);
        let mut out = Vec::new();
        loop {
            let more = if self.inside {
                self.close(&mut out)
            } else {
                self.open(&mut out)
            };
            if !more {
                return out;
            }
        }
    }

    /// The text is at its end.
    pub fn finish(&mut self) -> Vec<Piece> {
        let mut out = Vec::new();
        let rest = std::mem::take(&mut self.held);
        if !std::mem::take(&mut self.inside) {
            self.text(rest, &mut out);
        } else {
            // A mark at the end may be the end token itself.
            match self.calls(&rest) {
                Some(calls) => self.tell(calls, &mut out),
                None => self.text(format!("{}{rest}", self.format.begin), &mut out),
            }
        }
        out
    }

    /// Outside of a call: gives out text up to a mark. Whether one was found.
    fn open(&mut self, out: &mut Vec<Piece>) -> bool {
        let begin = self.format.begin;
        if let Some(at) = self.held.find(begin) {
            let rest = self.held.split_off(at + begin.len());
            self.held.truncate(at);
            let before = std::mem::replace(&mut self.held, rest);
            self.text(before, out);
            (self.inside, self.looked) = (true, 0);
            return true;
        }
        // The end may be the beginning of a mark.
        let part = (1..begin.len())
            .rev()
            .find(|n| self.held.ends_with(&begin[..*n]));
        let rest = self.held.split_off(self.held.len() - part.unwrap_or(0));
        let before = std::mem::replace(&mut self.held, rest);
        self.text(before, out);
        false
    }

    /// Inside of one: looks for the mark at its end. Whether it was found.
    fn close(&mut self, out: &mut Vec<Piece>) -> bool {
        let end = self.format.end;
        if end.is_empty() {
            return false;
        }
        while let Some(at) = self.held[self.looked..].find(end) {
            let at = self.looked + at;
            // Arguments may hold the mark as text: then what stands before it is no JSON.
            if let Some(calls) = self.calls(&self.held[..at]) {
                self.tell(calls, out);
                self.held.drain(..at + end.len());
                self.inside = false;
                return true;
            }
            self.looked = at + end.len();
        }
        let mut next = (self.held.len() + 1).saturating_sub(end.len());
        while !self.held.is_char_boundary(next) {
            next -= 1;
        }
        self.looked = self.looked.max(next);
        false
    }

    /// Text between and behind calls is worth telling if it is more than space.
    fn text(&self, text: String, out: &mut Vec<Piece>) {
        let space = self.found > 0 && text.trim().is_empty();
        if !text.is_empty() && !space {
            out.push(Piece::Text(text));
        }
    }

    fn tell(&mut self, calls: Vec<Call>, out: &mut Vec<Piece>) {
        self.found += calls.len();
        out.extend(calls.into_iter().map(Piece::Call));
    }

    /// The calls that stand between marks; none if that is anything else.
    fn calls(&self, body: &str) -> Option<Vec<Call>> {
        let value: Value = serde_json::from_str(body.trim()).ok()?;
        let calls = match value {
            Value::Array(calls) => calls,
            one => vec![one],
        };
        let calls: Option<Vec<Call>> = calls.iter().map(|call| self.call(call)).collect();
        calls.filter(|calls| !calls.is_empty())
    }

    fn call(&self, call: &Value) -> Option<Call> {
        // Some models repeat the form that tools are described in.
        let call = call
            .get("function")
            .filter(|f| f.is_object())
            .unwrap_or(call);
        let name = call["name"].as_str()?;
        let arguments = match call.get("arguments").or_else(|| call.get("parameters")) {
            None | Some(Value::Null) => "{}".into(),
            // Given as text, it has to be JSON.
            Some(Value::String(text)) => {
                serde_json::from_str::<Value>(text).ok()?;
                text.clone()
            }
            Some(object) => object.to_string(),
        };
        self.names.iter().any(|known| known == name).then(|| Call {
            name: name.into(),
            arguments,
        })
    }
}

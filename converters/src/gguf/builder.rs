//! The header of a GGUF file that is written.

use crate::error::{Error, Result};
use crate::write::Target;

use super::types::Type;
use super::value::Kind;

/// Metadata and tensors, one after another.
#[derive(Default)]
pub(crate) struct Builder {
    entries: Vec<(String, Vec<u8>)>,
    tensors: Vec<u8>,
    count: u64,
    /// Where the next tensor begins, counted from the first.
    offset: u64,
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn list(kind: Kind, count: usize) -> Vec<u8> {
    let mut out = (kind as u32).to_le_bytes().to_vec();
    out.extend((count as u64).to_le_bytes());
    out
}

impl Builder {
    /// A key given again replaces the earlier one.
    fn entry(&mut self, key: &str, kind: Kind, value: &[u8]) {
        let mut bytes = (kind as u32).to_le_bytes().to_vec();
        bytes.extend(value);
        match self.entries.iter_mut().find(|(k, _)| k == key) {
            Some((_, old)) => *old = bytes,
            None => self.entries.push((key.into(), bytes)),
        }
    }

    pub fn text(&mut self, key: &str, value: &str) {
        let mut out = Vec::new();
        text(&mut out, value);
        self.entry(key, Kind::Text, &out);
    }

    pub fn uint(&mut self, key: &str, value: u32) {
        self.entry(key, Kind::U32, &value.to_le_bytes());
    }

    pub fn float(&mut self, key: &str, value: f32) {
        self.entry(key, Kind::F32, &value.to_le_bytes());
    }

    pub fn truth(&mut self, key: &str, value: bool) {
        self.entry(key, Kind::Bool, &[u8::from(value)]);
    }

    pub fn uints(&mut self, key: &str, values: &[u32]) {
        let mut out = list(Kind::U32, values.len());
        values.iter().for_each(|v| out.extend(v.to_le_bytes()));
        self.entry(key, Kind::List, &out);
    }

    pub fn ints(&mut self, key: &str, values: &[i32]) {
        let mut out = list(Kind::I32, values.len());
        values.iter().for_each(|v| out.extend(v.to_le_bytes()));
        self.entry(key, Kind::List, &out);
    }

    pub fn floats(&mut self, key: &str, values: &[f32]) {
        let mut out = list(Kind::F32, values.len());
        values.iter().for_each(|v| out.extend(v.to_le_bytes()));
        self.entry(key, Kind::List, &out);
    }

    pub fn texts<'a>(&mut self, key: &str, values: impl ExactSizeIterator<Item = &'a str>) {
        let mut out = list(Kind::Text, values.len());
        values.for_each(|v| text(&mut out, v));
        self.entry(key, Kind::List, &out);
    }

    /// The next tensor.
    pub fn tensor(&mut self, target: &Target, align: u64) -> Result<()> {
        let format = match target.format() {
            Some(format) => format.name().to_uppercase(),
            None => target.dtype().unwrap_or_default().to_string(),
        };
        let known = Type::named(&format).ok_or_else(|| {
            Error::file(&target.name, format!("GGUF has no element type {format}"))
        })?;
        text(&mut self.tensors, &target.name);
        self.tensors
            .extend((target.shape.len() as u32).to_le_bytes());
        for size in target.shape.iter().rev() {
            self.tensors.extend((*size as u64).to_le_bytes());
        }
        self.tensors.extend(known.number.to_le_bytes());
        self.tensors.extend(self.offset.to_le_bytes());
        self.offset += target.bytes()?.next_multiple_of(align);
        self.count += 1;
        Ok(())
    }

    /// The header, up to where the tensors begin.
    pub fn finish(self, align: u64) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend(self.count.to_le_bytes());
        out.extend((self.entries.len() as u64).to_le_bytes());
        for (key, value) in &self.entries {
            text(&mut out, key);
            out.extend(value);
        }
        out.extend(self.tensors);
        out.resize(out.len().next_multiple_of(align as usize), 0);
        out
    }
}

//! The header of one GGUF file, checked.
//!
//! All numbers are little endian. A file is `GGUF`, its version (u32), the counts of tensors and of
//! metadata (u64), the metadata (key, type, value), for each tensor its name, sizes (innermost first),
//! type and offset, and then, from the next multiple of the alignment, the tensors' bytes. A text is its
//! length (u64) and its bytes; a list is the type of its elements (u32), their count (u64), and they.
//!
//! Nothing is sized by a number of the file: lists stay where they are, and loops end with the file.

use std::collections::BTreeSet;
use std::ops::Range;

use strata_layers::Mark;

use super::types::Type;
use super::value::{Kind, Value};
use crate::checkpoint::{FILES, TENSORS, TensorInfo};
use crate::report::Report;

/// Longest key, and longest name of a tensor.
const MAX_NAME: usize = 1024;
/// Most dimensions of a tensor.
const MAX_RANK: usize = 8;
/// Deepest nesting of lists.
const MAX_DEPTH: usize = 8;
/// Most entries of metadata, and most tensors.
const MAX_ENTRIES: u64 = 1 << 20;
/// Where tensors begin, unless `general.alignment` says otherwise: at multiples of this.
const ALIGNMENT: u64 = 32;

/// What a file says.
pub(super) struct Header {
    /// Keys and values, in the order of the file.
    pub metadata: Vec<(String, Value)>,
    /// Tensors, in the order of the file.
    pub tensors: Vec<(String, TensorInfo)>,
}

/// The header of a file; none if something is wrong with it, which is reported.
pub(super) fn read(shard: &str, file: &[u8], report: &mut Report) -> Option<Header> {
    read_of(shard, file, file.len(), report)
}

/// The same of the beginning of a file that has, or will have, `total` bytes.
pub(super) fn read_of(
    shard: &str,
    file: &[u8],
    total: usize,
    report: &mut Report,
) -> Option<Header> {
    let mut reader = Reader { file, at: 0 };
    let raw = match header(&mut reader) {
        Ok(raw) => raw,
        Err(why) => {
            report.add(FILES, Mark::default(), format!("{shard}: {why}"));
            return None;
        }
    };
    checked(shard, raw, reader.at, total, report)
}

struct Reader<'a> {
    file: &'a [u8],
    at: usize,
}

type Read<T> = std::result::Result<T, String>;

impl<'a> Reader<'a> {
    fn take(&mut self, bytes: u64) -> Read<Range<usize>> {
        let left = self.file.len() - self.at;
        match usize::try_from(bytes) {
            Ok(bytes) if bytes <= left => {
                let start = self.at;
                self.at += bytes;
                Ok(start..self.at)
            }
            _ => Err(format!(
                "{bytes} bytes are expected at byte {}, but {left} are left: this is only a part of a file, or a damaged one",
                self.at
            )),
        }
    }

    fn array<const N: usize>(&mut self) -> Read<[u8; N]> {
        let range = self.take(N as u64)?;
        let mut out = [0; N];
        out.copy_from_slice(&self.file[range]);
        Ok(out)
    }

    fn u32(&mut self) -> Read<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Read<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn text(&mut self) -> Read<Range<usize>> {
        let length = self.u64()?;
        self.take(length)
    }

    /// A key or the name of a tensor.
    fn name(&mut self, what: &str) -> Read<String> {
        let at = self.at;
        let range = self.text()?;
        if range.is_empty() || range.len() > MAX_NAME {
            return Err(format!(
                "{what} at byte {at} has {} bytes; 1 to {MAX_NAME} are allowed",
                range.len()
            ));
        }
        let text = std::str::from_utf8(&self.file[range]);
        Ok(text
            .map_err(|_| format!("{what} at byte {at} is not UTF-8"))?
            .into())
    }

    fn kind(&mut self) -> Read<Kind> {
        let at = self.at;
        let number = self.u32()?;
        Kind::numbered(number).ok_or_else(|| {
            format!("byte {at}: there is no type of values {number}; there are 0 to 12")
        })
    }

    fn value(&mut self, kind: Kind) -> Read<Value> {
        Ok(match kind {
            Kind::Text => Value::Text(self.text()?),
            Kind::List => {
                let (kind, count) = self.list(0)?;
                Value::List(kind, count)
            }
            scalar => {
                let range = self.take(scalar.bytes() as u64)?;
                scalar
                    .scalar(&self.file[range.clone()])
                    .ok_or_else(|| format!("byte {}: a truth value is 0 or 1", range.start))?
            }
        })
    }

    /// Walks over a list: the type of its elements, their count and where they are.
    fn list(&mut self, depth: usize) -> Read<(Kind, super::value::Elements)> {
        if depth >= MAX_DEPTH {
            return Err(format!(
                "byte {}: lists are nested more than {MAX_DEPTH} deep",
                self.at
            ));
        }
        let kind = self.kind()?;
        let count = self.u64()?;
        let start = self.at;
        match kind {
            Kind::Text => {
                for _ in 0..count {
                    self.text()?;
                }
            }
            Kind::List => {
                for _ in 0..count {
                    self.list(depth + 1)?;
                }
            }
            scalar => {
                let bytes = count.checked_mul(scalar.bytes() as u64);
                self.take(bytes.unwrap_or(u64::MAX))?;
            }
        }
        let elements = super::value::Elements {
            // Each takes at least a byte of the file.
            count: count as usize,
            bytes: start..self.at,
        };
        Ok((kind, elements))
    }
}

/// A header whose tensors are not checked yet.
struct Raw {
    metadata: Vec<(String, Value)>,
    tensors: Vec<RawTensor>,
}

struct RawTensor {
    name: String,
    /// Innermost first.
    sizes: Vec<u64>,
    number: u32,
    offset: u64,
}

fn header(r: &mut Reader<'_>) -> Read<Raw> {
    let magic: [u8; 4] = r
        .array()
        .map_err(|_| format!("the file has {} bytes; no GGUF is so small", r.file.len()))?;
    if magic != *b"GGUF" {
        return Err("this is no GGUF file: it does not begin with `GGUF`".into());
    }
    let version = r.u32()?;
    match version {
        2 | 3 => {}
        1 => return Err("GGUF version 1; versions 2 and 3 are read: convert it again".into()),
        other if (1..=3).contains(&other.swap_bytes()) => {
            return Err("the file is big endian; little endian ones are read".into());
        }
        other => return Err(format!("GGUF version {other}; versions 2 and 3 are read")),
    }
    let (tensors, entries) = (r.u64()?, r.u64()?);
    for (what, count) in [("tensors", tensors), ("entries of metadata", entries)] {
        if count > MAX_ENTRIES {
            return Err(format!(
                "the header says {count} {what}; {MAX_ENTRIES} are allowed"
            ));
        }
    }
    let mut raw = Raw {
        metadata: Vec::new(),
        tensors: Vec::new(),
    };
    for i in 0..entries {
        let key = r.name("the key")?;
        let entry = |why| format!("entry {i} of the metadata, {key:?}: {why}");
        let kind = r.kind().map_err(entry)?;
        let value = r.value(kind).map_err(entry)?;
        raw.metadata.push((key, value));
    }
    for i in 0..tensors {
        let name = r.name("the name of a tensor")?;
        let tensor = |why| format!("tensor {i}, {name:?}: {why}");
        let rank = r.u32().map_err(tensor)?;
        if rank as usize > MAX_RANK {
            return Err(tensor(format!("{rank} dimensions; {MAX_RANK} are allowed")));
        }
        let mut sizes = Vec::new();
        for _ in 0..rank {
            sizes.push(r.u64().map_err(tensor)?);
        }
        let number = r.u32().map_err(tensor)?;
        let offset = r.u64().map_err(tensor)?;
        raw.tensors.push(RawTensor {
            name,
            sizes,
            number,
            offset,
        });
    }
    Ok(raw)
}

/// Every key and every tensor stands once, and every tensor's bytes are its own and in the file.
fn checked(shard: &str, raw: Raw, end: usize, file: usize, report: &mut Report) -> Option<Header> {
    let mut fine = true;
    let mut fault = |kind, message: String| {
        report.add(kind, Mark::default(), format!("{shard}: {message}"));
        fine = false;
    };
    let mut keys = BTreeSet::new();
    for (key, _) in &raw.metadata {
        if !keys.insert(key.as_str()) {
            fault(FILES, format!("the metadata has {key:?} twice"));
        }
    }
    let said = raw.metadata.iter().find(|(k, _)| k == "general.alignment");
    let alignment = match said.map(|(_, v)| v) {
        None => ALIGNMENT,
        Some(Value::Int(n)) if (1..=1 << 20).contains(n) && (*n as u64).is_power_of_two() => {
            *n as u64
        }
        Some(_) => {
            let why = "general.alignment is no power of two up to 1048576";
            fault(FILES, why.into());
            ALIGNMENT
        }
    };
    // A file is shorter than half of what fits.
    let data = (end as u64).next_multiple_of(alignment);
    let mut tensors: Vec<(String, TensorInfo)> = Vec::new();
    let mut names = BTreeSet::new();
    for t in raw.tensors {
        let name = t.name.clone();
        let mut fault = |why: String| fault(TENSORS, format!("tensor {name:?}: {why}"));
        if !names.insert(t.name.clone()) {
            fault("stands in the header twice".into());
        }
        let sizes: Option<Vec<usize>> = t
            .sizes
            .iter()
            .rev()
            .map(|n| usize::try_from(*n).ok())
            .collect();
        let Some(dtype) = Type::numbered(t.number) else {
            fault(format!("there is no element type {}", t.number));
            continue;
        };
        // A single number has no sizes.
        let shape = sizes.filter(|s| s.iter().all(|n| *n > 0));
        let bytes = shape.as_deref().and_then(|s| match s {
            [] => dtype.bytes_of(&[1]),
            s => dtype.bytes_of(s),
        });
        let (Some(shape), Some(bytes)) = (shape, bytes) else {
            let sizes: Vec<u64> = t.sizes.iter().rev().copied().collect();
            fault(format!(
                "sizes {sizes:?} of {} are no whole blocks of {}, or none, or too many",
                dtype.name, dtype.elements
            ));
            continue;
        };
        if !t.offset.is_multiple_of(alignment) {
            fault(format!(
                "its offset {} is no multiple of the alignment {alignment}",
                t.offset
            ));
        }
        let start = data.checked_add(t.offset);
        let stop = start.and_then(|s| s.checked_add(bytes as u64));
        let (Some(start), Some(stop)) = (start, stop.filter(|s| *s <= file as u64)) else {
            fault(format!(
                "its {bytes} bytes at offset {} lie outside the file of {file}",
                t.offset
            ));
            continue;
        };
        let info = TensorInfo {
            dtype: dtype.name.into(),
            shape,
            shard: shard.into(),
            strides: None,
            range: start as usize..stop as usize,
        };
        tensors.push((t.name, info));
    }
    let mut sorted: Vec<_> = tensors.iter().collect();
    sorted.sort_by_key(|(_, info)| (info.range.start, info.range.end));
    for pair in sorted.windows(2) {
        if let [(a, first), (b, second)] = pair
            && second.range.start < first.range.end
        {
            fault(
                TENSORS,
                format!("the bytes of tensors {a:?} and {b:?} overlap"),
            );
        }
    }
    fine.then_some(Header {
        metadata: raw.metadata,
        tensors,
    })
}

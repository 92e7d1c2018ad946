//! Another implementation's run of a model, block by block, and how far ours is from it.
//!
//! The file is safetensors: `token_ids` (T) I64 or I32, and in F32 whichever there are of `hidden.0` (T, D),
//! what the first block reads; `hidden.{i}` (T, D), the stream behind block i, counted from 1; `norm` (T, D),
//! behind the final norm; `logits` (T, V). `tests/make_reference.py` writes one with transformers.
//!
//! A row's difference is measured by the row: sqrt(mean((x - r)²)) over the standard deviation of r, the
//! reference's values at that position. So positions and blocks of any size compare.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value as Json};
use strata_layers::Graph;

use crate::ids::TokenId;
use crate::runner::Point;
use crate::session::{self, Engine, Request};

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum Error {
    #[error("{path}: {source}")]
    Io {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path}: {}", .faults.join("; "))]
    Faults { path: PathBuf, faults: Vec<String> },
    #[error(transparent)]
    Engine(#[from] session::Error),
}

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Value {
    /// The stream.
    Stream(Point),
    /// The logits.
    Logits,
}

impl Value {
    /// The tensor's name.
    pub fn tensor(self) -> String {
        match self {
            Value::Stream(Point::Embedding) => "hidden.0".into(),
            Value::Stream(Point::Block(i)) => format!("hidden.{}", i + 1),
            Value::Stream(Point::Norm) => "norm".into(),
            Value::Logits => "logits".into(),
        }
    }

    fn of(name: &str) -> Option<Value> {
        match name {
            "norm" => Some(Value::Stream(Point::Norm)),
            "logits" => Some(Value::Logits),
            _ => {
                let number = name.strip_prefix("hidden.")?;
                let i: usize = number.parse().ok()?;
                // `hidden.01` is no name of ours.
                (i.to_string() == number).then(|| {
                    Value::Stream(match i.checked_sub(1) {
                        None => Point::Embedding,
                        Some(block) => Point::Block(block),
                    })
                })
            }
        }
    }
}

/// A reference's run, whose tensors stay in their file until they are compared.
pub struct ReferenceRun {
    path: PathBuf,
    file: File,
    /// Its tokens.
    pub tokens: Vec<TokenId>,
    /// Where each value begins in the file, and its width.
    values: BTreeMap<Value, (u64, usize)>,
}

impl fmt::Debug for ReferenceRun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (tokens, values) = (self.tokens.len(), self.values.len());
        write!(f, "ReferenceRun({tokens} tokens, {values} tensors)")
    }
}

/// Most bytes of a header: ten thousand blocks have one of a megabyte.
const MAX_HEADER: u64 = 16 << 20;

impl ReferenceRun {
    /// Reads the header and the tokens, and checks all of it against the network.
    pub fn open(path: &Path, graph: &Graph) -> Result<Self, Error> {
        let io = |source| Error::Io {
            path: path.into(),
            source,
        };
        let fault = |text: String| Error::Faults {
            path: path.into(),
            faults: vec![text],
        };
        // Asked first: to open a pipe would wait for its other end.
        if !std::fs::metadata(path).map_err(io)?.is_file() {
            return Err(fault("is no regular file".into()));
        }
        let mut file = File::open(path).map_err(io)?;
        let size = file.metadata().map_err(io)?.len();
        let mut length = [0; 8];
        if size < 8 {
            return Err(fault(format!(
                "is no safetensors file: it has {size} bytes"
            )));
        }
        file.read_exact(&mut length).map_err(io)?;
        let length = u64::from_le_bytes(length);
        if length > MAX_HEADER.min(size - 8) {
            return Err(fault(format!(
                "is no safetensors file: a header of {length} bytes, in a file of {size} and of at most {MAX_HEADER}"
            )));
        }
        let mut header = vec![0; length as usize];
        file.read_exact(&mut header).map_err(io)?;
        let tensors = read_header(&header, size - 8 - length).map_err(|faults| Error::Faults {
            path: path.into(),
            faults,
        })?;
        let begin = 8 + length;
        let (tokens, mut faults) = match tensors.get("token_ids") {
            None => (Vec::new(), vec!["`token_ids` is missing".into()]),
            Some(info) => read_tokens(&mut file, begin, info).map_err(io)?,
        };
        let vocab = graph.vocab;
        if let Some(at) = tokens.iter().position(|t| *t as usize >= vocab) {
            faults.push(format!(
                "token id {} at position {at} is outside the vocabulary of {vocab}",
                tokens[at]
            ));
        }
        let mut values = BTreeMap::new();
        let blocks = graph.stack.len();
        let names = tensors.keys().filter(|n| *n != "token_ids");
        let mut deepest = 0;
        for name in names {
            let Some(value) = Value::of(name) else {
                faults.push(format!(
                    "`{name}` is none of token_ids, hidden.0 to hidden.{blocks}, norm and logits"
                ));
                continue;
            };
            if let Value::Stream(Point::Block(i)) = value {
                deepest = deepest.max(i + 1);
                if i >= blocks {
                    continue;
                }
            }
            let info = &tensors[name];
            let width = match value {
                Value::Stream(_) => graph.d_model,
                Value::Logits => vocab,
            };
            let expected = [tokens.len(), width];
            if info.dtype != "F32" || info.shape != expected {
                // Without tokens, every shape is wrong.
                if !tokens.is_empty() {
                    faults.push(format!(
                        "`{name}` is {} {:?}, expected F32 {expected:?}: (tokens, {})",
                        info.dtype,
                        info.shape,
                        if value == Value::Logits {
                            "vocab"
                        } else {
                            "d_model"
                        }
                    ));
                }
                continue;
            }
            values.insert(value, (begin + info.data_offsets[0], width));
        }
        if deepest > blocks {
            faults.push(format!(
                "its model has at least {deepest} blocks, the plan {blocks}: one block of the plan is one of `hidden.1` …"
            ));
        }
        if values.is_empty() && faults.is_empty() {
            faults.push("there is nothing to compare beside `token_ids`".into());
        }
        if !faults.is_empty() {
            let path = path.into();
            return Err(Error::Faults { path, faults });
        }
        Ok(ReferenceRun {
            path: path.into(),
            file,
            tokens,
            values,
        })
    }

    /// What it holds, in the order in which it is computed.
    pub fn values(&self) -> impl Iterator<Item = Value> {
        self.values.keys().copied()
    }

    /// Rows of a value from `position` on, into `rows`.
    fn read(&mut self, value: Value, position: usize, rows: &mut [f32]) -> Result<(), Error> {
        let (begin, width) = self.values[&value];
        let at = begin + (position * width * 4) as u64;
        let mut bytes = vec![0; rows.len() * 4];
        let read =
            (self.file.seek(SeekFrom::Start(at))).and_then(|_| self.file.read_exact(&mut bytes));
        read.map_err(|source| Error::Io {
            path: self.path.clone(),
            source,
        })?;
        for (value, bytes) in rows.iter_mut().zip(bytes.as_chunks().0) {
            *value = f32::from_le_bytes(*bytes);
        }
        Ok(())
    }
}

/// A tensor as the header has it.
#[derive(Deserialize)]
struct TensorInfo {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

/// The tensors of a header, each with as many bytes as its shape wants, within the `data` bytes that there are.
fn read_header(header: &[u8], data: u64) -> Result<BTreeMap<String, TensorInfo>, Vec<String>> {
    let object: Map<String, Json> =
        serde_json::from_slice(header).map_err(|e| vec![format!("is no safetensors file: {e}")])?;
    let (mut tensors, mut faults) = (BTreeMap::new(), Vec::new());
    for (name, entry) in object {
        if name == "__metadata__" {
            continue;
        }
        let info: TensorInfo = match serde_json::from_value(entry) {
            Ok(info) => info,
            Err(e) => {
                faults.push(format!("`{name}`: {e}"));
                continue;
            }
        };
        let size = match info.dtype.as_str() {
            "F32" | "I32" => Some(4),
            "I64" => Some(8),
            // Its use is refused for its type.
            _ => None,
        };
        let elements = info
            .shape
            .iter()
            .try_fold(1_u64, |n, size| n.checked_mul(u64::try_from(*size).ok()?));
        let wanted = size.map(|size| elements.and_then(|n| n.checked_mul(size)));
        let [from, to] = info.data_offsets;
        if from > to || to > data {
            faults.push(format!(
                "`{name}` is at bytes {from} to {to} of {data}: the file was cut, or is damaged"
            ));
        } else if wanted.is_some_and(|wanted| wanted != Some(to - from)) {
            faults.push(format!(
                "`{name}` {:?} does not fit its {} bytes",
                info.shape,
                to - from
            ));
        } else {
            tensors.insert(name, info);
        }
    }
    if faults.is_empty() {
        Ok(tensors)
    } else {
        Err(faults)
    }
}

/// The tokens and what is wrong with them. Their bytes are known to be in the file.
fn read_tokens(
    file: &mut File,
    begin: u64,
    info: &TensorInfo,
) -> std::io::Result<(Vec<TokenId>, Vec<String>)> {
    let size = match info.dtype.as_str() {
        "I64" => 8,
        "I32" => 4,
        other => {
            let fault = format!("`token_ids` is {other}, expected I64 or I32");
            return Ok((Vec::new(), vec![fault]));
        }
    };
    let flat = matches!(info.shape[..], [_] | [1, _]);
    let count: usize = info.shape.iter().product();
    if !flat || count == 0 {
        let fault = format!(
            "`token_ids` has the shape {:?}, expected one sequence of at least a token",
            info.shape
        );
        return Ok((Vec::new(), vec![fault]));
    }
    file.seek(SeekFrom::Start(begin + info.data_offsets[0]))?;
    let mut bytes = vec![0; count * size];
    file.read_exact(&mut bytes)?;
    let wide = bytes.chunks_exact(size).map(|b| match size {
        8 => i64::from_le_bytes(b.try_into().expect("eight bytes")),
        _ => i64::from(i32::from_le_bytes(b.try_into().expect("four bytes"))),
    });
    let mut tokens = Vec::with_capacity(count);
    for (position, id) in wide.enumerate() {
        match TokenId::try_from(id) {
            Ok(id) => tokens.push(id),
            Err(_) => {
                let fault = format!("token id {id} at position {position} is none");
                return Ok((Vec::new(), vec![fault]));
            }
        }
    }
    Ok((tokens, Vec::new()))
}

/// How far one value is from the reference's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Difference {
    /// What was compared.
    pub value: Value,
    /// The largest difference of an element, in standard deviations of its row.
    pub largest: f64,
    /// Root of the mean of all rows' squared differences.
    pub rms: f64,
    /// The difference of the row that is farthest off; infinite if one side has a number that is none.
    pub worst: f64,
    /// The position of that row.
    pub worst_position: usize,
    rows: usize,
}

impl Difference {
    fn new(value: Value) -> Self {
        Difference {
            value,
            largest: 0.0,
            rms: 0.0,
            worst: 0.0,
            worst_position: 0,
            rows: 0,
        }
    }

    /// Takes a row in: ours, and the reference's.
    fn add(&mut self, position: usize, ours: &[f32], reference: &[f32]) {
        let n = reference.len() as f64;
        let mean = reference.iter().map(|r| f64::from(*r)).sum::<f64>() / n;
        let (mut variance, mut squares, mut most) = (0.0, 0.0, 0.0_f64);
        for (x, r) in ours.iter().zip(reference) {
            variance += (f64::from(*r) - mean).powi(2) / n;
            // Equal infinities differ by nothing.
            let d = if x == r {
                0.0
            } else {
                f64::from(*x) - f64::from(*r)
            };
            let d = if d.is_nan() { f64::INFINITY } else { d };
            squares += d * d / n;
            most = most.max(d.abs());
        }
        let std = variance.sqrt();
        let by = |d: f64| match d {
            0.0 => 0.0,
            d if d.is_finite() && std.is_finite() => d / std,
            _ => f64::INFINITY,
        };
        let (row, most) = (by(squares.sqrt()), by(most));
        self.largest = self.largest.max(most);
        let rows = self.rows as f64;
        self.rms = ((self.rms * self.rms * rows + row * row) / (rows + 1.0)).sqrt();
        self.rows += 1;
        if row > self.worst {
            (self.worst, self.worst_position) = (row, position);
        }
    }
}

/// Runs the reference's tokens and compares each value as it is computed, a chunk at a time.
/// `engine` runs nothing else; `progress` is told the tokens done.
pub fn compare(
    engine: &mut Engine,
    run: &mut ReferenceRun,
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<Difference>, Error> {
    let mut found: BTreeMap<Value, Difference> =
        run.values().map(|v| (v, Difference::new(v))).collect();
    let id = engine.submit(Request {
        prompt: run.tokens.clone(),
        prompt_logits: found.contains_key(&Value::Logits),
        ..Request::default()
    })?;
    // Both closures of a step read the file.
    let state = std::cell::RefCell::new((run, &mut found, None));
    let take = |value: Value, position: usize, width: usize, rows: &[f32]| {
        let (run, found, failed) = &mut *state.borrow_mut();
        let Some(difference) = found.get_mut(&value).filter(|_| failed.is_none()) else {
            return;
        };
        let mut reference = vec![0.0; rows.len()];
        if let Err(error) = run.read(value, position, &mut reference) {
            *failed = Some(error);
            return;
        }
        let pairs = rows.chunks_exact(width).zip(reference.chunks_exact(width));
        for (i, (ours, theirs)) in pairs.enumerate() {
            difference.add(position + i, ours, theirs);
        }
    };
    let graph = &engine.network().graph;
    let (d_model, vocab) = (graph.d_model, graph.vocab);
    while engine.step_watched(
        &mut |w| take(Value::Stream(w.point), w.position, d_model, w.rows),
        &mut |_, position, logits| take(Value::Logits, position, vocab, logits),
    )? {
        if let Some(error) = state.borrow_mut().2.take() {
            return Err(error);
        }
        progress(engine.computed(id));
    }
    let tokens = state.into_inner().0.tokens.len();
    let whole = found.values().all(|d| d.rows == tokens);
    assert!(whole, "{tokens} rows of every value: {found:?}");
    Ok(found.into_values().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_measured_by_the_references_spread() {
        let mut d = Difference::new(Value::Logits);
        let reference = [1.0, -1.0, 1.0, -1.0];
        d.add(0, &reference, &reference);
        assert_eq!((d.largest, d.rms, d.worst), (0.0, 0.0, 0.0));
        d.add(1, &[1.0, -1.0, 1.5, -1.0], &reference);
        assert_eq!((d.largest, d.worst, d.worst_position), (0.5, 0.25, 1));
        assert!((d.rms - 0.25 / 2_f64.sqrt()).abs() < 1e-15);
        // A row of zeros that is the same is no division by zero; one that differs is infinitely far.
        d.add(2, &[0.0; 4], &[0.0; 4]);
        assert_eq!(d.worst, 0.25);
        d.add(3, &[0.0, 0.0, f32::NAN, 0.0], &reference);
        d.add(4, &[1.0; 4], &reference);
        assert_eq!((d.worst, d.worst_position), (f64::INFINITY, 3));
    }

    #[test]
    fn values_and_their_names_lead_to_each_other() {
        for value in [
            Value::Stream(Point::Embedding),
            Value::Stream(Point::Block(0)),
            Value::Stream(Point::Block(41)),
            Value::Stream(Point::Norm),
            Value::Logits,
        ] {
            assert_eq!(Value::of(&value.tensor()), Some(value));
        }
        for name in [
            "hidden.",
            "hidden.01",
            "hidden.-1",
            "hidden",
            "head",
            "hidden.1.x",
        ] {
            assert_eq!(Value::of(name), None, "{name}");
        }
    }
}

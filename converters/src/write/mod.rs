//! Writing checkpoints: what a tensor's bytes are made from, and files that are whole or not there.
//!
//! A [`Target`] knows its size before any element is read, so a file's header is written first and its
//! tensors follow, piece by piece: pieces are made by several threads and written in order, and memory
//! is bounded by the few pieces under way, whatever the model's size.

pub mod folder;
pub mod safetensors;
mod stream;

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use strata_kernels::{Format, HostTensor};

use crate::checkpoint::{Checkpoint, Contents};
use crate::error::{Error, Result};
use crate::published::Step;

pub use folder::{Folder, Options};
pub use stream::{File, Progress, Quiet, begun, write};

/// A tensor that is to be written.
pub struct Target {
    /// Its name in the file.
    pub name: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    encoding: Encoding,
    /// How much the columns of each run's weight count; empty if all count alike.
    importance: Vec<Option<Arc<[f32]>>>,
    open: Box<Open>,
    held: Mutex<Held>,
}

/// Opens what a target is made from.
type Open = dyn Fn() -> Result<Content> + Send + Sync;

/// How a target's elements are stored.
#[derive(Debug, Clone, PartialEq)]
enum Encoding {
    /// As some file has them: the element type in the words of safetensors, and the bytes.
    Stored(String, u64),
    /// In a format that runs.
    Made(Format),
    /// The codes of rows in a format with a scale a row.
    Codes(Format),
    /// The scales of such rows, which have so many columns.
    Scales(Format, usize),
}

/// What is open while a target's pieces are made.
#[derive(Default)]
struct Held {
    content: Option<Arc<Content>>,
    done: usize,
}

/// What a target's elements are made from.
pub enum Content {
    /// Bytes that are written as they are.
    Stored(Contents),
    /// A tensor of a checkpoint that is widened, to the type that the target has.
    Widened(Arc<Checkpoint>, String),
    /// Elements of tensors, one run after the other.
    Made {
        /// The runs.
        runs: Vec<Part>,
        /// What is done to each element on the way, the last first.
        undo: Vec<Step>,
    },
}

/// Elements of a tensor, in a row.
#[derive(Debug, Clone)]
pub struct Part {
    /// The tensor.
    pub tensor: HostTensor,
    /// Which of its elements.
    pub elements: Range<usize>,
    /// What is done to each before anything else.
    pub change: Option<Step>,
}

impl From<(HostTensor, Range<usize>)> for Part {
    fn from((tensor, elements): (HostTensor, Range<usize>)) -> Self {
        Part {
            tensor,
            elements,
            change: None,
        }
    }
}

/// Elements made at a time: whole blocks of every format.
const PIECE: usize = 1 << 20;

impl Target {
    /// Bytes as some file has them, of any element type, in the words of safetensors.
    pub fn stored(
        name: impl Into<String>,
        shape: Vec<usize>,
        dtype: &str,
        bytes: u64,
        open: impl Fn() -> Result<Contents> + Send + Sync + 'static,
    ) -> Self {
        Target {
            name: name.into(),
            shape,
            encoding: Encoding::Stored(dtype.into(), bytes),
            importance: Vec::new(),
            open: Box::new(move || Ok(Content::Stored(open()?))),
            held: Mutex::default(),
        }
    }

    /// Elements in a format. What they are made from is opened when the first piece is made, and let go of
    /// after the last.
    pub fn made(
        name: impl Into<String>,
        shape: Vec<usize>,
        format: Format,
        open: impl Fn() -> Result<Content> + Send + Sync + 'static,
    ) -> Self {
        Target {
            name: name.into(),
            shape,
            encoding: Encoding::Made(format),
            importance: Vec::new(),
            open: Box::new(open),
            held: Mutex::default(),
        }
    }

    /// Rows of (rows, columns) in the format int8 or fp8, as safetensors has them: the numbers, and beside them a
    /// scale a row, F32 of (rows, 1).
    pub fn by_rows(
        format: Format,
        [numbers, scales]: [String; 2],
        [rows, columns]: [usize; 2],
        open: impl Fn() -> Result<Content> + Send + Sync + 'static,
    ) -> [Self; 2] {
        let open = Arc::new(open);
        let again = open.clone();
        let numbers = Target::made(numbers, vec![rows, columns], format, move || open());
        let scales = Target::made(scales, vec![rows, 1], format, move || again());
        [
            Target {
                encoding: Encoding::Codes(format),
                ..numbers
            },
            Target {
                encoding: Encoding::Scales(format, columns),
                ..scales
            },
        ]
    }

    /// The same, quantised row by row: of each run of elements, how much the columns of the weight that they are
    /// from count. Formats without blocks do not ask.
    pub fn weighing(self, importance: Vec<Option<Arc<[f32]>>>) -> Self {
        let in_blocks = self.format().is_some_and(|f| f.dtype().is_none());
        let asks = in_blocks && importance.iter().any(Option::is_some);
        let importance = if asks { importance } else { Vec::new() };
        Target { importance, ..self }
    }

    /// All numbers that say how much columns count.
    pub(crate) fn importance(&self) -> impl Iterator<Item = f32> {
        self.importance
            .iter()
            .flatten()
            .flat_map(|w| w.iter().copied())
    }

    /// The bytes it takes in the file.
    pub fn bytes(&self) -> Result<u64> {
        match &self.encoding {
            Encoding::Stored(_, bytes) => Ok(*bytes),
            Encoding::Made(format) => {
                let bytes = format.bytes_of(&self.shape).map(|b| b as u64);
                bytes.ok_or_else(|| {
                    let elements = format.block().elements;
                    let why = format!(
                        "rows of {:?} are no whole blocks of {elements}, as {format} has them",
                        self.shape
                    );
                    Error::file(&self.name, why)
                })
            }
            Encoding::Codes(_) => Ok(self.elements() as u64),
            Encoding::Scales(..) => Ok(4 * self.elements() as u64),
        }
    }

    /// The format of its elements, if it is one that runs.
    pub fn format(&self) -> Option<Format> {
        match self.encoding {
            Encoding::Made(format) => Some(format),
            Encoding::Stored(..) | Encoding::Codes(_) | Encoding::Scales(..) => None,
        }
    }

    /// Element type, in the words of safetensors; `None` for formats that it does not know.
    pub fn dtype(&self) -> Option<&str> {
        match &self.encoding {
            Encoding::Stored(dtype, _) => Some(dtype),
            Encoding::Codes(Format::Fp8) => Some("F8_E4M3"),
            Encoding::Codes(_) => Some("I8"),
            Encoding::Scales(..) => Some("F32"),
            Encoding::Made(format) => match format {
                Format::F32 => Some("F32"),
                Format::F16 => Some("F16"),
                Format::BF16 => Some("BF16"),
                _ => None,
            },
        }
    }

    /// In how many pieces it is made.
    fn pieces(&self) -> usize {
        match &self.encoding {
            Encoding::Stored(_, bytes) => bytes.div_ceil(4 * PIECE as u64) as usize,
            _ => self.source_elements().div_ceil(self.piece_elements()),
        }
    }

    /// Elements of a piece: whole rows where rows are quantised as such.
    fn piece_elements(&self) -> usize {
        let columns = match (&self.encoding, self.shape.last()) {
            (Encoding::Scales(_, columns), _) => *columns,
            (Encoding::Codes(_), Some(columns)) => *columns,
            (_, Some(columns)) if !self.importance.is_empty() => *columns,
            _ => return PIECE,
        };
        (PIECE / columns.max(1)).max(1) * columns.max(1)
    }

    fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Elements of what it is made from.
    fn source_elements(&self) -> usize {
        match self.encoding {
            Encoding::Scales(_, columns) => self.elements() * columns,
            _ => self.elements(),
        }
    }

    /// The bytes of one piece.
    fn piece(&self, piece: usize, to: &mut Vec<u8>) -> Result<()> {
        let content = self.content()?;
        match (&*content, &self.encoding) {
            (Content::Stored(contents), _) => {
                let start = piece * 4 * PIECE;
                let end = (start + 4 * PIECE).min(contents.bytes().len());
                to.extend_from_slice(contents.bytes().get(start..end).unwrap_or_default());
                contents.forget(start..end);
            }
            (Content::Made { runs, undo }, Encoding::Made(format)) => {
                self.make(piece, *format, runs, undo, to)?;
            }
            (
                Content::Made { runs, undo },
                Encoding::Codes(format) | Encoding::Scales(format, _),
            ) => {
                self.make_rows(piece, *format, runs, undo, to)?;
            }
            (Content::Widened(checkpoint, tensor), _) => {
                let wanted = piece * PIECE..((piece + 1) * PIECE).min(self.elements());
                checkpoint.widen(tensor, wanted, to)?;
            }
            (Content::Made { .. }, Encoding::Stored(..)) => {
                return Err(Error::file(&self.name, "its elements have no format"));
            }
        }
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.done += 1;
        if held.done == self.pieces() {
            *held = Held::default();
        }
        Ok(())
    }

    /// What it is made from, opened by whoever comes first.
    fn content(&self) -> Result<Arc<Content>> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(content) = &held.content {
            return Ok(content.clone());
        }
        let content = Arc::new((self.open)()?);
        held.content = Some(content.clone());
        Ok(content)
    }

    /// The source's elements of a piece.
    fn wanted(&self, piece: usize) -> Range<usize> {
        let each = self.piece_elements();
        piece * each..((piece + 1) * each).min(self.source_elements())
    }

    /// A piece of rows with a scale each: their numbers or their scales.
    fn make_rows(
        &self,
        piece: usize,
        format: Format,
        runs: &[Part],
        undo: &[Step],
        to: &mut Vec<u8>,
    ) -> Result<()> {
        let values = widened(self.wanted(piece), runs, undo)?;
        let (columns, scales) = match (&self.encoding, self.shape.last()) {
            (Encoding::Scales(_, columns), _) => (*columns, true),
            (_, last) => (last.copied().unwrap_or(1), false),
        };
        let mut row = Vec::new();
        for values in values.chunks(columns.max(1)) {
            row.clear();
            encode(format, values, None, &mut row).map_err(|why| Error::file(&self.name, why))?;
            let scale = row.len() - 4;
            to.extend_from_slice(if scales {
                &row[scale..]
            } else {
                &row[..columns]
            });
        }
        Ok(())
    }

    fn make(
        &self,
        piece: usize,
        format: Format,
        runs: &[Part],
        undo: &[Step],
        to: &mut Vec<u8>,
    ) -> Result<()> {
        let wanted = self.wanted(piece);
        let as_is = |run: &Part| run.tensor.format() == format && run.change.is_none();
        // The same bytes, if what is cut are whole blocks.
        let before = to.len();
        let same = undo.is_empty()
            && runs.iter().all(as_is)
            && cut(wanted.clone(), runs).all(|(run, from)| {
                let found = run.tensor.elements(from);
                found.map(|b| to.extend_from_slice(b)).is_some()
            });
        if same {
            cut(wanted, runs).for_each(|(run, from)| run.tensor.forget(from));
            return Ok(());
        }
        to.truncate(before);
        let values = widened(wanted.clone(), runs, undo)?;
        let named = |why| Error::file(&self.name, why);
        if self.importance.is_empty() {
            return encode(format, &values, None, to).map_err(named);
        }
        let columns = self.shape.last().copied().unwrap_or(1);
        let runs: Vec<&Range<usize>> = runs.iter().map(|run| &run.elements).collect();
        let ends: Vec<usize> = runs
            .iter()
            .scan(0, |end, range| {
                *end += range.len();
                Some(*end)
            })
            .collect();
        let mut weights = Vec::new();
        for (row, values) in values.chunks(columns).enumerate() {
            let start = wanted.start + row * columns;
            let told = self.weigh(start..start + columns, &runs, &ends, &mut weights);
            let weights = told.then_some(&weights[..]);
            encode(format, values, weights, to).map_err(named)?;
        }
        Ok(())
    }

    /// How much the elements of a row count, of runs with these ends; false if nobody says.
    fn weigh(
        &self,
        row: Range<usize>,
        runs: &[&Range<usize>],
        ends: &[usize],
        weights: &mut Vec<f32>,
    ) -> bool {
        weights.clear();
        let (mut at, mut told) = (row.start, false);
        let first = ends.partition_point(|end| *end <= row.start);
        for (run, (end, range)) in ends.iter().zip(runs).enumerate().skip(first) {
            if at >= row.end {
                break;
            }
            let importance = self.importance.get(run).and_then(Option::as_ref);
            told |= importance.is_some();
            // Rows of a weight follow each other.
            let from = range.end - (end - at);
            let part = at..row.end.min(*end);
            let of = |i: usize| importance.map_or(1.0, |w| w[(from + i - at) % w.len()]);
            weights.extend(part.clone().map(of));
            at = part.end;
        }
        told
    }
}

/// The parts of runs, one behind the other, that are the elements `wanted` of them all.
fn cut(wanted: Range<usize>, runs: &[Part]) -> impl Iterator<Item = (&Part, Range<usize>)> {
    let mut first = 0;
    runs.iter().filter_map(move |run| {
        let (start, end) = (first, first + run.elements.len());
        first = end;
        let part = wanted.start.max(start)..wanted.end.min(end);
        let at = run.elements.start;
        (!part.is_empty()).then(|| (run, at + (part.start - start)..at + (part.end - start)))
    })
}

/// The values of the elements `wanted` of runs.
fn widened(wanted: Range<usize>, runs: &[Part], undo: &[Step]) -> Result<Vec<f32>> {
    let mut values = Vec::with_capacity(wanted.len());
    for (run, from) in cut(wanted, runs) {
        let done = values.len();
        values.resize(done + from.len(), 0.0);
        run.tensor.widen(from.clone(), &mut values[done..])?;
        if let Some(step) = &run.change {
            values[done..].iter_mut().for_each(|v| *v = step.apply(*v));
        }
        run.tensor.forget(from);
    }
    for value in &mut values {
        *value = undo.iter().rev().fold(*value, |v, step| step.apply(v));
    }
    Ok(values)
}

/// Values in a format, appended: whole blocks. With weights they are a row.
fn encode(
    format: Format,
    values: &[f32],
    weights: Option<&[f32]>,
    to: &mut Vec<u8>,
) -> std::result::Result<(), String> {
    let start = to.len();
    let bytes = format
        .row_bytes(values.len())
        .ok_or("its pieces are no whole blocks")?;
    to.resize(start + bytes, 0);
    let to = &mut to[start..];
    if format == Format::F32 {
        // What is not finite is written as it is.
        let places = to.chunks_exact_mut(4).zip(values);
        places.for_each(|(to, v)| to.copy_from_slice(&v.to_le_bytes()));
        return Ok(());
    }
    format
        .quantize(values, weights, to)
        .map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(format: Format, runs: Vec<(HostTensor, Range<usize>)>, shape: &[usize]) -> Vec<u8> {
        let open = move || {
            Ok(Content::Made {
                runs: runs.iter().cloned().map(Part::from).collect(),
                undo: Vec::new(),
            })
        };
        let target = Target::made("t", shape.to_vec(), format, open);
        let mut bytes = Vec::new();
        for piece in 0..target.pieces() {
            target.piece(piece, &mut bytes).unwrap();
        }
        assert_eq!(bytes.len() as u64, target.bytes().unwrap());
        bytes
    }

    #[test]
    fn runs_of_several_tensors_follow_each_other() {
        let a = HostTensor::from_f32(&[2, 2], &[0.0, 1.0, 2.0, 3.0]).unwrap();
        let b = HostTensor::from_f32(&[2, 2], &[4.0, 5.0, 6.0, 7.0]).unwrap();
        let runs = vec![(b.clone(), 2..4), (a.clone(), 0..4), (b, 0..2)];
        let expected: Vec<u8> = [6.0f32, 7.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect();
        assert_eq!(made(Format::F32, runs, &[4, 2]), expected);
    }

    #[test]
    fn large_tensors_are_made_in_pieces() {
        let values: Vec<f32> = (0..PIECE + 100).map(|i| (i % 251) as f32).collect();
        let tensor = HostTensor::from_f32(&[values.len()], &values).unwrap();
        let bytes = made(
            Format::BF16,
            vec![(tensor, 0..values.len())],
            &[values.len()],
        );
        let back = HostTensor::new(
            Format::BF16,
            &[values.len()],
            Arc::new(bytes),
            0..2 * values.len(),
        );
        assert_eq!(back.unwrap().to_f32(), values);
    }
}

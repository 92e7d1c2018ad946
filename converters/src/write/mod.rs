//! Writing checkpoints: what a tensor's bytes are made from, and files that are whole or not there.
//!
//! A [`Target`] knows its size before any element is read, so a file's header is written first and its
//! tensors follow, piece by piece: pieces are made by several threads and written in order, and memory
//! is bounded by the few pieces under way, whatever the model's size.

pub mod folder;
pub mod safetensors;
mod stream;

use std::ops::Range;
use std::sync::Arc;

use strata_kernels::tensor::HostBytes;
use strata_kernels::{Format, HostTensor};

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::published::Step;

pub use folder::{Folder, Options};
pub use stream::{File, Progress, Quiet, write};

/// A tensor that is to be written.
pub struct Target {
    /// Its name in the file.
    pub name: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Where its elements are from.
    pub content: Content,
}

/// Where a target's elements are from.
pub enum Content {
    /// Bytes as some file has them, of any element type.
    Stored {
        /// Element type, in the words of safetensors.
        dtype: String,
        /// Who holds the bytes.
        owner: Arc<dyn HostBytes>,
        /// Which they are.
        range: Range<usize>,
    },
    /// A tensor of a checkpoint that is widened.
    Widened {
        /// Element type, in the words of safetensors: F32 or BF16.
        dtype: String,
        /// The checkpoint.
        checkpoint: Arc<Checkpoint>,
        /// The tensor's name there.
        tensor: String,
    },
    /// Elements of tensors, one run after the other.
    Made {
        /// How they are to be stored.
        format: Format,
        /// The runs.
        runs: Vec<(HostTensor, Range<usize>)>,
        /// What is done to each element on the way.
        undo: Vec<Step>,
    },
}

/// Elements made at a time: whole blocks of every format.
const PIECE: usize = 1 << 20;

impl Target {
    /// The bytes it takes in the file.
    pub fn bytes(&self) -> Result<u64> {
        match &self.content {
            Content::Stored { range, .. } => Ok(range.len() as u64),
            Content::Widened { dtype, .. } => {
                let size = if dtype == "F32" { 4 } else { 2 };
                Ok((self.elements() as u64).saturating_mul(size))
            }
            Content::Made { format, .. } => {
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
        }
    }

    /// Element type, in the words of safetensors; `None` for formats that it does not know.
    pub fn dtype(&self) -> Option<&str> {
        match &self.content {
            Content::Stored { dtype, .. } | Content::Widened { dtype, .. } => Some(dtype),
            Content::Made { format, .. } => match format {
                Format::F32 => Some("F32"),
                Format::F16 => Some("F16"),
                Format::BF16 => Some("BF16"),
                _ => None,
            },
        }
    }

    /// In how many pieces it is made.
    fn pieces(&self) -> usize {
        match &self.content {
            Content::Stored { range, .. } => range.len().div_ceil(4 * PIECE),
            Content::Widened { .. } | Content::Made { .. } => self.elements().div_ceil(PIECE),
        }
    }

    fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The bytes of one piece.
    fn piece(&self, piece: usize, to: &mut Vec<u8>) -> Result<()> {
        match &self.content {
            Content::Stored { owner, range, .. } => {
                let start = range.start + piece * 4 * PIECE;
                let end = (start + 4 * PIECE).min(range.end);
                to.extend_from_slice(&owner.bytes()[start..end]);
                owner.forget(start..end);
                Ok(())
            }
            Content::Widened {
                checkpoint, tensor, ..
            } => {
                let wanted = piece * PIECE..((piece + 1) * PIECE).min(self.elements());
                checkpoint.widen(tensor, wanted, to)
            }
            Content::Made { format, runs, undo } => {
                let wanted = piece * PIECE..((piece + 1) * PIECE).min(self.elements());
                let mut first = 0;
                let mut values = Vec::new();
                for (tensor, range) in runs {
                    let (start, end) = (first, first + range.len());
                    first = end;
                    let part = wanted.start.max(start)..wanted.end.min(end);
                    if part.is_empty() {
                        continue;
                    }
                    let from = range.start + (part.start - start)..range.start + (part.end - start);
                    if undo.is_empty() && tensor.format() == *format && values.is_empty() {
                        // The same bytes, if what is cut are whole blocks.
                        if let Some(bytes) = tensor.elements(from.clone()) {
                            to.extend_from_slice(bytes);
                            tensor.forget(from);
                            continue;
                        }
                    }
                    let done = values.len();
                    values.resize(done + from.len(), 0.0);
                    tensor.widen(from.clone(), &mut values[done..])?;
                    tensor.forget(from);
                }
                for value in &mut values {
                    *value = undo.iter().rev().fold(*value, |v, step| step.apply(v));
                }
                encode(*format, &values, to).map_err(|why| Error::file(&self.name, why))
            }
        }
    }
}

/// Values in a format, appended.
fn encode(format: Format, values: &[f32], to: &mut Vec<u8>) -> std::result::Result<(), String> {
    match format {
        Format::F32 => to.extend(values.iter().flat_map(|v| v.to_le_bytes())),
        Format::F16 => to.extend(
            values
                .iter()
                .flat_map(|v| half::f16::from_f32(*v).to_le_bytes()),
        ),
        Format::BF16 => {
            to.extend(
                values
                    .iter()
                    .flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()),
            );
        }
        other => return Err(format!("nothing is quantised to {other} yet")),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(format: Format, runs: Vec<(HostTensor, Range<usize>)>, shape: &[usize]) -> Vec<u8> {
        let content = Content::Made {
            format,
            runs,
            undo: Vec::new(),
        };
        let target = Target {
            name: "t".into(),
            shape: shape.to_vec(),
            content,
        };
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

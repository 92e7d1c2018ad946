//! A checkpoint's weights on a device.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use strata_converters::mapping::{self, Mapping};
use strata_converters::{Config, transforms};
use strata_kernels::{Backend, DType, Format, HostTensor, Matrix};
use strata_layers::plan::is_new;
use strata_layers::{Cut, WeightSource, WeightSpec};

use super::LoadProgress;
use crate::cut;
use crate::importance::Importance;
use crate::quantize::quantize;
use crate::random_weights::RandomWeights;

/// The element type that a config.json names.
pub(super) fn declared_dtype(config: &Config) -> Option<DType> {
    let word = ["dtype", "torch_dtype"]
        .iter()
        .flat_map(|key| config.texts(key))
        .next()?;
    match word {
        "bfloat16" => Some(DType::BF16),
        "float16" => Some(DType::F16),
        _ => Some(DType::F32),
    }
}

/// The format that most bytes of a checkpoint's matrices have.
pub(super) fn main_format(mapping: &Mapping) -> Format {
    let mut bytes: HashMap<Format, usize> = HashMap::new();
    for row in mapping.rows().iter().filter(|r| r.shape.len() == 2) {
        *bytes.entry(row.format).or_default() += row.bytes;
    }
    let most = bytes
        .into_iter()
        .max_by_key(|(format, bytes)| (*bytes, *format));
    most.map_or(Format::F32, |(format, _)| format)
}

/// Checkpoints up to this size are scanned whole for numbers that are none; of larger ones, the small
/// weights are. It takes a few hundredths of a second.
pub(super) const SCANNED_BYTES: usize = 256 << 20;

/// A warning for each weight with numbers that are none.
pub(super) fn non_finite(mapping: &Mapping, up_to: usize) -> Vec<String> {
    let total: usize = mapping.rows().iter().map(|r| r.bytes).sum();
    let rows = mapping
        .rows()
        .iter()
        .filter(|r| total <= up_to || r.shape.len() < 2);
    let warning = |row: &mapping::Row| {
        let count = transforms::non_finite(&mapping.load(&row.path).ok()?);
        let elements: usize = row.shape.iter().product();
        (count > 0).then(|| {
            format!(
                "warning: {count} of the {elements} elements of {} ({}) are not finite: the checkpoint is damaged, or its training failed",
                row.path, row.source
            )
        })
    };
    rows.filter_map(warning).collect()
}

/// A checkpoint's weights on a device.
pub(super) struct Stored<'a, 'p> {
    mapping: &'a Mapping,
    /// What each weight runs in.
    formats: HashMap<String, Format>,
    threads: usize,
    importance: Option<Arc<Importance>>,
    /// Draws the weights of new blocks.
    drawn: RandomWeights,
    backend: Arc<dyn Backend>,
    ready: RefCell<HashMap<String, Matrix>>,
    progress: &'a RefCell<&'p mut dyn LoadProgress>,
}

impl<'a, 'p> Stored<'a, 'p> {
    /// Matrices are converted to their `formats`, which differ from what is stored only where that has no
    /// blocks.
    pub(super) fn new(
        mapping: &'a Mapping,
        formats: HashMap<String, Format>,
        threads: usize,
        drawn: RandomWeights,
        backend: Arc<dyn Backend>,
        progress: &'a RefCell<&'p mut dyn LoadProgress>,
    ) -> Self {
        let ready = RefCell::default();
        Stored {
            mapping,
            formats,
            threads,
            importance: None,
            drawn,
            backend,
            ready,
            progress,
        }
    }

    /// The same, quantising by how much columns count.
    pub(super) fn weighing(self, importance: Option<Arc<Importance>>) -> Self {
        Stored { importance, ..self }
    }

    fn host(&self, path: &str) -> strata_kernels::Result<HostTensor> {
        let host = self
            .mapping
            .load(path)
            .map_err(|error| strata_kernels::Error::Value {
                op: "load",
                why: error.to_string(),
            })?;
        self.progress
            .borrow_mut()
            .advance(host.bytes().len() as u64);
        Ok(host)
    }
}

impl WeightSource for Stored<'_, '_> {
    fn matrix(&self, path: &str, spec: &WeightSpec) -> strata_kernels::Result<Matrix> {
        if is_new(path) {
            return self.drawn.matrix(path, spec);
        }
        let format = self.formats.get(path).copied();
        let known = match (&spec.cut, format) {
            (Some(Cut::Zeros), Some(format)) => cut::zeros(format, spec),
            _ => path.to_string(),
        };
        if let Some(ready) = self.ready.borrow().get(&known) {
            return Ok(ready.clone());
        }
        let whole = self.host(path)?;
        let wanted = format.unwrap_or(whole.format());
        // What is quantised here is cut behind that, so that a part has the bits of the whole.
        let quantises = wanted != whole.format() && wanted.dtype().is_none();
        let host = match quantises {
            true => whole,
            false => cut::host(&whole, path, spec)?,
        };
        let part = spec;
        let spec = if quantises { &spec.whole() } else { spec };
        let [rows, cols] = spec.shape[..] else {
            panic!("{path}: a matrix has two dimensions, not {:?}", spec.shape);
        };
        let matrix = match wanted.dtype() {
            _ if wanted == host.format() => {
                let data = self.backend.upload(&host, rows, cols)?;
                Matrix::new(wanted, cols, data)
            }
            Some(dtype) => {
                let data = self.backend.alloc(dtype, rows, cols)?;
                // By rows, so that no f32 copy of a large matrix is made.
                const ROWS: usize = 64;
                for first in (0..rows).step_by(ROWS) {
                    let range = first..(first + ROWS).min(rows);
                    let part = host.reshape(&[rows, cols])?.slice(range.clone())?;
                    self.backend
                        .write(&part.to_f32(), &mut data.row_range(range))?;
                }
                Matrix::dense(data)
            }
            None => {
                let weights = self.importance.as_ref().and_then(|i| i.of(path));
                let shape = (rows, cols);
                let host = quantize(wanted, shape, weights.as_deref(), self.threads, |r, to| {
                    host.widen(r * cols..(r + 1) * cols, to)
                })
                .map_err(|error| strata_kernels::Error::Value {
                    op: "load",
                    why: format!("{path}: {error}"),
                })?;
                let (host, cols) = (cut::host(&host, path, part)?, part.shape[1]);
                let data = self.backend.upload(&host, part.shape[0], cols)?;
                Matrix::new(wanted, cols, data)
            }
        };
        self.ready.borrow_mut().insert(known, matrix.clone());
        Ok(matrix)
    }

    fn vector(&self, path: &str, spec: &WeightSpec) -> strata_kernels::Result<Vec<f32>> {
        if is_new(path) {
            return self.drawn.vector(path, spec);
        }
        Ok(spec.cut_from(self.host(path)?.to_f32()))
    }
}

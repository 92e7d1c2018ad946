//! Weights for a model without a checkpoint, drawn by the published rules, straight in their place and
//! in the type they run in.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::Arc;

use strata_kernels::{Backend, DType, Format, Matrix, Result, random};
use strata_layers::{Cut, Init, Role, WeightSource, WeightSpec};

use crate::cut;
use crate::importance::Importance;
use crate::quantize::quantize;

/// Draws weights by a seed. A weight depends on the seed and its path only, so the same seed gives the
/// same model on every machine and in every order of loading.
pub struct RandomWeights {
    seed: u64,
    init_std: f32,
    dtype: DType,
    /// Other formats than `dtype`, by path.
    formats: HashMap<String, Format>,
    threads: usize,
    importance: Option<Arc<Importance>>,
    backend: Arc<dyn Backend>,
    drawn: RefCell<HashMap<String, Matrix>>,
}

impl RandomWeights {
    /// Matrices of type `dtype`, of standard deviation `init_std`.
    pub fn new(seed: u64, init_std: f64, dtype: DType, backend: Arc<dyn Backend>) -> Self {
        let init_std = init_std as f32;
        RandomWeights {
            seed,
            init_std,
            dtype,
            formats: HashMap::new(),
            threads: 1,
            importance: None,
            backend,
            drawn: RefCell::default(),
        }
    }

    /// The same, with the matrices at these paths in these formats, `threads` threads to quantise them, and
    /// perhaps how much their columns count.
    pub fn with_formats(
        self,
        formats: HashMap<String, Format>,
        threads: usize,
        importance: Option<Arc<Importance>>,
    ) -> Self {
        RandomWeights {
            formats,
            threads,
            importance,
            ..self
        }
    }

    fn values(&self, path: &str, spec: &WeightSpec) -> Vec<f32> {
        values(seed_of(self.seed, path), spec, self.init_std)
    }
}

/// The elements of a weight, drawn as [`RandomWeights`] draws them.
pub fn draw(seed: u64, init_std: f64, path: &str, spec: &WeightSpec) -> Vec<f32> {
    let (seed, init_std) = (seed_of(seed, path), init_std as f32);
    match (spec.role, spec.init, &spec.shape[..]) {
        // A matrix is drawn row by row, on the device.
        (Role::Matrix | Role::Table, Init::Normal, &[rows, cols]) => (0..rows)
            .flat_map(|r| random::normal_row(seed, r, cols, init_std))
            .collect(),
        _ => values(seed, spec, init_std),
    }
}

/// FNV-1a of the path, so that the draw does not depend on the standard library's hash.
fn seed_of(seed: u64, path: &str) -> u64 {
    let hash = path.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
    });
    hash ^ seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn values(seed: u64, spec: &WeightSpec, init_std: f32) -> Vec<f32> {
    let elements = spec.elements();
    let uniform = |i: usize| random::uniform(seed, i as u64);
    match spec.init {
        Init::Normal => random::normal_row(seed, 0, elements, init_std),
        Init::Constant(value) => vec![value; elements],
        Init::Uniform(fan_in) => {
            let bound = (fan_in as f32).powf(-0.5);
            (0..elements)
                .map(|i| bound * (2.0 * uniform(i) - 1.0))
                .collect()
        }
        Init::StateDecay => {
            let states = spec.shape.last().copied().unwrap_or(1);
            (0..elements).map(|i| -((i % states + 1) as f32)).collect()
        }
        Init::UnitNormal => random::normal_row(seed, 0, elements, 1.0),
        Init::Harmonics => {
            let states = spec.shape.last().copied().unwrap_or(1);
            (0..elements)
                .map(|i| std::f32::consts::PI * (i % states) as f32)
                .collect()
        }
        Init::LogStep => {
            let (low, high) = (1e-3f32.ln(), 1e-1f32.ln());
            let draw = |i| low + (high - low) * uniform(i);
            (0..elements).map(draw).collect()
        }
        Init::HeadDecay => (0..elements).map(|i| -1.0 - 15.0 * uniform(i)).collect(),
        Init::StepBias => {
            let step = |i| {
                let (low, high) = (1e-3f32.ln(), 1e-1f32.ln());
                (low + (high - low) * uniform(i)).exp()
            };
            // The inverse of softplus: ln(eˢ - 1).
            (0..elements)
                .map(|i| step(i) + (-(-step(i)).exp_m1()).ln())
                .collect()
        }
    }
}

impl WeightSource for RandomWeights {
    fn matrix(&self, path: &str, spec: &WeightSpec) -> Result<Matrix> {
        let format = self.formats.get(path).copied().unwrap_or(self.dtype.into());
        let known = match spec.cut {
            Some(Cut::Zeros) => cut::zeros(format, spec),
            _ => path.to_string(),
        };
        if let Some(drawn) = self.drawn.borrow().get(&known) {
            return Ok(drawn.clone());
        }
        let matrix = self.draw_matrix(path, spec, format)?;
        self.drawn.borrow_mut().insert(known, matrix.clone());
        Ok(matrix)
    }

    fn vector(&self, path: &str, spec: &WeightSpec) -> Result<Vec<f32>> {
        Ok(spec.cut_from(self.values(path, &spec.whole())))
    }
}

impl RandomWeights {
    fn draw_matrix(&self, path: &str, part: &WeightSpec, format: Format) -> Result<Matrix> {
        let spec = &part.whole();
        let [rows, cols] = spec.shape[..] else {
            panic!("{path}: a matrix has two dimensions, not {:?}", spec.shape);
        };
        let Some(dtype) = format.dtype() else {
            let (seed, init_std) = (seed_of(self.seed, path), self.init_std);
            let all = match spec.init {
                Init::Normal => Vec::new(),
                _ => self.values(path, spec),
            };
            let weights = self.importance.as_ref().and_then(|i| i.of(path));
            let shape = (rows, cols);
            let host = quantize(format, shape, weights.as_deref(), self.threads, |r, to| {
                match spec.init {
                    Init::Normal => {
                        to.copy_from_slice(&random::normal_row(seed, r, cols, init_std));
                    }
                    _ => to.copy_from_slice(&all[r * cols..(r + 1) * cols]),
                }
                Ok(())
            })?;
            let (host, cols) = (cut::host(&host, path, part)?, part.shape[1]);
            let data = self.backend.upload(&host, part.shape[0], cols)?;
            return Ok(Matrix::new(format, cols, data));
        };
        if part.cut == Some(Cut::Zeros) {
            return Ok(Matrix::dense(self.backend.alloc(dtype, rows, cols)?));
        }
        let mut data = self.backend.alloc(dtype, rows, cols)?;
        match spec.init {
            Init::Normal => {
                self.backend
                    .fill_normal(&mut data, seed_of(self.seed, path), self.init_std)?;
            }
            _ => self.backend.write(&self.values(path, spec), &mut data)?,
        }
        Ok(Matrix::dense(cut::device(&data, part, &*self.backend)?))
    }
}

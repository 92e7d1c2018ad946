//! The weights that layers want, and who hands them out.

use std::ops::Range;

use strata_kernels::{Backend, HostTensor, Matrix, Result, Tensor};

/// One weight that a layer wants.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightSpec {
    /// Its name within the layer; empty for a layer that has one weight only.
    pub name: String,
    /// Its shape as checkpoints store it, outputs before inputs.
    pub shape: Vec<usize>,
    /// What it is used as.
    pub role: Role,
    /// How it is drawn when there is no checkpoint.
    pub init: Init,
    /// Which part of a weight it is; none if it is whole.
    pub cut: Option<Cut>,
}

/// A part of a weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cut {
    /// These rows, one run behind the other, of so many.
    Rows {
        /// Rows of the whole.
        of: usize,
        /// Those that are taken.
        take: Vec<Range<usize>>,
    },
    /// These columns of so many, of a matrix.
    Columns {
        /// Columns of the whole.
        of: usize,
        /// Those that are taken.
        take: Range<usize>,
    },
    /// Nothing of it: zeros.
    Zeros,
}

impl WeightSpec {
    /// A matrix (outputs, inputs), drawn normally.
    pub fn matrix(name: impl Into<String>, rows: usize, cols: usize) -> Self {
        let (shape, role, init) = (vec![rows, cols], Role::Matrix, Init::Normal);
        WeightSpec {
            name: name.into(),
            shape,
            role,
            init,
            cut: None,
        }
    }

    /// The weight that it is a part of.
    pub fn whole(&self) -> WeightSpec {
        let mut whole = WeightSpec {
            cut: None,
            ..self.clone()
        };
        match &self.cut {
            Some(Cut::Rows { of, .. }) => whole.shape[0] = *of,
            Some(Cut::Columns { of, .. }) => whole.shape[1] = *of,
            Some(Cut::Zeros) | None => {}
        }
        whole
    }

    /// Of the elements of the whole weight those that it has.
    pub fn cut_from(&self, values: Vec<f32>) -> Vec<f32> {
        let row = self.shape[1..].iter().product::<usize>();
        match &self.cut {
            None => values,
            Some(Cut::Zeros) => vec![0.0; self.elements()],
            Some(Cut::Rows { take, .. }) => {
                let rows = take.iter().map(|t| &values[t.start * row..t.end * row]);
                rows.flatten().copied().collect()
            }
            Some(Cut::Columns { of, take }) => {
                let rows = values.chunks(*of).map(|r| &r[take.clone()]);
                rows.flatten().copied().collect()
            }
        }
    }

    /// A small weight that runs in f32.
    pub fn vector(name: impl Into<String>, shape: &[usize], init: Init) -> Self {
        WeightSpec {
            name: name.into(),
            shape: shape.to_vec(),
            role: Role::Vector,
            init,
            cut: None,
        }
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The full path of the weight in a layer at `layer`.
    pub fn path(&self, layer: &str) -> String {
        if self.name.is_empty() {
            layer.into()
        } else {
            format!("{layer}.{}", self.name)
        }
    }
}

/// What a weight is used as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Multiplies activations: runs in the form it is stored in, and may be quantised.
    Matrix,
    /// A lookup table: as a matrix, but read row by row.
    Table,
    /// Small; always runs in f32.
    Vector,
}

/// How a weight is drawn for a model without a checkpoint: the published initialisations, so that
/// activations and states stay in the range of a real model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// Normal, with the plan's `init_std`.
    Normal,
    /// Uniform between ±1/√fan_in, for the given number of inputs.
    Uniform(usize),
    /// One value.
    Constant(f32),
    /// A of Mamba: -(1, 2, …, N) in every channel (S4D-real).
    StateDecay,
    /// A of Mamba-2, one a head: minus a draw that is uniform between 1 and 16.
    HeadDecay,
    /// Imaginary parts of S4D's A: π · (0, 1, …, N − 1) in every channel (S4D-Lin).
    Harmonics,
    /// The logarithm of a step size, uniform between those of 0.001 and 0.1.
    LogStep,
    /// Normal, of standard deviation 1.
    UnitNormal,
    /// Bias of the step size: the inverse softplus of a draw that is uniform in the logarithm
    /// between 0.001 and 0.1.
    StepBias,
}

/// Hands out weights by path, for one device. Two layers that ask for one path get the same memory.
pub trait WeightSource {
    /// A matrix or table in the form it runs in.
    fn matrix(&self, path: &str, spec: &WeightSpec) -> Result<Matrix>;

    /// A small weight in f32, in the shape of its spec.
    fn vector(&self, path: &str, spec: &WeightSpec) -> Result<Vec<f32>>;
}

/// The weights of one layer, by the names of its specs.
pub struct Weights<'a> {
    /// Where they come from.
    pub source: &'a dyn WeightSource,
    /// The device that small weights go to.
    pub backend: &'a dyn Backend,
    /// The layer's path.
    pub path: &'a str,
    /// What the layer asked for.
    pub specs: &'a [WeightSpec],
}

impl Weights<'_> {
    /// The matrix `name`.
    pub fn matrix(&self, name: &str) -> Result<Matrix> {
        let spec = self.spec(name);
        self.source.matrix(&spec.path(self.path), spec)
    }

    /// The elements of the small weight `name`, for layers that rearrange them.
    pub fn values(&self, name: &str) -> Result<Vec<f32>> {
        let spec = self.spec(name);
        self.source.vector(&spec.path(self.path), spec)
    }

    /// The small weight `name` as one row.
    pub fn vector(&self, name: &str) -> Result<Tensor> {
        let values = self.values(name)?;
        self.upload(1, values.len(), &values)
    }

    /// As [`Weights::vector`], when the layer has it.
    pub fn optional_vector(&self, name: &str) -> Result<Option<Tensor>> {
        let wanted = self.specs.iter().any(|s| s.name == name);
        wanted.then(|| self.vector(name)).transpose()
    }

    /// Rows of f32 on the device.
    pub fn upload(&self, rows: usize, cols: usize, values: &[f32]) -> Result<Tensor> {
        self.backend
            .upload(&HostTensor::from_f32(&[rows, cols], values)?, rows, cols)
    }

    /// Which columns of the whole matrix `name` the layer has, where it has a part.
    pub fn columns_of(&self, name: &str) -> Option<Range<usize>> {
        match &self.spec(name).cut {
            Some(Cut::Columns { take, .. }) => Some(take.clone()),
            _ => None,
        }
    }

    fn spec(&self, name: &str) -> &WeightSpec {
        let spec = self.specs.iter().find(|s| s.name == name);
        spec.unwrap_or_else(|| panic!("{}: the layer did not ask for `{name}`", self.path))
    }
}

/// (rows, cols) to (cols, rows).
pub fn transpose(rows: usize, cols: usize, values: &[f32]) -> Vec<f32> {
    assert_eq!(values.len(), rows * cols);
    (0..cols)
        .flat_map(|c| (0..rows).map(move |r| values[r * cols + c]))
        .collect()
}

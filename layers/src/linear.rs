//! A projection, alone or as a part of other layers.

use strata_kernels::ops;
use strata_kernels::{Matrix, Result, Tensor};

use crate::layer::{Context, Layer, LayerSpec};
use crate::param::{Check, Fields, Param};
use crate::params;
use crate::weights::{Init, WeightSpec, Weights};
use crate::yaml::{Faults, Value};

params! {
    /// Parameters of `linear`.
    pub struct Linear as "linear" {
        /// Name of its weights within the block.
        name: Option<String> = None,
        /// Width of the output; that of the input if left out.
        d_out: Option<usize> = None,
        /// Whether a bias is added.
        bias: bool = false,
    }
}

impl Check for Linear {
    fn check(&self, fields: &Fields<'_>, faults: &mut Faults) {
        fields.positive(&[("d_out", self.d_out.unwrap_or(1))], faults);
    }
}

impl LayerSpec for Linear {
    fn kind(&self) -> &'static str {
        "linear"
    }

    fn name(&self) -> &str {
        self.name.as_deref().unwrap_or("linear")
    }

    fn write(&self) -> Value {
        Param::write(self)
    }

    fn d_out(&self, d_in: usize) -> usize {
        self.d_out.unwrap_or(d_in)
    }

    fn weights(&self, widths: &[usize]) -> Vec<WeightSpec> {
        let d_in = widths[0];
        projection("", self.d_out(d_in), d_in, self.bias)
    }

    fn build(&self, weights: &Weights<'_>) -> Result<Box<dyn Layer>> {
        Ok(Box::new(Projection::build("", weights)?))
    }
}

/// What a projection named `name` wants: a matrix, and `name.bias`.
pub(crate) fn projection(name: &str, rows: usize, cols: usize, bias: bool) -> Vec<WeightSpec> {
    let mut specs = vec![WeightSpec::matrix(name, rows, cols)];
    if bias {
        specs.push(WeightSpec::vector(
            bias_of(name),
            &[rows],
            Init::Constant(0.0),
        ));
    }
    specs
}

fn bias_of(name: &str) -> String {
    if name.is_empty() {
        "bias".into()
    } else {
        format!("{name}.bias")
    }
}

/// A matrix and perhaps a bias, ready to multiply.
pub(crate) struct Projection {
    w: Matrix,
    bias: Option<Tensor>,
}

impl Projection {
    pub fn build(name: &str, weights: &Weights<'_>) -> Result<Self> {
        let bias = weights.optional_vector(&bias_of(name))?;
        Ok(Projection {
            w: weights.matrix(name)?,
            bias,
        })
    }

    /// Into new scratch, (T, d_out).
    pub fn apply(&self, x: &Tensor, cx: &mut Context<'_>) -> Result<Tensor> {
        let mut y = cx.take(x.rows(), self.w.rows())?;
        self.forward(x, &mut y, cx)?;
        Ok(y)
    }
}

impl Layer for Projection {
    fn forward(&self, x: &Tensor, y: &mut Tensor, cx: &mut Context<'_>) -> Result<()> {
        let (w, bias, activations) = (&self.w, self.bias.as_ref(), cx.activations);
        cx.backend.linear(ops::Linear {
            x,
            w,
            bias,
            activations,
            y,
        })
    }
}

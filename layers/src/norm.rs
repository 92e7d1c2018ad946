//! RMSNorm over the features of each token.

use strata_kernels::ops::RmsNorm;
use strata_kernels::{Result, Tensor};

use crate::layer::{Context, Layer, LayerSpec};
use crate::param::{Check, Fields, Param};
use crate::params;
use crate::weights::{Init, WeightSpec, Weights};
use crate::yaml::{Faults, Value};

params! {
    /// Parameters of `norm`.
    pub struct Norm as "norm" {
        /// Name of its weight within the block.
        name: Option<String> = None,
        /// Added to the mean square before the root.
        eps: f64,
        /// Whether the result is multiplied by a learned weight.
        weight: bool = true,
    }
}

impl Check for Norm {
    fn check(&self, fields: &Fields<'_>, faults: &mut Faults) {
        check_eps("eps", self.eps, fields, faults);
    }
}

/// Faults an epsilon that is no small positive number.
pub(crate) fn check_eps(key: &str, eps: f64, fields: &Fields<'_>, faults: &mut Faults) {
    if !(0.0..1.0).contains(&eps) {
        faults.add(
            fields.at(key),
            format!("`{key}` is {eps}; it must be from 0 to below 1"),
        );
    }
}

impl LayerSpec for Norm {
    fn kind(&self) -> &'static str {
        "norm"
    }

    fn name(&self) -> &str {
        self.name.as_deref().unwrap_or("norm")
    }

    fn write(&self) -> Value {
        Param::write(self)
    }

    fn weights(&self, widths: &[usize]) -> Vec<WeightSpec> {
        let d_in = widths[0];
        let weight = WeightSpec::vector("", &[d_in], Init::Constant(1.0));
        self.weight.then_some(weight).into_iter().collect()
    }

    fn build(&self, weights: &Weights<'_>) -> Result<Box<dyn Layer>> {
        Ok(Box::new(Ready {
            eps: self.eps as f32,
            weight: weights.optional_vector("")?,
        }))
    }
}

struct Ready {
    eps: f32,
    weight: Option<Tensor>,
}

impl Layer for Ready {
    fn forward(&self, x: &Tensor, y: &mut Tensor, cx: &mut Context<'_>) -> Result<()> {
        cx.backend.rms_norm(RmsNorm {
            x,
            weight: self.weight.as_ref(),
            eps: self.eps,
            groups: 1,
            y,
        })
    }
}

//! Multiplication by a constant of the plan.

use strata_kernels::ops;
use strata_kernels::{Result, Tensor};

use crate::layer::{Context, Layer, LayerSpec};
use crate::param::{Check, Param};
use crate::params;
use crate::weights::{WeightSpec, Weights};
use crate::yaml::Value;

params! {
    /// Parameters of `scale`.
    pub struct Scale as "scale" {
        /// The factor.
        by: f64,
    }
}

impl Check for Scale {}

impl LayerSpec for Scale {
    fn kind(&self) -> &'static str {
        "scale"
    }

    fn name(&self) -> &str {
        "scale"
    }

    fn write(&self) -> Value {
        Param::write(self)
    }

    fn weights(&self, _widths: &[usize]) -> Vec<WeightSpec> {
        Vec::new()
    }

    fn build(&self, _weights: &Weights<'_>) -> Result<Box<dyn Layer>> {
        Ok(Box::new(Ready { by: self.by as f32 }))
    }
}

struct Ready {
    by: f32,
}

impl Layer for Ready {
    fn forward(&self, x: &Tensor, y: &mut Tensor, cx: &mut Context<'_>) -> Result<()> {
        cx.backend.scale(ops::Scale { x, by: self.by, y })
    }
}

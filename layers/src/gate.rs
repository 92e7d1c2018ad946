//! Elementwise functions of a plan: an activation, and a product with another value.

use strata_kernels::ops::{self, Activation};
use strata_kernels::{Result, Tensor};

use crate::layer::{Context, Layer, LayerSpec};
use crate::param::{Check, Param};
use crate::params;
use crate::weights::{WeightSpec, Weights};
use crate::yaml::Value;

params! {
    /// Parameters of `gate`: x · act(by).
    pub struct Gate as "gate" {
        /// The value that goes through the function.
        by: String,
        /// The function.
        act: Activation = Activation::Identity,
    }
}

impl Check for Gate {}

impl LayerSpec for Gate {
    fn kind(&self) -> &'static str {
        "gate"
    }

    fn name(&self) -> &str {
        "gate"
    }

    fn write(&self) -> Value {
        Param::write(self)
    }

    fn operands(&self) -> Vec<&str> {
        vec![&self.by]
    }

    fn check_widths(&self, widths: &[usize]) -> std::result::Result<(), String> {
        match widths {
            [x, by] if x != by => Err(format!(
                "width {x} is gated by `{}`, of width {by}",
                self.by
            )),
            _ => Ok(()),
        }
    }

    fn weights(&self, _widths: &[usize]) -> Vec<WeightSpec> {
        Vec::new()
    }

    fn build(&self, _weights: &Weights<'_>) -> Result<Box<dyn Layer>> {
        Ok(Box::new(Ready(self.act)))
    }
}

params! {
    /// Parameters of `activate`: act(x).
    pub struct Activate as "activate" {
        /// The function.
        act: Activation,
    }
}

impl Check for Activate {}

impl LayerSpec for Activate {
    fn kind(&self) -> &'static str {
        "activate"
    }

    fn name(&self) -> &str {
        "activate"
    }

    fn write(&self) -> Value {
        Param::write(self)
    }

    fn weights(&self, _widths: &[usize]) -> Vec<WeightSpec> {
        Vec::new()
    }

    fn build(&self, _weights: &Weights<'_>) -> Result<Box<dyn Layer>> {
        Ok(Box::new(Ready(self.act)))
    }
}

/// Gates by the operand, if there is one.
struct Ready(Activation);

impl Layer for Ready {
    fn forward(&self, x: &Tensor, y: &mut Tensor, cx: &mut Context<'_>) -> Result<()> {
        let (act, gate) = (self.0, cx.operands.first());
        cx.backend.activate(ops::Activate { x, gate, act, y })
    }
}

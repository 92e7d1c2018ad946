//! The tokens of every sequence in the opposite order: what a bidirectional mixer runs its second half
//! on. Its sequences are read whole.

use strata_kernels::ops::Gather;
use strata_kernels::{Result, Tensor};

use crate::layer::{Context, Layer, LayerSpec};
use crate::param::{Check, Param};
use crate::params;
use crate::weights::{WeightSpec, Weights};
use crate::yaml::Value;

params! {
    /// `reverse` takes nothing.
    pub struct Reverse as "reverse" {}
}

impl Check for Reverse {}

impl LayerSpec for Reverse {
    fn kind(&self) -> &'static str {
        "reverse"
    }

    fn name(&self) -> &str {
        "reverse"
    }

    fn write(&self) -> Value {
        Param::write(self)
    }

    fn sees_later_tokens(&self) -> bool {
        true
    }

    fn weights(&self, _widths: &[usize]) -> Vec<WeightSpec> {
        Vec::new()
    }

    fn build(&self, _weights: &Weights<'_>) -> Result<Box<dyn Layer>> {
        Ok(Box::new(self.clone()))
    }
}

impl Layer for Reverse {
    fn forward(&self, x: &Tensor, y: &mut Tensor, cx: &mut Context<'_>) -> Result<()> {
        let spans = cx.ragged.spans.iter();
        let rows: Vec<usize> = spans.flat_map(|span| span.rows().rev()).collect();
        cx.backend.gather(Gather { x, rows: &rows, y })
    }
}

//! Some columns of the stream.

use strata_kernels::{Result, Tensor};

use crate::layer::{Context, Layer, LayerSpec};
use crate::param::{Check, Fields, Param};
use crate::params;
use crate::weights::{WeightSpec, Weights};
use crate::yaml::{Faults, Value};

params! {
    /// Parameters of `slice`.
    pub struct Slice as "slice" {
        /// The first column.
        from: usize,
        /// The column after the last.
        to: usize,
    }
}

impl Check for Slice {
    fn check(&self, fields: &Fields<'_>, faults: &mut Faults) {
        let (from, to) = (self.from, self.to);
        if from >= to {
            let message = format!("`to` is {to}; it must be more than `from`, {from}");
            faults.add(fields.at("to"), message);
        }
    }
}

impl LayerSpec for Slice {
    fn kind(&self) -> &'static str {
        "slice"
    }

    fn name(&self) -> &str {
        "slice"
    }

    fn write(&self) -> Value {
        Param::write(self)
    }

    fn check_widths(&self, widths: &[usize]) -> std::result::Result<(), String> {
        if self.to <= widths[0] {
            return Ok(());
        }
        let (to, width) = (self.to, widths[0]);
        Err(format!("its input has width {width}, and `to` is {to}"))
    }

    fn d_out(&self, _d_in: usize) -> usize {
        self.to - self.from
    }

    fn weights(&self, _widths: &[usize]) -> Vec<WeightSpec> {
        Vec::new()
    }

    fn build(&self, _weights: &Weights<'_>) -> Result<Box<dyn Layer>> {
        Ok(Box::new(self.clone()))
    }
}

impl Layer for Slice {
    fn forward(&self, x: &Tensor, y: &mut Tensor, cx: &mut Context<'_>) -> Result<()> {
        cx.backend.copy(&x.columns(self.from..self.to), y)
    }
}

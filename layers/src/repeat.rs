//! Every run of columns several times in a row: heads that a group of others shares, written out.

use strata_kernels::{Result, Tensor};

use crate::layer::{Context, Layer, LayerSpec};
use crate::param::{Check, Fields, MAX_SIZE, Param};
use crate::params;
use crate::weights::{WeightSpec, Weights};
use crate::yaml::{Faults, Value};

params! {
    /// Parameters of `repeat`.
    pub struct Repeat as "repeat" {
        /// Columns of a run; the input holds whole runs.
        width: usize,
        /// How often each is written.
        times: usize,
    }
}

impl Check for Repeat {
    fn check(&self, fields: &Fields<'_>, faults: &mut Faults) {
        let sizes = [("width", self.width), ("times", self.times)];
        fields.positive(&sizes, faults);
    }
}

impl LayerSpec for Repeat {
    fn kind(&self) -> &'static str {
        "repeat"
    }

    fn name(&self) -> &str {
        "repeat"
    }

    fn write(&self) -> Value {
        Param::write(self)
    }

    fn check_widths(&self, widths: &[usize]) -> std::result::Result<(), String> {
        let (d_in, width) = (widths[0], self.width);
        if d_in % width != 0 {
            return Err(format!(
                "its input has width {d_in}, no multiple of {width}"
            ));
        }
        match d_in.checked_mul(self.times) {
            Some(d_out) if d_out <= MAX_SIZE => Ok(()),
            _ => Err(format!(
                "{} times {d_in} is more than {MAX_SIZE}",
                self.times
            )),
        }
    }

    fn d_out(&self, d_in: usize) -> usize {
        d_in * self.times
    }

    fn weights(&self, _widths: &[usize]) -> Vec<WeightSpec> {
        Vec::new()
    }

    fn build(&self, _weights: &Weights<'_>) -> Result<Box<dyn Layer>> {
        Ok(Box::new(self.clone()))
    }
}

impl Layer for Repeat {
    fn forward(&self, x: &Tensor, y: &mut Tensor, cx: &mut Context<'_>) -> Result<()> {
        let run = |i: usize| i * self.width..(i + 1) * self.width;
        for i in 0..y.cols() / self.width {
            let from = x.columns(run(i / self.times));
            cx.backend.copy(&from, &mut y.columns(run(i)))?;
        }
        Ok(())
    }
}

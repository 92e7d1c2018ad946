//! A causal depthwise convolution by itself.

use strata_kernels::ops::{self, Activation};
use strata_kernels::{Result, Tensor};

use crate::layer::{Context, Layer, LayerSpec};
use crate::param::{Check, Fields, Param};
use crate::params;
use crate::state::{Part, StateSpec};
use crate::weights::{Init, WeightSpec, Weights, transpose};
use crate::yaml::{Faults, Value};

params! {
    /// Parameters of `conv1d`.
    pub struct Conv1d as "conv1d" {
        /// Name of its weights within the block.
        name: Option<String> = None,
        /// How many tokens each output sees, its own included: K.
        taps: usize,
        /// Applied to the sum.
        act: Activation = Activation::Identity,
        /// Whether there is a bias.
        bias: bool = true,
    }
}

/// Most taps: a convolution keeps as many inputs of every sequence.
const MAX_TAPS: usize = 65_536;

impl Check for Conv1d {
    fn check(&self, fields: &Fields<'_>, faults: &mut Faults) {
        if !(1..=MAX_TAPS).contains(&self.taps) {
            let message = format!("`taps` is {}; it must be 1 to {MAX_TAPS}", self.taps);
            faults.add(fields.at("taps"), message);
        }
    }
}

impl LayerSpec for Conv1d {
    fn kind(&self) -> &'static str {
        "conv1d"
    }

    fn name(&self) -> &str {
        self.name.as_deref().unwrap_or("conv1d")
    }

    fn write(&self) -> Value {
        Param::write(self)
    }

    fn weights(&self, widths: &[usize]) -> Vec<WeightSpec> {
        let mut specs = conv_weights("", widths[0], self.taps, false);
        if self.bias {
            specs.push(WeightSpec::vector(
                "bias",
                &[widths[0]],
                Init::Uniform(self.taps),
            ));
        }
        specs
    }

    fn state(&self, widths: &[usize]) -> StateSpec {
        StateSpec {
            pages: None,
            slot: vec![conv_state(self.taps, widths[0])],
        }
    }

    fn other_flops(&self, widths: &[usize], _position: usize) -> f64 {
        conv_flops(self.taps, widths[0])
    }

    fn build(&self, weights: &Weights<'_>) -> Result<Box<dyn Layer>> {
        let width = weights.specs[0].shape[0];
        Ok(Box::new(Convolution {
            w: taps_first("", width, self.taps, weights)?,
            bias: weights.optional_vector("bias")?,
            act: self.act,
        }))
    }
}

/// What a convolution named `name` wants: (channels, taps), and `name.bias`.
pub(crate) fn conv_weights(name: &str, width: usize, taps: usize, bias: bool) -> Vec<WeightSpec> {
    let init = Init::Uniform(taps);
    let mut specs = vec![WeightSpec::vector(name, &[width, taps], init)];
    if bias {
        specs.push(WeightSpec::vector(format!("{name}.bias"), &[width], init));
    }
    specs
}

/// Operations of a convolution on one token.
pub(crate) fn conv_flops(taps: usize, width: usize) -> f64 {
    2.0 * taps as f64 * width as f64
}

/// The inputs that a convolution keeps of every sequence.
pub(crate) fn conv_state(taps: usize, width: usize) -> Part {
    Part {
        name: "conv_state",
        rows: taps - 1,
        cols: width,
    }
}

/// (taps, channels), so that neighbouring channels are computed together.
pub(crate) fn taps_first(
    name: &str,
    width: usize,
    taps: usize,
    weights: &Weights<'_>,
) -> Result<Tensor> {
    let w = transpose(width, taps, &weights.values(name)?);
    weights.upload(taps, width, &w)
}

/// A convolution with its weights; its state is the first part of the slot.
pub(crate) struct Convolution {
    /// (K, I).
    pub w: Tensor,
    pub bias: Option<Tensor>,
    pub act: Activation,
}

impl Layer for Convolution {
    fn forward(&self, x: &Tensor, y: &mut Tensor, cx: &mut Context<'_>) -> Result<()> {
        let conv_state = cx
            .state
            .slot
            .first_mut()
            .expect("a conv_state was asked for");
        cx.backend.conv1d(ops::Conv1d {
            x,
            w: &self.w,
            bias: self.bias.as_ref(),
            act: self.act,
            conv_state,
            ragged: cx.ragged,
            y,
        })
    }
}

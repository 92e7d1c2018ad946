//! Normalisation over the features of each token: RMSNorm (Zhang and Sennrich, 2019) or LayerNorm (Ba
//! et al., 2016), of the whole row or of equal parts of it.

use strata_kernels::ops::{LayerNorm, RmsNorm};
use strata_kernels::{Result, Tensor};

use crate::layer::{Context, Layer, LayerSpec};
use crate::param::{Check, Fields, Param};
use crate::weights::{Init, WeightSpec, Weights};
use crate::yaml::{Faults, Value};
use crate::{params, words};

/// What is made one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// The mean square.
    Rms,
    /// The variance, around a mean of zero.
    Layer,
}

words!(NormKind as "a kind of norm" {
    Rms = "rms",
    Layer = "layer",
});

params! {
    /// Parameters of `norm`.
    pub struct Norm as "norm" {
        /// Name of its weight within the block.
        name: Option<String> = None,
        /// What is made one.
        kind: NormKind = NormKind::Rms,
        /// Added to the mean square, or the variance, before the root.
        eps: f64,
        /// So many equal parts of the row are normalised each by itself.
        groups: usize = 1,
        /// Whether all parts have one weight, rather than the row one.
        per_group: bool = false,
        /// Whether the result is multiplied by a learned weight.
        weight: bool = true,
        /// Whether a learned bias is added.
        bias: bool = false,
    }
}

impl Check for Norm {
    fn check(&self, fields: &Fields<'_>, faults: &mut Faults) {
        check_eps("eps", self.eps, fields, faults);
        fields.positive(&[("groups", self.groups)], faults);
        if self.bias && self.kind == NormKind::Rms {
            let message = "a `bias` is for `kind: layer`; rms has none";
            faults.add(fields.at("bias"), message);
        }
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

    fn check_widths(&self, widths: &[usize]) -> std::result::Result<(), String> {
        let (width, groups) = (widths[0], self.groups);
        if width % groups == 0 {
            return Ok(());
        }
        Err(format!(
            "its input has width {width}, which has no {groups} equal `groups`"
        ))
    }

    fn weights(&self, widths: &[usize]) -> Vec<WeightSpec> {
        let parts = if self.per_group { self.groups } else { 1 };
        let width = widths[0] / parts;
        let mut specs = Vec::new();
        if self.weight {
            specs.push(WeightSpec::vector("", &[width], Init::Constant(1.0)));
        }
        if self.bias {
            specs.push(WeightSpec::vector("bias", &[width], Init::Constant(0.0)));
        }
        specs
    }

    fn build(&self, weights: &Weights<'_>) -> Result<Box<dyn Layer>> {
        Ok(Box::new(Ready {
            kind: self.kind,
            eps: self.eps as f32,
            groups: self.groups,
            weight: weights.optional_vector("")?,
            bias: weights.optional_vector("bias")?,
        }))
    }
}

struct Ready {
    kind: NormKind,
    eps: f32,
    groups: usize,
    weight: Option<Tensor>,
    bias: Option<Tensor>,
}

impl Layer for Ready {
    fn forward(&self, x: &Tensor, y: &mut Tensor, cx: &mut Context<'_>) -> Result<()> {
        let (eps, groups, weight) = (self.eps, self.groups, self.weight.as_ref());
        match self.kind {
            NormKind::Rms => cx.backend.rms_norm(RmsNorm {
                x,
                weight,
                eps,
                groups,
                y,
            }),
            NormKind::Layer => cx.backend.layer_norm(LayerNorm {
                x,
                weight,
                bias: self.bias.as_ref(),
                eps,
                groups,
                y,
            }),
        }
    }
}

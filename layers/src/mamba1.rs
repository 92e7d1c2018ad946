//! The Mamba-1 mixer (Gu and Dao, 2023): projection, causal convolution, selective scan, gate.
//!
//! Some families normalise the three inputs of the scan (dt, B, C) by RMS before use, with learned
//! weights or without.

use std::ops::Range;

use strata_kernels::ops::{Activation, RmsNorm, SelectiveScan};
use strata_kernels::{Result, Tensor};

use crate::conv1d::{Convolution, conv_flops, conv_state, conv_weights, taps_first};
use crate::layer::{Context, Layer, LayerSpec};
use crate::linear::{Projection, projection};
use crate::norm::check_eps;
use crate::param::{Check, Fields, Param};
use crate::params;
use crate::selective_scan::scan_flops;
use crate::share::{Of, Share, even, shifted};
use crate::state::{Part, StateSpec};
use crate::weights::{Init, WeightSpec, Weights, transpose};
use crate::yaml::{Faults, Value};

params! {
    /// Normalisation of the scan's inputs.
    pub struct InnerNorm as "inner_norm" {
        /// Added to the mean square before the root.
        eps: f64,
        /// Whether there are learned weights.
        weight: bool,
    }
}

impl Check for InnerNorm {
    fn check(&self, fields: &Fields<'_>, faults: &mut Faults) {
        check_eps("eps", self.eps, fields, faults);
    }
}

params! {
    /// Parameters of `mamba1`.
    pub struct Mamba1 as "mamba1" {
        /// Name of its weights within the block.
        name: Option<String> = None,
        /// Inner width I.
        d_inner: usize,
        /// State elements of a channel, N.
        d_state: usize,
        /// Taps of the convolution, K.
        d_conv: usize,
        /// Rank R of the step size's projection.
        dt_rank: usize,
        /// Whether the convolution has a bias.
        conv_bias: bool = true,
        /// Whether the outer projections have biases.
        bias: bool = false,
        /// Normalisation of dt, B and C; none if left out.
        inner_norm: Option<InnerNorm> = None,
    }
}

impl Check for Mamba1 {
    fn check(&self, fields: &Fields<'_>, faults: &mut Faults) {
        let sizes = [
            ("d_inner", self.d_inner),
            ("d_state", self.d_state),
            ("d_conv", self.d_conv),
            ("dt_rank", self.dt_rank),
        ];
        fields.positive(&sizes, faults);
    }
}

/// The normalised inputs of the scan, in the order of the projection that makes them.
const INPUTS: [&str; 3] = ["dt_norm", "b_norm", "c_norm"];

impl Mamba1 {
    fn input_widths(&self) -> [usize; 3] {
        [self.dt_rank, self.d_state, self.d_state]
    }
}

impl LayerSpec for Mamba1 {
    fn kind(&self) -> &'static str {
        "mamba1"
    }

    fn name(&self) -> &str {
        self.name.as_deref().unwrap_or("mamba1")
    }

    fn write(&self) -> Value {
        Param::write(self)
    }

    fn weights(&self, widths: &[usize]) -> Vec<WeightSpec> {
        let d_in = widths[0];
        let (inner, states) = (self.d_inner, self.d_state);
        let mut specs = projection("in_proj", 2 * inner, d_in, self.bias);
        specs.extend(conv_weights("conv", inner, self.d_conv, self.conv_bias));
        specs.extend(projection(
            "x_proj",
            self.dt_rank + 2 * states,
            inner,
            false,
        ));
        if self.inner_norm.as_ref().is_some_and(|n| n.weight) {
            for (name, width) in INPUTS.iter().zip(self.input_widths()) {
                specs.push(WeightSpec::vector(*name, &[width], Init::Constant(1.0)));
            }
        }
        let dt_proj = WeightSpec::matrix("dt_proj", inner, self.dt_rank);
        specs.push(WeightSpec {
            init: Init::Uniform(self.dt_rank),
            ..dt_proj
        });
        specs.push(WeightSpec::vector("dt_bias", &[inner], Init::StepBias));
        specs.push(WeightSpec::vector("a", &[inner, states], Init::StateDecay));
        specs.push(WeightSpec::vector("d", &[inner], Init::Constant(1.0)));
        specs.extend(projection("out_proj", d_in, inner, self.bias));
        specs
    }

    fn state(&self, _widths: &[usize]) -> StateSpec {
        let slot = vec![
            conv_state(self.d_conv, self.d_inner),
            Part {
                name: "ssm_state",
                rows: self.d_state,
                cols: self.d_inner,
            },
        ];
        StateSpec { pages: None, slot }
    }

    fn other_flops(&self, _widths: &[usize], _position: usize) -> f64 {
        conv_flops(self.d_conv, self.d_inner) + scan_flops(self.d_inner, self.d_state)
    }

    /// Channels. What is read of all of them to make dt, B and C is summed over the ranks.
    fn share(&self, _widths: &[usize], rank: Of) -> Option<std::result::Result<Share, String>> {
        let inner = self.d_inner;
        let own = |own: Range<usize>| {
            let spec = Mamba1 {
                d_inner: own.len(),
                ..self.clone()
            };
            let share = Share::new(spec)
                .columns("out_proj", inner, own.clone(), rank)
                .columns("x_proj", inner, own.clone(), rank)
                .rows("in_proj", 2 * inner, &[own.clone(), shifted(&own, inner)]);
            let names = ["conv", "dt_proj", "dt_bias", "a", "d"];
            names.iter().fold(share, |share, name| {
                share.rows(name, inner, std::slice::from_ref(&own))
            })
        };
        Some(even(inner, rank).map(own))
    }

    fn build(&self, weights: &Weights<'_>) -> Result<Box<dyn Layer>> {
        let (inner, taps, states) = (self.d_inner, self.d_conv, self.d_state);
        // Channels last, so that neighbouring channels are computed together.
        let a = transpose(inner, states, &weights.values("a")?);
        let mut norms = [None, None, None];
        for (norm, name) in norms.iter_mut().zip(INPUTS) {
            *norm = weights.optional_vector(name)?;
        }
        Ok(Box::new(Ready {
            in_proj: Projection::build("in_proj", weights)?,
            conv: Convolution {
                w: taps_first("conv", inner, taps, weights)?,
                bias: weights.optional_vector("conv.bias")?,
                act: Activation::Silu,
            },
            x_proj: Projection::build("x_proj", weights)?,
            norms,
            dt_proj: Projection::build("dt_proj", weights)?,
            dt_bias: weights.vector("dt_bias")?,
            a: weights.upload(states, inner, &a)?,
            d: weights.vector("d")?,
            out_proj: Projection::build("out_proj", weights)?,
            spec: self.clone(),
        }))
    }
}

struct Ready {
    spec: Mamba1,
    in_proj: Projection,
    conv: Convolution,
    x_proj: Projection,
    norms: [Option<Tensor>; 3],
    dt_proj: Projection,
    dt_bias: Tensor,
    a: Tensor, // (N, I)
    d: Tensor,
    out_proj: Projection,
}

impl Ready {
    /// Input `i` of the scan, normalised if the plan says so.
    fn normed(&self, i: usize, x: Tensor, cx: &mut Context<'_>) -> Result<Tensor> {
        let Some(norm) = &self.spec.inner_norm else {
            return Ok(x);
        };
        let mut y = cx.take(x.rows(), x.cols())?;
        let (weight, eps) = (self.norms[i].as_ref(), norm.eps as f32);
        cx.backend.rms_norm(RmsNorm {
            x: &x,
            weight,
            eps,
            groups: 1,
            y: &mut y,
        })?;
        Ok(y)
    }
}

impl Layer for Ready {
    fn forward(&self, x: &Tensor, y: &mut Tensor, cx: &mut Context<'_>) -> Result<()> {
        let (tokens, inner, ragged) = (x.rows(), self.spec.d_inner, cx.ragged);
        let xz = self.in_proj.apply(x, cx)?; // (T, 2I): x first, then z
        let (x, z) = (xz.columns(0..inner), xz.columns(inner..2 * inner));

        let mut u = cx.take(tokens, inner)?;
        self.conv.forward(&x, &mut u, cx)?;
        let mut ssm_state = cx.state.slot[1].clone();

        let mut inputs = self.x_proj.apply(&u, cx)?; // (T, R + 2N)
        cx.all_reduce(&mut inputs)?;
        let (rank, states) = (self.spec.dt_rank, self.spec.d_state);
        let dt_low = self.normed(0, inputs.columns(0..rank), cx)?;
        let b = self.normed(1, inputs.columns(rank..rank + states), cx)?;
        let c = self.normed(2, inputs.columns(rank + states..rank + 2 * states), cx)?;

        let dt = self.dt_proj.apply(&dt_low, cx)?; // (T, I)
        let mut scanned = cx.take(tokens, inner)?;
        cx.backend.selective_scan(SelectiveScan {
            x: &u,
            dt: &dt,
            dt_bias: Some(&self.dt_bias),
            a: &self.a,
            b: &b,
            c: &c,
            d: &self.d,
            z: Some(&z),
            groups: 1,
            ssm_state: &mut ssm_state,
            ragged,
            y: &mut scanned,
        })?;
        self.out_proj.forward(&scanned, y, cx)?;
        cx.all_reduce(y)
    }
}

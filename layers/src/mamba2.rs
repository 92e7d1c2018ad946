//! The Mamba-2 mixer (Dao and Gu, 2024): one projection makes gate, input, B, C and step sizes; a causal
//! convolution; a scan with one decay a head; a gate and perhaps a norm of groups.

use std::ops::Range;

use strata_kernels::ops::{self, Activation};
use strata_kernels::{Result, Tensor};

use crate::conv1d::{Convolution, conv_flops, conv_state, conv_weights, taps_first};
use crate::layer::{Context, Layer, LayerSpec};
use crate::linear::{Projection, projection};
use crate::norm::check_eps;
use crate::param::{Check, Fields, Param};
use crate::params;
use crate::share::{Of, Share, grouped, scaled, shifted};
use crate::ssd_scan::{
    Scan, Sizes, check_chunk, check_groups, check_steps, scan_weights, step_limit,
};
use crate::state::StateSpec;
use crate::weights::{Init, WeightSpec, Weights};
use crate::yaml::{Faults, Value};

params! {
    /// RMS normalisation beside the gate.
    pub struct GateNorm as "norm" {
        /// Added to the mean square before the root.
        eps: f64,
        /// So many equal parts are normalised each by itself; as many as B and C have if left out.
        groups: Option<usize> = None,
        /// Whether the norm comes before the gate, rather than after it.
        before_gate: bool = false,
    }
}

impl Check for GateNorm {
    fn check(&self, fields: &Fields<'_>, faults: &mut Faults) {
        check_eps("eps", self.eps, fields, faults);
        fields.positive(&[("groups", self.groups.unwrap_or(1))], faults);
    }
}

params! {
    /// Multipliers of the five parts that the first projection makes.
    pub struct InScales as "in_scales" {
        /// Of the gate.
        z: f64 = 1.0,
        /// Of the input.
        x: f64 = 1.0,
        /// Of B.
        b: f64 = 1.0,
        /// Of C.
        c: f64 = 1.0,
        /// Of the step sizes.
        dt: f64 = 1.0,
    }
}

impl Check for InScales {}

params! {
    /// Parameters of `mamba2`.
    pub struct Mamba2 as "mamba2" {
        /// Name of its weights within the block.
        name: Option<String> = None,
        /// Heads h.
        heads: usize,
        /// Channels of a head, P.
        head_dim: usize,
        /// So many equal runs of heads have a B and a C each.
        groups: usize,
        /// State elements of a channel, N.
        d_state: usize,
        /// Taps of the convolution, K.
        d_conv: usize,
        /// Whether the convolution has a bias.
        conv_bias: bool = true,
        /// Whether the first projection has a bias.
        bias: bool = false,
        /// Whether the last projection has one.
        out_bias: bool = false,
        /// The norm beside the gate; none if left out.
        norm: Option<GateNorm> = None,
        /// Smallest step size; no bound if left out.
        dt_min: Option<f64> = None,
        /// Largest step size; no bound if left out.
        dt_max: Option<f64> = None,
        /// Multipliers of what the first projection makes; none if left out.
        in_scales: Option<InScales> = None,
        /// Tokens of a chunk of the scan's form with matrix products; its recurrence if left out.
        chunk_size: Option<usize> = None,
    }
}

impl Check for Mamba2 {
    fn check(&self, fields: &Fields<'_>, faults: &mut Faults) {
        let (heads, groups) = (self.heads, self.groups);
        let sizes = [
            ("heads", heads),
            ("head_dim", self.head_dim),
            ("groups", groups),
            ("d_state", self.d_state),
            ("d_conv", self.d_conv),
        ];
        fields.positive(&sizes, faults);
        check_groups(heads, groups, fields, faults);
        check_steps(self.dt_min, self.dt_max, fields, faults);
        check_chunk(self.chunk_size, fields, faults);
        let inner = heads.saturating_mul(self.head_dim);
        let parts = self.norm.as_ref().map_or(1, |n| n.groups.unwrap_or(groups));
        if parts > 0 && inner % parts != 0 {
            let message = format!("heads · head_dim is {inner}, which has no {parts} equal groups");
            faults.add(fields.at("norm"), message);
        }
    }
}

impl Mamba2 {
    /// I = h · P.
    fn inner(&self) -> usize {
        self.heads.saturating_mul(self.head_dim)
    }

    /// Width of B, and of C.
    fn states(&self) -> usize {
        self.groups.saturating_mul(self.d_state)
    }

    /// What its scan costs and keeps.
    fn sizes(&self) -> Sizes {
        Sizes {
            heads: self.heads,
            head_dim: self.head_dim,
            groups: self.groups,
            states: self.d_state,
            chunk: self.chunk_size,
        }
    }

    /// Width of what the convolution takes: x, B and C.
    fn conv_width(&self) -> usize {
        self.inner().saturating_add(self.states().saturating_mul(2))
    }
}

impl LayerSpec for Mamba2 {
    fn kind(&self) -> &'static str {
        "mamba2"
    }

    fn name(&self) -> &str {
        self.name.as_deref().unwrap_or("mamba2")
    }

    fn write(&self) -> Value {
        Param::write(self)
    }

    fn weights(&self, widths: &[usize]) -> Vec<WeightSpec> {
        let (d_in, inner) = (widths[0], self.inner());
        let made = inner
            .saturating_add(self.conv_width())
            .saturating_add(self.heads);
        let mut specs = projection("in_proj", made, d_in, self.bias);
        specs.extend(conv_weights(
            "conv",
            self.conv_width(),
            self.d_conv,
            self.conv_bias,
        ));
        specs.extend(scan_weights(self.heads));
        if self.norm.is_some() {
            specs.push(WeightSpec::vector("norm", &[inner], Init::Constant(1.0)));
        }
        specs.extend(projection("out_proj", d_in, inner, self.out_bias));
        specs
    }

    fn state(&self, _widths: &[usize]) -> StateSpec {
        let mut slot = vec![conv_state(self.d_conv, self.conv_width())];
        slot.extend(self.sizes().state());
        StateSpec { pages: None, slot }
    }

    fn other_flops(&self, _widths: &[usize], position: usize) -> f64 {
        conv_flops(self.d_conv, self.conv_width()) + self.sizes().flops(position)
    }

    /// Heads, with the groups of B and C that they read. A gated norm whose groups end where ranks do is a part of
    /// the norm; of another each rank has the whole, and gathers its row.
    fn share(&self, _widths: &[usize], rank: Of) -> Option<std::result::Result<Share, String>> {
        let (inner, states, width) = (self.inner(), self.states(), self.conv_width());
        let own = |[own, groups]: [Range<usize>; 2]| {
            let channels = scaled(&own, self.head_dim);
            let parts = self.norm.as_ref().map(|n| n.groups.unwrap_or(self.groups));
            // Channels of a group of the norm.
            let part = parts.map(|parts| inner / parts);
            let cut = part
                .filter(|p| channels.start.is_multiple_of(*p) && channels.end.is_multiple_of(*p));
            let norm = self.norm.as_ref().map(|norm| GateNorm {
                groups: cut.map_or(parts, |part| Some(channels.len() / part)),
                ..norm.clone()
            });
            let spec = Mamba2 {
                heads: own.len(),
                groups: groups.len(),
                norm,
                ..self.clone()
            };
            let b = shifted(&scaled(&groups, self.d_state), inner);
            let taken = [channels.clone(), b.clone(), shifted(&b, states)];
            let made: Vec<_> = std::iter::once(channels.clone())
                .chain(taken.iter().map(|t| shifted(t, inner)))
                .chain([shifted(&own, inner + width)])
                .collect();
            let share = Share::new(spec)
                .columns("out_proj", inner, channels.clone(), rank)
                .rows("in_proj", inner + width + self.heads, &made)
                .rows("conv", width, &taken);
            let share = ["dt_bias", "a", "d"].iter().fold(share, |share, name| {
                share.rows(name, self.heads, std::slice::from_ref(&own))
            });
            match cut {
                Some(_) => share.rows("norm", inner, &[channels]),
                None => share.wider("norm", inner),
            }
        };
        Some(grouped(self.heads, self.groups, rank).map(own))
    }

    fn build(&self, weights: &Weights<'_>) -> Result<Box<dyn Layer>> {
        let (inner, states) = (self.inner(), self.states());
        let norm = weights.optional_vector("norm")?;
        let mut conv = taps_first("conv", self.conv_width(), self.d_conv, weights)?;
        if let Some(by) = &self.in_scales {
            // The convolution is linear up to its bias, so that its taps may carry the multipliers.
            let mut taps = vec![0.0; conv.rows() * conv.cols()];
            weights.backend.read(&conv, &mut taps)?;
            let by = |i: usize| match i % (inner + 2 * states) {
                i if i < inner => by.x,
                i if i < inner + states => by.b,
                _ => by.c,
            };
            for (i, tap) in taps.iter_mut().enumerate() {
                *tap *= by(i) as f32;
            }
            conv = weights.upload(conv.rows(), conv.cols(), &taps)?;
        }
        Ok(Box::new(Ready {
            in_proj: Projection::build("in_proj", weights)?,
            conv: Convolution {
                w: conv,
                bias: weights.optional_vector("conv.bias")?,
                act: Activation::Silu,
            },
            scan: Scan {
                dt_bias: weights.vector("dt_bias")?,
                dt_limit: step_limit(self.dt_min, self.dt_max),
                a: weights.vector("a")?,
                d: weights.vector("d")?,
                groups: self.groups,
                scale_input: true,
                chunk: self.chunk_size,
            },
            among: norm
                .as_ref()
                .filter(|n| n.cols() > inner)
                .and(weights.columns_of("out_proj")),
            norm,
            out_proj: Projection::build("out_proj", weights)?,
            spec: self.clone(),
        }))
    }
}

struct Ready {
    spec: Mamba2,
    in_proj: Projection,
    conv: Convolution,
    scan: Scan,
    norm: Option<Tensor>,
    /// Where its channels are among those that the norm is over, when these are more.
    among: Option<Range<usize>>,
    out_proj: Projection,
}

impl Ready {
    fn scaled(&self, x: Tensor, by: Option<f64>, cx: &mut Context<'_>) -> Result<Tensor> {
        let Some(by) = by.filter(|by| *by != 1.0) else {
            return Ok(x);
        };
        let mut y = cx.take(x.rows(), x.cols())?;
        cx.backend.scale(ops::Scale {
            x: &x,
            by: by as f32,
            y: &mut y,
        })?;
        Ok(y)
    }

    fn normed(&self, x: &Tensor, norm: &GateNorm, cx: &mut Context<'_>) -> Result<Tensor> {
        // Other ranks' channels come from them: beside zeros, so that the sum of all is what is gathered.
        let gathered = match &self.among {
            None => None,
            Some(own) => {
                let width = self.norm.as_ref().map_or(x.cols(), Tensor::cols);
                let mut row = cx.take(x.rows(), width)?;
                cx.backend.clear(&mut row)?;
                cx.backend.copy(x, &mut row.columns(own.clone()))?;
                cx.all_reduce(&mut row)?;
                Some(row)
            }
        };
        let x = gathered.as_ref().unwrap_or(x);
        let mut y = cx.take(x.rows(), x.cols())?;
        cx.backend.rms_norm(ops::RmsNorm {
            x,
            weight: self.norm.as_ref(),
            eps: norm.eps as f32,
            groups: norm.groups.unwrap_or(self.spec.groups),
            y: &mut y,
        })?;
        Ok(match &self.among {
            Some(own) => y.columns(own.clone()),
            None => y,
        })
    }

    fn gated(&self, x: &Tensor, z: &Tensor, cx: &mut Context<'_>) -> Result<Tensor> {
        let mut y = cx.take(x.rows(), x.cols())?;
        cx.backend.activate(ops::Activate {
            x,
            gate: Some(z),
            act: Activation::Silu,
            y: &mut y,
        })?;
        Ok(y)
    }
}

impl Layer for Ready {
    fn forward(&self, x: &Tensor, y: &mut Tensor, cx: &mut Context<'_>) -> Result<()> {
        let (tokens, inner, states) = (x.rows(), self.spec.inner(), self.spec.states());
        let width = self.spec.conv_width();
        let made = self.in_proj.apply(x, cx)?; // (T, I + I + 2gN + h): z, x, B, C, dt
        let by = self.spec.in_scales.as_ref();
        let z = self.scaled(made.columns(0..inner), by.map(|by| by.z), cx)?;
        let dt = made.columns(inner + width..made.cols());
        let dt = self.scaled(dt, by.map(|by| by.dt), cx)?;

        let mut u = cx.take(tokens, width)?;
        self.conv
            .forward(&made.columns(inner..inner + width), &mut u, cx)?;
        let x = u.columns(0..inner);
        let b = u.columns(inner..inner + states);
        let c = u.columns(inner + states..width);
        let mut scanned = cx.take(tokens, inner)?;
        self.scan.run([&x, &dt, &b, &c], 1, &mut scanned, cx)?;

        let mixed = match &self.spec.norm {
            None => self.gated(&scanned, &z, cx)?,
            Some(norm) if norm.before_gate => {
                let normed = self.normed(&scanned, norm, cx)?;
                self.gated(&normed, &z, cx)?
            }
            Some(norm) => {
                let gated = self.gated(&scanned, &z, cx)?;
                self.normed(&gated, norm, cx)?
            }
        };
        self.out_proj.forward(&mixed, y, cx)?;
        cx.all_reduce(y)
    }
}

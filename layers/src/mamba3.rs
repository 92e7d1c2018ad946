//! The Mamba-3 mixer (Lahoti et al., 2026): one projection, norms of B and C, and a scan with a scalar
//! decay per head, the trapezoid rule and a rotation that depends on the input. There is no convolution.
//!
//! With `mimo` the state takes `rank` inputs and gives `rank` outputs at each token, made of one and
//! summed to one by learned weights.

use strata_kernels::ops::{Decay, HeadNorm, Mamba3Scan, Mimo, RmsNorm};
use strata_kernels::{Result, Tensor};

use crate::layer::{Context, Layer, LayerSpec};
use crate::linear::{Projection, projection};
use crate::norm::check_eps;
use crate::param::{Check, Fields, Param};
use crate::state::{Part, StateSpec};
use crate::weights::{Init, WeightSpec, Weights};
use crate::yaml::{Faults, Value};
use crate::{params, words};

words!(Decay as "a decay" { HeavyTail = "heavy_tail", Softplus = "softplus", });

params! {
    /// Parameters of `mamba3`.
    pub struct Mamba3 as "mamba3" {
        /// Name of its weights within the block.
        name: Option<String> = None,
        /// Heads H.
        heads: usize,
        /// Width P of a head.
        head_dim: usize,
        /// Groups G of heads that share B and C.
        groups: usize = 1,
        /// States N of a channel.
        d_state: usize,
        /// Pairs of states that are rotated, K.
        angles: usize,
        /// Whether inputs and outputs are weighted for each rank; then pairs are N / 2 states apart, and
        /// neighbours otherwise.
        mimo: bool = false,
        /// Inputs and outputs of the state at one token, R.
        rank: usize = 1,
        /// How a projection becomes the rate of decay.
        decay: Decay,
        /// The least rate of decay.
        a_floor: f64 = 1e-4,
        /// Added to the mean squares of the norms before the root.
        norm_eps: f64,
        /// Whether each head's output is normalised before the gate, as B and C always are.
        out_norm: bool = false,
        /// Whether the input projection has a bias.
        bias: bool = false,
        /// Whether the output projection has a bias.
        out_bias: bool = false,
    }
}

impl Check for Mamba3 {
    fn check(&self, fields: &Fields<'_>, faults: &mut Faults) {
        let sizes = [
            ("heads", self.heads),
            ("head_dim", self.head_dim),
            ("groups", self.groups),
            ("d_state", self.d_state),
            ("angles", self.angles),
            ("rank", self.rank),
        ];
        fields.positive(&sizes, faults);
        check_eps("norm_eps", self.norm_eps, fields, faults);
        if !self.heads.is_multiple_of(self.groups.max(1)) {
            let message = format!(
                "{} heads are no whole number of {} groups",
                self.heads, self.groups
            );
            faults.add(fields.at("groups"), message);
        }
        if 2 * self.angles > self.d_state {
            let message = format!(
                "{} angles turn two states each; there are {}",
                self.angles, self.d_state
            );
            faults.add(fields.at("angles"), message);
        }
        if self.mimo && self.d_state % 2 == 1 {
            let message = format!(
                "with `mimo` states are paired by halves; there are {}",
                self.d_state
            );
            faults.add(fields.at("d_state"), message);
        }
        if self.rank > 1 && !self.mimo {
            faults.add(fields.at("rank"), "a rank above one needs `mimo: true`");
        }
        if self.a_floor < 0.0 {
            faults.add(fields.at("a_floor"), "`a_floor` is a rate: 0 or more");
        }
    }
}

impl Mamba3 {
    fn inner(&self) -> usize {
        self.heads * self.head_dim
    }

    /// The parts of the input projection, in order. Absurd sizes stay absurd and do not overflow.
    fn parts(&self) -> [usize; 8] {
        let (inner, heads) = (self.inner(), self.heads);
        let shared = self.ranked().saturating_mul(self.groups);
        [
            inner,
            inner,
            shared,
            shared,
            heads,
            heads,
            heads,
            self.angles,
        ]
    }

    /// States of all ranks.
    fn ranked(&self) -> usize {
        self.rank.saturating_mul(self.d_state)
    }
}

impl LayerSpec for Mamba3 {
    fn kind(&self) -> &'static str {
        "mamba3"
    }

    fn name(&self) -> &str {
        self.name.as_deref().unwrap_or("mamba3")
    }

    fn write(&self) -> Value {
        Param::write(self)
    }

    fn weights(&self, widths: &[usize]) -> Vec<WeightSpec> {
        let (heads, rank, states) = (self.heads, self.rank, self.d_state);
        let rows = self.parts().into_iter().fold(0, usize::saturating_add);
        let mut specs = projection("in_proj", rows, widths[0], self.bias);
        let mut vector = |name: &str, shape: &[usize], init| {
            specs.push(WeightSpec::vector(name, shape, init));
        };
        let one = Init::Constant(1.0);
        vector("dt_bias", &[heads], Init::StepBias);
        vector("b_norm", &[states], one);
        vector("c_norm", &[states], one);
        vector("b_bias", &[heads, rank, states], one);
        vector("c_bias", &[heads, rank, states], one);
        vector("d", &[heads], one);
        if self.mimo {
            let each = [heads, rank, self.head_dim];
            let share = Init::Constant(1.0 / rank as f32);
            vector("mimo_x", &each, share);
            vector("mimo_z", &each, one);
            vector("mimo_o", &each, share);
        }
        if self.out_norm {
            vector("norm", &[self.inner()], one);
        }
        specs.extend(projection(
            "out_proj",
            widths[0],
            self.inner(),
            self.out_bias,
        ));
        specs
    }

    fn state(&self, _widths: &[usize]) -> StateSpec {
        let part = |name, rows, cols| Part { name, rows, cols };
        let slot = vec![
            part("angle_state", self.heads, self.angles),
            part(
                "ssm_state",
                self.heads.saturating_mul(self.d_state),
                self.head_dim,
            ),
            part("b_state", self.heads, self.ranked()),
            part("x_state", self.heads, self.head_dim),
        ];
        StateSpec { pages: None, slot }
    }

    fn build(&self, weights: &Weights<'_>) -> Result<Box<dyn Layer>> {
        let mut mimo = [None, None, None];
        for (weight, name) in mimo.iter_mut().zip(["mimo_x", "mimo_z", "mimo_o"]) {
            *weight = weights.optional_vector(name)?;
        }
        Ok(Box::new(Ready {
            in_proj: Projection::build("in_proj", weights)?,
            dt_bias: weights.vector("dt_bias")?,
            b_norm: weights.vector("b_norm")?,
            c_norm: weights.vector("c_norm")?,
            b_bias: weights.vector("b_bias")?,
            c_bias: weights.vector("c_bias")?,
            d: weights.vector("d")?,
            mimo,
            norm: weights.optional_vector("norm")?,
            out_proj: Projection::build("out_proj", weights)?,
            spec: self.clone(),
        }))
    }
}

struct Ready {
    spec: Mamba3,
    in_proj: Projection,
    dt_bias: Tensor,
    b_norm: Tensor,
    c_norm: Tensor,
    b_bias: Tensor,
    c_bias: Tensor,
    d: Tensor,
    mimo: [Option<Tensor>; 3],
    norm: Option<Tensor>,
    out_proj: Projection,
}

impl Ready {
    /// B or C, each rank and group normalised by itself.
    fn normed(&self, x: &Tensor, weight: &Tensor, cx: &mut Context<'_>) -> Result<Tensor> {
        let mut y = cx.take(x.rows(), x.cols())?;
        cx.backend.rms_norm(RmsNorm {
            x,
            weight: Some(weight),
            eps: self.spec.norm_eps as f32,
            groups: x.cols() / self.spec.d_state,
            y: &mut y,
        })?;
        Ok(y)
    }
}

impl Layer for Ready {
    fn forward(&self, x: &Tensor, y: &mut Tensor, cx: &mut Context<'_>) -> Result<()> {
        let (spec, tokens) = (&self.spec, x.rows());
        let joined = self.in_proj.apply(x, cx)?;
        let mut at = 0;
        let [z, x, b, c, dt, a, trap, angle] = spec.parts().map(|width| {
            at += width;
            joined.columns(at - width..at)
        });
        let b = self.normed(&b, &self.b_norm, cx)?;
        let c = self.normed(&c, &self.c_norm, cx)?;
        let mimo = match &self.mimo {
            [Some(x_in), Some(z_in), Some(y_out)] => Some(Mimo { x_in, z_in, y_out }),
            _ => None,
        };
        let eps = spec.norm_eps as f32;
        let norm = self.norm.as_ref().map(|weight| HeadNorm { weight, eps });
        let mut scanned = cx.take(tokens, spec.inner())?;
        let [angle_state, ssm_state, b_state, x_state] = &mut cx.state.slot[..] else {
            panic!(
                "mamba3 asks for four parts of a slot, and got {}",
                cx.state.slot.len()
            );
        };
        cx.backend.mamba3_scan(Mamba3Scan {
            x: &x,
            z: &z,
            b: &b,
            c: &c,
            dt: &dt,
            a: &a,
            trap: &trap,
            angle: &angle,
            dt_bias: &self.dt_bias,
            b_bias: &self.b_bias,
            c_bias: &self.c_bias,
            d: &self.d,
            mimo,
            norm,
            decay: spec.decay,
            a_floor: spec.a_floor as f32,
            heads: spec.heads,
            groups: spec.groups,
            rank: spec.rank,
            angle_state,
            ssm_state,
            b_state,
            x_state,
            ragged: cx.ragged,
            y: &mut scanned,
        })?;
        self.out_proj.forward(&scanned, y, cx)
    }
}

//! The feed-forward network: down(act(gate x) · up x), or down(act(up x)) without a gate.

use std::ops::Range;

use strata_kernels::ops::{Activate, Activation, Scale};
use strata_kernels::{Result, Tensor};

use crate::layer::{Context, Layer, LayerSpec};
use crate::linear::{Projection, projection};
use crate::param::{Check, Fields, Param};
use crate::share::{Of, Share, even};
use crate::weights::{WeightSpec, Weights};
use crate::yaml::{Faults, Value};
use crate::{params, words};

words!(Activation as "an activation" {
    Silu = "silu",
    Gelu = "gelu",
    GeluTanh = "gelu_tanh",
    Relu = "relu",
    Relu2 = "relu2",
    Sigmoid = "sigmoid",
    Identity = "identity",
});

params! {
    /// Parameters of `mlp`.
    pub struct Mlp as "mlp" {
        /// Name of its weights within the block.
        name: Option<String> = None,
        /// Inner width.
        d_ff: usize,
        /// The function in the middle.
        act: Activation,
        /// Whether a second projection is multiplied by the activated one.
        gated: bool = true,
        /// Whether the projections have biases.
        bias: bool = false,
        /// Multiplies what goes through the function; 1 if left out.
        gate_scale: Option<f64> = None,
    }
}

impl Check for Mlp {
    fn check(&self, fields: &Fields<'_>, faults: &mut Faults) {
        fields.positive(&[("d_ff", self.d_ff)], faults);
        if self.gate_scale.is_some() && !self.gated {
            let message = "`gate_scale` is for a gate; here `gated` is false";
            faults.add(fields.at("gate_scale"), message);
        }
    }
}

impl LayerSpec for Mlp {
    fn kind(&self) -> &'static str {
        "mlp"
    }

    fn name(&self) -> &str {
        self.name.as_deref().unwrap_or("mlp")
    }

    fn write(&self) -> Value {
        Param::write(self)
    }

    fn weights(&self, widths: &[usize]) -> Vec<WeightSpec> {
        let d_in = widths[0];
        let mut specs = projection("up", self.d_ff, d_in, self.bias);
        specs.extend(projection("down", d_in, self.d_ff, self.bias));
        if self.gated {
            specs.extend(projection("gate", self.d_ff, d_in, self.bias));
        }
        specs
    }

    fn share(&self, _widths: &[usize], rank: Of) -> Option<std::result::Result<Share, String>> {
        let own = |own: Range<usize>| {
            let spec = Mlp {
                d_ff: own.len(),
                ..self.clone()
            };
            let share = Share::new(spec).columns("down", self.d_ff, own.clone(), rank);
            let own = [own];
            share
                .rows("up", self.d_ff, &own)
                .rows("gate", self.d_ff, &own)
        };
        Some(even(self.d_ff, rank).map(own))
    }

    fn build(&self, weights: &Weights<'_>) -> Result<Box<dyn Layer>> {
        let gate = self
            .gated
            .then(|| Projection::build("gate", weights))
            .transpose()?;
        let (up, down) = (
            Projection::build("up", weights)?,
            Projection::build("down", weights)?,
        );
        Ok(Box::new(Ready {
            act: self.act,
            gate_scale: self.gate_scale.map(|s| s as f32),
            gate,
            up,
            down,
        }))
    }
}

struct Ready {
    act: Activation,
    gate_scale: Option<f32>,
    gate: Option<Projection>,
    up: Projection,
    down: Projection,
}

impl Layer for Ready {
    fn forward(&self, x: &Tensor, y: &mut Tensor, cx: &mut Context<'_>) -> Result<()> {
        let mut gate = self.gate.as_ref().map(|g| g.apply(x, cx)).transpose()?; // (T, F)
        if let (Some(raw), Some(by)) = (&gate, self.gate_scale) {
            let mut y = cx.take(raw.rows(), raw.cols())?;
            cx.backend.scale(Scale {
                x: raw,
                by,
                y: &mut y,
            })?;
            gate = Some(y);
        }
        let up = self.up.apply(x, cx)?; // (T, F)
        let mut inner = cx.take(up.rows(), up.cols())?;
        let (gate, y_inner) = (gate.as_ref(), &mut inner);
        cx.backend.activate(Activate {
            x: &up,
            gate,
            act: self.act,
            y: y_inner,
        })?;
        self.down.forward(&inner, y, cx)?;
        cx.all_reduce(y)
    }
}

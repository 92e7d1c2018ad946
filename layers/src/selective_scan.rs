//! The selective scan of Mamba-1 by itself, between projections that a plan spells out.

use strata_kernels::ops;
use strata_kernels::{Result, Tensor};

use crate::layer::{Context, Layer, LayerSpec};
use crate::param::{Check, Fields, Param};
use crate::params;
use crate::state::{Part, StateSpec};
use crate::weights::{Init, WeightSpec, Weights, transpose};
use crate::yaml::{Faults, Value};

params! {
    /// Parameters of `selective_scan`.
    pub struct SelectiveScan as "selective_scan" {
        /// Name of its weights within the block.
        name: Option<String> = None,
        /// The value that holds the step sizes, before bias and softplus: as wide as the stream.
        dt: String,
        /// The value that holds B: `groups` · `d_state` wide.
        b: String,
        /// The value that holds C, as wide as B.
        c: String,
        /// The value that gates the result through SiLU; none if left out.
        z: Option<String> = None,
        /// State elements of a channel, N.
        d_state: usize,
        /// So many equal runs of channels have a B and a C each.
        groups: usize = 1,
    }
}

impl Check for SelectiveScan {
    fn check(&self, fields: &Fields<'_>, faults: &mut Faults) {
        let sizes = [("d_state", self.d_state), ("groups", self.groups)];
        fields.positive(&sizes, faults);
    }
}

impl LayerSpec for SelectiveScan {
    fn kind(&self) -> &'static str {
        "selective_scan"
    }

    fn name(&self) -> &str {
        self.name.as_deref().unwrap_or("selective_scan")
    }

    fn write(&self) -> Value {
        Param::write(self)
    }

    fn operands(&self) -> Vec<&str> {
        let all = [&self.dt, &self.b, &self.c].into_iter().chain(&self.z);
        all.map(String::as_str).collect()
    }

    fn check_widths(&self, widths: &[usize]) -> std::result::Result<(), String> {
        let (inner, groups) = (widths[0], self.groups);
        if inner % groups != 0 {
            return Err(format!("width {inner} has no {groups} equal `groups`"));
        }
        let states = groups.saturating_mul(self.d_state);
        let expected = [
            ("`dt`", inner),
            ("`b`", states),
            ("`c`", states),
            ("`z`", inner),
        ];
        check_operands(&expected, widths)
    }

    fn weights(&self, widths: &[usize]) -> Vec<WeightSpec> {
        let inner = widths[0];
        vec![
            WeightSpec::vector("dt_bias", &[inner], Init::StepBias),
            WeightSpec::vector("a", &[inner, self.d_state], Init::StateDecay),
            WeightSpec::vector("d", &[inner], Init::Constant(1.0)),
        ]
    }

    fn state(&self, widths: &[usize]) -> StateSpec {
        let part = Part {
            name: "ssm_state",
            rows: self.d_state,
            cols: widths[0],
        };
        StateSpec {
            pages: None,
            slot: vec![part],
        }
    }

    fn other_flops(&self, widths: &[usize], _position: usize) -> f64 {
        scan_flops(widths[0], self.d_state)
    }

    fn build(&self, weights: &Weights<'_>) -> Result<Box<dyn Layer>> {
        let (a, states) = (weights.values("a")?, self.d_state);
        let inner = a.len() / states;
        // Channels last, so that neighbouring channels are computed together.
        Ok(Box::new(Ready {
            dt_bias: weights.vector("dt_bias")?,
            a: weights.upload(states, inner, &transpose(inner, states, &a))?,
            d: weights.vector("d")?,
            groups: self.groups,
        }))
    }
}

/// Operations of the scan on one token: seven for each element of its state, an exponential among them.
pub(crate) fn scan_flops(inner: usize, states: usize) -> f64 {
    7.0 * inner as f64 * states as f64
}

/// Faults an operand that has not the width it should have.
pub(crate) fn check_operands(
    expected: &[(&str, usize)],
    widths: &[usize],
) -> std::result::Result<(), String> {
    for ((what, expected), found) in expected.iter().zip(&widths[1..]) {
        if found != expected {
            return Err(format!(
                "{what} must have width {expected}, and has {found}"
            ));
        }
    }
    Ok(())
}

struct Ready {
    dt_bias: Tensor,
    a: Tensor, // (N, I)
    d: Tensor,
    groups: usize,
}

impl Layer for Ready {
    fn forward(&self, x: &Tensor, y: &mut Tensor, cx: &mut Context<'_>) -> Result<()> {
        let [dt, b, c, z @ ..] = cx.operands else {
            panic!("selective_scan asks for three operands or four");
        };
        cx.backend.selective_scan(ops::SelectiveScan {
            x,
            dt,
            dt_bias: Some(&self.dt_bias),
            a: &self.a,
            b,
            c,
            d: &self.d,
            z: z.first(),
            groups: self.groups,
            ssm_state: &mut cx.state.slot[0],
            ragged: cx.ragged,
            y,
        })
    }
}

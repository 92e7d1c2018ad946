//! The scan of Mamba-2 by itself (Dao and Gu, 2024), with one decay a head, between projections that a
//! plan spells out.

use strata_kernels::ops;
use strata_kernels::{Result, Tensor};

use crate::layer::{Context, Layer, LayerSpec};
use crate::param::{Check, Fields, Param};
use crate::params;
use crate::selective_scan::check_operands;
use crate::state::{Part, StateSpec};
use crate::weights::{Init, WeightSpec, Weights};
use crate::yaml::{Faults, Value};

params! {
    /// Parameters of `ssd_scan`.
    pub struct SsdScan as "ssd_scan" {
        /// Name of its weights within the block.
        name: Option<String> = None,
        /// The value that holds the step sizes, before bias and softplus: one a head.
        dt: String,
        /// The value that holds B: `groups` · `d_state` wide.
        b: String,
        /// The value that holds C, as wide as B.
        c: String,
        /// Heads that the stream is made of.
        heads: usize,
        /// So many equal runs of heads have a B and a C each.
        groups: usize = 1,
        /// State elements of a channel, N.
        d_state: usize,
        /// Smallest step size; no bound if left out.
        dt_min: Option<f64> = None,
        /// Largest step size; no bound if left out.
        dt_max: Option<f64> = None,
        /// Whether the input is multiplied by the step size, as the decay is made from it.
        scale_input: bool = true,
    }
}

impl Check for SsdScan {
    fn check(&self, fields: &Fields<'_>, faults: &mut Faults) {
        let (heads, groups) = (self.heads, self.groups);
        let sizes = [
            ("heads", heads),
            ("groups", groups),
            ("d_state", self.d_state),
        ];
        fields.positive(&sizes, faults);
        check_groups(heads, groups, fields, faults);
        check_steps(self.dt_min, self.dt_max, fields, faults);
    }
}

/// Faults heads that do not share groups evenly.
pub(crate) fn check_groups(heads: usize, groups: usize, fields: &Fields<'_>, faults: &mut Faults) {
    if groups > 0 && !heads.is_multiple_of(groups) {
        let message = format!("`heads` is {heads}, no multiple of the {groups} `groups`");
        faults.add(fields.at("groups"), message);
    }
}

/// Faults bounds of the step size that leave none.
pub(crate) fn check_steps(
    min: Option<f64>,
    max: Option<f64>,
    fields: &Fields<'_>,
    faults: &mut Faults,
) {
    let (low, high) = step_limit(min, max);
    if !(0.0..=high).contains(&low) {
        let message =
            format!("step sizes from {low} to {high}: `dt_min` must be from 0 to `dt_max`");
        faults.add(fields.at("dt_min"), message);
    }
}

/// The bounds of the step size; softplus has none but zero.
pub(crate) fn step_limit(min: Option<f64>, max: Option<f64>) -> (f32, f32) {
    (
        min.unwrap_or(0.0) as f32,
        max.map_or(f32::INFINITY, |m| m as f32),
    )
}

/// The weights of the scan: dt_bias, a and d, one number a head.
pub(crate) fn scan_weights(heads: usize) -> Vec<WeightSpec> {
    vec![
        WeightSpec::vector("dt_bias", &[heads], Init::StepBias),
        WeightSpec::vector("a", &[heads], Init::HeadDecay),
        WeightSpec::vector("d", &[heads], Init::Constant(1.0)),
    ]
}

/// Operations of the scan on one token: five for each element of its state.
pub(crate) fn scan_flops(inner: usize, states: usize) -> f64 {
    5.0 * inner as f64 * states as f64
}

/// The state of the scan: a matrix (d_state, head_dim) for each head.
pub(crate) fn scan_state(heads: usize, head_dim: usize, states: usize) -> Part {
    Part {
        name: "ssm_state",
        rows: heads * states,
        cols: head_dim,
    }
}

impl LayerSpec for SsdScan {
    fn kind(&self) -> &'static str {
        "ssd_scan"
    }

    fn name(&self) -> &str {
        self.name.as_deref().unwrap_or("ssd_scan")
    }

    fn write(&self) -> Value {
        Param::write(self)
    }

    fn operands(&self) -> Vec<&str> {
        vec![&self.dt, &self.b, &self.c]
    }

    fn check_widths(&self, widths: &[usize]) -> std::result::Result<(), String> {
        let (inner, heads) = (widths[0], self.heads);
        if inner % heads != 0 {
            return Err(format!("width {inner} has no {heads} equal `heads`"));
        }
        let states = self.groups.saturating_mul(self.d_state);
        let expected = [("`dt`", heads), ("`b`", states), ("`c`", states)];
        check_operands(&expected, widths)
    }

    fn weights(&self, _widths: &[usize]) -> Vec<WeightSpec> {
        scan_weights(self.heads)
    }

    fn state(&self, widths: &[usize]) -> StateSpec {
        StateSpec {
            pages: None,
            slot: vec![scan_state(self.heads, widths[0] / self.heads, self.d_state)],
        }
    }

    fn other_flops(&self, widths: &[usize], _position: usize) -> f64 {
        scan_flops(widths[0], self.d_state)
    }

    fn build(&self, weights: &Weights<'_>) -> Result<Box<dyn Layer>> {
        Ok(Box::new(Scan {
            dt_bias: weights.vector("dt_bias")?,
            dt_limit: step_limit(self.dt_min, self.dt_max),
            a: weights.vector("a")?,
            d: weights.vector("d")?,
            groups: self.groups,
            scale_input: self.scale_input,
        }))
    }
}

/// The scan with its weights.
pub(crate) struct Scan {
    pub dt_bias: Tensor,
    pub dt_limit: (f32, f32),
    pub a: Tensor,
    pub d: Tensor,
    pub groups: usize,
    pub scale_input: bool,
}

impl Scan {
    /// `y` from `x`, step sizes, B and C; the state is part `part` of the slot.
    pub fn run(
        &self,
        [x, dt, b, c]: [&Tensor; 4],
        part: usize,
        y: &mut Tensor,
        cx: &mut Context<'_>,
    ) -> Result<()> {
        cx.backend.ssd_scan(ops::SsdScan {
            x,
            dt,
            dt_bias: Some(&self.dt_bias),
            dt_limit: self.dt_limit,
            a: &self.a,
            b,
            c,
            d: Some(&self.d),
            scale_input: self.scale_input,
            groups: self.groups,
            ssm_state: &mut cx.state.slot[part],
            ragged: cx.ragged,
            y,
        })
    }
}

impl Layer for Scan {
    fn forward(&self, x: &Tensor, y: &mut Tensor, cx: &mut Context<'_>) -> Result<()> {
        let [dt, b, c] = cx.operands else {
            panic!("ssd_scan asks for three operands");
        };
        self.run([x, dt, b, c], 0, y, cx)
    }
}

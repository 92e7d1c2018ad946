//! The scan of Mamba-2 by itself (Dao and Gu, 2024), with one decay a head, between projections that a
//! plan spells out: as a recurrence, or by chunks.

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
        /// Tokens of a chunk of the form with matrix products; the recurrence if left out.
        chunk_size: Option<usize> = None,
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
        check_chunk(self.chunk_size, fields, faults);
    }
}

/// Most tokens of a chunk: every sequence keeps what one has brought.
const MAX_CHUNK: usize = 4096;

/// Faults chunks of no token, and of more than a sequence should keep.
pub(crate) fn check_chunk(size: Option<usize>, fields: &Fields<'_>, faults: &mut Faults) {
    if let Some(size) = size.filter(|size| !(1..=MAX_CHUNK).contains(size)) {
        let message = format!("`chunk_size` is {size}; it must be 1 to {MAX_CHUNK}");
        faults.add(fields.at("chunk_size"), message);
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

/// What a scan's costs and its state follow from.
pub(crate) struct Sizes {
    pub heads: usize,
    /// P.
    pub head_dim: usize,
    pub groups: usize,
    /// N.
    pub states: usize,
    /// Q of the form with chunks.
    pub chunk: Option<usize>,
}

impl Sizes {
    /// Operations on one token after `position` others. The recurrence has five for each element of its
    /// state. By chunks there are two products with the state, one of them when a chunk is full, and two
    /// with each of the chunk's tokens up to this one.
    pub fn flops(&self, position: usize) -> f64 {
        let inner = self.heads as f64 * self.head_dim as f64;
        let of_state = inner * self.states as f64;
        let Some(chunk) = self.chunk else {
            return 5.0 * of_state;
        };
        let tokens = (position % chunk + 1) as f64;
        4.0 * of_state + 2.0 * tokens * (inner + self.groups as f64 * self.states as f64)
    }

    /// A matrix (d_state, head_dim) for each head; by chunks also what the tokens of the last chunk have
    /// brought: their inputs, their B, and the sums of their decays.
    pub fn state(&self) -> Vec<Part> {
        let part = |name, rows: usize, cols: usize| Part { name, rows, cols };
        let mut parts = vec![part("ssm_state", self.heads * self.states, self.head_dim)];
        if let Some(chunk) = self.chunk {
            parts.extend([
                part("chunk_inputs", self.heads * chunk, self.head_dim),
                part("chunk_b", self.groups * chunk, self.states),
                part("chunk_decays", self.heads, chunk),
            ]);
        }
        parts
    }
}

impl SsdScan {
    fn sizes(&self, inner: usize) -> Sizes {
        Sizes {
            heads: self.heads,
            head_dim: inner / self.heads,
            groups: self.groups,
            states: self.d_state,
            chunk: self.chunk_size,
        }
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
            slot: self.sizes(widths[0]).state(),
        }
    }

    fn other_flops(&self, widths: &[usize], position: usize) -> f64 {
        self.sizes(widths[0]).flops(position)
    }

    fn build(&self, weights: &Weights<'_>) -> Result<Box<dyn Layer>> {
        Ok(Box::new(Scan {
            dt_bias: weights.vector("dt_bias")?,
            dt_limit: step_limit(self.dt_min, self.dt_max),
            a: weights.vector("a")?,
            d: weights.vector("d")?,
            groups: self.groups,
            scale_input: self.scale_input,
            chunk: self.chunk_size,
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
    /// Q of the form with chunks.
    pub chunk: Option<usize>,
}

impl Scan {
    /// `y` from `x`, step sizes, B and C; the state is in the slot's parts from `first` on.
    pub fn run(
        &self,
        [x, dt, b, c]: [&Tensor; 4],
        first: usize,
        y: &mut Tensor,
        cx: &mut Context<'_>,
    ) -> Result<()> {
        let (ssm_state, of_chunk) = cx.state.slot[first..]
            .split_first_mut()
            .expect("an ssm_state was asked for");
        let scan = ops::SsdScan {
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
            ssm_state,
            ragged: cx.ragged,
            y,
        };
        let Some(chunk_size) = self.chunk else {
            return cx.backend.ssd_scan(scan);
        };
        let [chunk_inputs, chunk_b, chunk_decays] = of_chunk else {
            panic!("a scan by chunks asks for three parts beside its ssm_state");
        };
        cx.backend.ssd_chunked(ops::SsdChunked {
            scan,
            chunk_size,
            chunk_inputs,
            chunk_b,
            chunk_decays,
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

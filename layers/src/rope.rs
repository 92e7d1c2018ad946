//! Rotary positions (Su et al., 2021) and the ways in which published models stretch them: linear
//! (Chen et al., 2023), by wavelength (Grattafiori et al., 2024), and YaRN (Peng et al., 2023).

use std::f64::consts::TAU;

use strata_kernels::ops;
use strata_kernels::{Result, Tensor};

use crate::layer::{Context, Layer, LayerSpec};
use crate::param::{Check, Fields, Param};
use crate::weights::{WeightSpec, Weights};
use crate::yaml::{Faults, Value};
use crate::{params, words};

/// How frequencies are changed for texts longer than those of the first training.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScalingKind {
    /// All by one factor.
    Linear,
    /// Long waves by a factor, short ones not at all, those between in part.
    Llama3,
    /// The same by the number of turns in the first training's context, and sharper scores.
    Yarn,
}

words!(ScalingKind as "a kind of scaling" {
    Linear = "linear",
    Llama3 = "llama3",
    Yarn = "yarn",
});

params! {
    /// How frequencies are changed.
    pub struct Scaling as "scaling" {
        /// The way.
        kind: ScalingKind,
        /// How many times longer texts become.
        factor: f64,
        /// Tokens of the first training: llama3 and yarn.
        original_context: Option<usize> = None,
        /// Waves that turn fewer times than this in the original context are long: llama3.
        low_freq_factor: f64 = 1.0,
        /// Waves that turn more often are short: llama3.
        high_freq_factor: f64 = 4.0,
        /// Waves that turn more often are short: yarn.
        beta_fast: f64 = 32.0,
        /// Waves that turn fewer times are long: yarn.
        beta_slow: f64 = 1.0,
        /// Multiplies rotated queries and keys; 0.1 · ln(factor) + 1 if left out: yarn.
        attention_factor: Option<f64> = None,
        /// Whether the bounds of the ramp are whole pairs: yarn.
        truncate: bool = true,
    }
}

impl Check for Scaling {
    fn check(&self, fields: &Fields<'_>, faults: &mut Faults) {
        if self.factor <= 0.0 {
            let message = format!("`factor` is {}; it must be positive", self.factor);
            faults.add(fields.at("factor"), message);
        }
        let needs = self.kind != ScalingKind::Linear;
        if needs && self.original_context.unwrap_or(0) == 0 {
            let message = "this kind of scaling needs `original_context`";
            faults.add(fields.at("original_context"), message);
        }
        let (low, high) = (self.low_freq_factor, self.high_freq_factor);
        if low <= 0.0 || high <= low {
            let message = format!(
                "`low_freq_factor` is {low} and `high_freq_factor` {high}; the first must be positive and smaller"
            );
            faults.add(fields.at("high_freq_factor"), message);
        }
        let (slow, fast) = (self.beta_slow, self.beta_fast);
        if slow <= 0.0 || fast <= slow {
            let message = format!(
                "`beta_slow` is {slow} and `beta_fast` {fast}; the first must be positive and smaller"
            );
            faults.add(fields.at("beta_fast"), message);
        }
    }
}

params! {
    /// Rotary positions.
    pub struct Rope as "rope" {
        /// Base of the frequencies: pair f turns by theta^(-2f / dims) radians a token.
        theta: f64,
        /// How many elements of a head turn; all if left out.
        dims: Option<usize> = None,
        /// Whether neighbours form a pair, rather than the halves.
        interleaved: bool = false,
        /// How the frequencies are changed; not at all if left out.
        scaling: Option<Scaling> = None,
    }
}

impl Check for Rope {
    fn check(&self, fields: &Fields<'_>, faults: &mut Faults) {
        if self.theta <= 0.0 {
            faults.add(
                fields.at("theta"),
                format!("`theta` is {}; it must be positive", self.theta),
            );
        }
    }
}

impl Rope {
    /// Faults a number of turning elements that a head does not have.
    pub(crate) fn check_dims(&self, head_dim: usize) -> std::result::Result<(), String> {
        match self.dims {
            Some(dims) if dims > head_dim || dims % 2 != 0 => Err(format!(
                "`dims` of rope is {dims}; it must be even and at most {head_dim}"
            )),
            _ => Ok(()),
        }
    }

    /// Radians a token of each pair, and what rotated elements are multiplied with. In f64 until the
    /// end, as `theta` reaches 1e11 and beyond.
    fn frequencies(&self, head_dim: usize) -> (Vec<f32>, f32) {
        let dims = self.dims.unwrap_or(head_dim / 2 * 2);
        let plain = |f: usize| self.theta.powf(-2.0 * f as f64 / dims as f64);
        let Some(s) = &self.scaling else {
            return ((0..dims / 2).map(|f| plain(f) as f32).collect(), 1.0);
        };
        let context = s.original_context.unwrap_or(1) as f64;
        // The share of a pair's own frequency; the rest is that of the stretched one.
        let share = |f: usize| match s.kind {
            ScalingKind::Linear => 0.0,
            ScalingKind::Llama3 => {
                let turns = context * plain(f) / TAU;
                let (low, high) = (s.low_freq_factor, s.high_freq_factor);
                ((turns - low) / (high - low)).clamp(0.0, 1.0)
            }
            ScalingKind::Yarn => {
                // The pair that turns so many times in the original context.
                let pair = |turns: f64| {
                    dims as f64 * (context / (turns * TAU)).ln() / (2.0 * self.theta.ln())
                };
                let (mut low, mut high) = (pair(s.beta_fast), pair(s.beta_slow));
                if s.truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, high) = (low.max(0.0), high.min(dims as f64 - 1.0));
                let width = if high == low { 0.001 } else { high - low };
                1.0 - ((f as f64 - low) / width).clamp(0.0, 1.0)
            }
        };
        let scaled = |f: usize| {
            let (own, share) = (plain(f), share(f));
            (own * share + own / s.factor * (1.0 - share)) as f32
        };
        let by = match s.kind {
            ScalingKind::Yarn => {
                let usual = if s.factor > 1.0 {
                    0.1 * s.factor.ln() + 1.0
                } else {
                    1.0
                };
                s.attention_factor.unwrap_or(usual)
            }
            _ => 1.0,
        };
        ((0..dims / 2).map(scaled).collect(), by as f32)
    }

    /// The rotation of heads of `head_dim` elements.
    pub(crate) fn build(&self, head_dim: usize, weights: &Weights<'_>) -> Result<Rotation> {
        let (turns, scale) = self.frequencies(head_dim);
        Ok(Rotation {
            frequencies: weights.upload(1, turns.len(), &turns)?,
            scale,
            interleaved: self.interleaved,
            head_dim,
        })
    }
}

/// Rotary positions, ready to turn queries and keys.
pub(crate) struct Rotation {
    frequencies: Tensor,
    scale: f32,
    interleaved: bool,
    head_dim: usize,
}

impl Rotation {
    /// Turns every head of `x` in place.
    pub fn apply(&self, x: &mut Tensor, cx: &Context<'_>) -> Result<()> {
        cx.backend.rope(ops::Rope {
            x,
            head_dim: self.head_dim,
            frequencies: &self.frequencies,
            scale: self.scale,
            interleaved: self.interleaved,
            ragged: cx.ragged,
        })
    }
}

params! {
    /// Parameters of the layer `rope`: rotary positions by themselves.
    pub struct RopeLayer as "rope" {
        /// Elements of a head; the input holds whole heads.
        head_dim: usize,
        /// As in `attention`.
        theta: f64,
        /// As in `attention`.
        dims: Option<usize> = None,
        /// As in `attention`.
        interleaved: bool = false,
        /// As in `attention`.
        scaling: Option<Scaling> = None,
    }
}

impl RopeLayer {
    fn rope(&self) -> Rope {
        Rope {
            theta: self.theta,
            dims: self.dims,
            interleaved: self.interleaved,
            scaling: self.scaling.clone(),
        }
    }
}

impl Check for RopeLayer {
    fn check(&self, fields: &Fields<'_>, faults: &mut Faults) {
        fields.positive(&[("head_dim", self.head_dim)], faults);
        self.rope().check(fields, faults);
        if let Err(why) = self.rope().check_dims(self.head_dim) {
            faults.add(fields.at("dims"), why);
        }
    }
}

impl LayerSpec for RopeLayer {
    fn kind(&self) -> &'static str {
        "rope"
    }

    fn name(&self) -> &str {
        "rope"
    }

    fn write(&self) -> Value {
        Param::write(self)
    }

    fn check_widths(&self, widths: &[usize]) -> std::result::Result<(), String> {
        if widths[0].is_multiple_of(self.head_dim) {
            return Ok(());
        }
        let (width, head_dim) = (widths[0], self.head_dim);
        Err(format!(
            "its input has width {width}, no multiple of `head_dim` {head_dim}"
        ))
    }

    fn weights(&self, _widths: &[usize]) -> Vec<WeightSpec> {
        Vec::new()
    }

    fn build(&self, weights: &Weights<'_>) -> Result<Box<dyn Layer>> {
        Ok(Box::new(self.rope().build(self.head_dim, weights)?))
    }
}

impl Layer for Rotation {
    fn forward(&self, x: &Tensor, y: &mut Tensor, cx: &mut Context<'_>) -> Result<()> {
        cx.backend.copy(x, y)?;
        self.apply(y, cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frequencies(scaling: Option<Scaling>) -> (Vec<f32>, f32) {
        let rope = Rope {
            theta: 10_000.0,
            dims: None,
            interleaved: false,
            scaling,
        };
        rope.frequencies(16)
    }

    fn scaling(kind: ScalingKind) -> Scaling {
        Scaling {
            kind,
            factor: 8.0,
            original_context: Some(512),
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            attention_factor: None,
            truncate: true,
        }
    }

    /// What transformers 5.23 computes for these settings (`modeling_rope_utils`), to six digits.
    #[test]
    fn frequencies_are_those_of_the_reference() {
        let plain: Vec<f32> = (0..8).map(|f| 10f32.powf(-f as f32 / 2.0)).collect();
        let close = |a: &[f32], b: &[f32]| {
            assert!(
                a.iter().zip(b).all(|(a, b)| (a / b - 1.0).abs() < 1e-5),
                "{a:?} {b:?}"
            );
        };
        close(&frequencies(None).0, &plain);
        let eighth: Vec<f32> = plain.iter().map(|f| f / 8.0).collect();
        close(&frequencies(Some(scaling(ScalingKind::Linear))).0, &eighth);
        let llama3 = [
            1.0,
            0.316_227_8,
            0.1,
            0.018_496_68,
            0.001_25,
            0.000_395_284_7,
            0.000_125,
            3.952_847e-5,
        ];
        close(&frequencies(Some(scaling(ScalingKind::Llama3))).0, &llama3);
        let (yarn, by) = frequencies(Some(scaling(ScalingKind::Yarn)));
        let expected = [
            1.0,
            0.247_052_9,
            0.056_25,
            0.010_870_33,
            0.001_25,
            0.000_395_284_7,
            0.000_125,
            3.952_847e-5,
        ];
        close(&yarn, &expected);
        assert!((by - 1.207_944_2).abs() < 1e-6, "{by}");
    }
}

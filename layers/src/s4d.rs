//! S4D (Gu, Gupta, Goel and Ré, 2022): a diagonal state space that is the same at every token, the
//! ancestor of the selective scan. Each channel has `d_state` complex states, of which the conjugates
//! are not kept.
//!
//! Weights as in the authors' code: `log_dt` is the logarithm of the step, `a_log` that of −Re A,
//! `a_im` is Im A, `c` holds real and imaginary parts. Time is made discrete by zero-order hold.

use strata_kernels::ops::S4dScan;
use strata_kernels::{Result, Tensor};

use crate::layer::{Context, Layer, LayerSpec};
use crate::param::{Check, Fields, Param};
use crate::params;
use crate::state::{Part, StateSpec};
use crate::weights::{Init, WeightSpec, Weights, transpose};
use crate::yaml::{Faults, Value};

params! {
    /// Parameters of `s4d`.
    pub struct S4d as "s4d" {
        /// Name of its weights within the block.
        name: Option<String> = None,
        /// Complex states of a channel: half of what the paper calls N.
        d_state: usize,
    }
}

impl Check for S4d {
    fn check(&self, fields: &Fields<'_>, faults: &mut Faults) {
        fields.positive(&[("d_state", self.d_state)], faults);
    }
}

impl LayerSpec for S4d {
    fn kind(&self) -> &'static str {
        "s4d"
    }

    fn name(&self) -> &str {
        self.name.as_deref().unwrap_or("s4d")
    }

    fn write(&self) -> Value {
        Param::write(self)
    }

    fn weights(&self, widths: &[usize]) -> Vec<WeightSpec> {
        let (inner, states) = (widths[0], self.d_state);
        vec![
            WeightSpec::vector("log_dt", &[inner], Init::LogStep),
            WeightSpec::vector("a_log", &[inner, states], Init::Constant(0.5f32.ln())),
            WeightSpec::vector("a_im", &[inner, states], Init::Harmonics),
            WeightSpec::vector("c", &[inner, states, 2], Init::UnitNormal),
            WeightSpec::vector("d", &[inner], Init::UnitNormal),
        ]
    }

    fn state(&self, widths: &[usize]) -> StateSpec {
        let part = Part {
            name: "ssm_state",
            rows: 2 * self.d_state,
            cols: widths[0],
        };
        StateSpec {
            pages: None,
            slot: vec![part],
        }
    }

    fn other_flops(&self, widths: &[usize], _position: usize) -> f64 {
        // A complex product and sum, and the real part of another.
        12.0 * widths[0] as f64 * self.d_state as f64
    }

    fn build(&self, weights: &Weights<'_>) -> Result<Box<dyn Layer>> {
        let (log_dt, states) = (weights.values("log_dt")?, self.d_state);
        let (a_log, a_im, c) = (
            weights.values("a_log")?,
            weights.values("a_im")?,
            weights.values("c")?,
        );
        let inner = log_dt.len();
        let mut parts: [Vec<f32>; 4] = Default::default();
        for i in 0..inner * states {
            let dt = f64::from(log_dt[i / states]).exp();
            let (re, im) = (-f64::from(a_log[i]).exp(), f64::from(a_im[i]));
            let (a_re, a_im) = polar((dt * re).exp(), dt * im);
            // c · (a − 1) / A.
            let step = divide((a_re - 1.0, a_im), (re, im));
            let c = (f64::from(c[2 * i]), f64::from(c[2 * i + 1]));
            let c = (c.0 * step.0 - c.1 * step.1, c.0 * step.1 + c.1 * step.0);
            for (part, value) in parts.iter_mut().zip([a_re, a_im, c.0, c.1]) {
                part.push(value as f32);
            }
        }
        // Channels last, so that neighbouring channels are computed together.
        let [a_re, a_im, c_re, c_im] =
            parts.map(|p| weights.upload(states, inner, &transpose(inner, states, &p)));
        Ok(Box::new(Ready {
            a_re: a_re?,
            a_im: a_im?,
            c_re: c_re?,
            c_im: c_im?,
            d: weights.vector("d")?,
        }))
    }
}

/// A complex number of this size and angle.
fn polar(size: f64, angle: f64) -> (f64, f64) {
    (size * angle.cos(), size * angle.sin())
}

fn divide(a: (f64, f64), b: (f64, f64)) -> (f64, f64) {
    let size = b.0 * b.0 + b.1 * b.1;
    (
        (a.0 * b.0 + a.1 * b.1) / size,
        (a.1 * b.0 - a.0 * b.1) / size,
    )
}

struct Ready {
    a_re: Tensor, // (N, I), as the next three
    a_im: Tensor,
    c_re: Tensor,
    c_im: Tensor,
    d: Tensor,
}

impl Layer for Ready {
    fn forward(&self, x: &Tensor, y: &mut Tensor, cx: &mut Context<'_>) -> Result<()> {
        cx.backend.s4d_scan(S4dScan {
            x,
            a_re: &self.a_re,
            a_im: &self.a_im,
            c_re: &self.c_re,
            c_im: &self.c_im,
            d: &self.d,
            ssm_state: &mut cx.state.slot[0],
            ragged: cx.ragged,
            y,
        })
    }
}

//! y = act(x), or y = act(gate) · x when there is a gate (SwiGLU: Shazeer, 2020).

use super::{Check, linear::write_row, silu};
use crate::error::Result;
use crate::tensor::Tensor;

/// The elementwise functions that layers use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// x · σ(x).
    Silu,
    /// x · Φ(x), by the error function.
    Gelu,
    /// The tanh approximation of `Gelu`.
    GeluTanh,
    /// max(x, 0).
    Relu,
    /// max(x, 0)².
    Relu2,
    /// σ(x), the logistic function.
    Sigmoid,
    /// x.
    Identity,
}

impl Activation {
    /// The function at one point.
    pub fn apply(self, x: f32) -> f32 {
        match self {
            Activation::Silu => silu(x),
            Activation::Gelu => 0.5 * x * (1.0 + erf(x * std::f32::consts::FRAC_1_SQRT_2)),
            Activation::GeluTanh => {
                let inner = 0.797_884_6 * (x + 0.044_715 * x * x * x);
                0.5 * x * (1.0 + inner.tanh())
            }
            Activation::Relu => x.max(0.0),
            Activation::Relu2 => x.max(0.0).powi(2),
            Activation::Sigmoid => 1.0 / (1.0 + (-x).exp()),
            Activation::Identity => x,
        }
    }
}

/// Abramowitz and Stegun 7.1.26 in double precision: within 1.5e-7, the resolution of f32 near one.
fn erf(x: f32) -> f32 {
    let t = 1.0 / (1.0 + 0.327_591_1 * f64::from(x.abs()));
    let poly = t
        * (0.254_829_592
            + t * (-0.284_496_736
                + t * (1.421_413_741 + t * (-1.453_152_027 + t * 1.061_405_429))));
    let value = 1.0 - poly * (-f64::from(x) * f64::from(x)).exp();
    (if x < 0.0 { -value } else { value }) as f32
}

/// An activation, gated or not.
pub struct Activate<'a> {
    /// (T, F) F32.
    pub x: &'a Tensor,
    /// (T, F) F32: the branch that goes through `act`.
    pub gate: Option<&'a Tensor>,
    /// The function.
    pub act: Activation,
    /// (T, F) F32.
    pub y: &'a mut Tensor,
}

impl Activate<'_> {
    /// Shapes, types and overlaps.
    pub fn check(&self) -> Result<()> {
        let c = Check("activate");
        c.f32(&[("x", self.x), ("y", self.y)])?;
        c.equal("rows of y", self.y.rows(), self.x.rows())?;
        c.equal("columns of y", self.y.cols(), self.x.cols())?;
        if let Some(gate) = self.gate {
            c.f32(&[("gate", gate)])?;
            c.equal("rows of gate", gate.rows(), self.x.rows())?;
            c.equal("columns of gate", gate.cols(), self.x.cols())?;
            c.apart("y", self.y, &[gate])?;
        }
        c.apart("y", self.y, &[self.x])
    }

    /// The plain loops.
    pub(crate) fn reference(&mut self) {
        let x = self.x.view::<f32>();
        let gate = self.gate.map(|g| g.view::<f32>());
        for t in 0..x.rows() {
            let y: Vec<f32> = (0..x.cols())
                .map(|i| match gate {
                    Some(gate) => self.act.apply(gate.row(t)[i]) * x.row(t)[i],
                    None => self.act.apply(x.row(t)[i]),
                })
                .collect();
            write_row(self.y, t, 0, &y);
        }
    }
}

//! The difference of two maps of differential attention (Ye et al., 2024): A − λB, where
//! λ = exp(q1 · k1) − exp(q2 · k2) + init is learned.

use strata_kernels::ops;
use strata_kernels::{Result, Tensor};

use crate::layer::{Context, Layer, LayerSpec};
use crate::param::{Check, Fields, Param};
use crate::params;
use crate::weights::{Init, WeightSpec, Weights};
use crate::yaml::{Faults, Value};

params! {
    /// Parameters of `differential`: x holds A, then B.
    pub struct Differential as "differential" {
        /// Name of its weights within the block.
        name: Option<String> = None,
        /// Elements of each of the four vectors that λ comes from.
        d: usize,
        /// What λ starts from.
        init: f64,
    }
}

impl Check for Differential {
    fn check(&self, fields: &Fields<'_>, faults: &mut Faults) {
        fields.positive(&[("d", self.d)], faults);
    }
}

const VECTORS: [&str; 4] = ["q1", "k1", "q2", "k2"];

impl LayerSpec for Differential {
    fn kind(&self) -> &'static str {
        "differential"
    }

    fn name(&self) -> &str {
        self.name.as_deref().unwrap_or("differential")
    }

    fn write(&self) -> Value {
        Param::write(self)
    }

    fn check_widths(&self, widths: &[usize]) -> std::result::Result<(), String> {
        if widths[0].is_multiple_of(2) {
            return Ok(());
        }
        Err(format!(
            "its input has width {}, which has no halves",
            widths[0]
        ))
    }

    fn d_out(&self, d_in: usize) -> usize {
        d_in / 2
    }

    fn weights(&self, _widths: &[usize]) -> Vec<WeightSpec> {
        let vector = |name| WeightSpec::vector(name, &[self.d], Init::Constant(0.0));
        VECTORS.into_iter().map(vector).collect()
    }

    fn build(&self, weights: &Weights<'_>) -> Result<Box<dyn Layer>> {
        let [q1, k1, q2, k2] = VECTORS.map(|name| weights.values(name));
        let dot = |a: Vec<f32>, b: Vec<f32>| a.iter().zip(&b).map(|(a, b)| a * b).sum::<f32>();
        let lambda = dot(q1?, k1?).exp() - dot(q2?, k2?).exp() + self.init as f32;
        Ok(Box::new(Ready { lambda }))
    }
}

struct Ready {
    lambda: f32,
}

impl Layer for Ready {
    fn forward(&self, x: &Tensor, y: &mut Tensor, cx: &mut Context<'_>) -> Result<()> {
        let half = y.cols();
        let mut b = cx.take(x.rows(), half)?;
        cx.backend.scale(ops::Scale {
            x: &x.columns(half..2 * half),
            by: -self.lambda,
            y: &mut b,
        })?;
        cx.backend.add(ops::Add {
            a: &x.columns(0..half),
            b: &b,
            y,
        })
    }
}

//! The selective scan of Mamba-1 (Gu and Dao, 2023, equation 2 with the simplified B).
//!
//! For each sequence, channel i with g = i / (I / groups) and state n, over its rows in order:
//!
//! ```text
//! δ          = softplus(dt[t, i] + dt_bias[i])
//! h[n, i]    = exp(δ · a[n, i]) · h[n, i] + δ · b[t, g, n] · x[t, i]
//! y[t, i]    = Σₙ c[t, g, n] · h[n, i] + d[i] · x[t, i]
//! y[t, i]   *= silu(z[t, i])                                      (when there is a gate)
//! ```
//!
//! h starts from the sequence's ssm_state and is left there. Rows are taken one after the other in
//! f32, so cutting a sequence into chunks changes no bit.

use super::{Check, linear::write_row, silu, softplus};
use crate::error::Result;
use crate::span::Ragged;
use crate::tensor::Tensor;

/// A selective scan.
pub struct SelectiveScan<'a> {
    /// (T, I) F32.
    pub x: &'a Tensor,
    /// (T, I) F32: step sizes before bias and softplus.
    pub dt: &'a Tensor,
    /// (1, I) F32.
    pub dt_bias: Option<&'a Tensor>,
    /// (N, I) F32, negative: A, with the state dimension first so that channels are adjacent.
    pub a: &'a Tensor,
    /// (T, groups · N) F32.
    pub b: &'a Tensor,
    /// (T, groups · N) F32.
    pub c: &'a Tensor,
    /// How many b and c there are; channels share them evenly.
    pub groups: usize,
    /// (1, I) F32.
    pub d: &'a Tensor,
    /// (T, I) F32.
    pub z: Option<&'a Tensor>,
    /// (slots, N·I) F32: h of each sequence, state dimension first.
    pub ssm_state: &'a mut Tensor,
    /// Which rows belong to which sequence and slot.
    pub ragged: Ragged<'a>,
    /// (T, I) F32.
    pub y: &'a mut Tensor,
}

impl SelectiveScan<'_> {
    /// Shapes, types, slots and overlaps.
    pub fn check(&self) -> Result<()> {
        let c = Check("selective_scan");
        let (rows, inner, states) = (self.x.rows(), self.x.cols(), self.a.rows());
        c.f32(&[
            ("x", self.x),
            ("dt", self.dt),
            ("a", self.a),
            ("b", self.b),
            ("c", self.c),
        ])?;
        c.f32(&[("ssm_state", self.ssm_state), ("y", self.y)])?;
        c.equal("rows of dt", self.dt.rows(), rows)?;
        c.equal("columns of dt", self.dt.cols(), inner)?;
        c.equal("columns of a", self.a.cols(), inner)?;
        c.equal("rows of b", self.b.rows(), rows)?;
        c.at_least("groups", self.groups, 1)?;
        c.equal("channels beyond whole groups", inner % self.groups, 0)?;
        c.equal("columns of b", self.b.cols(), self.groups * states)?;
        c.equal("rows of c", self.c.rows(), rows)?;
        c.equal("columns of c", self.c.cols(), self.groups * states)?;
        c.vector("d", self.d, inner)?;
        c.equal(
            "columns of ssm_state",
            self.ssm_state.cols(),
            states * inner,
        )?;
        c.equal("rows of y", self.y.rows(), rows)?;
        c.equal("columns of y", self.y.cols(), inner)?;
        if let Some(bias) = self.dt_bias {
            c.vector("dt_bias", bias, inner)?;
        }
        if let Some(z) = self.z {
            c.f32(&[("z", z)])?;
            c.equal("rows of z", z.rows(), rows)?;
            c.equal("columns of z", z.cols(), inner)?;
            c.apart("y", self.y, &[z])?;
        }
        c.slots(&self.ragged, rows, self.ssm_state)?;
        c.apart(
            "ssm_state",
            self.ssm_state,
            &[self.x, self.dt, self.b, self.c, self.y],
        )?;
        c.apart("y", self.y, &[self.x, self.dt, self.b, self.c])
    }

    /// The plain loops.
    pub(crate) fn reference(&mut self) {
        let (x, dt, a) = (
            self.x.view::<f32>(),
            self.dt.view::<f32>(),
            self.a.view::<f32>(),
        );
        let (b, c, d) = (
            self.b.view::<f32>(),
            self.c.view::<f32>(),
            self.d.view::<f32>(),
        );
        let dt_bias = self.dt_bias.map(|t| t.view::<f32>());
        let z = self.z.map(|t| t.view::<f32>());
        let (states, inner) = (a.rows(), a.cols());
        for span in self.ragged.spans {
            let mut h = self.ssm_state.view::<f32>().row(span.slot).to_vec();
            let mut y = vec![0.0; inner];
            for t in span.rows() {
                for i in 0..inner {
                    let delta = softplus(dt.row(t)[i] + dt_bias.map_or(0.0, |b| b.row(0)[i]));
                    let group = i / (inner / self.groups) * states;
                    let mut sum = 0.0;
                    for n in 0..states {
                        let (b, c) = (b.row(t)[group + n], c.row(t)[group + n]);
                        let h = &mut h[n * inner + i];
                        *h = (delta * a.row(n)[i]).exp() * *h + delta * x.row(t)[i] * b;
                        sum += c * *h;
                    }
                    sum += d.row(0)[i] * x.row(t)[i];
                    y[i] = sum * z.map_or(1.0, |z| silu(z.row(t)[i]));
                }
                write_row(self.y, t, 0, &y);
            }
            write_row(self.ssm_state, span.slot, 0, &h);
        }
    }
}

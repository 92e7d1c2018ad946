//! The scan of Mamba-2 (Dao and Gu, 2024), in the form that the paper calls recurrent: one decay for a
//! whole head.
//!
//! For each sequence, over its rows in order, head h with g = h / (heads / groups), channel p of the
//! head and state n:
//!
//! ```text
//! δ           = clamp(softplus(dt[t, h] + dt_bias[h]), dt_limit)
//! s[h, n, p]  = exp(δ · a[h]) · s[h, n, p] + (δ · x[t, h, p]) · b[t, g, n]
//! y[t, h, p]  = Σₙ c[t, g, n] · s[h, n, p] + d[h] · x[t, h, p]
//! ```
//!
//! Without `scale_input` the input is x itself, not δ · x. s starts from the sequence's ssm_state and
//! is left there. Rows are taken one after the other in f32, so cutting a sequence into chunks changes
//! no bit; a device with matrix units may take many rows of a sequence by chunks of its own, within its
//! tolerance. [`SsdChunked`](super::SsdChunked) is the form with matrix products.

use super::{Check, linear::write_row, softplus};
use crate::error::Result;
use crate::span::Ragged;
use crate::tensor::Tensor;

/// A scan with one decay a head.
pub struct SsdScan<'a> {
    /// (T, heads · P) F32. The number of heads is that of `a`.
    pub x: &'a Tensor,
    /// (T, heads) F32: step sizes before bias and softplus.
    pub dt: &'a Tensor,
    /// (1, heads) F32.
    pub dt_bias: Option<&'a Tensor>,
    /// Least and greatest step size; (0, ∞) leaves them as they are.
    pub dt_limit: (f32, f32),
    /// (1, heads) F32, negative.
    pub a: &'a Tensor,
    /// (T, groups · N) F32.
    pub b: &'a Tensor,
    /// (T, groups · N) F32.
    pub c: &'a Tensor,
    /// (1, heads) F32.
    pub d: Option<&'a Tensor>,
    /// Whether the input is multiplied by the step size.
    pub scale_input: bool,
    /// How many b and c there are; heads share them evenly.
    pub groups: usize,
    /// (slots, heads · N · P) F32: s of each sequence, head by head, of each head the state dimension
    /// first so that channels are adjacent.
    pub ssm_state: &'a mut Tensor,
    /// Which rows belong to which sequence and slot.
    pub ragged: Ragged<'a>,
    /// (T, heads · P) F32.
    pub y: &'a mut Tensor,
}

impl SsdScan<'_> {
    /// Shapes, types, limits, slots and overlaps.
    pub fn check(&self) -> Result<()> {
        self.check_as(&Check("ssd_scan"))
    }

    /// The same for an operation that has these arguments among others.
    pub(super) fn check_as(&self, c: &Check) -> Result<()> {
        let (rows, heads) = (self.x.rows(), self.a.cols());
        c.f32(&[("x", self.x), ("dt", self.dt), ("b", self.b), ("c", self.c)])?;
        c.f32(&[("ssm_state", self.ssm_state), ("y", self.y)])?;
        c.at_least("heads", heads, 1)?;
        c.at_least("groups", self.groups, 1)?;
        c.equal("heads beyond whole groups", heads % self.groups, 0)?;
        c.equal("columns of x beyond whole heads", self.x.cols() % heads, 0)?;
        c.equal("rows of dt", self.dt.rows(), rows)?;
        c.equal("columns of dt", self.dt.cols(), heads)?;
        c.vector("a", self.a, heads)?;
        for vector in [("dt_bias", self.dt_bias), ("d", self.d)] {
            if let (what, Some(vector)) = vector {
                c.vector(what, vector, heads)?;
            }
        }
        let (least, greatest) = self.dt_limit;
        c.value(least <= greatest, || {
            format!("step sizes from {least} to {greatest}")
        })?;
        c.equal("rows of b", self.b.rows(), rows)?;
        c.equal(
            "columns of b beyond whole groups",
            self.b.cols() % self.groups,
            0,
        )?;
        c.equal("rows of c", self.c.rows(), rows)?;
        c.equal("columns of c", self.c.cols(), self.b.cols())?;
        c.equal(
            "columns of ssm_state",
            self.ssm_state.cols(),
            self.x.cols() * self.states(),
        )?;
        c.equal("rows of y", self.y.rows(), rows)?;
        c.equal("columns of y", self.y.cols(), self.x.cols())?;
        c.slots(&self.ragged, rows, self.ssm_state)?;
        c.apart(
            "ssm_state",
            self.ssm_state,
            &[self.x, self.dt, self.b, self.c, self.y],
        )?;
        c.apart("y", self.y, &[self.x, self.dt, self.b, self.c])
    }

    /// N.
    pub(crate) fn states(&self) -> usize {
        self.b.cols() / self.groups
    }

    /// The plain loops.
    pub(crate) fn reference(&mut self) {
        let (x, dt) = (self.x.view::<f32>(), self.dt.view::<f32>());
        let (b, c) = (self.b.view::<f32>(), self.c.view::<f32>());
        let (heads, states) = (self.a.cols(), self.states());
        let width = x.cols() / heads;
        let of_heads =
            |t: Option<&Tensor>| t.map_or(vec![0.0; heads], |t| t.view::<f32>().row(0).to_vec());
        let (a, dt_bias, d) = (
            of_heads(Some(self.a)),
            of_heads(self.dt_bias),
            of_heads(self.d),
        );
        for span in self.ragged.spans {
            let mut s = self.ssm_state.view::<f32>().row(span.slot).to_vec();
            let mut y = vec![0.0; x.cols()];
            for t in span.rows() {
                for h in 0..heads {
                    let delta =
                        softplus(dt.row(t)[h] + dt_bias[h]).clamp(self.dt_limit.0, self.dt_limit.1);
                    let decay = (delta * a[h]).exp();
                    let group = h / (heads / self.groups) * states;
                    let (b, c) = (&b.row(t)[group..][..states], &c.row(t)[group..][..states]);
                    for p in 0..width {
                        let x = x.row(t)[h * width + p];
                        let input = if self.scale_input { delta * x } else { x };
                        let mut sum = 0.0;
                        for n in 0..states {
                            let s = &mut s[(h * states + n) * width + p];
                            *s = decay * *s + input * b[n];
                            sum += c[n] * *s;
                        }
                        y[h * width + p] = sum + d[h] * x;
                    }
                }
                write_row(self.y, t, 0, &y);
            }
            write_row(self.ssm_state, span.slot, 0, &s);
        }
    }
}

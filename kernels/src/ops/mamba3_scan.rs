//! The scan of Mamba-3 (Lahoti et al., 2026): a scalar decay per head, the trapezoid rule, inputs and
//! outputs rotated by an angle that is a state of its own, and R inputs and outputs of the state at
//! once where there is a `mimo`.
//!
//! For each sequence and head h of group g = h // (H / G), over its rows in order, with one state S of
//! N × P elements:
//!
//! ```text
//! δ     = softplus(dt[t, h] + dt_bias[h])
//! α     = exp(-δ · max(f(a[t, h]), a_floor))
//! λ     = σ(trap[t, h])
//! θ[k]  = (θ[k] + π · tanh(angle[t, k]) · δ) mod 2π
//! B[r]  = rotate(b[t, r, g] + b_bias[h, r], θ)           C[r] = rotate(c[t, r, g] + c_bias[h, r], θ)
//! X[r]  = x[t, h] · x_in[h, r]                           (x[t, h] without mimo)
//! S     = α · S + Σᵣ (1 - λ) · δ · α · B'[r] ⊗ X'[r] + Σᵣ λ · δ · B[r] ⊗ X[r]
//! Y[r]  = C[r] · S + d[h] · X[r]
//! Y[r] *= weight[h] / √(mean(Y[r]²) + eps)               (when there is a norm)
//! Y[r] *= silu(z[t, h] · z_in[h, r])                     (silu(z[t, h]) without mimo)
//! y[t, h] = Σᵣ Y[r] · y_out[h, r]                        (Y without mimo)
//! ```
//!
//! B' and X' are those of the row before. θ, S, B' and x' start from the sequence's state and are left
//! there. Rows are taken one after the other in f32, so cutting a sequence into chunks changes no bit.
//!
//! rotate turns pair k of the N elements by θ[k], for as many pairs as there are angles: pairs are
//! neighbours (2k, 2k + 1), with mimo (k, k + N / 2).

use std::f32::consts::{PI, TAU};

use super::{Check, linear::write_row, silu, softplus};
use crate::error::Result;
use crate::span::Ragged;
use crate::tensor::Tensor;

/// What f is: how a projection becomes a rate of decay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decay {
    /// 1 + a for a ≥ 0, 1 / (1 - a) below.
    HeavyTail,
    /// ln(1 + eᵃ).
    Softplus,
}

impl Decay {
    /// f(a).
    pub fn apply(self, a: f32) -> f32 {
        match self {
            Decay::HeavyTail => a.max(0.0) + 1.0 / (1.0 - a.min(0.0)),
            Decay::Softplus => softplus(a),
        }
    }
}

/// How one input becomes R, and R outputs one. Each is (1, H·R·P) F32.
#[derive(Clone, Copy)]
pub struct Mimo<'a> {
    /// Multiplies x.
    pub x_in: &'a Tensor,
    /// Multiplies z.
    pub z_in: &'a Tensor,
    /// Multiplies the outputs before they are summed.
    pub y_out: &'a Tensor,
}

/// The root-mean-square norm of each head's output before the gate.
#[derive(Clone, Copy)]
pub struct HeadNorm<'a> {
    /// (1, H·P) F32.
    pub weight: &'a Tensor,
    /// Added to the mean square before the root.
    pub eps: f32,
}

/// A Mamba-3 scan.
pub struct Mamba3Scan<'a> {
    /// (T, H·P) F32.
    pub x: &'a Tensor,
    /// (T, H·P) F32: the gate.
    pub z: &'a Tensor,
    /// (T, R·G·N) F32, normalised.
    pub b: &'a Tensor,
    /// (T, R·G·N) F32, normalised.
    pub c: &'a Tensor,
    /// (T, H) F32: step sizes before bias and softplus.
    pub dt: &'a Tensor,
    /// (T, H) F32: rates of decay before f.
    pub a: &'a Tensor,
    /// (T, H) F32: logits of λ.
    pub trap: &'a Tensor,
    /// (T, K) F32: turns before tanh.
    pub angle: &'a Tensor,
    /// (1, H) F32.
    pub dt_bias: &'a Tensor,
    /// (1, H·R·N) F32.
    pub b_bias: &'a Tensor,
    /// (1, H·R·N) F32.
    pub c_bias: &'a Tensor,
    /// (1, H) F32.
    pub d: &'a Tensor,
    /// Needed for a rank above one.
    pub mimo: Option<Mimo<'a>>,
    /// Normalises the outputs.
    pub norm: Option<HeadNorm<'a>>,
    /// What f is.
    pub decay: Decay,
    /// The least rate of decay.
    pub a_floor: f32,
    /// H.
    pub heads: usize,
    /// G, which divides H.
    pub groups: usize,
    /// R.
    pub rank: usize,
    /// (slots, H·K) F32: θ.
    pub angle_state: &'a mut Tensor,
    /// (slots, H·N·P) F32: S of each head, state dimension first.
    pub ssm_state: &'a mut Tensor,
    /// (slots, H·R·N) F32: B of the row before.
    pub b_state: &'a mut Tensor,
    /// (slots, H·P) F32: x of the row before.
    pub x_state: &'a mut Tensor,
    /// Which rows belong to which sequence and slot.
    pub ragged: Ragged<'a>,
    /// (T, H·P) F32.
    pub y: &'a mut Tensor,
}

impl Mamba3Scan<'_> {
    /// P and N.
    pub(crate) fn sizes(&self) -> (usize, usize) {
        let states = self.b.cols() / (self.rank * self.groups);
        (self.x.cols() / self.heads, states)
    }

    /// Shapes, types, slots and overlaps.
    pub fn check(&self) -> Result<()> {
        let c = Check("mamba3_scan");
        let (heads, groups, rank) = (self.heads, self.groups, self.rank);
        c.at_least("heads", heads, 1)?;
        c.at_least("groups", groups, 1)?;
        c.at_least("rank", rank, 1)?;
        c.equal("heads beyond whole groups", heads % groups, 0)?;
        c.value(rank == 1 || self.mimo.is_some(), || {
            format!("rank {rank} without a mimo")
        })?;
        let (rows, inner) = (self.x.rows(), self.x.cols());
        c.equal("columns of x beyond whole heads", inner % heads, 0)?;
        let odd = self.b.cols() % (rank * groups);
        c.equal("columns of b beyond whole groups", odd, 0)?;
        let (_, states) = self.sizes();
        let pairs = self.angle.cols();
        c.at_least("states of a head", states, 2 * pairs)?;
        if self.mimo.is_some() {
            c.equal("states beyond whole pairs", states % 2, 0)?;
        }
        let inputs = [
            ("x", self.x, inner),
            ("z", self.z, inner),
            ("b", self.b, rank * groups * states),
            ("c", self.c, rank * groups * states),
            ("dt", self.dt, heads),
            ("a", self.a, heads),
            ("trap", self.trap, heads),
            ("angle", self.angle, pairs),
        ];
        for (what, tensor, cols) in inputs {
            c.f32(&[(what, tensor)])?;
            c.equal(what, tensor.rows(), rows)?;
            c.equal(what, tensor.cols(), cols)?;
        }
        c.vector("dt_bias", self.dt_bias, heads)?;
        c.vector("b_bias", self.b_bias, heads * rank * states)?;
        c.vector("c_bias", self.c_bias, heads * rank * states)?;
        c.vector("d", self.d, heads)?;
        if let Some(mimo) = &self.mimo {
            c.vector("x_in", mimo.x_in, inner * rank)?;
            c.vector("z_in", mimo.z_in, inner * rank)?;
            c.vector("y_out", mimo.y_out, inner * rank)?;
        }
        if let Some(norm) = &self.norm {
            c.vector("weight", norm.weight, inner)?;
        }
        c.f32(&[("y", self.y)])?;
        c.equal("rows of y", self.y.rows(), rows)?;
        c.equal("columns of y", self.y.cols(), inner)?;
        let read = inputs.map(|(_, tensor, _)| tensor);
        c.apart("y", self.y, &read)?;
        let states: [(&'static str, &Tensor, usize); 4] = [
            ("angle_state", self.angle_state, heads * pairs),
            ("ssm_state", self.ssm_state, inner * states),
            ("b_state", self.b_state, heads * rank * states),
            ("x_state", self.x_state, inner),
        ];
        for (i, (what, state, cols)) in states.iter().enumerate() {
            c.f32(&[(what, state)])?;
            c.equal(what, state.cols(), *cols)?;
            c.slots(&self.ragged, rows, state)?;
            c.apart(what, state, &read)?;
            c.apart(what, state, &[&*self.y])?;
            let others = states[..i].iter().map(|(_, other, _)| *other);
            c.apart(what, state, &others.collect::<Vec<_>>())?;
        }
        Ok(())
    }

    /// The plain loops.
    pub(crate) fn reference(&mut self) {
        for span in self.ragged.spans {
            let state = |of: &Tensor| of.view::<f32>().row(span.slot).to_vec();
            let mut theta = state(self.angle_state);
            let mut ssm = state(self.ssm_state);
            let mut b_before = state(self.b_state);
            let mut x_before = state(self.x_state);
            let mut y = vec![0.0; self.x.cols()];
            let (width, states) = self.sizes();
            let (pairs, ranked) = (self.angle.cols(), self.rank * states);
            for t in span.rows() {
                for h in 0..self.heads {
                    let head = Head {
                        theta: &mut theta[h * pairs..][..pairs],
                        ssm: &mut ssm[h * states * width..][..states * width],
                        b_before: &mut b_before[h * ranked..][..ranked],
                        x_before: &mut x_before[h * width..][..width],
                        y: &mut y[h * width..][..width],
                    };
                    self.one(t, h, head);
                }
                write_row(self.y, t, 0, &y);
            }
            write_row(self.angle_state, span.slot, 0, &theta);
            write_row(self.ssm_state, span.slot, 0, &ssm);
            write_row(self.b_state, span.slot, 0, &b_before);
            write_row(self.x_state, span.slot, 0, &x_before);
        }
    }

    /// One row of one head.
    fn one(&self, t: usize, h: usize, head: Head<'_>) {
        let (width, states) = self.sizes();
        let (rank, group) = (self.rank, h / (self.heads / self.groups));
        let input = |of: &Tensor, at: usize, n: usize| of.view::<f32>().row(t)[at..][..n].to_vec();
        let weight = |of: &Tensor, at: usize| of.view::<f32>().row(0)[at];

        let delta = softplus(input(self.dt, h, 1)[0] + weight(self.dt_bias, h));
        let rate = self.decay.apply(input(self.a, h, 1)[0]).max(self.a_floor);
        let alpha = (-delta * rate).exp();
        let lambda = 1.0 / (1.0 + (-input(self.trap, h, 1)[0]).exp());
        let (before, now) = ((1.0 - lambda) * delta * alpha, lambda * delta);

        for (theta, angle) in head
            .theta
            .iter_mut()
            .zip(input(self.angle, 0, self.angle.cols()))
        {
            let sum = *theta + PI * angle.tanh() * delta;
            *theta = sum - TAU * (sum / TAU).floor();
        }
        let rotated = |of: &Tensor, bias: &Tensor, r: usize| {
            let mut v = input(of, (r * self.groups + group) * states, states);
            let first = (h * rank + r) * states;
            (0..states).for_each(|n| v[n] += weight(bias, first + n));
            for (k, theta) in head.theta.iter().enumerate() {
                let (i, j) = match self.mimo {
                    Some(_) => (k, k + states / 2),
                    None => (2 * k, 2 * k + 1),
                };
                let (sin, cos) = theta.sin_cos();
                (v[i], v[j]) = (v[i] * cos - v[j] * sin, v[i] * sin + v[j] * cos);
            }
            v
        };

        let x = input(self.x, h * width, width);
        let z = input(self.z, h * width, width);
        head.ssm.iter_mut().for_each(|s| *s *= alpha);
        for r in 0..rank {
            let b = rotated(self.b, self.b_bias, r);
            let b_before = &mut head.b_before[r * states..][..states];
            for (p, x) in x.iter().enumerate() {
                let by = self
                    .mimo
                    .map_or(1.0, |m| weight(m.x_in, (h * rank + r) * width + p));
                for n in 0..states {
                    head.ssm[n * width + p] +=
                        before * b_before[n] * head.x_before[p] * by + now * b[n] * x * by;
                }
            }
            b_before.copy_from_slice(&b);
        }
        head.y.fill(0.0);
        for r in 0..rank {
            let c = rotated(self.c, self.c_bias, r);
            let at = |p: usize| (h * rank + r) * width + p;
            let mut out = vec![0.0; width];
            for (p, out) in out.iter_mut().enumerate() {
                let sum: f32 = (0..states).map(|n| c[n] * head.ssm[n * width + p]).sum();
                let by = self.mimo.map_or(1.0, |m| weight(m.x_in, at(p)));
                *out = sum + weight(self.d, h) * x[p] * by;
            }
            if let Some(norm) = &self.norm {
                let square = out.iter().map(|y| y * y).sum::<f32>() / width as f32;
                let by = 1.0 / (square + norm.eps).sqrt();
                for (p, out) in out.iter_mut().enumerate() {
                    *out *= by * weight(norm.weight, h * width + p);
                }
            }
            for p in 0..width {
                let (z_in, y_out) = self.mimo.map_or((1.0, 1.0), |m| {
                    (weight(m.z_in, at(p)), weight(m.y_out, at(p)))
                });
                head.y[p] += out[p] * silu(z[p] * z_in) * y_out;
            }
        }
        head.x_before.copy_from_slice(&x);
    }
}

/// The state of one head of one sequence, and where its output goes.
struct Head<'a> {
    theta: &'a mut [f32],
    ssm: &'a mut [f32],
    b_before: &'a mut [f32],
    x_before: &'a mut [f32],
    y: &'a mut [f32],
}

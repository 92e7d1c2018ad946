//! The scan of S4D (Gu, Gupta, Goel and Ré, 2022): a diagonal state space that is the same at every
//! token, with complex states.
//!
//! For each sequence, channel i and state n, over its rows in order:
//!
//! ```text
//! s[n, i]  = a[n, i] · s[n, i] + x[t, i]                          (complex)
//! y[t, i]  = 2 · Re(Σₙ c[n, i] · s[n, i]) + d[i] · x[t, i]
//! ```
//!
//! a and c are those of discrete time. From the continuous A, B, C and the step δ, held constant
//! between tokens (zero-order hold): a = exp(δ · A) and c = C · B · (exp(δ · A) − 1) / A. Of each pair
//! of conjugate states only one is kept, which the factor two makes up for.
//!
//! s starts from the sequence's ssm_state and is left there. Rows are taken one after the other in
//! f32, so cutting a sequence into chunks changes no bit.

use super::{Check, linear::write_row};
use crate::error::Result;
use crate::span::Ragged;
use crate::tensor::Tensor;

/// A scan with fixed complex decays.
pub struct S4dScan<'a> {
    /// (T, I) F32.
    pub x: &'a Tensor,
    /// (N, I) F32: real parts of the transition.
    pub a_re: &'a Tensor,
    /// (N, I) F32: imaginary parts.
    pub a_im: &'a Tensor,
    /// (N, I) F32: real parts of what the states count for in the output.
    pub c_re: &'a Tensor,
    /// (N, I) F32: imaginary parts.
    pub c_im: &'a Tensor,
    /// (1, I) F32.
    pub d: &'a Tensor,
    /// (slots, 2 · N · I) F32: s of each sequence, state dimension first: the real parts of all states,
    /// then the imaginary ones.
    pub ssm_state: &'a mut Tensor,
    /// Which rows belong to which sequence and slot.
    pub ragged: Ragged<'a>,
    /// (T, I) F32.
    pub y: &'a mut Tensor,
}

impl S4dScan<'_> {
    /// Shapes, types, slots and overlaps.
    pub fn check(&self) -> Result<()> {
        let c = Check("s4d_scan");
        let (rows, inner, states) = (self.x.rows(), self.x.cols(), self.a_re.rows());
        c.f32(&[("x", self.x), ("ssm_state", self.ssm_state), ("y", self.y)])?;
        for (what, tensor) in [
            ("a_re", self.a_re),
            ("a_im", self.a_im),
            ("c_re", self.c_re),
            ("c_im", self.c_im),
        ] {
            c.f32(&[(what, tensor)])?;
            c.equal(what, tensor.rows(), states)?;
            c.equal(what, tensor.cols(), inner)?;
        }
        c.vector("d", self.d, inner)?;
        c.equal(
            "columns of ssm_state",
            self.ssm_state.cols(),
            2 * states * inner,
        )?;
        c.equal("rows of y", self.y.rows(), rows)?;
        c.equal("columns of y", self.y.cols(), inner)?;
        c.slots(&self.ragged, rows, self.ssm_state)?;
        c.apart("ssm_state", self.ssm_state, &[self.x, self.y])?;
        c.apart("y", self.y, &[self.x])
    }

    /// The plain loops.
    pub(crate) fn reference(&mut self) {
        let (x, d) = (self.x.view::<f32>(), self.d.view::<f32>());
        let (a_re, a_im) = (self.a_re.view::<f32>(), self.a_im.view::<f32>());
        let (c_re, c_im) = (self.c_re.view::<f32>(), self.c_im.view::<f32>());
        let (states, inner) = (a_re.rows(), a_re.cols());
        for span in self.ragged.spans {
            let mut s = self.ssm_state.view::<f32>().row(span.slot).to_vec();
            let (re, im) = s.split_at_mut(states * inner);
            let mut y = vec![0.0; inner];
            for t in span.rows() {
                for i in 0..inner {
                    let x = x.row(t)[i];
                    let mut sum = 0.0;
                    for n in 0..states {
                        let (re, im) = (&mut re[n * inner + i], &mut im[n * inner + i]);
                        let (a_re, a_im) = (a_re.row(n)[i], a_im.row(n)[i]);
                        (*re, *im) = (a_re * *re - a_im * *im + x, a_re * *im + a_im * *re);
                        sum += c_re.row(n)[i] * *re - c_im.row(n)[i] * *im;
                    }
                    y[i] = 2.0 * sum + d.row(0)[i] * x;
                }
                write_row(self.y, t, 0, &y);
            }
            write_row(self.ssm_state, span.slot, 0, &s);
        }
    }
}

//! Rotary position embedding (Su et al., 2021), in place.
//!
//! In every head the first 2·F of its elements are rotated in F pairs by the angle
//! position · frequencies[f]. Pairs are (f, f + F), or (2f, 2f + 1) when interleaved. The angle is a
//! product of two f32 numbers, as in the reference implementations. Sine and cosine are multiplied by
//! `scale`, which some ways to reach beyond the trained context want (YaRN: Peng et al., 2023).

use super::{Check, linear::write_row};
use crate::error::Result;
use crate::span::Ragged;
use crate::tensor::Tensor;

/// A rotation of queries or keys.
pub struct Rope<'a> {
    /// (T, heads · head_dim) F32.
    pub x: &'a mut Tensor,
    /// Elements of one head.
    pub head_dim: usize,
    /// (1, F) F32, 2·F ≤ head_dim: radians per position.
    pub frequencies: &'a Tensor,
    /// Pairs are neighbours.
    pub interleaved: bool,
    /// Multiplies what is rotated; one for a rotation alone.
    pub scale: f32,
    /// Gives each row its position.
    pub ragged: Ragged<'a>,
}

impl Rope<'_> {
    /// Shapes and types.
    pub fn check(&self) -> Result<()> {
        let c = Check("rope");
        c.f32(&[("x", self.x)])?;
        c.at_least("head_dim", self.head_dim, 1)?;
        c.equal(
            "columns of x beyond whole heads",
            self.x.cols() % self.head_dim,
            0,
        )?;
        c.vector("frequencies", self.frequencies, self.frequencies.cols())?;
        c.at_least("head_dim", self.head_dim, 2 * self.frequencies.cols())?;
        c.spans(&self.ragged, self.x.rows())?;
        c.apart("x", self.x, &[])
    }

    /// The plain loops.
    pub(crate) fn reference(&mut self) {
        let frequencies = self.frequencies.view::<f32>().row(0).to_vec();
        let pairs = frequencies.len();
        for span in self.ragged.spans {
            for t in span.rows() {
                let position = (span.position + t - span.start) as f32;
                let mut row = self.x.view::<f32>().row(t).to_vec();
                for head in row.chunks_exact_mut(self.head_dim) {
                    for (f, frequency) in frequencies.iter().enumerate() {
                        let (sin, cos) = (position * frequency).sin_cos();
                        let (sin, cos) = (sin * self.scale, cos * self.scale);
                        let (i, j) = if self.interleaved {
                            (2 * f, 2 * f + 1)
                        } else {
                            (f, f + pairs)
                        };
                        (head[i], head[j]) =
                            (head[i] * cos - head[j] * sin, head[j] * cos + head[i] * sin);
                    }
                }
                write_row(self.x, t, 0, &row);
            }
        }
    }
}

//! The scan of Mamba-2 (Dao and Gu, 2024) in the form that the paper calls dual: matrix products within
//! chunks of tokens, a state from chunk to chunk.
//!
//! Chunks of Q tokens are anchored at positions of the sequence: chunk c holds tokens cQ to (c + 1)Q - 1,
//! however many of them a batch brings. With S the state before the chunk of token t, head h,
//! g = h / (heads / groups), channel p and state n:
//!
//! ```text
//! δ[t]        = clamp(softplus(dt[t, h] + dt_bias[h]), dt_limit)
//! u[t, p]     = δ[t] · x[t, h, p]                          (x[t, h, p] without scale_input)
//! l[t]        = Σ δ[s] · a[h]                              over the chunk's tokens s ≤ t
//! y[t, h, p]  = exp(l[t]) · Σₙ c[t, g, n] · S[h, n, p]
//!             + Σ exp(l[t] - l[s]) · (c[t, g] · b[s, g]) · u[s, p]    over the chunk's tokens s ≤ t
//!             + d[h] · x[t, h, p]
//! ```
//!
//! and when the chunk's last token e is there
//!
//! ```text
//! S[h, n, p]  = exp(l[e]) · S[h, n, p] + Σ exp(l[e] - l[s]) · b[s, g, n] · u[s, p]    over its tokens s
//! ```
//!
//! That is [`SsdScan`] with its sums in another order. A sequence keeps S and what its unfinished chunk
//! has brought, u, b and l; how many rows of it count follows from the position. Every sum is in order of
//! s or n in f32, whoever computed its terms and when, so cutting a sequence anywhere changes no bit. The
//! differences of l are as exact as l is long: an error of l[t] · 2⁻²⁴, relative to a decay.

use super::{Check, SsdScan, linear::write_row, softplus};
use crate::error::Result;
use crate::tensor::Tensor;

/// A scan with one decay a head, by chunks.
pub struct SsdChunked<'a> {
    /// Inputs, output and S: as for the recurrence.
    pub scan: SsdScan<'a>,
    /// Q.
    pub chunk_size: usize,
    /// (slots, heads · Q · P) F32: u of the chunk's tokens, head by head, token t in row t mod Q.
    pub chunk_inputs: &'a mut Tensor,
    /// (slots, groups · Q · N) F32: b, group by group.
    pub chunk_b: &'a mut Tensor,
    /// (slots, heads · Q) F32: l, head by head.
    pub chunk_decays: &'a mut Tensor,
}

impl SsdChunked<'_> {
    /// Shapes, types, limits, slots and overlaps.
    pub fn check(&self) -> Result<()> {
        let c = Check("ssd_chunked");
        let scan = &self.scan;
        scan.check_as(&c)?;
        c.at_least("chunk_size", self.chunk_size, 1)?;
        let parts = [
            ("chunk_inputs", &*self.chunk_inputs, scan.x.cols()),
            ("chunk_b", &*self.chunk_b, scan.b.cols()),
            ("chunk_decays", &*self.chunk_decays, scan.a.cols()),
        ];
        for (i, (what, part, cols)) in parts.into_iter().enumerate() {
            c.f32(&[(what, part)])?;
            c.equal(what, part.cols(), cols.saturating_mul(self.chunk_size))?;
            c.slots(&scan.ragged, scan.x.rows(), part)?;
            c.apart(what, part, &[scan.x, scan.dt, scan.b, scan.c])?;
            c.apart(what, part, &[&*scan.ssm_state, &*scan.y])?;
            c.apart(what, part, &parts.map(|(_, part, _)| part)[..i])?;
        }
        Ok(())
    }

    /// The plain loops.
    pub(crate) fn reference(&mut self) {
        for i in 0..self.scan.ragged.spans.len() {
            let span = &self.scan.ragged.spans[i];
            let state = |of: &Tensor| of.view::<f32>().row(span.slot).to_vec();
            let mut kept = Kept {
                s: state(self.scan.ssm_state),
                u: state(self.chunk_inputs),
                b: state(self.chunk_b),
                l: state(self.chunk_decays),
            };
            for (i, t) in span.rows().enumerate() {
                let y = self.one(t, (span.position + i) % self.chunk_size, &mut kept);
                write_row(self.scan.y, t, 0, &y);
            }
            write_row(self.scan.ssm_state, span.slot, 0, &kept.s);
            write_row(self.chunk_inputs, span.slot, 0, &kept.u);
            write_row(self.chunk_b, span.slot, 0, &kept.b);
            write_row(self.chunk_decays, span.slot, 0, &kept.l);
        }
    }

    /// Output of row `t`, which is token `place` of its chunk.
    fn one(&self, t: usize, place: usize, kept: &mut Kept) -> Vec<f32> {
        let scan = &self.scan;
        let (heads, states, size) = (scan.a.cols(), scan.states(), self.chunk_size);
        let width = scan.x.cols() / heads;
        let input = |of: &Tensor, first: usize, n: usize| {
            let row = of.view::<f32>();
            row.row(t)[first..][..n].to_vec()
        };
        let weight = |of: Option<&Tensor>, h: usize| of.map_or(0.0, |t| t.view::<f32>().row(0)[h]);
        for g in 0..scan.groups {
            let b = input(scan.b, g * states, states);
            kept.b[(g * size + place) * states..][..states].copy_from_slice(&b);
        }
        let mut out = Vec::with_capacity(heads * width);
        for h in 0..heads {
            let g = h / (heads / scan.groups);
            let (b, c) = (
                &kept.b[g * size * states..][..size * states],
                input(scan.c, g * states, states),
            );
            let x = input(scan.x, h * width, width);
            let s = &mut kept.s[h * states * width..][..states * width];
            let u = &mut kept.u[h * size * width..][..size * width];
            let l = &mut kept.l[h * size..][..size];

            let delta = softplus(input(scan.dt, h, 1)[0] + weight(scan.dt_bias, h))
                .clamp(scan.dt_limit.0, scan.dt_limit.1);
            let before = if place == 0 { 0.0 } else { l[place - 1] };
            l[place] = before + delta * weight(Some(scan.a), h);
            for (u, x) in u[place * width..].iter_mut().zip(&x) {
                *u = if scan.scale_input { delta * x } else { *x };
            }
            let weights: Vec<f32> = (0..=place)
                .map(|r| {
                    let score: f32 = (0..states).map(|n| c[n] * b[r * states + n]).sum();
                    (l[place] - l[r]).exp() * score
                })
                .collect();
            for p in 0..width {
                let earlier: f32 = (0..states).map(|n| c[n] * s[n * width + p]).sum();
                let mut y = l[place].exp() * earlier;
                for (r, weight) in weights.iter().enumerate() {
                    y += weight * u[r * width + p];
                }
                out.push(y + weight(scan.d, h) * x[p]);
            }
            if place + 1 == size {
                for (i, s) in s.iter_mut().enumerate() {
                    let (n, p) = (i / width, i % width);
                    *s *= l[place].exp();
                    for r in 0..size {
                        *s += b[r * states + n] * ((l[place] - l[r]).exp() * u[r * width + p]);
                    }
                }
            }
        }
        out
    }
}

/// What a sequence keeps.
struct Kept {
    s: Vec<f32>,
    u: Vec<f32>,
    b: Vec<f32>,
    l: Vec<f32>,
}

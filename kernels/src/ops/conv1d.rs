//! Causal depthwise convolution over time, with state.
//!
//! y[t, i] = act(bias[i] + Σₖ w[k, i] · x[t - (K-1) + k, i]), where x before a sequence's first row
//! of this batch comes from its conv_state: the last K-1 inputs, oldest first, zeros at the start
//! of a sequence. Afterwards conv_state holds the last K-1 inputs again.

use super::{Activation, Check, linear::write_row};
use crate::error::Result;
use crate::span::Ragged;
use crate::tensor::Tensor;

/// A convolution of Mamba's inner stream.
pub struct Conv1d<'a> {
    /// (T, I) F32.
    pub x: &'a Tensor,
    /// (K, I) F32, oldest tap first.
    pub w: &'a Tensor,
    /// (1, I) F32.
    pub bias: Option<&'a Tensor>,
    /// Applied to the sum.
    pub act: Activation,
    /// (slots, (K-1)·I) F32: rows of inputs, oldest first.
    pub conv_state: &'a mut Tensor,
    /// Which rows belong to which sequence and slot.
    pub ragged: Ragged<'a>,
    /// (T, I) F32.
    pub y: &'a mut Tensor,
}

impl Conv1d<'_> {
    /// Shapes, types, slots and overlaps.
    pub fn check(&self) -> Result<()> {
        let c = Check("conv1d");
        c.f32(&[
            ("x", self.x),
            ("w", self.w),
            ("conv_state", self.conv_state),
            ("y", self.y),
        ])?;
        c.at_least("taps", self.w.rows(), 1)?;
        c.equal("columns of w", self.w.cols(), self.x.cols())?;
        c.equal(
            "columns of conv_state",
            self.conv_state.cols(),
            (self.w.rows() - 1) * self.x.cols(),
        )?;
        c.equal("rows of y", self.y.rows(), self.x.rows())?;
        c.equal("columns of y", self.y.cols(), self.x.cols())?;
        if let Some(bias) = self.bias {
            c.vector("bias", bias, self.x.cols())?;
        }
        c.slots(&self.ragged, self.x.rows(), self.conv_state)?;
        c.apart("conv_state", self.conv_state, &[self.x, self.y])?;
        c.apart("y", self.y, &[self.x])
    }

    /// The plain loops.
    pub(crate) fn reference(&mut self) {
        let (x, w) = (self.x.view::<f32>(), self.w.view::<f32>());
        let (taps, width) = (w.rows(), w.cols());
        for span in self.ragged.spans {
            let mut window = self.conv_state.view::<f32>().row(span.slot).to_vec();
            for t in span.rows() {
                window.extend_from_slice(x.row(t));
                let y: Vec<f32> = (0..width)
                    .map(|i| {
                        let sum: f32 = (0..taps).map(|k| w.row(k)[i] * window[k * width + i]).sum();
                        self.act
                            .apply(sum + self.bias.map_or(0.0, |b| b.view::<f32>().row(0)[i]))
                    })
                    .collect();
                write_row(self.y, t, 0, &y);
                window.drain(..width);
            }
            write_row(self.conv_state, span.slot, 0, &window);
        }
    }
}

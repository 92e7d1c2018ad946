//! Normalisation to mean zero and variance one.

use super::Cpu;
use crate::ops::LayerNorm;

impl Cpu {
    pub(super) fn do_layer_norm(&self, mut op: LayerNorm<'_>) {
        op.reference();
    }
}

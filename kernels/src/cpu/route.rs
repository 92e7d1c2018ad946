//! The router's choice: a few comparisons a row, by the plain loops.

use super::Cpu;
use crate::ops::Route;

impl Cpu {
    pub(super) fn do_route(&self, mut op: Route<'_>) {
        op.reference();
    }
}

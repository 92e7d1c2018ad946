//! The scan of S4D.

use super::Cpu;
use crate::ops::S4dScan;

impl Cpu {
    pub(super) fn do_s4d_scan(&self, mut op: S4dScan<'_>) {
        op.reference();
    }
}

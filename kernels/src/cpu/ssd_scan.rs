//! The scan of Mamba-2.

use super::Cpu;
use crate::ops::SsdScan;

impl Cpu {
    pub(super) fn do_ssd_scan(&self, mut op: SsdScan<'_>) {
        op.reference();
    }
}

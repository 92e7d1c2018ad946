//! Picking rows.

use super::Cpu;
use crate::ops::Gather;

impl Cpu {
    pub(super) fn do_gather(&self, op: Gather<'_>) {
        let (x, y) = (op.x.view::<f32>(), op.y.view_mut::<f32>());
        let from = op.rows;
        self.for_rows(from.len(), x.cols(), |rows, _| {
            for r in rows {
                // SAFETY: rows are shared out, and each is written by one part.
                unsafe { y.row(r) }.copy_from_slice(x.row(from[r]));
            }
        });
    }
}

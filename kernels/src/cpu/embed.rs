//! The table lookup.

use super::Cpu;
use super::simd::{Float, Kernel, Simd, widen, with_float};
use crate::ops::Embed;
use crate::tensor::{View, ViewMut};

impl Cpu {
    pub(super) fn do_embed(&self, op: Embed<'_>) {
        let (ids, y) = (op.ids, op.y.view_mut::<f32>());
        let format = op.table.format();
        if format.dtype().is_none() {
            let table = op.table.data().view::<u8>();
            return self.for_rows(ids.len(), y.cols(), |rows, _| {
                for r in rows {
                    // SAFETY: rows are shared out, and each is written by one part.
                    let y = unsafe { y.row(r) };
                    format.dequantize(table.row(ids[r] as usize), y);
                }
            });
        }
        with_float!(op.table.data().dtype(), T => {
            let table = op.table.data().view::<T>();
            self.for_rows(ids.len(), y.cols(), |rows, _| {
                self.isa().launch(Lookup { ids, table, rows, y });
            });
        });
    }
}

struct Lookup<'a, T> {
    ids: &'a [u32],
    table: View<T>,
    rows: std::ops::Range<usize>,
    y: ViewMut<f32>,
}

impl<T: Float> Kernel for Lookup<'_, T> {
    type Out = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for r in self.rows {
            // SAFETY: rows are shared out, and each is written by one part.
            let y = unsafe { self.y.row(r) };
            widen(s, self.table.row(self.ids[r] as usize), y);
        }
    }
}

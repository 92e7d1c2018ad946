//! The likeliest token of rows of logits.

use super::Cpu;
use crate::ops::Likeliest;

/// Elements that are compared side by side.
const LANES: usize = 16;

impl Cpu {
    pub(super) fn do_likeliest(&self, op: Likeliest<'_>) {
        let (x, y) = (op.x.view::<f32>(), op.y.view_mut::<i32>());
        self.for_rows(op.x.rows(), op.x.cols(), |rows, _| {
            for r in rows {
                // SAFETY: rows are shared out, and each is written by one part.
                let y = unsafe { y.row(r) };
                y[0] = likeliest(x.row(r), op.by);
            }
        });
    }
}

/// By lanes, as processors compare; which element it was is asked once.
fn likeliest(x: &[f32], by: f32) -> i32 {
    let (mut tops, mut nans) = ([f32::NEG_INFINITY; LANES], [0u32; LANES]);
    let mut look = |x: &[f32]| {
        for ((top, nans), x) in tops.iter_mut().zip(&mut nans).zip(x) {
            let x = x * by;
            *top = if x > *top { x } else { *top };
            *nans += u32::from(x.is_nan());
        }
    };
    let whole = x.chunks_exact(LANES);
    let rest = whole.remainder();
    whole.for_each(&mut look);
    look(rest);
    let top = tops.into_iter().fold(f32::NEG_INFINITY, f32::max);
    if !top.is_finite() || nans.into_iter().any(|n| n > 0) {
        return -1;
    }
    x.iter()
        .position(|x| x * by == top)
        .map_or(-1, |i| i as i32)
}

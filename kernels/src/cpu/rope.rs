//! Rotary position embedding: the angles of a row are computed once for all its heads.

use super::Cpu;
use crate::ops::Rope;

impl Cpu {
    pub(super) fn do_rope(&self, op: Rope<'_>) {
        let (dim, pairs) = (op.head_dim, op.frequencies.cols());
        let (interleaved, scale, spans) = (op.interleaved, op.scale, op.ragged.spans);
        let frequencies = op.frequencies.view::<f32>();
        let x = op.x.view_mut::<f32>();
        // A sine and a cosine cost like some tens of elements.
        self.for_rows(x.rows(), x.cols() + 64 * pairs, |rows, scratch| {
            let mut parts = scratch.split(&[4 * pairs, 4 * pairs]);
            let (sines, cosines) = (parts.next::<f32>(pairs), parts.next::<f32>(pairs));
            let mut at = spans.partition_point(|span| span.start + span.len <= rows.start);
            for t in rows {
                if !spans[at].rows().contains(&t) {
                    at += 1;
                }
                let position = (spans[at].position + t - spans[at].start) as f32;
                for (f, frequency) in frequencies.row(0).iter().enumerate() {
                    let (sin, cos) = (position * frequency).sin_cos();
                    (sines[f], cosines[f]) = (sin * scale, cos * scale);
                }
                // SAFETY: rows are shared out, and each is written by one part.
                for head in unsafe { x.row(t) }.chunks_exact_mut(dim) {
                    if interleaved {
                        rotate_neighbours(&mut head[..2 * pairs], sines, cosines);
                    } else {
                        let (left, right) = head[..2 * pairs].split_at_mut(pairs);
                        rotate_halves(left, right, sines, cosines);
                    }
                }
            }
        });
    }
}

fn rotate_halves(left: &mut [f32], right: &mut [f32], sines: &[f32], cosines: &[f32]) {
    for (((a, b), sin), cos) in left.iter_mut().zip(right).zip(sines).zip(cosines) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

fn rotate_neighbours(head: &mut [f32], sines: &[f32], cosines: &[f32]) {
    for ((pair, sin), cos) in head.chunks_exact_mut(2).zip(sines).zip(cosines) {
        (pair[0], pair[1]) = (pair[0] * cos - pair[1] * sin, pair[1] * cos + pair[0] * sin);
    }
}

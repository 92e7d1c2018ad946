//! Attention and rotation, on a GPU.

use super::*;

#[test]
#[ignore = "needs a GPU"]
fn cuda_attention() {
    let mut rng = Rng(10 << 20);
    let (f32s, bytes) = ([F32, F32], [U8, U8]);
    let cases = [
        // lengths, (heads, kv_heads), dims, window, first tokens that stay, pages, rope
        (vec![3, 1, 20], (1, 1), (1, 1), None, 0, f32s, None),
        (
            vec![70, 5],
            (2, 2),
            (7, 7),
            Some(1),
            0,
            f32s,
            Some((3, false)),
        ),
        (
            vec![130, 65],
            (4, 2),
            (16, 16),
            None,
            0,
            [BF16, BF16],
            Some((8, true)),
        ),
        (
            vec![200, 33],
            (6, 1),
            (64, 64),
            Some(100),
            0,
            [F16, F16],
            Some((32, false)),
        ),
        (
            vec![90, 128],
            (5, 5),
            (80, 80),
            Some(64),
            0,
            [F32, BF16],
            Some((20, true)),
        ),
        (vec![1100, 40], (8, 1), (16, 16), None, 0, f32s, None),
        (
            vec![700, 9],
            (20, 1),
            (128, 128),
            None,
            0,
            [BF16, BF16],
            None,
        ),
        (
            vec![300, 9],
            (4, 1),
            (256, 256),
            None,
            0,
            [BF16, BF16],
            None,
        ),
        (
            vec![620, 7],
            (3, 3),
            (17, 17),
            Some(530),
            0,
            [BF16, F16],
            None,
        ),
        (
            vec![150, 700],
            (6, 2),
            (64, 64),
            Some(90),
            40,
            [BF16, BF16],
            None,
        ),
        (vec![40, 333], (6, 2), (96, 96), None, 0, [BF16, BF16], None),
        (
            vec![200],
            (2, 2),
            (192, 192),
            Some(65),
            0,
            [BF16, BF16],
            None,
        ),
        (vec![150], (7, 1), (80, 80), None, 0, [BF16, BF16], None),
        (vec![130, 40], (4, 2), (16, 64), None, 4, [F32, BF16], None),
        (vec![1100, 30], (2, 2), (24, 17), Some(30), 5, f32s, None),
        (vec![200, 90], (4, 1), (8, 8), Some(20), 37, f32s, None),
        (vec![1300], (2, 1), (8, 8), Some(1), 600, f32s, None),
        (vec![90], (1, 1), (4, 4), Some(10), 200, f32s, None),
        // In bytes.
        (vec![3, 1, 20], (1, 1), (1, 1), None, 0, bytes, None),
        (vec![130, 65], (4, 2), (16, 16), None, 0, bytes, None),
        (vec![620, 7], (3, 3), (17, 17), Some(530), 0, bytes, None),
        (vec![150, 40], (6, 2), (80, 48), Some(30), 5, bytes, None),
        (vec![700, 9], (20, 1), (128, 128), None, 0, bytes, None),
    ];
    for (lengths, heads, dims, window, keep_first, pages, rope) in cases {
        let case = AttentionCase {
            window,
            keep_first,
            pages,
            rope,
            ..AttentionCase::new(&mut rng, &lengths, heads, dims)
        };
        let schedules = schedules(&mut rng, &lengths, [16, 5, 1]);
        let expected = case.run(&Reference, &schedules[0]);
        for (i, schedule) in schedules.iter().enumerate() {
            for (s, found) in case.run(gpu(), schedule).iter().enumerate() {
                let what = format!("{heads:?} heads of {dims:?}, schedule {i}, sequence {s}");
                let size = vec![1.0; found.len()];
                // A rounding to half precision or BF16 of a rotated key may fall to the other side.
                let rounded = rope.is_some() && pages != f32s;
                // Some matrix units take queries and weights in BF16 too.
                let units = pages == [BF16, BF16] && dims.0 >= 64;
                let allowed = if rounded || units { 2e-2 } else { 1e-5 };
                near(&what, found, &expected[s], &size, allowed);
            }
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn cuda_rope() {
    let mut rng = Rng(11 << 20);
    for (dim, heads, pairs) in [(2, 1, 1), (7, 3, 2), (16, 4, 8), (80, 2, 20), (64, 8, 32)] {
        let x = rng.numbers(33 * heads * dim, 3.0);
        let rates = rng.numbers(pairs, 1.0);
        let spans = [(0, 30, 0), (30, 1, 1000), (31, 2, 77)].map(|(start, len, position)| Span {
            start,
            len,
            position,
            slot: 0,
            pages: 0..0,
        });
        for (interleaved, scale) in [(false, 1.0), (true, 1.0), (false, 1.2), (true, 0.7)] {
            let run = |b: &dyn Backend| {
                let mut x = put(b, F32, heads * dim, &x, true);
                let frequencies = vector(b, &rates);
                let ragged = Ragged {
                    spans: &spans,
                    page_table: &[],
                    page_size: 1,
                };
                b.rope(Rope {
                    x: &mut x.view,
                    head_dim: dim,
                    frequencies: &frequencies,
                    interleaved,
                    scale,
                    ragged,
                })
                .unwrap();
                take(b, &x)
            };
            let (found, expected) = (run(gpu()), run(&Reference));
            near("rope", &found, &expected, &vec![5.0; found.len()], 5e-7);
        }
    }
}

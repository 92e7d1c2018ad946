//! Lookups, choices, copies and draws, on a GPU.

use super::*;

#[test]
#[ignore = "needs a GPU"]
fn cuda_likeliest() {
    for cols in LIKELIEST {
        for (by, wide) in [
            (1.0, false),
            (1.0, true),
            (0.1, false),
            (7.0, true),
            (-1.0, false),
        ] {
            let expected = likeliest(&Reference, cols, by, false);
            same("likeliest", &likeliest(gpu(), cols, by, wide), &expected);
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn cuda_lookups_copies_and_draws() {
    let mut rng = Rng(6 << 20);
    for dtype in [F32, BF16, F16] {
        for (vocabulary, cols, tokens) in [(1, 1, 1), (7, 31, 33), (50, 100, 3), (9, 2560, 130)] {
            let table = rng.numbers(vocabulary * cols, 3.0);
            let ids: Vec<u32> = (0..tokens).map(|_| rng.below(vocabulary) as u32).collect();
            let run = |b: &dyn Backend| {
                let table = Matrix::dense(put(b, dtype, cols, &table, false).view);
                let mut y = blank(b, tokens, cols, true);
                let (ids, table) = (&ids, &table);
                let op = Embed {
                    ids,
                    table,
                    y: &mut y.view,
                };
                b.embed(op).unwrap();
                take(b, &y)
            };
            same("embed", &run(gpu()), &run(&Reference));
        }
    }
    let b = gpu();
    for dtype in [F32, BF16, F16, DType::I32] {
        for (rows, cols) in [(1, 1), (3, 7), (200, 1000), (1, 200_000), (40, 20_000)] {
            let values: Vec<f32> = (0..rows * cols).map(|_| rng.below(200) as f32).collect();
            let from = put(b, dtype, cols, &values, true);
            let to = put(b, dtype, cols, &vec![0.0; rows * cols], true);
            b.copy(&from.view, &mut to.view.clone()).unwrap();
            same("copy", &read(b, &to.view), &values);
            b.clear(&mut to.view.clone()).unwrap();
            assert!(read(b, &to.view).iter().all(|x| x.to_bits() == 0));
            if dtype != DType::I32 {
                take(b, &to);
            }
        }
        for (rows, cols) in [(1, 1), (5, 33), (3, 5000), (300, 700), (1, 150_000)] {
            let draw = |b: &dyn Backend| {
                let mut tensor = b.alloc(dtype, rows, cols).unwrap();
                b.fill_normal(&mut tensor, 77, 3.0).unwrap();
                read(b, &tensor)
            };
            same("fill_normal", &draw(b), &draw(&Reference));
        }
    }
    let host = HostTensor::from_f32(&[3, 5], &rng.numbers(15, 1.0)).unwrap();
    let uploaded = b.upload(&host, 3, 5).unwrap();
    same("upload", &read(b, &uploaded), &host.to_f32());
    assert!(b.upload(&host, 3, 4).is_err());
}

//! Block formats against gguf-py and GGML: vectors made by `make_formats.py`.

use strata_kernels::Format;

const COLUMNS: usize = 512;
const ROWS: usize = 5;

fn f32s(bytes: &[u8]) -> Vec<f32> {
    let words = bytes.chunks_exact(4);
    words
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect()
}

fn file(name: &str) -> Vec<u8> {
    let path = format!("{}/tests/formats/{name}.bin", env!("CARGO_MANIFEST_DIR"));
    std::fs::read(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

fn in_blocks() -> impl Iterator<Item = Format> {
    let all = Format::ALL.into_iter();
    all.filter(|f| f.dtype().is_none() && !f.scales_rows())
}

/// What torch gives: `s = x.abs().amax() / 127`, `q = torch.round(x / s)`.
#[test]
fn rows_of_bytes_are_those_of_torch() {
    let x = [0.5, -1.27, 0.015, 0.025, 0.0, 1.0, -0.005];
    let mut row = vec![9; 12];
    Format::Int8.quantize(&x, None, &mut row).unwrap();
    // 0.015 and 0.025 are 1.5 and 2.5 steps, -0.005 half of one.
    let codes: Vec<i8> = row[..8].iter().map(|c| c.cast_signed()).collect();
    assert_eq!(codes, [50, -127, 2, 2, 0, 100, 0, 0]);
    let s = 1.27f32 / 127.0;
    assert_eq!(row[8..], s.to_le_bytes());
    let mut back = vec![0.0; 7];
    Format::Int8.dequantize(&row, &mut back);
    assert_eq!(back[1].to_bits(), (-127.0 * s).to_bits());
    for (x, y) in x.iter().zip(&back) {
        assert!((x - y).abs() <= s / 2.0 * 1.001, "{x} {y}");
    }
    for size in [0.0, 1e-45, 1e-38, 1e-30, 1e6] {
        let mut row = vec![9; 12];
        Format::Int8.quantize(&[size; 7], None, &mut row).unwrap();
        Format::Int8.dequantize(&row, &mut back);
        assert!(
            back.iter()
                .all(|y| y.is_finite() && (y - size).abs() <= size * 1e-4 || size < 1e-44)
        );
    }
    assert!(
        Format::Int8
            .quantize(&[f32::NAN], None, &mut [0; 8])
            .is_err()
    );
    assert!(Format::Int8.quantize(&[1.0], None, &mut [0; 9]).is_err());
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn blocks_widen_to_the_bits_of_gguf_py() {
    for format in in_blocks() {
        let file = file(format.name());
        let size = format.row_bytes(COLUMNS).unwrap();
        let expected = f32s(&file[size..size + 4 * COLUMNS]);
        let mut found = vec![0.0; COLUMNS];
        format.dequantize(&file[..size], &mut found);
        assert_eq!(bits(&found), bits(&expected), "{format}");
    }
}

#[test]
fn rows_quantise_to_the_bits_of_ggml() {
    let rows = f32s(&file("rows"));
    let importance = &rows[ROWS * COLUMNS..];
    assert_eq!(importance.len(), COLUMNS);
    for format in in_blocks() {
        let file = file(format.name());
        let size = format.row_bytes(COLUMNS).unwrap();
        let quantised = &file[size + 4 * COLUMNS..];
        assert_eq!(quantised.len(), 2 * ROWS * size);
        for (i, row) in rows.chunks_exact(COLUMNS).take(ROWS).enumerate() {
            for (kind, importance) in [None, Some(importance)].into_iter().enumerate() {
                let expected = &quantised[(kind * ROWS + i) * size..][..size];
                let mut found = vec![0; size];
                format.quantize(row, importance, &mut found).unwrap();
                let bytes = format.block().bytes;
                for (b, (f, e)) in found.chunks(bytes).zip(expected.chunks(bytes)).enumerate() {
                    assert_eq!(f, e, "{format}, row {i}, kind {kind}, block {b}");
                }
            }
        }
    }
}

#[test]
fn rows_err_less_where_columns_count_more() {
    let rows = f32s(&file("rows"));
    let importance = &rows[ROWS * COLUMNS..];
    // Formats whose scale is the largest element's do not ask.
    for format in in_blocks().filter(|f| *f != Format::Q8_0) {
        let error = |given: Option<&[f32]>| -> f64 {
            let mut sum = 0.0;
            for row in rows.chunks_exact(COLUMNS).take(ROWS) {
                let mut to = vec![0; format.row_bytes(COLUMNS).unwrap()];
                format.quantize(row, given, &mut to).unwrap();
                let mut back = vec![0.0; COLUMNS];
                format.dequantize(&to, &mut back);
                let each = row.iter().zip(&back).zip(importance);
                sum += each
                    .map(|((x, y), w)| f64::from(w * (x - y).powi(2)))
                    .sum::<f64>();
            }
            sum
        };
        let (without, with) = (error(None), error(Some(importance)));
        assert!(with < without, "{format}: {with} with, {without} without");
    }
}

#[test]
fn what_blocks_cannot_hold_is_an_error_that_says_where() {
    for format in Format::ALL {
        let row = vec![0.5; 256];
        let mut to = vec![0; format.row_bytes(256).unwrap()];
        format.quantize(&row, None, &mut to).unwrap();
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut row = row.clone();
            row[77] = bad;
            let error = format.quantize(&row, None, &mut to).unwrap_err();
            assert!(error.to_string().contains("element 77"), "{error}");
        }
        assert!(format.quantize(&row, None, &mut to[1..]).is_err());
        assert!(format.quantize(&row, Some(&row[1..]), &mut to).is_err());
        let importance = vec![-1.0; 256];
        let error = format
            .quantize(&row, Some(&importance), &mut to)
            .unwrap_err();
        assert!(error.to_string().contains("column 0"), "{error}");
        let block = format.block().elements;
        if block > 1 {
            let row = vec![0.5; block + 1];
            assert!(format.quantize(&row, None, &mut to).is_err());
        }
        if !matches!(format, Format::F32 | Format::BF16) {
            let mut row = row.clone();
            row[200] = 1e30;
            let error = format.quantize(&row, None, &mut to).unwrap_err();
            assert!(error.to_string().contains("too large"), "{format}: {error}");
        }
    }
}

//! The part of a weight that a rank has, cut from the whole as it is stored.

use std::sync::Arc;

use strata_kernels::{Backend, Error, Format, HostTensor, Result, Tensor};
use strata_layers::{Cut, WeightSpec};

/// The bytes of a part. Whole blocks stay what they are, so that a part has the bits of the whole.
pub fn host(whole: &HostTensor, path: &str, spec: &WeightSpec) -> Result<HostTensor> {
    let format = whole.format();
    let [rows, cols] = spec.whole().shape[..] else {
        panic!("{path}: a matrix has two dimensions, not {:?}", spec.shape);
    };
    let whole = whole.reshape(&[rows, cols])?;
    let joined = |bytes: Vec<u8>| {
        let range = 0..bytes.len();
        HostTensor::new(format, &spec.shape, Arc::new(bytes), range)
    };
    match &spec.cut {
        None => Ok(whole),
        Some(Cut::Rows { take, .. }) => match &take[..] {
            [one] => whole.slice(one.clone()),
            several => {
                let mut bytes = Vec::new();
                for run in several {
                    bytes.extend_from_slice(whole.slice(run.clone())?.bytes());
                }
                joined(bytes)
            }
        },
        Some(Cut::Columns { of, take }) => {
            let block = format.block().elements;
            let cuts = [take.start, take.end];
            let whole_blocks = cuts.iter().all(|at| at % block == 0) && !format.scales_rows();
            let (true, Some(row), Some(first), Some(last)) = (
                whole_blocks,
                format.row_bytes(*of),
                format.row_bytes(take.start),
                format.row_bytes(take.end),
            ) else {
                let why = if format.scales_rows() {
                    format!("{format} has one scale for a whole row")
                } else {
                    format!("{format} has blocks of {block}")
                };
                return Err(Error::Value {
                    op: "load",
                    why: format!(
                        "{path}: columns {} to {} of {of} cannot be cut out, as {why}; use --parallel pipeline, or another format",
                        take.start, take.end
                    ),
                });
            };
            let rows = whole.bytes().chunks_exact(row.max(1));
            joined(rows.flat_map(|r| &r[first..last]).copied().collect())
        }
        Some(Cut::Zeros) => {
            let bytes = format.bytes_of(&spec.shape).unwrap_or(0);
            joined(vec![0; bytes])
        }
    }
}

/// The same of a weight that lies whole on a device, element by element.
pub fn device(whole: &Tensor, spec: &WeightSpec, on: &dyn Backend) -> Result<Tensor> {
    let (rows, cols) = (spec.shape[0], spec.shape[1]);
    let to = on.alloc(whole.dtype(), rows, cols)?;
    match &spec.cut {
        None => return Ok(whole.clone()),
        Some(Cut::Zeros) => {}
        Some(Cut::Columns { take, .. }) => {
            on.copy(&whole.columns(take.clone()), &mut to.row_range(0..rows))?;
        }
        Some(Cut::Rows { take, .. }) => {
            let mut first = 0;
            for run in take {
                let mut part = to.row_range(first..first + run.len());
                on.copy(&whole.row_range(run.clone()), &mut part)?;
                first += run.len();
            }
        }
    }
    Ok(to)
}

/// What zeros go by: all of a shape and format are one.
pub fn zeros(format: Format, spec: &WeightSpec) -> String {
    format!("zeros of {format} {:?}", spec.shape)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_have_the_bits_of_the_whole() {
        let values: Vec<f32> = (0..24).map(|i| i as f32).collect();
        let whole = HostTensor::from_f32(&[4, 6], &values).unwrap();
        let part = |shape: [usize; 2], cut: Cut| {
            let spec = WeightSpec {
                cut: Some(cut),
                ..WeightSpec::matrix("", shape[0], shape[1])
            };
            let found = host(&whole, "w", &spec).unwrap().to_f32();
            assert_eq!(found, spec.cut_from(values.clone()));
            found
        };
        let take = vec![3..4, 0..1];
        let rows = part([2, 6], Cut::Rows { of: 4, take });
        assert_eq!(rows[..2], [18.0, 19.0]);
        let columns = part([4, 2], Cut::Columns { of: 6, take: 1..3 });
        assert_eq!(columns, [1.0, 2.0, 7.0, 8.0, 13.0, 14.0, 19.0, 20.0]);
        assert_eq!(part([4, 6], Cut::Zeros), [0.0; 24]);
    }

    #[test]
    fn blocks_are_not_cut_in_two() {
        let bytes = Format::Q8_0.bytes_of(&[2, 64]).unwrap();
        let whole = HostTensor::new(Format::Q8_0, &[2, 64], Arc::new(vec![1; bytes]), 0..bytes);
        let whole = whole.unwrap();
        let part = |take: std::ops::Range<usize>| {
            let spec = WeightSpec {
                cut: Some(Cut::Columns {
                    of: 64,
                    take: take.clone(),
                }),
                ..WeightSpec::matrix("", 2, take.len())
            };
            host(&whole, "blocks.0.mlp.down", &spec)
        };
        assert_eq!(part(32..64).unwrap().bytes().len(), bytes / 2);
        let error = part(16..64).unwrap_err().to_string();
        assert!(
            error.contains("blocks.0.mlp.down") && error.contains("blocks of 32"),
            "{error}"
        );
    }
}

//! What a device can do at most, measured through the operations that models use.

use std::time::{Duration, Instant};

use strata_kernels::ops::Linear;
use strata_kernels::{Backend, DType, Matrix, Result, Tensor};

use super::model::Limits;

/// Elements of the tensors that are copied: a gigabyte each, which no cache holds.
const COPIED: usize = 256 << 20;
/// Rows, inputs and outputs of the product.
const SIDE: usize = 8192;
const TIMES: usize = 10;

/// Rates of a large copy, which reads and writes, and of a large product with inputs of type
/// `activations`. Takes three gigabytes of the device for a moment.
pub(super) fn measure(device: &dyn Backend, activations: DType) -> Result<Limits> {
    let from = device.alloc(DType::F32, 1, COPIED)?;
    let mut to = device.alloc(DType::F32, 1, COPIED)?;
    let copying = timed(device, &from.columns(0..1), || device.copy(&from, &mut to))?;
    drop((from, to));

    let mut x = device.alloc(DType::F32, SIDE, SIDE)?;
    device.fill_normal(&mut x, 1, 1.0)?;
    let mut w = device.alloc(activations, SIDE, SIDE)?;
    device.fill_normal(&mut w, 2, 1.0)?;
    let (w, mut y) = (Matrix::dense(w), device.alloc(DType::F32, SIDE, SIDE)?);
    let first = y.row_range(0..1).columns(0..1);
    let product = || {
        device.linear(Linear {
            x: &x,
            w: &w,
            bias: None,
            activations,
            y: &mut y,
        })
    };
    let multiplying = timed(device, &first, product)?;
    Ok(Limits {
        bytes_per_second: 2.0 * 4.0 * COPIED as f64 / copying.as_secs_f64(),
        flops_per_second: 2.0 * (SIDE as f64).powi(3) / multiplying.as_secs_f64(),
    })
}

/// The time of one run of `work`, the mean of some after one that is not counted. Reading `probe` waits
/// for the device.
fn timed(
    device: &dyn Backend,
    probe: &Tensor,
    mut work: impl FnMut() -> Result<()>,
) -> Result<Duration> {
    let wait = || device.read(probe, &mut [0.0]);
    work()?;
    wait()?;
    let start = Instant::now();
    for _ in 0..TIMES {
        work()?;
    }
    wait()?;
    Ok(start.elapsed() / TIMES as u32)
}

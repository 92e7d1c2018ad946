//! Matrices to block formats, on several threads.

use std::sync::{Arc, Mutex, PoisonError};

use strata_kernels::{Format, HostTensor, Result};

/// A matrix of (rows, columns) in `format`; `importance` says how much each column counts. `read` gives a row; it is asked for each once, by any of
/// `threads` threads. Fails where a row is no whole blocks or holds what the format cannot.
pub fn quantize(
    format: Format,
    (rows, cols): (usize, usize),
    importance: Option<&[f32]>,
    threads: usize,
    read: impl Fn(usize, &mut [f32]) -> Result<()> + Sync,
) -> Result<HostTensor> {
    let row = format.row_bytes(cols).unwrap_or(0);
    let mut bytes = vec![0u8; rows * row];
    let each = rows.div_ceil(threads.max(1)).max(1);
    let failed = Mutex::new(None);
    std::thread::scope(|scope| {
        for (part, bytes) in bytes.chunks_mut((each * row).max(1)).enumerate() {
            let (read, failed) = (&read, &failed);
            scope.spawn(move || {
                let mut values = vec![0.0; cols];
                for (r, to) in bytes.chunks_mut(row.max(1)).enumerate() {
                    let done = read(part * each + r, &mut values)
                        .and_then(|()| format.quantize(&values, importance, to));
                    if let Err(error) = done {
                        let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                        failed.get_or_insert(error);
                        return;
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap_or_else(PoisonError::into_inner);
    match failed {
        Some(error) => Err(error),
        None => {
            let range = 0..bytes.len();
            HostTensor::new(format, &[rows, cols], Arc::new(bytes), range)
        }
    }
}

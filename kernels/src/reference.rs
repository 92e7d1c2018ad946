//! The backend that defines every result: plain loops in f32 on one thread. A whole model can run on
//! it, which is the first thing to try when numbers differ.

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::ops::{
    Activate, Add, Attention, Combine, Conv1d, Embed, ExpertLinear, Gather, KvWrite, LayerNorm,
    Likeliest, Linear, Mamba3Scan, RmsNorm, Rope, Route, S4dScan, Scale, SelectiveScan, SsdChunked,
    SsdScan,
    linear::{read_row, write_row},
};
use crate::random;
use crate::tensor::{DType, HostTensor, Tensor};

/// The reference backend.
#[derive(Debug, Default)]
pub struct Reference;

/// Runs the checks, then the plain loops.
macro_rules! by_reference {
    ($($op:ident: $args:ident),* $(,)?) => {
        $(fn $op(&self, mut op: $args<'_>) -> Result<()> {
            op.check()?;
            op.reference();
            Ok(())
        })*
    };
}

impl Backend for Reference {
    fn name(&self) -> &'static str {
        "reference"
    }

    fn alloc(&self, dtype: DType, rows: usize, cols: usize) -> Result<Tensor> {
        Tensor::host(dtype, rows, cols)
    }

    fn upload(&self, from: &HostTensor, rows: usize, cols: usize) -> Result<Tensor> {
        upload(from, rows, cols)
    }

    fn read(&self, from: &Tensor, to: &mut [f32]) -> Result<()> {
        read(from, to)
    }

    fn write(&self, from: &[f32], to: &mut Tensor) -> Result<()> {
        write(from, to)
    }

    fn copy(&self, from: &Tensor, to: &mut Tensor) -> Result<()> {
        copy(from, to)
    }

    fn clear(&self, tensor: &mut Tensor) -> Result<()> {
        clear(tensor)
    }

    fn fill_normal(&self, tensor: &mut Tensor, seed: u64, std: f32) -> Result<()> {
        for r in 0..tensor.rows() {
            let row = random::normal_row(seed, r, tensor.cols(), std);
            write_row(tensor, r, 0, &row);
        }
        Ok(())
    }

    by_reference! {
        linear: Linear, embed: Embed, gather: Gather, rms_norm: RmsNorm, layer_norm: LayerNorm,
        add: Add, scale: Scale, activate: Activate, conv1d: Conv1d, selective_scan: SelectiveScan,
        ssd_scan: SsdScan, ssd_chunked: SsdChunked, mamba3_scan: Mamba3Scan, s4d_scan: S4dScan, rope: Rope,
        kv_write: KvWrite, attention: Attention, route: Route, expert_linear: ExpertLinear,
        combine: Combine, likeliest: Likeliest,
    }
}

/// A weight in host memory: a view where the address allows it, else a copy.
pub(crate) fn upload(from: &HostTensor, rows: usize, cols: usize) -> Result<Tensor> {
    let whole = from
        .format()
        .row_bytes(cols)
        .and_then(|b| b.checked_mul(rows));
    if rows.checked_mul(cols) != Some(from.len()) || whole != Some(from.bytes().len()) {
        return Err(Error::Shape {
            op: "upload",
            what: "elements",
            found: from.len(),
            expected: rows * cols,
        });
    }
    if let Some(view) = Tensor::borrowed(from, rows) {
        return Ok(view);
    }
    // Blocks are bytes, and those are always aligned.
    let dtype = from.format().dtype().unwrap_or(DType::U8);
    let mut copy = Tensor::host(dtype, rows, cols)?;
    write(&from.to_f32(), &mut copy)?;
    Ok(copy)
}

pub(crate) fn read(from: &Tensor, to: &mut [f32]) -> Result<()> {
    let expected = from.rows() * from.cols();
    if to.len() != expected {
        return Err(Error::Shape {
            op: "read",
            what: "elements",
            found: to.len(),
            expected,
        });
    }
    for r in 0..from.rows() {
        read_row(from, r, &mut to[r * from.cols()..][..from.cols()]);
    }
    Ok(())
}

pub(crate) fn write(from: &[f32], to: &mut Tensor) -> Result<()> {
    let expected = to.rows() * to.cols();
    if from.len() != expected {
        return Err(Error::Shape {
            op: "write",
            what: "elements",
            found: from.len(),
            expected,
        });
    }
    for r in 0..to.rows() {
        write_row(to, r, 0, &from[r * to.cols()..][..to.cols()]);
    }
    Ok(())
}

/// Shapes, types and overlaps of a copy.
pub(crate) fn check_copy(from: &Tensor, to: &Tensor) -> Result<()> {
    let c = crate::ops::Check("copy");
    c.equal("rows", to.rows(), from.rows())?;
    c.equal("columns", to.cols(), from.cols())?;
    c.is("target", to, from.dtype())?;
    c.apart("target", to, &[from])
}

pub(crate) fn copy(from: &Tensor, to: &mut Tensor) -> Result<()> {
    check_copy(from, to)?;
    let mut row = vec![0.0; from.cols()];
    for r in 0..from.rows() {
        // Widening and rounding back is exact, also for I32 up to 2²⁴, which expert numbers are.
        read_row(from, r, &mut row);
        write_row(to, r, 0, &row);
    }
    Ok(())
}

pub(crate) fn clear(tensor: &mut Tensor) -> Result<()> {
    let zeros = vec![0.0; tensor.cols()];
    for r in 0..tensor.rows() {
        write_row(tensor, r, 0, &zeros);
    }
    Ok(())
}

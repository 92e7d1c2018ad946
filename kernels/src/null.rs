//! The backend that computes nothing and counts bytes: for scheduler tests, and to learn what a plan
//! will allocate before anything is.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::backend::Backend;
use crate::error::Result;
use crate::ops::{
    Activate, Add, Attention, Combine, Conv1d, Embed, ExpertLinear, Gather, KvWrite, LayerNorm,
    Likeliest, Linear, Mamba3Scan, RmsNorm, Rope, Route, S4dScan, Scale, SelectiveScan, SsdChunked,
    SsdScan,
};
use crate::tensor::{DType, HostTensor, Tensor};

/// A backend without memory. Shapes are checked as everywhere.
#[derive(Debug, Default)]
pub struct Null {
    allocated: AtomicUsize,
}

impl Null {
    /// Bytes asked for so far.
    pub fn allocated(&self) -> usize {
        self.allocated.load(Ordering::Relaxed)
    }
}

macro_rules! check_only {
    ($($op:ident: $args:ident),* $(,)?) => {
        $(fn $op(&self, op: $args<'_>) -> Result<()> {
            op.check()
        })*
    };
}

impl Backend for Null {
    fn name(&self) -> &'static str {
        "null"
    }

    fn alloc(&self, dtype: DType, rows: usize, cols: usize) -> Result<Tensor> {
        let tensor = Tensor::null(dtype, rows, cols);
        self.allocated.fetch_add(tensor.bytes(), Ordering::Relaxed);
        Ok(tensor)
    }

    fn upload(&self, from: &HostTensor, rows: usize, cols: usize) -> Result<Tensor> {
        let dtype = from.format().dtype().unwrap_or(DType::U8);
        let row = from.format().row_bytes(cols).unwrap_or(0) / dtype.size();
        Ok(Tensor::null(dtype, rows, row))
    }

    fn read(&self, _from: &Tensor, to: &mut [f32]) -> Result<()> {
        to.fill(0.0);
        Ok(())
    }

    fn write(&self, _from: &[f32], _to: &mut Tensor) -> Result<()> {
        Ok(())
    }

    fn copy(&self, _from: &Tensor, _to: &mut Tensor) -> Result<()> {
        Ok(())
    }

    fn clear(&self, _tensor: &mut Tensor) -> Result<()> {
        Ok(())
    }

    fn fill_normal(&self, _tensor: &mut Tensor, _seed: u64, _std: f32) -> Result<()> {
        Ok(())
    }

    check_only! {
        linear: Linear, embed: Embed, gather: Gather, rms_norm: RmsNorm, layer_norm: LayerNorm,
        add: Add, scale: Scale, activate: Activate, conv1d: Conv1d, selective_scan: SelectiveScan,
        ssd_scan: SsdScan, ssd_chunked: SsdChunked, mamba3_scan: Mamba3Scan, s4d_scan: S4dScan, rope: Rope,
        kv_write: KvWrite, attention: Attention, route: Route, expert_linear: ExpertLinear,
        combine: Combine, likeliest: Likeliest,
    }
}

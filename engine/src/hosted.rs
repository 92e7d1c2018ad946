//! Experts in the host's memory, the rest of a model on a device.
//!
//! Matrices of which each token meets a few are read where they lie, in mapped files, by the CPU; inputs of their products
//! go there and results come back. So a step is not recorded: it waits for the host in every layer of experts.

use std::collections::HashSet;
use std::sync::Arc;

use strata_kernels::ops::{
    Activate, Add, Attention, Combine, Conv1d, Embed, ExpertLinear, Gather, KvWrite, LayerNorm,
    Likeliest, Linear, Mamba3Scan, RmsNorm, Rope, Route, S4dScan, Scale, SelectiveScan, SsdChunked,
    SsdScan,
};
use strata_kernels::{Backend, DType, Format, HostTensor, Matrix, Result, Tensor};
use strata_layers::{WeightSource, WeightSpec};

/// A device whose experts are the host's.
pub struct Hosted {
    device: Arc<dyn Backend>,
    host: Arc<dyn Backend>,
}

impl Hosted {
    /// Products of experts on `host`, all else on `device`.
    pub fn new(device: Arc<dyn Backend>, host: Arc<dyn Backend>) -> Self {
        Hosted { device, host }
    }
}

/// Operations that are the device's.
macro_rules! hand_on {
    ($($name:ident: $op:ident),* $(,)?) => {
        $(
            fn $name(&self, op: $op<'_>) -> Result<()> {
                self.device.$name(op)
            }
        )*
    };
}

impl Backend for Hosted {
    fn name(&self) -> &'static str {
        self.device.name()
    }

    fn tolerance(&self, activations: DType, format: Format) -> f32 {
        self.device.tolerance(activations, format)
    }

    fn prompt_rows(&self) -> usize {
        self.device.prompt_rows()
    }

    fn alloc(&self, dtype: DType, rows: usize, cols: usize) -> Result<Tensor> {
        self.device.alloc(dtype, rows, cols)
    }

    fn upload(&self, from: &HostTensor, rows: usize, cols: usize) -> Result<Tensor> {
        self.device.upload(from, rows, cols)
    }

    fn read(&self, from: &Tensor, to: &mut [f32]) -> Result<()> {
        self.device.read(from, to)
    }

    fn read_rows(
        &self,
        from: &Tensor,
        room: &mut [f32],
        row: &mut dyn FnMut(usize, &mut [f32]),
    ) -> Result<()> {
        self.device.read_rows(from, room, row)
    }

    fn write(&self, from: &[f32], to: &mut Tensor) -> Result<()> {
        self.device.write(from, to)
    }

    fn copy(&self, from: &Tensor, to: &mut Tensor) -> Result<()> {
        self.device.copy(from, to)
    }

    fn receive(&self, from: &Tensor, of: &dyn Backend, to: &mut Tensor) -> Result<()> {
        self.device.receive(from, of, to)
    }

    fn memory(&self) -> Result<Option<(u64, u64)>> {
        self.device.memory()
    }

    fn clear(&self, tensor: &mut Tensor) -> Result<()> {
        self.device.clear(tensor)
    }

    fn fill_normal(&self, tensor: &mut Tensor, seed: u64, std: f32) -> Result<()> {
        self.device.fill_normal(tensor, seed, std)
    }

    fn expert_linear(&self, op: ExpertLinear<'_>) -> Result<()> {
        op.check()?;
        let (host, device) = (&*self.host, &*self.device);
        let mut x = host.alloc(DType::F32, op.x.rows(), op.x.cols())?;
        host.receive(op.x, device, &mut x)?;
        let mut experts = host.alloc(DType::I32, op.experts.rows(), op.experts.cols())?;
        host.receive(op.experts, device, &mut experts)?;
        let mut y = host.alloc(DType::F32, op.y.rows(), op.y.cols())?;
        host.expert_linear(ExpertLinear {
            x: &x,
            w: op.w,
            experts: &experts,
            activations: op.activations,
            y: &mut y,
        })?;
        device.receive(&y, host, op.y)
    }

    hand_on! {
        linear: Linear, embed: Embed, gather: Gather, rms_norm: RmsNorm, layer_norm: LayerNorm, add: Add,
        scale: Scale, activate: Activate, conv1d: Conv1d, selective_scan: SelectiveScan, ssd_scan: SsdScan,
        ssd_chunked: SsdChunked, mamba3_scan: Mamba3Scan, s4d_scan: S4dScan, rope: Rope, kv_write: KvWrite,
        attention: Attention, route: Route, combine: Combine, likeliest: Likeliest,
    }
}

/// Weights of which some are the host's.
pub struct HostedWeights<'a> {
    /// The paths of those.
    pub paths: &'a HashSet<String>,
    /// Where they come from.
    pub host: Box<dyn WeightSource + 'a>,
    /// Where the others come from.
    pub device: Box<dyn WeightSource + 'a>,
}

impl HostedWeights<'_> {
    fn of(&self, path: &str) -> &dyn WeightSource {
        match self.paths.contains(path) {
            true => &*self.host,
            false => &*self.device,
        }
    }
}

impl WeightSource for HostedWeights<'_> {
    fn matrix(&self, path: &str, spec: &WeightSpec) -> Result<Matrix> {
        self.of(path).matrix(path, spec)
    }

    fn vector(&self, path: &str, spec: &WeightSpec) -> Result<Vec<f32>> {
        self.of(path).vector(path, spec)
    }
}

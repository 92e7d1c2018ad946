//! The fast CPU backend.
//!
//! Every kernel is written once over `simd::Simd` and runs on the widest instruction set that the
//! machine has. What a row of a batch comes out as depends on that row alone, to the bit: not on the
//! rows beside it, on how its sequence is cut into chunks, on page numbers or on the number of
//! threads. Instruction sets may differ from each other.
//!
//! Nothing is allocated once scratch memory has grown to what a model's operations need.

mod activate;
mod add;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod blocks;
mod bytes;
mod conv1d;
mod direct;
mod direct_codes;
mod dot;
mod elementwise;
mod embed;
mod expert_linear;
mod fp8;
mod gather;
mod int8;
mod kept;
mod kv_write;
mod layer_norm;
mod likeliest;
mod limits;
mod linear;
mod mamba3_scan;
mod math;
mod memory;
mod pool;
mod portable;
mod rms_norm;
mod rope;
mod route;
mod s4d_scan;
mod scale;
mod scratch;
mod selective_scan;
mod simd;
mod ssd_chunked;
mod ssd_scan;
mod ssd_tiles;
#[cfg(target_arch = "x86_64")]
mod ymm;

use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};

pub use limits::{Limits, measure};
pub use simd::Isa;

use self::pool::Pool;
use self::scratch::Scratch;
use crate::backend::Backend;
use crate::error::Result;
use crate::ops::{
    Activate, Add, Attention, Combine, Conv1d, Embed, ExpertLinear, Gather, KvWrite, LayerNorm,
    Likeliest, Linear, Mamba3Scan, RmsNorm, Rope, Route, S4dScan, Scale, SelectiveScan, SsdChunked,
    SsdScan,
};
use crate::reference;
use crate::tensor::{DType, HostTensor, Tensor};

/// How the backend is set up. The default is right for a machine that is ours.
#[derive(Debug, Clone, Copy, Default)]
pub struct CpuOptions {
    /// Number of threads, the caller's among them; zero takes as many as the process may run on.
    pub threads: usize,
    /// The widest instruction set to use; none takes the widest of the machine. One that the
    /// machine lacks is a ceiling like any other: [`Cpu::features`] says what runs.
    pub isa: Option<Isa>,
}

/// The fast CPU backend.
pub struct Cpu {
    isa: Isa,
    pool: Pool,
    /// Scratch that all threads read: copies of inputs, lists. Held for one operation.
    shared: Mutex<Scratch>,
    /// The same for lists of choices, whose length is known before that of the copies.
    lists: Mutex<Scratch>,
}

/// Elements of a light operation that are worth a thread: fewer are done before it has started.
const GRAIN: usize = 16 * 1024;

impl Cpu {
    /// A backend with threads of its own, which end with it.
    pub fn new(options: CpuOptions) -> Cpu {
        let threads = match options.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from),
            n => n,
        };
        Cpu {
            isa: Isa::best(options.isa),
            pool: Pool::new(threads),
            shared: Mutex::default(),
            lists: Mutex::default(),
        }
    }

    /// Number of threads that share an operation.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// The instruction set in use: `avx512bf16`, `avx512`, `avx2` or `portable`.
    pub fn features(&self) -> &'static str {
        self.isa.name()
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.isa
    }

    fn pool(&self) -> &Pool {
        &self.pool
    }

    fn shared(&self) -> MutexGuard<'_, Scratch> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lists(&self) -> MutexGuard<'_, Scratch> {
        self.lists.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shares out `rows` whose work is like that on `cost` elements each.
    fn for_rows(&self, rows: usize, cost: usize, f: impl Fn(Range<usize>, &mut Scratch) + Sync) {
        let height = GRAIN
            .div_ceil(cost.max(1))
            .max(rows.div_ceil(4 * self.threads()));
        let height = height.max(1);
        self.pool.run(rows.div_ceil(height), |part, scratch| {
            f(part * height..((part + 1) * height).min(rows), scratch);
        });
    }

    /// Shares out columns, whose work is like that on `cost` elements each, in multiples of the
    /// widest vector: which columns make a shorter vector does not depend on it.
    fn for_columns(
        &self,
        columns: usize,
        cost: usize,
        f: impl Fn(Range<usize>, &mut Scratch) + Sync,
    ) {
        const UNIT: usize = 64;
        let width = GRAIN
            .div_ceil(cost.max(1))
            .max(columns.div_ceil(4 * self.threads()));
        let width = width.next_multiple_of(UNIT);
        self.pool.run(columns.div_ceil(width), |part, scratch| {
            f(part * width..((part + 1) * width).min(columns), scratch);
        });
    }
}

impl std::fmt::Debug for Cpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cpu({}, {} threads)", self.features(), self.threads())
    }
}

/// Runs the checks, then the kernel.
macro_rules! checked {
    ($($op:ident, $run:ident: $args:ident),* $(,)?) => {
        $(fn $op(&self, op: $args<'_>) -> Result<()> {
            op.check()?;
            self.$run(op);
            Ok(())
        })*
    };
}

impl Backend for Cpu {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn alloc(&self, dtype: DType, rows: usize, cols: usize) -> Result<Tensor> {
        Tensor::host(dtype, rows, cols)
    }

    fn upload(&self, from: &HostTensor, rows: usize, cols: usize) -> Result<Tensor> {
        reference::upload(from, rows, cols)
    }

    fn read(&self, from: &Tensor, to: &mut [f32]) -> Result<()> {
        reference::read(from, to)
    }

    fn write(&self, from: &[f32], to: &mut Tensor) -> Result<()> {
        reference::write(from, to)
    }

    fn copy(&self, from: &Tensor, to: &mut Tensor) -> Result<()> {
        reference::check_copy(from, to)?;
        self.do_copy(from, to);
        Ok(())
    }

    fn receive(&self, from: &Tensor, of: &dyn Backend, to: &mut Tensor) -> Result<()> {
        if from.device_address().is_none() {
            return self.copy(from, to);
        }
        let mut room = vec![0.0; from.rows() * from.cols()];
        of.read(from, &mut room)?;
        self.write(&room, to)
    }

    fn clear(&self, tensor: &mut Tensor) -> Result<()> {
        self.do_clear(tensor);
        Ok(())
    }

    fn fill_normal(&self, tensor: &mut Tensor, seed: u64, std: f32) -> Result<()> {
        crate::ops::Check("fill_normal").drawn(tensor)?;
        self.do_fill_normal(tensor, seed, std);
        Ok(())
    }

    checked! {
        linear, do_linear: Linear, embed, do_embed: Embed, gather, do_gather: Gather,
        rms_norm, do_rms_norm: RmsNorm, layer_norm, do_layer_norm: LayerNorm,
        add, do_add: Add, scale, do_scale: Scale,
        activate, do_activate: Activate, conv1d, do_conv1d: Conv1d,
        selective_scan, do_selective_scan: SelectiveScan, ssd_scan, do_ssd_scan: SsdScan,
        ssd_chunked, do_ssd_chunked: SsdChunked,
        mamba3_scan, do_mamba3_scan: Mamba3Scan, s4d_scan, do_s4d_scan: S4dScan, rope, do_rope: Rope,
        kv_write, do_kv_write: KvWrite, attention, do_attention: Attention, route, do_route: Route,
        expert_linear, do_expert_linear: ExpertLinear, combine, do_combine: Combine,
        likeliest, do_likeliest: Likeliest,
    }
}

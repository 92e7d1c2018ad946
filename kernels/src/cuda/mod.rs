//! NVIDIA GPUs.
//!
//! Driver and libraries are loaded when the backend is made, so that one binary runs with a GPU and
//! without; kernels are CUDA C++ (`kernels/`), compiled for the GPU at hand. All work goes to one
//! stream in the order of the calls, and only reading waits for it.
//!
//! Sums are f32. A row's result depends on the rows beside it in its last bits: single rows and large
//! batches are multiplied in different orders. `tolerance` says how far that may go. Scans, by
//! chunks too, norms and convolutions are the same bits for any cut of a sequence, as on the CPU; but for
//! Mamba-2's scan of prompts where matrix units take it (`ssd_hopper`).

mod attention;
mod block_units;
mod blocks;
mod compile;
mod device;
mod experts;
mod fp8;
mod int8;
mod linear;
mod lists;
mod locate;
mod matmul;
mod recording;
mod row;
mod row_blocks;
mod rows;
mod sequences;
mod ssd_chunked;
mod ssd_hopper;
mod transfer;

use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

pub use compile::{Compiled, KernelCache, UNITS, Unit, compile};

use cudarc::driver::result;
use cudarc::driver::sys::{CUevent, CUevent_flags_enum};

use self::device::{Allocation, Device, Param, Pinned, failed};
use self::lists::Lists;
use self::matmul::Matmul;
use self::recording::Recordings;
use self::row::Waiting;
use crate::backend::{Backend, Repeat};
use crate::error::{Error, Result};
use crate::format::Format;
use crate::matrix::Matrix;
use crate::ops::{
    Activate, Add, Attention, Combine, Conv1d, Embed, ExpertLinear, Gather, KvWrite, LayerNorm,
    Likeliest, Linear, Mamba3Scan, RmsNorm, Rope, Route, S4dScan, Scale, SelectiveScan, SsdChunked,
    SsdScan,
};
use crate::tensor::{DType, HostTensor, Tensor};

/// How the backend is set up.
#[derive(Clone, Default)]
pub struct CudaOptions {
    /// Which GPU, counted from 0 as the driver does.
    pub ordinal: usize,
    /// Folders that may hold NVIDIA's libraries, beside where the system's loader looks.
    pub libraries: Vec<PathBuf>,
    /// Where compiled kernels are kept; none compiles them each time.
    pub cache: Option<Arc<dyn KernelCache>>,
}

/// One GPU.
pub struct Cuda {
    device: Arc<Device>,
    state: Mutex<State>,
    /// Told when a recording has ended.
    recorded: Condvar,
}

/// What operations share. They run one at a time.
struct State {
    device: Arc<Device>,
    lists: Lists,
    /// Through which results come back.
    staging: Pinned,
    /// Through which weights go in, from the first large one on.
    loading: Option<Pinned>,
    /// Of either half of it, whether what was last sent there has arrived.
    arrived: [CUevent; 2],
    libraries: Vec<PathBuf>,
    /// Loaded with the first product that is for matrix units.
    matmul: Option<Matmul>,
    /// Memory for one operation: it grows to the largest ask and stays.
    scratch: Option<Allocation>,
    /// Addresses of experts' matrices, by layer and projection.
    experts: experts::Tables,
    recordings: Recordings,
    /// Products that wait for what follows them, while a step is recorded.
    waiting: Waiting,
    norms: rows::WaitingNorms,
    /// What lies rounded in `scratch`, for as long as nothing but products comes.
    rounded: Option<linear::Rounded>,
}

// SAFETY: events may be used from any thread; everything else may by itself.
unsafe impl Send for State {}

impl Drop for State {
    fn drop(&mut self) {
        if self.device.enter().is_ok() {
            for event in self.arrived {
                // SAFETY: made with the state, destroyed once.
                let _ = unsafe { result::event::destroy(event) };
            }
        }
    }
}

/// An error of this backend.
fn fault(why: String) -> Error {
    Error::Device {
        backend: "cuda",
        why,
    }
}

/// Loads the compiler of kernels, for [`compile`], which needs no GPU.
pub fn load_compiler(libraries: &[PathBuf]) -> Result<()> {
    locate::compiler(libraries)
}

const STAGING: usize = 4 << 20;

impl Cuda {
    /// Opens a GPU. What is missing or too old is one clear error.
    pub fn new(options: CudaOptions) -> Result<Self> {
        locate::driver()?;
        locate::compiler(&options.libraries)?;
        let device = Arc::new(Device::open(options.ordinal, options.cache.as_ref())?);
        let flag = CUevent_flags_enum::CU_EVENT_DISABLE_TIMING;
        let event = || result::event::create(flag).map_err(failed("making an event"));
        let state = State {
            lists: Lists::new(&device)?,
            staging: Pinned::new(&device, STAGING)?,
            loading: None,
            arrived: [event()?, event()?],
            libraries: options.libraries,
            matmul: None,
            scratch: None,
            experts: experts::Tables::default(),
            recordings: Recordings::default(),
            waiting: Waiting::None,
            norms: rows::WaitingNorms::default(),
            rounded: None,
            device: device.clone(),
        };
        Ok(Cuda {
            device,
            state: Mutex::new(state),
            recorded: Condvar::new(),
        })
    }

    /// What the GPU calls itself.
    pub fn gpu(&self) -> &str {
        &self.device.name
    }

    /// Waits until all operations are done.
    pub fn synchronize(&self) -> Result<()> {
        self.enter()?.device.synchronize()
    }

    fn enter(&self) -> Result<MutexGuard<'_, State>> {
        let mut state = self.enter_open()?;
        state.flush()?;
        state.rounded = None;
        Ok(state)
    }

    /// As `enter`, for operations that may be done with products that wait.
    fn enter_open(&self) -> Result<MutexGuard<'_, State>> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.recordings.keep_out() {
            let waited = self.recorded.wait(state);
            state = waited.unwrap_or_else(PoisonError::into_inner);
        }
        state.device.enter()?;
        Ok(state)
    }
}

impl std::fmt::Debug for Cuda {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Cuda({})", self.device.name)
    }
}

impl State {
    /// `bytes` of memory for this operation.
    fn scratch(&mut self, bytes: usize) -> Result<u64> {
        if let Some(scratch) = self.scratch.as_ref().filter(|s| s.bytes >= bytes) {
            return Ok(scratch.pointer);
        }
        // The old one goes first, in the order of the stream, and with it what was recorded on it.
        self.recordings.forget();
        self.scratch = None;
        let new = Allocation::new(&self.device, bytes.next_power_of_two())?;
        Ok(self.scratch.insert(new).pointer)
    }
}

/// Where a tensor's elements lie. Fails for one of another backend.
fn address(of: &Tensor) -> Result<u64> {
    of.device_address()
        .ok_or_else(|| fault(format!("{of:?} is not in the GPU's memory")))
}

fn optional(of: Option<&Tensor>) -> Result<u64> {
    of.map_or(Ok(0), address)
}

/// Rows of a tensor, as kernels take them.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C)]
struct Rows {
    pointer: u64,
    stride: i64,
}

// SAFETY: `Rows` in common.cuh.
unsafe impl Param for Rows {}

impl Rows {
    /// Of no tensor.
    const NONE: Rows = Rows {
        pointer: 0,
        stride: 0,
    };

    fn of(tensor: &Tensor) -> Result<Self> {
        Ok(Rows {
            pointer: address(tensor)?,
            stride: tensor.stride() as i64,
        })
    }

    fn optional(tensor: Option<&Tensor>) -> Result<Self> {
        tensor.map_or(Ok(Rows::NONE), Rows::of)
    }

    /// Whether four neighbours can be read at once.
    fn wide(&self) -> bool {
        self.pointer.is_multiple_of(16) && self.stride % 4 == 0
    }
}

/// The number of an element type: `Type` in common.cuh.
fn code(dtype: DType) -> i32 {
    match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::BF16 => 2,
        DType::I32 => 3,
        DType::U8 => 4,
    }
}

/// Refuses a weight in blocks that no kernel here reads.
fn dense(op: &'static str, matrix: &Matrix) -> Result<()> {
    if matrix.format().dtype().is_some() {
        return Ok(());
    }
    Err(Error::Unsupported {
        op,
        backend: "cuda",
        why: format!(
            "the weight is stored as {}; load the model with --dtype bf16, or use --device cpu",
            matrix.format()
        ),
    })
}

/// Runs the checks, then the kernels.
macro_rules! checked {
    ($($op:ident: $args:ident),* $(,)?) => {
        $(fn $op(&self, op: $args<'_>) -> Result<()> {
            op.check()?;
            self.enter()?.$op(op)
        })*
    };
}

impl Backend for Cuda {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn alloc(&self, dtype: DType, rows: usize, cols: usize) -> Result<Tensor> {
        self.enter()?.alloc(dtype, rows, cols)
    }

    fn upload(&self, from: &HostTensor, rows: usize, cols: usize) -> Result<Tensor> {
        self.enter()?.upload(from, rows, cols)
    }

    fn read(&self, from: &Tensor, to: &mut [f32]) -> Result<()> {
        self.enter()?.read(from, to)
    }

    fn read_rows(
        &self,
        from: &Tensor,
        room: &mut [f32],
        row: &mut dyn FnMut(usize, &mut [f32]),
    ) -> Result<()> {
        self.enter()?.read_rows(from, room, row)
    }

    fn write(&self, from: &[f32], to: &mut Tensor) -> Result<()> {
        self.enter()?.write(from, to)
    }

    fn copy(&self, from: &Tensor, to: &mut Tensor) -> Result<()> {
        crate::reference::check_copy(from, to)?;
        self.enter()?.copy(from, to)
    }

    fn receive(&self, from: &Tensor, of: &dyn Backend, to: &mut Tensor) -> Result<()> {
        crate::reference::check_copy(from, to)?;
        if self.enter()?.receive(from, to)? {
            return Ok(());
        }
        let mut room = vec![0.0; from.rows() * from.cols()];
        of.read(from, &mut room)?;
        self.write(&room, to)
    }

    fn memory(&self) -> Result<Option<(u64, u64)>> {
        let (free, total) = self.device.memory()?;
        Ok(Some((free as u64, total as u64)))
    }

    fn clear(&self, tensor: &mut Tensor) -> Result<()> {
        self.enter()?.clear(tensor)
    }

    fn fill_normal(&self, tensor: &mut Tensor, seed: u64, std: f32) -> Result<()> {
        self.enter()?.fill_normal(tensor, seed, std)
    }

    fn tolerance(&self, activations: DType, format: Format) -> f32 {
        match (activations, format.dtype()) {
            // An input of a product may round to the other side; where there is a router, it may choose
            // another of two experts nearly as good.
            (DType::BF16, Some(_)) => 0.4,
            (DType::BF16, None) if !format.rounds_inputs() => 0.4,
            // Of integers, too, in blocks of 32 and of 256: as far as their rounding itself moves logits.
            (DType::BF16, None) if format.block().elements == 32 => 0.6,
            (DType::BF16, None) => 1.2,
            _ => 1e-3,
        }
    }

    fn prompt_rows(&self) -> usize {
        4096
    }

    fn repeat(&self, step: &Repeat<'_>, operations: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        self.run_or_repeat(step, operations)
    }

    fn linear(&self, op: Linear<'_>) -> Result<()> {
        op.check()?;
        self.enter_open()?.linear(op)
    }

    fn add(&self, op: Add<'_>) -> Result<()> {
        op.check()?;
        self.enter_open()?.add(op)
    }

    fn activate(&self, op: Activate<'_>) -> Result<()> {
        op.check()?;
        self.enter_open()?.activate(op)
    }

    fn conv1d(&self, op: Conv1d<'_>) -> Result<()> {
        op.check()?;
        self.enter_open()?.conv1d(op)
    }

    fn selective_scan(&self, op: SelectiveScan<'_>) -> Result<()> {
        op.check()?;
        self.enter_open()?.selective_scan(op)
    }

    fn rms_norm(&self, op: RmsNorm<'_>) -> Result<()> {
        op.check()?;
        let mut state = self.enter_open()?;
        state.rounded = None;
        state.rms_norm(op)
    }

    checked! {
        embed: Embed, gather: Gather, layer_norm: LayerNorm,
        scale: Scale,
        ssd_scan: SsdScan, ssd_chunked: SsdChunked, mamba3_scan: Mamba3Scan, s4d_scan: S4dScan, rope: Rope,
        kv_write: KvWrite, attention: Attention, route: Route, expert_linear: ExpertLinear,
        combine: Combine, likeliest: Likeliest,
    }
}

//! One GPU: its context, its stream, its memory and its kernels. All work goes to one stream, so that
//! operations run in the order they are called.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{
    self, CUcontext, CUdeviceptr, CUevent_flags_enum, CUfunction, CUgraphExec, CUresult, CUstream,
};

use super::compile::{KernelCache, UNITS, compile_all};
use super::fault;
use crate::device_memory::DeviceMemory;
use crate::error::{Error, Result};

/// A failed call of the driver, in words. The driver has been loaded by then.
pub(super) fn failed(what: &str) -> impl Fn(DriverError) -> Error + '_ {
    move |error| {
        let why = error.error_string().ok();
        let why = why.map_or_else(String::new, |s| format!(": {}", s.to_string_lossy()));
        fault(format!("{what} failed, error {}{why}", error.0 as u32))
    }
}

/// One GPU.
pub(super) struct Device {
    id: sys::CUdevice,
    context: CUcontext,
    pub stream: CUstream,
    /// Where work goes while it is recorded, which runs none of it.
    recorder: CUstream,
    recording: AtomicBool,
    /// How often memory was allocated.
    allocations: AtomicU64,
    kernels: HashMap<&'static str, CUfunction>,
    pub name: String,
    /// Shared memory that a block may ask for.
    pub shared_memory: usize,
    /// Multiprocessors.
    pub processors: usize,
    /// Whether kernels are started while those before them end: from Hopper on.
    starts_early: bool,
}

// SAFETY: the handles may be used from any thread; each call makes the context current first.
unsafe impl Send for Device {}
// SAFETY: as above; the driver locks what it has to.
unsafe impl Sync for Device {}

/// Kernels that ask for shared memory when they are launched, beside some that is theirs.
const LARGE: [&str; 7] = [
    "attention",
    "attention_units_64",
    "attention_units_80",
    "attention_units_96",
    "attention_units_128",
    "mamba3_scan",
    "route",
];
/// The same, by how their names begin.
const LARGE_KINDS: [&str; 14] = [
    "few_",
    "row_q4",
    "row_q6",
    "row_q8",
    "row_int8",
    "row_fp8",
    "ssd_chunked_",
    "ssd_prepare_",
    "ssd_segments_",
    "ssd_hopper_",
    "attention_hopper_",
    "expert_units",
    "units_int8",
    "units_fp8",
];
const OWN_SHARED: usize = 4096;

impl Device {
    /// Opens GPU `ordinal` and loads all kernels. Driver and compiler have been loaded.
    pub fn open(ordinal: usize, cache: Option<&Arc<dyn KernelCache>>) -> Result<Self> {
        result::init().map_err(|e| match e.0 {
            CUresult::CUDA_ERROR_NO_DEVICE => {
                fault("the driver sees no GPU; use --device cpu".into())
            }
            CUresult::CUDA_ERROR_STUB_LIBRARY => fault(
                "the libcuda.so that was found is the toolkit's stub, not a driver; take its folder out of LD_LIBRARY_PATH".into(),
            ),
            _ => failed("starting the driver")(e),
        })?;
        let count = result::device::get_count().map_err(failed("counting GPUs"))?;
        let there = i32::try_from(ordinal).ok().filter(|o| *o < count);
        let Some(there) = there else {
            return Err(fault(format!(
                "there is no GPU {ordinal}: the driver sees {count}, counted from 0"
            )));
        };
        let id = result::device::get(there).map_err(failed("opening the GPU"))?;
        let name = result::device::get_name(id).map_err(failed("asking for the GPU's name"))?;
        // SAFETY: released when the device is dropped.
        let context = unsafe { result::primary_ctx::retain(id) };
        let context = context.map_err(failed("making a context on the GPU"))?;
        let mut device = Device {
            id,
            context,
            stream: std::ptr::null_mut(),
            recorder: std::ptr::null_mut(),
            recording: AtomicBool::new(false),
            allocations: AtomicU64::new(0),
            kernels: HashMap::new(),
            name,
            shared_memory: 0,
            processors: 0,
            starts_early: false,
        };
        device.enter()?;
        device.stream = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(failed("making a stream"))?;
        device.recorder = result::stream::create(result::stream::StreamKind::NonBlocking)
            .map_err(failed("making a stream"))?;
        use sys::CUdevice_attribute_enum as Attribute;
        let shared =
            device.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        device.shared_memory = shared - OWN_SHARED;
        device.processors =
            device.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let major = device.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
        let minor = device.attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
        if major < 8 {
            return Err(fault(format!(
                "{} has compute capability {major}.{minor}; 8.0 is the least (Ampere, 2020)",
                device.name
            )));
        }
        device.starts_early = major >= 9;
        device.keep_freed_memory()?;
        device.load(&format!("sm_{major}{minor}"), cache)?;
        Ok(device)
    }

    fn attribute(&self, of: sys::CUdevice_attribute_enum) -> Result<usize> {
        // SAFETY: the device was opened.
        let value = unsafe { result::device::get_attribute(self.id, of) };
        let value = value.map_err(failed("asking for a property of the GPU"))?;
        Ok(usize::try_from(value).unwrap_or(0))
    }

    /// Freed memory stays ours: without this each synchronisation would give it back.
    fn keep_freed_memory(&self) -> Result<()> {
        let all = u64::MAX;
        let attribute = sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        // SAFETY: the pool is the device's own, and the value is the 64 bits that this attribute is.
        let set = unsafe {
            result::device::get_default_mem_pool(self.id).and_then(|pool| {
                result::mem_pool::set_attribute(pool, attribute, (&raw const all).cast_mut().cast())
            })
        };
        set.map_err(failed("setting up the memory pool"))
    }

    fn load(&mut self, architecture: &str, cache: Option<&Arc<dyn KernelCache>>) -> Result<()> {
        let cubins = compile_all(architecture, cache)?;
        for (unit, cubin) in UNITS.iter().zip(&cubins) {
            let Some(cubin) = cubin else { continue };
            // SAFETY: a whole image, as the compiler wrote it; the cache checks what it stores.
            let module = unsafe { result::module::load_data(cubin.as_ptr().cast()) };
            let module = module.map_err(failed(unit.name))?;
            for kernel in unit.kernels {
                let name = CString::new(*kernel).unwrap_or_default();
                // SAFETY: the module stays loaded for as long as the context.
                let function = unsafe { result::module::get_function(module, name) };
                let function = function.map_err(failed(kernel))?;
                if LARGE.contains(kernel) || LARGE_KINDS.iter().any(|k| kernel.starts_with(k)) {
                    let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                    let most = self.shared_memory as i32;
                    // SAFETY: the function was just found.
                    let set = unsafe {
                        result::function::set_function_attribute(function, attribute, most)
                    };
                    set.map_err(failed(kernel))?;
                }
                self.kernels.insert(kernel, function);
            }
        }
        Ok(())
    }

    /// Whether this GPU has a kernel: some are for one architecture only.
    pub fn has(&self, kernel: &str) -> bool {
        self.kernels.contains_key(kernel)
    }

    /// Makes the context this thread's.
    pub fn enter(&self) -> Result<()> {
        // SAFETY: the context is alive.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed("entering the context"))
    }

    /// Waits until all that was asked for is done.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: the stream is alive.
        unsafe { result::stream::synchronize(self.stream) }.map_err(failed("the GPU's work"))
    }

    /// Lets `later`'s stream wait for all that was asked of this device so far.
    pub fn before(&self, later: &Device) -> Result<()> {
        let flag = CUevent_flags_enum::CU_EVENT_DISABLE_TIMING;
        self.enter()?;
        let event = result::event::create(flag).map_err(failed("making an event"))?;
        // SAFETY: both streams are alive. The driver keeps what it needs of an event that is destroyed while
        // somebody waits for it.
        let waits = unsafe {
            result::event::record(event, self.stream).and_then(|()| {
                later.enter().ok();
                let flag = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
                result::stream::wait_event(later.stream, event, flag)
            })
        };
        // SAFETY: made above, destroyed once.
        let gone = unsafe { result::event::destroy(event) };
        waits
            .and(gone)
            .map_err(failed("waiting for another device"))
    }

    /// Copies bytes of another device, behind all that was asked of that so far and before all that will be.
    /// Answers whether there is a way between the two.
    pub fn copy_from(&self, other: &Device, from: u64, to: u64, bytes: usize) -> Result<bool> {
        other.before(self)?;
        self.enter()?;
        let one = std::ptr::eq(self.context, other.context);
        // SAFETY: the caller's: as many bytes lie at both, each on its device.
        let copied = unsafe {
            if one {
                result::memcpy_dtod_async(to, from, bytes, self.stream)
            } else {
                let (to_context, from_context) = (self.context, other.context);
                sys::cuMemcpyPeerAsync(to, to_context, from, from_context, bytes, self.stream)
                    .result()
            }
        };
        match copied {
            Ok(()) => self.before(other).map(|()| true),
            Err(_) if !one => Ok(false),
            Err(error) => Err(failed("copying between devices")(error)),
        }
    }

    /// The stream of what operations do on the device: kernels, copies, fills.
    pub fn work(&self) -> CUstream {
        if self.records() {
            self.recorder
        } else {
            self.stream
        }
    }

    /// Whether work is recorded rather than done.
    pub fn records(&self) -> bool {
        self.recording.load(Ordering::Relaxed)
    }

    /// How often memory was allocated so far.
    pub fn allocations(&self) -> u64 {
        self.allocations.load(Ordering::Relaxed)
    }

    /// From here on work is recorded.
    pub fn begin_recording(&self) -> Result<()> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is alive and not capturing.
        unsafe { result::stream::begin_capture(self.recorder, mode) }
            .map_err(failed("recording"))?;
        self.recording.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// From here on work is done again. What was recorded, ready to be started.
    pub fn end_recording(&self) -> Result<CUgraphExec> {
        self.recording.store(false, Ordering::Relaxed);
        // SAFETY: the stream captures since `begin_recording`; the graph is destroyed once, when it has
        // been made ready, or was not.
        unsafe {
            let graph = result::stream::end_capture(self.recorder).map_err(failed("recording"))?;
            let mut ready = std::ptr::null_mut();
            let made = sys::cuGraphInstantiateWithFlags(&raw mut ready, graph, 0).result();
            let _ = sys::cuGraphDestroy(graph);
            made.map_err(failed("preparing what was recorded"))?;
            Ok(ready)
        }
    }

    /// Starts a kernel on `grid` blocks of `threads` threads. An empty grid is nothing to do.
    pub fn launch(
        &self,
        kernel: &'static str,
        grid: (usize, usize, usize),
        threads: usize,
        shared: usize,
        params: &mut [*mut c_void],
    ) -> Result<()> {
        if grid.0 == 0 || grid.1 == 0 || grid.2 == 0 {
            return Ok(());
        }
        let function = self.kernels[kernel];
        if grid.0 > i32::MAX as usize || grid.1.max(grid.2) > 65_535 || shared > self.shared_memory
        {
            return Err(Error::Unsupported {
                op: kernel,
                backend: "cuda",
                why: format!("sizes beyond the device's: a grid of {grid:?}, {shared} bytes"),
            });
        }
        let mut early = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue {
                programmaticStreamSerializationAllowed: 1,
            },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: grid.0 as u32,
            gridDimY: grid.1 as u32,
            gridDimZ: grid.2 as u32,
            blockDimX: threads as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared as u32,
            hStream: self.work(),
            attrs: &raw mut early,
            numAttrs: u32::from(self.starts_early),
        };
        // SAFETY: `params` points to what the kernel's signature names: each structure stands beside
        // its kernel's, field by field, and every tensor was checked by its operation. Memory that is
        // freed meanwhile is freed in the order of the stream. A kernel that starts early waits for
        // what is before it (`BEGIN` in common.cuh).
        unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                function,
                params.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        }
        .result()
        .map_err(failed(kernel))
    }

    /// Free and total memory in bytes.
    pub fn memory(&self) -> Result<(usize, usize)> {
        self.enter()?;
        result::mem_get_info().map_err(failed("asking for free memory"))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.enter().is_ok() && !self.stream.is_null() {
            // SAFETY: made in `open`, destroyed once, after the last work on it.
            unsafe {
                let _ = result::stream::synchronize(self.stream);
                let _ = result::stream::destroy(self.stream);
                if !self.recorder.is_null() {
                    let _ = result::stream::destroy(self.recorder);
                }
            }
        }
        // SAFETY: retained in `open`.
        let _ = unsafe { result::primary_ctx::release(self.id) };
    }
}

/// Memory on a device, freed in the order of its stream.
pub(super) struct Allocation {
    pub pointer: CUdeviceptr,
    pub bytes: usize,
    device: Arc<Device>,
}

impl Allocation {
    /// So many bytes, with whatever was there. The context is current.
    pub fn new(device: &Arc<Device>, bytes: usize) -> Result<Self> {
        device.allocations.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the stream is alive.
        let pointer = unsafe { result::malloc_async(device.stream, bytes.max(256)) };
        let pointer = pointer.map_err(|e| match e.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::OutOfMemory {
                backend: "cuda",
                bytes,
            },
            _ => failed("allocating memory")(e),
        })?;
        Ok(Allocation {
            pointer,
            bytes,
            device: device.clone(),
        })
    }

    /// So many bytes of zeros.
    pub fn zeroed(device: &Arc<Device>, bytes: usize) -> Result<Self> {
        let new = Allocation::new(device, bytes)?;
        // SAFETY: all of it is ours.
        unsafe { result::memset_d8_async(new.pointer, 0, bytes.max(256), device.stream) }
            .map_err(failed("clearing memory"))?;
        Ok(new)
    }
}

impl DeviceMemory for Allocation {
    fn address(&self) -> usize {
        self.pointer as usize
    }

    fn device(&self) -> &dyn std::any::Any {
        &*self.device
    }
}

impl Drop for Allocation {
    fn drop(&mut self) {
        if self.device.enter().is_ok() {
            // SAFETY: allocated in `new`, freed once.
            let _ = unsafe { result::free_async(self.pointer, self.device.stream) };
        }
    }
}

/// Host memory that the device copies from and to at full speed.
pub(super) struct Pinned {
    pub pointer: *mut u8,
    pub bytes: usize,
    device: Arc<Device>,
}

// SAFETY: plain bytes; their owner keeps writers apart.
unsafe impl Send for Pinned {}

impl Pinned {
    pub fn new(device: &Arc<Device>, bytes: usize) -> Result<Self> {
        // SAFETY: freed when it is dropped.
        let pointer = unsafe { result::malloc_host(bytes, 0) };
        let pointer = pointer.map_err(failed("allocating pinned memory"))?;
        Ok(Pinned {
            pointer: pointer.cast(),
            bytes,
            device: device.clone(),
        })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.device.enter().is_ok() {
            // SAFETY: allocated in `new`, freed once.
            let _ = unsafe { result::free_host(self.pointer.cast()) };
        }
    }
}

/// Values that kernels take, laid out as C does.
///
/// # Safety
/// The type is `repr(C)` and has the fields of the kernel's parameter, in its order.
pub(super) unsafe trait Param {}
macro_rules! params {
    ($($t:ty),*) => { $(
        // SAFETY: the same type in C.
        unsafe impl Param for $t {}
    )* };
}
params!(i32, u32, i64, u64, f32);

/// Where a parameter stands. It outlives the launch, which copies it.
pub(super) fn param<T: Param>(value: &T) -> *mut c_void {
    std::ptr::from_ref(value).cast_mut().cast()
}

/// `launch!(state, "kernel", grid, threads, shared; parameters)`.
macro_rules! launch {
    ($state:expr, $kernel:expr, $grid:expr, $threads:expr, $shared:expr; $($param:expr),* $(,)?) => {
        $state.device.launch(
            $kernel, $grid, $threads, $shared,
            &mut [$($crate::cuda::device::param(&$param)),*],
        )
    };
}
pub(super) use launch;

//! Memory, and the ways in and out of it.

use std::sync::Arc;

use cudarc::driver::result;
use cudarc::driver::sys::{self, CUmemorytype_enum};

use super::device::{Allocation, Device, Pinned, failed, launch};
use super::{State, address, code, fault};
use crate::error::{Error, Result};
use crate::tensor::{DType, HostTensor, Tensor};

/// Columns that a block of an elementwise kernel takes: `COLUMNS` in elements.cu.
const COLUMNS: usize = 1024;

/// Bytes that are sent at a time, and threads that read them.
const LOADED: usize = 16 << 20;
const READERS: usize = 8;

fn size_of(op: &'static str, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(Error::Shape {
        op,
        what: "elements",
        found,
        expected,
    })
}

impl State {
    pub fn alloc(&mut self, dtype: DType, rows: usize, cols: usize) -> Result<Tensor> {
        let bytes = rows
            .checked_mul(cols)
            .and_then(|n| n.checked_mul(dtype.size()))
            .ok_or(Error::OutOfMemory {
                backend: "cuda",
                bytes: usize::MAX,
            })?;
        let memory = Allocation::zeroed(&self.device, bytes)?;
        Ok(Tensor::on_device(Arc::new(memory), dtype, rows, cols))
    }

    pub fn upload(&mut self, from: &HostTensor, rows: usize, cols: usize) -> Result<Tensor> {
        size_of("upload", from.len(), rows.saturating_mul(cols))?;
        let (bytes, format) = (from.bytes(), from.format());
        let k = cols;
        // Of a weight in blocks, its rows of bytes.
        let (dtype, cols) = match format.dtype() {
            Some(dtype) => (dtype, cols),
            None => (DType::U8, format.row_bytes(cols).unwrap_or(0)),
        };
        size_of("upload", bytes.len(), rows * cols * dtype.size())?;
        if super::blocks::kernels(format).is_some() {
            let memory = self.upload_blocks(format, bytes)?;
            return Ok(Tensor::on_device(Arc::new(memory), dtype, rows, cols));
        }
        if format.scales_rows() {
            let memory = self.upload_int8(bytes, rows, k)?;
            return Ok(Tensor::on_device(Arc::new(memory), dtype, rows, cols));
        }
        let memory = Allocation::new(&self.device, bytes.len())?;
        self.send(memory.pointer, bytes)?;
        Ok(Tensor::on_device(Arc::new(memory), dtype, rows, cols))
    }

    /// Sends bytes to the device, where there is room for them. Many go through pinned memory of two halves: threads
    /// read into one, from a mapped file perhaps, while the other is copied.
    pub fn send(&mut self, to: u64, bytes: &[u8]) -> Result<()> {
        if bytes.len() < LOADED / 8 {
            if bytes.is_empty() {
                return Ok(());
            }
            // SAFETY: the caller's; the driver has taken the bytes over when this returns.
            return unsafe { result::memcpy_htod_async(to, bytes, self.device.stream) }
                .map_err(failed("copying a weight"));
        }
        if self.loading.is_none() {
            self.loading = Some(Pinned::new(&self.device, 2 * LOADED)?);
        }
        let Some(loading) = &self.loading else {
            return Ok(());
        };
        let readers = std::thread::available_parallelism().map_or(1, |n| n.get().min(READERS));
        for (i, part) in bytes.chunks(LOADED).enumerate() {
            let sent = self.arrived[i % 2];
            // SAFETY: what was sent from this half has arrived, so that nobody uses it; it holds the part.
            let half = unsafe {
                result::event::synchronize(sent).map_err(failed("copying a weight"))?;
                let start = loading.pointer.add(i % 2 * LOADED);
                std::slice::from_raw_parts_mut(start, part.len())
            };
            let each = part.len().div_ceil(readers).max(1);
            std::thread::scope(|scope| {
                for (from, to) in part.chunks(each).zip(half.chunks_mut(each)) {
                    scope.spawn(|| to.copy_from_slice(from));
                }
            });
            // SAFETY: the caller's; the half is kept until the event says that it was copied.
            unsafe {
                let to = to + (i * LOADED) as u64;
                result::memcpy_htod_async(to, half, self.device.stream)
                    .and_then(|()| result::event::record(sent, self.device.stream))
                    .map_err(failed("copying a weight"))?;
            }
        }
        Ok(())
    }

    pub fn read(&mut self, from: &Tensor, to: &mut [f32]) -> Result<()> {
        size_of("read", to.len(), from.rows() * from.cols())?;
        self.not_recorded("read")?;
        if to.is_empty() {
            return Ok(());
        }
        let numbers = matches!(from.dtype(), DType::F32 | DType::I32);
        let source = if numbers && from.is_contiguous() {
            address(from)?
        } else {
            let room = self.scratch(4 * to.len())?;
            self.convert(
                (address(from)?, from.stride(), from.dtype()),
                (room, from.cols(), DType::F32),
                [from.rows(), from.cols()],
            )?;
            room
        };
        // Whole numbers come as they are and are widened here.
        let whole = numbers && from.is_contiguous() && from.dtype() == DType::I32;
        let most = self.staging.bytes / 4;
        for (i, to) in to.chunks_mut(most).enumerate() {
            // SAFETY: as many elements lie there, and the staging memory holds them; they have arrived
            // when the stream is done.
            unsafe {
                let staged = self.staging.pointer.cast::<f32>();
                let room = std::slice::from_raw_parts_mut(staged, to.len());
                let pointer = source + (4 * i * most) as u64;
                result::memcpy_dtoh_async(room, pointer, self.device.stream)
                    .map_err(failed("reading"))?;
                self.device.synchronize()?;
                if whole {
                    let widened = room.iter().map(|bits| bits.to_bits().cast_signed() as f32);
                    to.iter_mut().zip(widened).for_each(|(to, n)| *to = n);
                } else {
                    to.copy_from_slice(room);
                }
            }
        }
        Ok(())
    }

    /// Rows as they arrive: one half of the staging memory is looked at while the other is filled.
    pub fn read_rows(
        &mut self,
        from: &Tensor,
        room: &mut [f32],
        row: &mut dyn FnMut(usize, &mut [f32]),
    ) -> Result<()> {
        let (rows, cols) = (from.rows(), from.cols());
        size_of("read", room.len(), rows * cols)?;
        self.not_recorded("read")?;
        let of_half = self.staging.bytes / 8;
        if cols == 0 || cols > of_half || from.dtype() != DType::F32 || !from.is_contiguous() {
            self.read(from, room)?;
            let rows = room.chunks_exact_mut(cols.max(1)).enumerate();
            rows.for_each(|(i, r)| row(i, r));
            return Ok(());
        }
        let (source, at_once) = (address(from)?, of_half / cols);
        let parts = rows.div_ceil(at_once);
        for part in 0..=parts {
            if part < parts {
                let (first, half) = (part * at_once, part % 2);
                let count = at_once.min(rows - first);
                // SAFETY: as many elements lie there, the half holds them, and what it held before has been
                // looked at.
                unsafe {
                    let half = self.half(half, of_half, count * cols);
                    let pointer = source + (4 * first * cols) as u64;
                    result::memcpy_dtoh_async(half, pointer, self.device.stream)
                        .and_then(|()| {
                            result::event::record(self.arrived[part % 2], self.device.stream)
                        })
                        .map_err(failed("reading"))?;
                }
            }
            let Some(part) = part.checked_sub(1) else {
                continue;
            };
            let first = part * at_once;
            let count = at_once.min(rows - first);
            // SAFETY: recorded above; then the half holds these rows, and nothing writes to it.
            let half = unsafe {
                result::event::synchronize(self.arrived[part % 2])
                    .map_err(failed("the GPU's work"))?;
                self.half(part % 2, of_half, count * cols)
            };
            for (i, r) in half.chunks_exact_mut(cols).enumerate() {
                row(first + i, r);
            }
        }
        Ok(())
    }

    /// So many numbers at the start of a half of the staging memory.
    ///
    /// # Safety
    /// There are as many, and there is no other view of them.
    unsafe fn half<'a>(&self, half: usize, of_half: usize, count: usize) -> &'a mut [f32] {
        // SAFETY: the caller's.
        unsafe {
            let start = self.staging.pointer.cast::<f32>().add(half * of_half);
            std::slice::from_raw_parts_mut(start, count)
        }
    }

    pub fn write(&mut self, from: &[f32], to: &mut Tensor) -> Result<()> {
        size_of("write", from.len(), to.rows() * to.cols())?;
        self.not_recorded("write")?;
        if from.is_empty() {
            return Ok(());
        }
        let room = self.scratch(4 * from.len())?;
        // SAFETY: there is room for the numbers, which the driver has taken over when this returns.
        unsafe { result::memcpy_htod_async(room, from, self.device.stream) }
            .map_err(failed("writing"))?;
        self.convert(
            (room, to.cols(), DType::F32),
            (address(to)?, to.stride(), to.dtype()),
            [to.rows(), to.cols()],
        )
    }

    /// Refuses what moves the host's numbers, which a recording would not see again.
    fn not_recorded(&self, op: &str) -> Result<()> {
        if self.device.records() {
            return Err(fault(format!("{op} cannot be recorded")));
        }
        Ok(())
    }

    /// Copies between types and strides.
    fn convert(
        &mut self,
        from: (u64, usize, DType),
        to: (u64, usize, DType),
        [rows, cols]: [usize; 2],
    ) -> Result<()> {
        launch!(self, "convert", (rows, cols.div_ceil(COLUMNS), 1), 256, 0;
            from.0, from.1 as i64, code(from.2), to.0, to.1 as i64, code(to.2), cols as i32)
    }

    pub fn copy(&mut self, from: &Tensor, to: &mut Tensor) -> Result<()> {
        let (rows, size) = (from.rows(), from.dtype().size());
        let width = from.cols() * size;
        if rows == 0 || width == 0 {
            return Ok(());
        }
        let (source, target) = (address(from)?, address(to)?);
        if from.is_contiguous() && to.is_contiguous() {
            // SAFETY: both tensors have these bytes, and they do not overlap.
            let done = unsafe {
                result::memcpy_dtod_async(target, source, rows * width, self.device.work())
            };
            return done.map_err(failed("copying"));
        }
        let pitch = |t: &Tensor| if rows == 1 { width } else { t.stride() * size };
        let kind = CUmemorytype_enum::CU_MEMORYTYPE_DEVICE;
        let copy = sys::CUDA_MEMCPY2D {
            srcXInBytes: 0,
            srcY: 0,
            srcMemoryType: kind,
            srcHost: std::ptr::null(),
            srcDevice: source,
            srcArray: std::ptr::null_mut(),
            srcPitch: pitch(from),
            dstXInBytes: 0,
            dstY: 0,
            dstMemoryType: kind,
            dstHost: std::ptr::null_mut(),
            dstDevice: target,
            dstArray: std::ptr::null_mut(),
            dstPitch: pitch(to),
            WidthInBytes: width,
            Height: rows,
        };
        // SAFETY: both tensors have rows of this width at these distances, and do not overlap.
        let done = unsafe { sys::cuMemcpy2DAsync_v2(&raw const copy, self.device.work()) };
        done.result().map_err(failed("copying"))
    }

    /// From another GPU's memory; `false` where there is no way but through the host's.
    pub fn receive(&mut self, from: &Tensor, to: &mut Tensor) -> Result<bool> {
        let other = from.device().and_then(|d| d.downcast_ref::<Device>());
        let (Some(other), true) = (other, from.is_contiguous() && to.is_contiguous()) else {
            return Ok(false);
        };
        self.not_recorded("receive")?;
        let there = self
            .device
            .copy_from(other, address(from)?, address(to)?, from.bytes());
        self.device.enter()?;
        there
    }

    pub fn clear(&mut self, tensor: &mut Tensor) -> Result<()> {
        let (rows, size) = (tensor.rows(), tensor.dtype().size());
        let width = tensor.cols() * size;
        if rows == 0 || width == 0 {
            return Ok(());
        }
        let pointer = address(tensor)?;
        // SAFETY: the tensor has rows of this width at this distance.
        let done = unsafe {
            if tensor.is_contiguous() {
                result::memset_d8_async(pointer, 0, rows * width, self.device.work())
            } else {
                let pitch = tensor.stride() * size;
                sys::cuMemsetD2D8Async(pointer, pitch, 0, width, rows, self.device.work()).result()
            }
        };
        done.map_err(failed("clearing memory"))
    }

    pub fn fill_normal(&mut self, tensor: &mut Tensor, seed: u64, std: f32) -> Result<()> {
        let by = crate::random::scale(std);
        let across = tensor.cols().div_ceil(256).min(1024);
        launch!(self, "fill_normal", (tensor.rows(), across, 1), 256, 0;
            address(tensor)?, tensor.stride() as i64, code(tensor.dtype()), seed, by,
            tensor.cols() as i64)
    }
}

//! Tensors: two-dimensional views on device memory.
//!
//! Everything a layer touches is a matrix: activations are (tokens, features), a slot tensor is
//! (slots, elements), a page tensor is (pages × page size, features), a vector is one row. Column
//! ranges of a wider tensor are views with the same row stride, so a fused projection is split
//! without a copy.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::format::Format;

/// Element types that run. Files may hold others; those are converted while loading.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of a single.
    BF16,
    /// Signed 32-bit integers: expert numbers.
    I32,
    /// Bytes: the blocks of a weight, whose [`Format`] says what they hold.
    U8,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::F32 | DType::I32 => 4,
            DType::F16 | DType::BF16 => 2,
            DType::U8 => 1,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "F32",
            DType::F16 => "F16",
            DType::BF16 => "BF16",
            DType::I32 => "I32",
            DType::U8 => "U8",
        })
    }
}

/// Bytes in host memory that somebody keeps alive: a mapped file, a vector.
pub trait HostBytes: Send + Sync {
    /// The bytes. The same address every time, as long as the owner lives.
    fn bytes(&self) -> &[u8];

    /// Told that a range will not be read again soon: its memory may be given back where that changes
    /// nothing, as with mapped files.
    fn forget(&self, _range: Range<usize>) {}
}

impl HostBytes for Vec<u8> {
    fn bytes(&self) -> &[u8] {
        self
    }
}

/// A weight as a source hands it out: row-major elements in host memory, shared with their owner.
#[derive(Clone)]
pub struct HostTensor {
    format: Format,
    shape: Vec<usize>,
    owner: Arc<dyn HostBytes>,
    range: Range<usize>,
}

impl HostTensor {
    /// A view of `range` (in bytes) of `owner`. Fails when the range does not hold exactly `shape`
    /// elements of `format`, when rows are no whole blocks, or when it lies outside its owner.
    pub fn new(
        format: Format,
        shape: &[usize],
        owner: Arc<dyn HostBytes>,
        range: Range<usize>,
    ) -> Result<Self> {
        let fault = |why: String| Error::Value {
            op: "host tensor",
            why,
        };
        let bytes = format.bytes_of(shape).ok_or_else(|| {
            let elements = format.block().elements;
            fault(format!(
                "shape {shape:?} has no rows of whole blocks of {elements}, as {format} wants them, or overflows"
            ))
        })?;
        if range.start > range.end || range.end > owner.bytes().len() {
            return Err(fault(format!(
                "bytes {range:?} lie outside the {} that there are",
                owner.bytes().len()
            )));
        }
        if range.len() != bytes {
            return Err(fault(format!(
                "{} bytes found, {bytes} expected for {shape:?} of {format}",
                range.len()
            )));
        }
        Ok(HostTensor {
            format,
            shape: shape.to_vec(),
            owner,
            range,
        })
    }

    /// A tensor of its own, from f32 values.
    pub fn from_f32(shape: &[usize], values: &[f32]) -> Result<Self> {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let range = 0..bytes.len();
        HostTensor::new(Format::F32, shape, Arc::new(bytes), range)
    }

    /// How its elements are stored.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Sizes, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements' bytes, little endian.
    pub fn bytes(&self) -> &[u8] {
        &self.owner.bytes()[self.range.clone()]
    }

    /// The same elements under another shape of equal size.
    pub fn reshape(&self, shape: &[usize]) -> Result<Self> {
        HostTensor::new(self.format, shape, self.owner.clone(), self.range.clone())
    }

    /// Entry `range` of the outermost dimension, without a copy.
    pub fn slice(&self, range: Range<usize>) -> Result<Self> {
        let outer = *self.shape.first().unwrap_or(&1);
        if range.start > range.end || range.end > outer {
            return Err(Error::Value {
                op: "host tensor",
                why: format!("rows {range:?} lie outside shape {:?}", self.shape),
            });
        }
        let row = self.range.len().checked_div(outer).unwrap_or(0);
        let mut shape = self.shape.clone();
        if let Some(first) = shape.first_mut() {
            *first = range.len();
        }
        let start = self.range.start + range.start * row;
        HostTensor::new(
            self.format,
            &shape,
            self.owner.clone(),
            start..start + range.len() * row,
        )
    }

    /// All elements, widened to f32.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.len()];
        self.dequantize(self.bytes(), &mut values);
        values
    }

    /// The bytes of some elements, counted row after row; `None` unless they are whole blocks.
    pub fn elements(&self, range: Range<usize>) -> Option<&[u8]> {
        self.bytes().get(self.bytes_of(range)?)
    }

    /// Some elements, widened to f32. Fails unless they are there, and whole blocks.
    pub fn widen(&self, range: Range<usize>, to: &mut [f32]) -> Result<()> {
        let bytes = self
            .elements(range.clone())
            .filter(|_| range.len() == to.len());
        let bytes = bytes.ok_or_else(|| Error::Value {
            op: "host tensor",
            why: format!("elements {range:?} of {self:?} are no whole blocks"),
        })?;
        self.dequantize(bytes, to);
        Ok(())
    }

    /// Widens whole blocks, or whole rows.
    fn dequantize(&self, from: &[u8], to: &mut [f32]) {
        let cols = self.columns();
        if !self.format.scales_rows() {
            return self.format.dequantize(from, to);
        }
        let row = self.format.row_bytes(cols).unwrap_or(0).max(1);
        let rows = from.chunks_exact(row).zip(to.chunks_mut(cols.max(1)));
        rows.for_each(|(from, to)| self.format.dequantize(from, to));
    }

    fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Told that some elements will not be read again soon: see [`HostBytes::forget`].
    pub fn forget(&self, range: Range<usize>) {
        if let Some(bytes) = self.bytes_of(range) {
            let start = self.range.start;
            self.owner.forget(start + bytes.start..start + bytes.end);
        }
    }

    /// Where elements are among the bytes.
    fn bytes_of(&self, range: Range<usize>) -> Option<Range<usize>> {
        let at = |element: usize| {
            if !self.format.scales_rows() {
                return self.format.row_bytes(element);
            }
            let cols = self.columns();
            let rows = element.is_multiple_of(cols).then(|| element / cols.max(1));
            rows?.checked_mul(self.format.row_bytes(cols)?)
        };
        let bytes = at(range.start)?..at(range.end)?;
        (bytes.start <= bytes.end && bytes.end <= self.range.len()).then_some(bytes)
    }

    fn address(&self) -> *const u8 {
        self.bytes().as_ptr()
    }
}

impl fmt::Debug for HostTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostTensor({} {:?})", self.format, self.shape)
    }
}

/// Zeroed host memory, aligned for vector loads. The operating system commits its pages when they
/// are first written, so a large reserve costs nothing until it is used.
struct HostMemory {
    pointer: *mut u8,
    /// What the allocator gave: `pointer` lies in it.
    start: *mut u8,
    layout: std::alloc::Layout,
}

/// Vector registers are at most 64 bytes wide, and so are cache lines.
const ALIGN: usize = 64;

impl HostMemory {
    fn new(bytes: usize) -> Option<Self> {
        // Asked for a larger alignment the allocator would write the zeros itself, to every page.
        let layout = std::alloc::Layout::from_size_align(bytes.checked_add(ALIGN)?, 1).ok()?;
        // SAFETY: the layout has a size of at least one byte.
        let start = unsafe { std::alloc::alloc_zeroed(layout) };
        let pointer = start.wrapping_add(start.align_offset(ALIGN));
        (!start.is_null()).then_some(HostMemory {
            pointer,
            start,
            layout,
        })
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout, and freed once.
        unsafe { std::alloc::dealloc(self.start, self.layout) }
    }
}

// SAFETY: the memory is plain bytes. Who may write which part, and when, is the contract of the
// operations: outputs overlap no input (checked in `ops`), and one operation runs at a time on a
// backend's activations.
unsafe impl Send for HostMemory {}
// SAFETY: as above.
unsafe impl Sync for HostMemory {}

/// Memory of a device that host code cannot reach, for as long as it is held.
pub(crate) trait DeviceMemory: Send + Sync {
    /// Its first byte, among the device's addresses.
    fn address(&self) -> usize;

    /// The device.
    fn device(&self) -> &dyn std::any::Any;
}

#[derive(Clone)]
enum Memory {
    /// Ours, writable.
    Owned(Arc<HostMemory>),
    /// Somebody's, read only.
    Borrowed(HostTensor),
    /// A device's, writable.
    Device(Arc<dyn DeviceMemory>),
    /// No memory at all: what the null backend hands out.
    None,
}

/// A view of `rows` × `cols` elements, `stride` elements from row to row, on memory that it keeps
/// alive. Cloning clones the view, not the elements.
#[derive(Clone)]
pub struct Tensor {
    memory: Memory,
    dtype: DType,
    offset: usize,
    rows: usize,
    cols: usize,
    stride: usize,
}

impl Tensor {
    /// New zeroed host memory.
    pub(crate) fn host(dtype: DType, rows: usize, cols: usize) -> Result<Self> {
        let out_of_memory = |bytes| Error::OutOfMemory {
            backend: "cpu",
            bytes,
        };
        let bytes = rows
            .checked_mul(cols)
            .and_then(|n| n.checked_mul(dtype.size()))
            .ok_or(out_of_memory(usize::MAX))?;
        let memory = HostMemory::new(bytes).ok_or(out_of_memory(bytes))?;
        Ok(Tensor::whole(
            Memory::Owned(Arc::new(memory)),
            dtype,
            rows,
            cols,
        ))
    }

    /// Memory of a device, which holds at least so many elements.
    pub(crate) fn on_device(
        memory: Arc<dyn DeviceMemory>,
        dtype: DType,
        rows: usize,
        cols: usize,
    ) -> Self {
        Tensor::whole(Memory::Device(memory), dtype, rows, cols)
    }

    /// Where the first element lies in a device's memory; none for a tensor of the host.
    pub(crate) fn device_address(&self) -> Option<u64> {
        matches!(self.memory, Memory::Device(_)).then(|| self.address() as u64)
    }

    /// The device that its memory is on; none for a tensor of the host.
    pub(crate) fn device(&self) -> Option<&dyn std::any::Any> {
        match &self.memory {
            Memory::Device(memory) => Some(memory.device()),
            _ => None,
        }
    }

    /// Whether the host reaches its memory.
    pub(crate) fn is_host(&self) -> bool {
        matches!(self.memory, Memory::Owned(_) | Memory::Borrowed(_))
    }

    /// A shape without memory.
    pub(crate) fn null(dtype: DType, rows: usize, cols: usize) -> Self {
        Tensor::whole(Memory::None, dtype, rows, cols)
    }

    /// A read-only view of a host tensor of `rows` rows: of its elements, or of the bytes of its blocks.
    /// `None` if its address is not aligned for them. Panics unless the rows are whole.
    pub(crate) fn borrowed(from: &HostTensor, rows: usize) -> Option<Self> {
        let dtype = from.format().dtype().unwrap_or(DType::U8);
        let elements = from.bytes().len() / dtype.size();
        let cols = elements.checked_div(rows).unwrap_or(0);
        assert_eq!(rows * cols, elements, "{rows} rows of {from:?}");
        let aligned = from.address().align_offset(dtype.size()) == 0;
        aligned.then(|| Tensor::whole(Memory::Borrowed(from.clone()), dtype, rows, cols))
    }

    fn whole(memory: Memory, dtype: DType, rows: usize, cols: usize) -> Self {
        Tensor {
            memory,
            dtype,
            offset: 0,
            rows,
            cols,
            stride: cols,
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Elements from the start of one row to the start of the next.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes of the elements in view.
    pub fn bytes(&self) -> usize {
        self.rows * self.cols * self.dtype.size()
    }

    /// Whether rows follow each other without gaps.
    pub fn is_contiguous(&self) -> bool {
        self.stride == self.cols || self.rows <= 1
    }

    /// The first `rows` rows.
    pub fn first_rows(&self, rows: usize) -> Tensor {
        self.row_range(0..rows)
    }

    /// Rows `range`. Panics when they are not there.
    pub fn row_range(&self, range: Range<usize>) -> Tensor {
        assert!(
            range.start <= range.end && range.end <= self.rows,
            "rows {range:?} of {self:?}"
        );
        let offset = self.offset + range.start * self.stride;
        Tensor {
            offset,
            rows: range.len(),
            ..self.clone()
        }
    }

    /// Columns `range` of every row, with this tensor's stride. Panics when they are not there.
    pub fn columns(&self, range: Range<usize>) -> Tensor {
        assert!(
            range.start <= range.end && range.end <= self.cols,
            "columns {range:?} of {self:?}"
        );
        Tensor {
            offset: self.offset + range.start,
            cols: range.len(),
            ..self.clone()
        }
    }

    /// The same elements as `rows` × `cols`. Panics when the sizes differ or rows have gaps.
    pub fn reshape(&self, rows: usize, cols: usize) -> Tensor {
        assert!(
            self.is_contiguous(),
            "only contiguous tensors can be reshaped: {self:?}"
        );
        assert_eq!(
            rows * cols,
            self.rows * self.cols,
            "reshape of {self:?} to {rows} × {cols}"
        );
        Tensor {
            rows,
            cols,
            stride: cols,
            ..self.clone()
        }
    }

    /// Whether operations may write to it.
    pub fn is_writable(&self) -> bool {
        !matches!(self.memory, Memory::Borrowed(_))
    }

    /// Address range in its memory, for the overlap check; empty without memory.
    fn extent(&self) -> Range<usize> {
        if matches!(self.memory, Memory::None) || self.rows == 0 || self.cols == 0 {
            return 0..0;
        }
        let start = self.address() as usize;
        start..start + ((self.rows - 1) * self.stride + self.cols) * self.dtype.size()
    }

    /// Whether two tensors may share an element. Column ranges of one wide tensor that do not meet
    /// are told apart.
    pub fn overlaps(&self, other: &Tensor) -> bool {
        let (a, b) = (self.extent(), other.extent());
        if a.start >= b.end || b.start >= a.end {
            return false;
        }
        if self.stride == other.stride && self.dtype == other.dtype && self.stride > 0 {
            let apart = a.start.abs_diff(b.start) / self.dtype.size() % self.stride;
            let (first, second) = if a.start <= b.start {
                (self, other)
            } else {
                (other, self)
            };
            // In every row, `second` begins `apart` elements after `first`.
            return !(first.cols <= apart && apart + second.cols <= self.stride);
        }
        true
    }

    /// The number of the address where it begins.
    pub(crate) fn place(&self) -> usize {
        self.address().addr()
    }

    fn address(&self) -> *mut u8 {
        let base = match &self.memory {
            Memory::Owned(memory) => memory.pointer,
            Memory::Borrowed(host) => host.address().cast_mut(),
            Memory::Device(memory) => std::ptr::without_provenance_mut(memory.address()),
            Memory::None => std::ptr::NonNull::<u64>::dangling().as_ptr().cast(),
        };
        base.wrapping_add(self.offset * self.dtype.size())
    }

    /// The elements, to be read by a CPU path. Panics on another element type: `check` of the
    /// operation has refused it before.
    pub(crate) fn view<T: Element>(&self) -> View<T> {
        assert_eq!(T::DTYPE, self.dtype, "element type of {self:?}");
        assert!(
            matches!(self.memory, Memory::Owned(_) | Memory::Borrowed(_)),
            "{self:?} is not in the host's memory"
        );
        View {
            pointer: self.address().cast(),
            rows: self.rows,
            cols: self.cols,
            stride: self.stride,
        }
    }

    /// The elements, to be written by a CPU path.
    pub(crate) fn view_mut<T: Element>(&mut self) -> ViewMut<T> {
        assert!(self.is_writable(), "{self:?} is read only");
        ViewMut(self.view())
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Tensor({} {} × {}, stride {})",
            self.dtype, self.rows, self.cols, self.stride
        )
    }
}

/// Types that a tensor's elements can be seen as.
pub(crate) trait Element: Copy + Send + Sync + 'static {
    /// The element type that has this form.
    const DTYPE: DType;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
}
impl Element for i32 {
    const DTYPE: DType = DType::I32;
}
impl Element for u8 {
    const DTYPE: DType = DType::U8;
}
impl Element for half::f16 {
    const DTYPE: DType = DType::F16;
}
impl Element for half::bf16 {
    const DTYPE: DType = DType::BF16;
}

/// Elements to read. A view is used inside one operation, whose tensors outlive it.
#[derive(Clone, Copy)]
pub(crate) struct View<T> {
    pointer: *const T,
    rows: usize,
    cols: usize,
    stride: usize,
}

// SAFETY: a view is a pointer to plain elements; see `HostMemory` for who may write them.
unsafe impl<T: Element> Send for View<T> {}
// SAFETY: as above.
unsafe impl<T: Element> Sync for View<T> {}

impl<T: Element> View<T> {
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    /// Rows in memory that a kernel has for itself.
    pub(crate) fn of_rows(from: &[T], rows: usize, cols: usize) -> Self {
        assert_eq!(from.len(), rows * cols, "{rows} rows of {cols}");
        View {
            pointer: from.as_ptr(),
            rows,
            cols,
            stride: cols,
        }
    }

    /// Columns `range` of every row.
    pub(crate) fn columns(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.cols);
        View {
            pointer: self.pointer.wrapping_add(range.start),
            cols: range.len(),
            ..*self
        }
    }

    /// The first element.
    pub(crate) fn pointer(&self) -> *const T {
        self.pointer
    }

    /// Row `r`.
    #[inline(always)]
    pub(crate) fn row(&self, r: usize) -> &[T] {
        assert!(r < self.rows, "row {r} of {}", self.rows);
        // SAFETY: the tensor holds `rows` rows of `cols` elements at this stride and is alive for
        // the whole operation; outputs overlap no input, so nobody writes these elements meanwhile.
        unsafe { std::slice::from_raw_parts(self.pointer.add(r * self.stride), self.cols) }
    }
}

/// Elements to write. Copies may go to several threads; each row is written by one of them.
#[derive(Clone, Copy)]
pub(crate) struct ViewMut<T>(View<T>);

impl<T: Element> ViewMut<T> {
    pub(crate) fn rows(&self) -> usize {
        self.0.rows
    }

    pub(crate) fn cols(&self) -> usize {
        self.0.cols
    }

    /// Columns `range` of every row.
    pub(crate) fn column_range(&self, range: Range<usize>) -> Self {
        ViewMut(self.0.columns(range))
    }

    /// The rows from `first` on.
    pub(crate) fn starting_at(&self, first: usize) -> Self {
        assert!(first <= self.0.rows, "row {first} of {}", self.0.rows);
        ViewMut(View {
            pointer: self.0.pointer.wrapping_add(first * self.0.stride),
            rows: self.0.rows - first,
            ..self.0
        })
    }

    /// Row `r`, to be written.
    ///
    /// # Safety
    /// No other reference to an element of this row is alive: within an operation each row belongs
    /// to one thread, which holds one such slice at a time.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)] // the caller keeps rows apart; a borrow could not cross threads
    pub(crate) unsafe fn row(&self, r: usize) -> &mut [T] {
        // SAFETY: the row exists (`columns` checks), and the caller keeps other references away.
        unsafe { self.columns(r, 0..self.0.cols) }
    }

    /// The first element of row `r`, for columns that are shared out among threads.
    #[inline(always)]
    pub(crate) fn row_pointer(&self, r: usize) -> *mut T {
        assert!(r < self.0.rows, "row {r} of {}", self.0.rows);
        self.0.pointer.wrapping_add(r * self.0.stride).cast_mut()
    }

    /// Columns `range` of row `r`, to be written.
    ///
    /// # Safety
    /// As for [`ViewMut::row`], for these elements.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn columns(&self, r: usize, range: Range<usize>) -> &mut [T] {
        assert!(r < self.0.rows && range.start <= range.end && range.end <= self.0.cols);
        // SAFETY: inside the tensor by the assertion; the caller keeps other references away.
        unsafe {
            let start = self
                .0
                .pointer
                .add(r * self.0.stride + range.start)
                .cast_mut();
            std::slice::from_raw_parts_mut(start, range.len())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn column_ranges_of_one_tensor_do_not_overlap() {
        let wide = Tensor::host(DType::F32, 4, 10).unwrap();
        let (left, right) = (wide.columns(0..4), wide.columns(4..10));
        assert!(!left.overlaps(&right) && !right.overlaps(&left));
        assert!(wide.overlaps(&left) && left.overlaps(&wide.columns(3..5)));
        assert!(!wide.row_range(0..2).overlaps(&wide.row_range(2..4)));
    }

    #[test]
    fn a_host_tensor_refuses_bytes_that_do_not_fit_its_shape() {
        let bytes: Arc<dyn HostBytes> = Arc::new(vec![0u8; 16]);
        assert!(HostTensor::new(Format::F32, &[2, 2], bytes.clone(), 0..16).is_ok());
        for (shape, range) in [
            (&[2usize, 3][..], 0..16),
            (&[2, 2], 4..20),
            (&[usize::MAX, 8], 0..16),
            (&[4], Range { start: 12, end: 8 }),
        ] {
            assert!(
                HostTensor::new(Format::F32, shape, bytes.clone(), range).is_err(),
                "{shape:?}"
            );
        }
    }

    #[test]
    fn slices_share_their_owner() {
        let t = HostTensor::from_f32(&[3, 2], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]).unwrap();
        assert_eq!(t.slice(1..3).unwrap().to_f32(), [2.0, 3.0, 4.0, 5.0]);
        assert!(t.slice(2..4).is_err());
    }
}

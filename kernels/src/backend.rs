//! What a device must be able to do.

use crate::error::Result;
use crate::format::Format;
use crate::ops::{
    Activate, Add, Attention, Combine, Conv1d, Embed, ExpertLinear, Gather, KvWrite, LayerNorm,
    Likeliest, Linear, Mamba3Scan, RmsNorm, Rope, Route, S4dScan, Scale, SelectiveScan, SsdChunked,
    SsdScan,
};
use crate::span::Ragged;
use crate::tensor::{DType, HostTensor, Tensor};

/// A step that will run again and again: see [`Backend::repeat`].
#[derive(Debug, Clone, Copy)]
pub struct Repeat<'a> {
    /// Equal for steps whose operations are the same, on the same tensors and with the same lists in host
    /// memory, but for the two below.
    pub key: [u64; 2],
    /// Tokens of the step's [`Embed`], one a row.
    pub ids: &'a [u32],
    /// The batch of all of its operations: one row a sequence. Of two steps with as many sequences it is
    /// positions, slots and pages that differ.
    pub ragged: Ragged<'a>,
}

/// A set of kernels and the device they run on.
///
/// Operations run in the order they are called. Each checks its arguments first and writes nothing
/// when they do not fit together. A backend that lacks an operation answers
/// [`Error::Unsupported`](crate::Error::Unsupported); it never substitutes silently.
pub trait Backend: Send + Sync {
    /// A short name for messages: `cpu`, `cuda`, `reference`, `null`.
    fn name(&self) -> &'static str;

    /// How far a row's results may move with the rows beside it and with the cuts of its sequence, in
    /// standard deviations of a model's logits, where matrices are stored in `format`: 0 is not at all, to
    /// the bit.
    fn tolerance(&self, _activations: DType, _format: Format) -> f32 {
        0.0
    }

    /// Rows of a prompt that are worth taking at once.
    fn prompt_rows(&self) -> usize {
        512
    }

    /// Runs `operations`, a step that will come again with other tokens and positions. A backend may record
    /// what they do and do it again under an equal key without asking them: results are the same bits.
    /// They read nothing back, and may be called more than once.
    fn repeat(&self, _step: &Repeat<'_>, operations: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        operations()
    }

    /// New zeroed memory. Memory that is never written may cost nothing.
    fn alloc(&self, dtype: DType, rows: usize, cols: usize) -> Result<Tensor>;

    /// A weight on the device, as `rows` × `cols`; of one in blocks, its rows of bytes. Where device and
    /// host share memory this is a view without a copy if the address is aligned.
    fn upload(&self, from: &HostTensor, rows: usize, cols: usize) -> Result<Tensor>;

    /// Copies elements to the host, widened to f32, row after row.
    fn read(&self, from: &Tensor, to: &mut [f32]) -> Result<()>;

    /// Reads as [`Backend::read`] and hands out each row, in order, to be changed at will. `room` has place
    /// for all of them; a backend may use memory of its own instead. `row` uses no backend.
    fn read_rows(
        &self,
        from: &Tensor,
        room: &mut [f32],
        row: &mut dyn FnMut(usize, &mut [f32]),
    ) -> Result<()> {
        self.read(from, room)?;
        let rows = room.chunks_exact_mut(from.cols().max(1)).enumerate();
        rows.for_each(|(i, values)| row(i, values));
        Ok(())
    }

    /// Copies elements from the host, row after row, rounded to the tensor's type.
    fn write(&self, from: &[f32], to: &mut Tensor) -> Result<()>;

    /// Copies between tensors of one shape and type.
    fn copy(&self, from: &Tensor, to: &mut Tensor) -> Result<()>;

    /// Copies an F32 tensor of another device, `of`, behind all that was asked of that so far; what is asked of it
    /// later comes after. Through host memory, unless devices know a shorter way.
    fn receive(&self, from: &Tensor, of: &dyn Backend, to: &mut Tensor) -> Result<()> {
        let mut room = vec![0.0; from.rows() * from.cols()];
        of.read(from, &mut room)?;
        self.write(&room, to)
    }

    /// Free and total bytes of memory of its own; none where it is the host's.
    fn memory(&self) -> Result<Option<(u64, u64)>> {
        Ok(None)
    }

    /// Sets all elements to zero.
    fn clear(&self, tensor: &mut Tensor) -> Result<()>;

    /// Fills with draws from a normal distribution of standard deviation `std`. Element (r, c) of
    /// the tensor depends on `seed`, r and c only.
    fn fill_normal(&self, tensor: &mut Tensor, seed: u64, std: f32) -> Result<()>;

    /// See [`Linear`].
    fn linear(&self, op: Linear<'_>) -> Result<()>;
    /// See [`Embed`].
    fn embed(&self, op: Embed<'_>) -> Result<()>;
    /// See [`Gather`].
    fn gather(&self, op: Gather<'_>) -> Result<()>;
    /// See [`RmsNorm`].
    fn rms_norm(&self, op: RmsNorm<'_>) -> Result<()>;
    /// See [`LayerNorm`].
    fn layer_norm(&self, op: LayerNorm<'_>) -> Result<()>;
    /// See [`Add`].
    fn add(&self, op: Add<'_>) -> Result<()>;
    /// See [`Scale`].
    fn scale(&self, op: Scale<'_>) -> Result<()>;
    /// See [`Activate`].
    fn activate(&self, op: Activate<'_>) -> Result<()>;
    /// See [`Conv1d`].
    fn conv1d(&self, op: Conv1d<'_>) -> Result<()>;
    /// See [`SelectiveScan`].
    fn selective_scan(&self, op: SelectiveScan<'_>) -> Result<()>;
    /// See [`Mamba3Scan`].
    fn mamba3_scan(&self, op: Mamba3Scan<'_>) -> Result<()>;
    /// See [`SsdScan`].
    fn ssd_scan(&self, op: SsdScan<'_>) -> Result<()>;
    /// See [`SsdChunked`].
    fn ssd_chunked(&self, op: SsdChunked<'_>) -> Result<()>;
    /// See [`S4dScan`].
    fn s4d_scan(&self, op: S4dScan<'_>) -> Result<()>;
    /// See [`Rope`].
    fn rope(&self, op: Rope<'_>) -> Result<()>;
    /// See [`KvWrite`].
    fn kv_write(&self, op: KvWrite<'_>) -> Result<()>;
    /// See [`Attention`].
    fn attention(&self, op: Attention<'_>) -> Result<()>;
    /// See [`Route`].
    fn route(&self, op: Route<'_>) -> Result<()>;
    /// See [`ExpertLinear`].
    fn expert_linear(&self, op: ExpertLinear<'_>) -> Result<()>;
    /// See [`Combine`].
    fn combine(&self, op: Combine<'_>) -> Result<()>;
    /// See [`Likeliest`].
    fn likeliest(&self, op: Likeliest<'_>) -> Result<()>;
}

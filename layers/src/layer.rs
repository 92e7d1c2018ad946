//! What a layer is: parameters that say which weights and state it wants, and a forward.

use std::fmt::Debug;
use std::sync::Arc;

use strata_kernels::{Backend, DType, Ragged, Rank, Result, Tensor};

use crate::share::{Of, Share};
use crate::state::{LayerState, Pages, StateSpec};
use crate::weights::{WeightSpec, Weights};
use crate::yaml::Value;

/// A layer as a plan states it: parameters, no weights.
pub trait LayerSpec: Debug + Send + Sync {
    /// The key of its step in a plan.
    fn kind(&self) -> &'static str;

    /// The name its weights go by within a block; the kind, unless the plan gives another.
    fn name(&self) -> &str;

    /// Its parameters, as a plan writes them.
    fn write(&self) -> Value;

    /// Width of its output, for inputs of width `d_in`.
    fn d_out(&self, d_in: usize) -> usize {
        d_in
    }

    /// The names of the values that it reads beside the stream.
    fn operands(&self) -> Vec<&str> {
        Vec::new()
    }

    /// What is wrong with the widths of its inputs: the stream's first, then those of its operands.
    fn check_widths(&self, _widths: &[usize]) -> std::result::Result<(), String> {
        Ok(())
    }

    /// The weights it wants, for inputs of these widths: the stream's first, then those of its operands.
    fn weights(&self, widths: &[usize]) -> Vec<WeightSpec>;

    /// The state it keeps for every sequence, for inputs of these widths.
    fn state(&self, _widths: &[usize]) -> StateSpec {
        StateSpec::default()
    }

    /// Whether a token's output depends on later ones.
    fn sees_later_tokens(&self) -> bool {
        false
    }

    /// The name under which later layers may read its keys and values.
    fn keeps_pages(&self) -> Option<&str> {
        None
    }

    /// The name under which an earlier layer keeps the keys and values that this one reads, and their
    /// widths.
    fn reads_pages(&self) -> Option<(&str, Pages)> {
        None
    }

    /// How much of a matrix one token is multiplied with: 1, but for experts.
    fn share_used(&self, _weight: &WeightSpec) -> f64 {
        1.0
    }

    /// How many tokens a token sees at most, itself included, and how many first ones beside them: of layers with
    /// attention that has a window.
    fn sight(&self) -> Option<Reach> {
        None
    }

    /// The same layer, whose tokens see the last `window` at most, and the first `keep_first` where it can show
    /// them; none if it has no attention. Or why it cannot be so.
    fn attending_last(
        &self,
        _window: usize,
        _keep_first: usize,
    ) -> Option<std::result::Result<Arc<dyn LayerSpec>, String>> {
        None
    }

    /// Operations on one token beside its products with matrices: convolutions, scans, and scores and
    /// sums of attention after `position` earlier tokens. Elementwise work is not counted.
    fn other_flops(&self, _widths: &[usize], _position: usize) -> f64 {
        0.0
    }

    /// What one of several ranks computes of it, for inputs of these widths; none for a layer that every rank has
    /// whole, or why there cannot be so many ranks.
    fn share(&self, _widths: &[usize], _rank: Of) -> Option<std::result::Result<Share, String>> {
        None
    }

    /// The layer with its weights on a device.
    fn build(&self, weights: &Weights<'_>) -> Result<Box<dyn Layer>>;
}

/// Tokens that attention can still see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reach {
    /// The last ones, a token itself included.
    pub window: usize,
    /// So many first ones beside them.
    pub keep_first: usize,
}

/// A layer with its weights on a device.
pub trait Layer: Send + Sync {
    /// Reads `x` (tokens, d_in), writes all of `y` (tokens, d_out).
    fn forward(&self, x: &Tensor, y: &mut Tensor, cx: &mut Context<'_>) -> Result<()>;
}

/// All that a layer may see while it runs.
pub struct Context<'a> {
    /// The device.
    pub backend: &'a dyn Backend,
    /// Which rows belong to which sequence.
    pub ragged: Ragged<'a>,
    /// The values that the layer reads beside `x`, in the order of [`LayerSpec::operands`].
    pub operands: &'a [Tensor],
    /// This layer's pages and slots, no one else's; of a layer that reads another's pages, those.
    pub state: &'a mut LayerState,
    /// Memory until the end of the layer.
    pub scratch: &'a mut Scratch,
    /// What matrix products round their inputs to: F32 or BF16.
    pub activations: DType,
    /// The place of this part of the layer among all parts; none if it is whole.
    pub rank: Option<&'a Rank>,
}

impl Context<'_> {
    /// Scratch of `rows` × `cols` in f32. Its contents are whatever was there.
    pub fn take(&mut self, rows: usize, cols: usize) -> Result<Tensor> {
        self.scratch.floats.take(self.backend, rows, cols)
    }

    /// Replaces this part of a sum by the sum of all parts; a whole layer has it already.
    pub fn all_reduce(&mut self, x: &mut Tensor) -> Result<()> {
        let Some(rank) = self.rank else {
            return Ok(());
        };
        let mut room = || self.scratch.floats.take(self.backend, x.rows(), x.cols());
        let room = [room()?, room()?, room()?];
        rank.all_reduce(x, room)
    }

    /// Scratch for whole numbers.
    pub fn take_i32(&mut self, rows: usize, cols: usize) -> Result<Tensor> {
        self.scratch.numbers.take(self.backend, rows, cols)
    }
}

/// Memory that layers borrow while they run. It grows to what the largest batch needs and is not
/// allocated again after that.
#[derive(Debug)]
pub struct Scratch {
    floats: Arena,
    numbers: Arena,
}

impl Default for Scratch {
    fn default() -> Self {
        Scratch {
            floats: Arena::new(DType::F32),
            numbers: Arena::new(DType::I32),
        }
    }
}

impl Scratch {
    /// Makes all of it free again. Nothing taken before may be in use.
    pub fn reset(&mut self, backend: &dyn Backend) -> Result<()> {
        self.floats.reset(backend)?;
        self.numbers.reset(backend)
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.floats.bytes() + self.numbers.bytes()
    }
}

/// One row of memory, handed out from the front; a further row where it was too short.
#[derive(Debug)]
struct Arena {
    dtype: DType,
    rows: Vec<Tensor>,
    /// Elements taken of the last row.
    used: usize,
    /// Elements taken since the reset, and the most that ever were.
    taken: usize,
    most: usize,
}

/// Elements between two tensors' starts are a multiple of this, so that each begins a cache line.
const ALIGN: usize = 16;

impl Arena {
    fn new(dtype: DType) -> Self {
        Arena {
            dtype,
            rows: Vec::new(),
            used: 0,
            taken: 0,
            most: 0,
        }
    }

    fn take(&mut self, backend: &dyn Backend, rows: usize, cols: usize) -> Result<Tensor> {
        let size = (rows * cols).next_multiple_of(ALIGN);
        if self.rows.last().is_none_or(|r| r.cols() - self.used < size) {
            self.rows.push(backend.alloc(self.dtype, 1, size)?);
            self.used = 0;
        }
        let row = self
            .rows
            .last()
            .expect("a row was just added if there was none");
        let taken = row
            .columns(self.used..self.used + rows * cols)
            .reshape(rows, cols);
        self.used += size;
        self.taken += size;
        self.most = self.most.max(self.taken);
        Ok(taken)
    }

    fn reset(&mut self, backend: &dyn Backend) -> Result<()> {
        if self.rows.len() > 1 {
            self.rows.clear();
            self.rows.push(backend.alloc(self.dtype, 1, self.most)?);
        }
        self.used = 0;
        self.taken = 0;
        Ok(())
    }

    fn bytes(&self) -> usize {
        self.rows.iter().map(Tensor::bytes).sum()
    }
}

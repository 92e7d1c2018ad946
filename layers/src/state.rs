//! What layers keep between batches. The engine owns it; a layer sees its own only.

use strata_kernels::{KvType, Tensor};

/// What one layer keeps for every sequence. A layer may want both kinds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StateSpec {
    /// Grows with the sequence: keys and values.
    pub pages: Option<Pages>,
    /// Of fixed size: parts of a slot.
    pub slot: Vec<Part>,
}

/// What one token adds to the pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pages {
    /// Heads of keys, and of values.
    pub heads: usize,
    /// Elements of a head of keys.
    pub head_dim: usize,
    /// Elements of a head of values.
    pub v_head_dim: usize,
}

impl Pages {
    /// Elements of its keys.
    pub fn keys(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Elements of its values.
    pub fn values(&self) -> usize {
        self.heads * self.v_head_dim
    }

    /// Elements of both.
    pub fn elements(&self) -> usize {
        self.keys() + self.values()
    }

    /// Bytes of both.
    pub fn bytes(&self, kv: KvType) -> usize {
        let row = |dim| kv.row_bytes(self.heads, dim);
        row(self.head_dim) + row(self.v_head_dim)
    }
}

/// A part of a slot: f32, `rows` × `cols` of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// What it holds: `conv_state`, `ssm_state`, ….
    pub name: &'static str,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
}

impl Part {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.rows * self.cols
    }
}

/// One layer's state for all sequences.
#[derive(Debug, Clone, Default)]
pub struct LayerState {
    /// Rows of keys and of values, (pages · page_size, columns of [`KvType`]).
    pub pages: Option<[Tensor; 2]>,
    /// (slots, elements) of each part, in the order of the spec.
    pub slot: Vec<Tensor>,
}

//! What layers keep between batches. The engine owns it; a layer sees its own only.

use strata_kernels::Tensor;

/// What one layer keeps for every sequence. A layer may want both kinds.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StateSpec {
    /// Grows with the sequence: keys and values.
    pub pages: Option<Pages>,
    /// Of fixed size: parts of a slot.
    pub slot: Vec<Part>,
}

/// Elements that one token adds to the pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pages {
    /// Of its keys: kv_heads · head_dim.
    pub keys: usize,
    /// Of its values: kv_heads · v_head_dim.
    pub values: usize,
}

impl Pages {
    /// Of both.
    pub fn elements(&self) -> usize {
        self.keys + self.values
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
    /// (pages · page_size, keys), (pages · page_size, values).
    pub pages: Option<[Tensor; 2]>,
    /// (slots, elements) of each part, in the order of the spec.
    pub slot: Vec<Tensor>,
}

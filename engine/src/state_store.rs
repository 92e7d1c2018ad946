//! The memory behind pages and slots: every layer's state of all sequences.

use std::sync::Arc;

use strata_kernels::{Backend, DType, Result, Tensor};
use strata_layers::graph::Graph;
use strata_layers::{LayerState, StateSpec};

/// How much state there is room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateSize {
    /// Tokens of a page.
    pub page_size: usize,
    /// Pages; a page holds the keys and values of its tokens in all attention layers.
    pub pages: usize,
    /// Slots; a slot holds the fixed-size state of one sequence in all layers.
    pub slots: usize,
    /// Type of keys and values.
    pub kv_dtype: DType,
}

/// Every layer's state.
pub struct StateStore {
    /// By node of the graph.
    pub layers: Vec<LayerState>,
    specs: Vec<StateSpec>,
    size: StateSize,
    backend: Arc<dyn Backend>,
}

impl StateStore {
    /// Zeroed state for a graph. Memory is committed as it is first written.
    pub fn new(graph: &Graph, size: StateSize, backend: Arc<dyn Backend>) -> Result<Self> {
        let specs: Vec<StateSpec> = graph.nodes.iter().map(|n| n.state.clone()).collect();
        let layer = |spec: &StateSpec| {
            let rows = size.pages * size.page_size;
            let page = |cols| backend.alloc(size.kv_dtype, rows, cols);
            let pages = match spec.pages {
                Some(p) => Some([page(p.keys)?, page(p.values)?]),
                None => None,
            };
            let part =
                |p: &strata_layers::Part| backend.alloc(DType::F32, size.slots, p.elements());
            let slot = spec.slot.iter().map(part).collect::<Result<_>>()?;
            Ok(LayerState { pages, slot })
        };
        let layers = specs.iter().map(layer).collect::<Result<_>>()?;
        Ok(StateStore {
            layers,
            specs,
            size,
            backend,
        })
    }

    /// Bytes of all pages, and of all slots.
    pub fn bytes(&self) -> (u64, u64) {
        let pages = self.layers.iter().filter_map(|l| l.pages.as_ref());
        let slots = self.layers.iter().flat_map(|l| &l.slot);
        (
            pages.flatten().map(|t| t.bytes() as u64).sum(),
            slots.map(|t| t.bytes() as u64).sum(),
        )
    }

    /// How much there is room for.
    pub fn size(&self) -> StateSize {
        self.size
    }

    /// Zeroes a slot.
    pub fn clear_slot(&mut self, slot: usize) -> Result<()> {
        for part in self.layers.iter().flat_map(|l| &l.slot) {
            self.backend.clear(&mut part.row_range(slot..slot + 1))?;
        }
        Ok(())
    }

    /// Copies a slot.
    pub fn copy_slot(&mut self, from: usize, to: usize) -> Result<()> {
        for part in self.layers.iter().flat_map(|l| &l.slot) {
            self.backend.copy(
                &part.row_range(from..from + 1),
                &mut part.row_range(to..to + 1),
            )?;
        }
        Ok(())
    }

    /// Copies a page.
    pub fn copy_page(&mut self, from: usize, to: usize) -> Result<()> {
        let rows = |page: usize| page * self.size.page_size..(page + 1) * self.size.page_size;
        for pages in self
            .layers
            .iter()
            .filter_map(|l| l.pages.as_ref())
            .flatten()
        {
            self.backend
                .copy(&pages.row_range(rows(from)), &mut pages.row_range(rows(to)))?;
        }
        Ok(())
    }

    /// The tensors that make up one sequence's state: `(name, rows, cols, tensor)` for each part of
    /// its slot, and then for the keys and values of each attention layer, of which the caller picks
    /// the pages.
    pub(crate) fn parts(&self) -> impl Iterator<Item = StatePart<'_>> {
        self.layers
            .iter()
            .zip(&self.specs)
            .enumerate()
            .flat_map(|(node, (layer, spec))| {
                let slot = layer
                    .slot
                    .iter()
                    .zip(&spec.slot)
                    .map(move |(tensor, part)| StatePart {
                        node,
                        name: part.name,
                        shape: [part.rows, part.cols],
                        tensor,
                        paged: false,
                    });
                let pages = layer.pages.iter().flat_map(move |pages| {
                    ["keys", "values"]
                        .into_iter()
                        .zip(pages)
                        .map(move |(name, tensor)| StatePart {
                            node,
                            name,
                            shape: [0, tensor.cols()],
                            tensor,
                            paged: true,
                        })
                });
                slot.chain(pages)
            })
    }

    /// The device that holds the state.
    pub(crate) fn backend(&self) -> &Arc<dyn Backend> {
        &self.backend
    }
}

/// One tensor of the store.
pub(crate) struct StatePart<'a> {
    pub node: usize,
    pub name: &'static str,
    /// Rows and columns of one sequence's part; rows of a paged part are its tokens.
    pub shape: [usize; 2],
    pub tensor: &'a Tensor,
    pub paged: bool,
}

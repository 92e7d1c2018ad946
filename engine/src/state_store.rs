//! The memory behind pages and slots: every layer's state of all sequences.

use std::sync::Arc;

use strata_kernels::{Backend, DType, KvType, Result, Tensor};
use strata_layers::graph::Node;
use strata_layers::{LayerState, Part, StateSpec};

use crate::runner::{Network, Stage};

/// How much state there is room for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateSize {
    /// Tokens of a page.
    pub page_size: usize,
    /// Pages; a page holds the keys and values of its tokens in all attention layers.
    pub pages: usize,
    /// Slots; a slot holds the fixed-size state of one sequence in all layers.
    pub slots: usize,
    /// How keys and values are kept.
    pub kv_dtype: KvType,
}

/// Every layer's state, on every device.
pub struct StateStore {
    /// By stage of the network.
    pub(crate) stages: Vec<StageState>,
    size: StateSize,
}

/// The state of one stage: pages and slots have the same numbers in all of them.
pub(crate) struct StageState {
    /// By node of the graph; nothing of those that run elsewhere.
    pub layers: Vec<LayerState>,
    specs: Vec<StateSpec>,
    backend: Arc<dyn Backend>,
    /// Which of so many ranks it is of.
    rank: Option<(usize, usize)>,
}

impl StageState {
    fn new(stage: &Stage, size: StateSize) -> Result<Self> {
        let backend = &stage.backend;
        let here = |(i, node): (usize, &Node)| match stage.nodes.contains(&i) {
            true => node.state.clone(),
            false => StateSpec::default(),
        };
        let specs: Vec<StateSpec> = stage.graph.nodes.iter().enumerate().map(here).collect();
        let layer = |spec: &StateSpec| {
            let rows = size.pages * size.page_size;
            let kv = size.kv_dtype;
            let page = |heads, dim| backend.alloc(kv.dtype(), rows, kv.columns(heads, dim));
            let pages = match spec.pages {
                Some(p) => Some([page(p.heads, p.head_dim)?, page(p.heads, p.v_head_dim)?]),
                None => None,
            };
            let part = |p: &Part| backend.alloc(DType::F32, size.slots, p.elements());
            let slot = spec.slot.iter().map(part).collect::<Result<_>>()?;
            Ok(LayerState { pages, slot })
        };
        Ok(StageState {
            layers: specs.iter().map(layer).collect::<Result<_>>()?,
            specs,
            backend: backend.clone(),
            rank: stage.rank.as_ref().map(|r| (r.index(), r.count())),
        })
    }

    fn slot(&self) -> impl Iterator<Item = &Tensor> {
        self.layers.iter().flat_map(|l| &l.slot)
    }

    fn pages(&self) -> impl Iterator<Item = &Tensor> {
        self.layers
            .iter()
            .filter_map(|l| l.pages.as_ref())
            .flatten()
    }

    fn parts(&self) -> impl Iterator<Item = StatePart<'_>> {
        let nodes = self.layers.iter().zip(&self.specs).enumerate();
        nodes.flat_map(move |(node, (layer, spec))| {
            let part = move |name, shape, tensor, paged| StatePart {
                node,
                rank: self.rank,
                name,
                shape,
                tensor,
                backend: &self.backend,
                paged,
            };
            let slot = layer.slot.iter().zip(&spec.slot);
            let slot = slot.map(move |(t, p)| part(p.name, [p.rows, p.cols], t, false));
            let pages = layer.pages.iter().flat_map(move |pages| {
                let named = ["keys", "values"].into_iter().zip(pages);
                named.map(move |(name, t)| part(name, [0, t.cols()], t, true))
            });
            slot.chain(pages)
        })
    }
}

impl StateStore {
    /// Zeroed state for a network. Memory is committed as it is first written.
    pub fn new(network: &Network, size: StateSize) -> Result<Self> {
        let stages = network.stages.iter();
        Ok(StateStore {
            stages: stages
                .map(|stage| StageState::new(stage, size))
                .collect::<Result<_>>()?,
            size,
        })
    }

    /// Bytes of all pages, and of all slots, of each stage.
    pub fn bytes(&self) -> Vec<(u64, u64)> {
        let sum =
            |tensors: &mut dyn Iterator<Item = &Tensor>| tensors.map(|t| t.bytes() as u64).sum();
        let stage = |s: &StageState| (sum(&mut s.pages()), sum(&mut s.slot()));
        self.stages.iter().map(stage).collect()
    }

    /// How much there is room for.
    pub fn size(&self) -> StateSize {
        self.size
    }

    /// Zeroes a slot.
    pub fn clear_slot(&mut self, slot: usize) -> Result<()> {
        for stage in &self.stages {
            for part in stage.slot() {
                stage.backend.clear(&mut part.row_range(slot..slot + 1))?;
            }
        }
        Ok(())
    }

    /// Copies a slot.
    pub fn copy_slot(&mut self, from: usize, to: usize) -> Result<()> {
        for stage in &self.stages {
            for part in stage.slot() {
                let mut to = part.row_range(to..to + 1);
                stage
                    .backend
                    .copy(&part.row_range(from..from + 1), &mut to)?;
            }
        }
        Ok(())
    }

    /// Copies a page.
    pub fn copy_page(&mut self, from: usize, to: usize) -> Result<()> {
        let rows = |page: usize| page * self.size.page_size..(page + 1) * self.size.page_size;
        for stage in &self.stages {
            for pages in stage.pages() {
                let mut to = pages.row_range(rows(to));
                stage.backend.copy(&pages.row_range(rows(from)), &mut to)?;
            }
        }
        Ok(())
    }

    /// The tensors that make up one sequence's state: each part of its slot, and the keys and values of each
    /// attention layer, of which the caller picks the pages.
    pub(crate) fn parts(&self) -> impl Iterator<Item = StatePart<'_>> {
        self.stages.iter().flat_map(StageState::parts)
    }
}

/// One tensor of the store.
pub(crate) struct StatePart<'a> {
    pub node: usize,
    /// Which of so many ranks it is of: a rank has the state of its part of a layer.
    pub rank: Option<(usize, usize)>,
    pub name: &'static str,
    /// Rows and columns of one sequence's part; rows of a paged part are its tokens.
    pub shape: [usize; 2],
    pub tensor: &'a Tensor,
    /// The device that holds it.
    pub backend: &'a Arc<dyn Backend>,
    pub paged: bool,
}

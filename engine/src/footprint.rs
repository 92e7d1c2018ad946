//! What a plan will allocate, known before anything is: found by running it on the null backend.

use std::sync::Arc;

use strata_kernels::null::Null;
use strata_kernels::{Backend, DType, Matrix, Ragged, Result, Span};
use strata_layers::{Graph, WeightSource, WeightSpec};

use crate::runner::{Network, Runner, Step};
use crate::state_store::{StateSize, StateStore};

/// Weights without memory.
struct Nothing(Arc<dyn Backend>);

impl WeightSource for Nothing {
    fn matrix(&self, _path: &str, spec: &WeightSpec) -> Result<Matrix> {
        let cols = spec.shape.last().copied().unwrap_or(1);
        let rows = spec.elements() / cols.max(1);
        Ok(Matrix::dense(self.0.alloc(DType::F32, rows, cols)?))
    }

    fn vector(&self, _path: &str, spec: &WeightSpec) -> Result<Vec<f32>> {
        Ok(vec![0.0; spec.elements()])
    }
}

/// Bytes of activations and scratch that each row of a step takes, beside weights and state.
pub fn bytes_per_row(graph: Graph) -> Result<usize> {
    const ROWS: usize = 64;
    let backend: Arc<dyn Backend> = Arc::new(Null::default());
    let source = Nothing(backend.clone());
    let network = Arc::new(Network::build(graph, &source, backend.clone(), DType::F32)?);
    let size = StateSize {
        page_size: ROWS,
        pages: 1,
        slots: 1,
        kv_dtype: DType::F32,
    };
    let state = StateStore::new(&network.graph, size, backend)?;
    let mut runner = Runner::new(network, state, ROWS)?;
    let fixed = runner.fixed_bytes();
    let spans = [Span {
        start: 0,
        len: ROWS,
        position: 0,
        slot: 0,
        pages: 0..1,
    }];
    let ragged = Ragged {
        spans: &spans,
        page_table: &[0],
        page_size: ROWS,
    };
    runner.forward(
        &Step {
            tokens: &[0; ROWS],
            ragged,
            logits: &[],
        },
        &mut |_, _| {},
    )?;
    Ok((runner.buffer_bytes() - fixed) / ROWS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use strata_layers::Plan;

    #[test]
    fn a_row_of_a_plan_takes_its_buffers_and_its_widest_layer() {
        let text = "\
plan: 1
name: t
vocab: 100
d_model: 32
context: 64
blocks:
  f: [residual: [norm: {eps: 1.0e-6}, mlp: {d_ff: 1024, act: silu}]]
stack: [f*3]
head: {norm: {eps: 1.0e-6}, tie: true}
";
        let graph = Graph::lower(&Plan::parse(text, "t").unwrap(), "t").unwrap();
        let bytes = bytes_per_row(graph).unwrap();
        // gate, up and their product of 1,024 each; three or four buffers of 32.
        assert!(
            (3 * 4096 + 3 * 128..=3 * 4096 + 8 * 128).contains(&bytes),
            "{bytes}"
        );
    }
}

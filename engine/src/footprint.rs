//! What a plan will allocate, known before anything is: found by running it on the null backend.

use std::sync::Arc;

use strata_kernels::null::Null;
use strata_kernels::{Backend, DType, KvType, Matrix, Ragged, Rank, Result, Span};
use strata_layers::{Graph, WeightSource, WeightSpec};

use crate::placement::Spot;
use crate::runner::{Network, Placed, Runner, Step};
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

/// Bytes of activations and scratch of a plan's steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Footprint {
    /// Of each row that there is room for: values between layers.
    pub buffers_per_row: usize,
    /// Of each row of the largest step so far: memory within a layer.
    pub scratch_per_row: usize,
    /// However many rows: for logits.
    pub fixed: usize,
}

impl Footprint {
    /// Finds it out for one device.
    pub fn of(graph: Graph) -> Result<Footprint> {
        let graph = Arc::new(graph);
        let whole = Spot {
            nodes: 0..graph.nodes.len(),
            graph,
            rank: None,
        };
        let found = Footprint::over(std::slice::from_ref(&whole))?;
        Ok(found[0])
    }

    /// Finds it out for each of several devices.
    pub fn over(spots: &[Spot]) -> Result<Vec<Footprint>> {
        let graph = spots[0].graph.clone();
        let image = graph.image.as_ref();
        let rows = image.map_or(64, |image| image.tokens());
        let blank = image.map(|image| vec![0.0; image.patches() * image.patch_width()]);
        let backend: Arc<dyn Backend> = Arc::new(Null::default());
        let source = Nothing(backend.clone());
        let devices = vec![backend; spots.len()];
        let ranks = spots.iter().any(|s| s.rank.is_some());
        let ranks = if ranks {
            Rank::all(&devices)
        } else {
            Vec::new()
        };
        let place = |(i, spot): (usize, &Spot)| Placed {
            backend: devices[i].clone(),
            source: &source,
            graph: spot.graph.clone(),
            nodes: spot.nodes.clone(),
            rank: ranks.get(i).cloned(),
        };
        let places = spots.iter().enumerate().map(place).collect();
        let network = Arc::new(Network::over(graph.clone(), places, DType::F32)?);
        let size = StateSize {
            page_size: rows,
            pages: 1,
            slots: 1,
            kv_dtype: KvType::F32,
        };
        let state = StateStore::new(&network, size)?;
        let mut runner = Runner::new(network, state, rows)?;
        let fixed = runner.fixed_bytes();
        let held = |runner: &Runner| -> Vec<usize> {
            let stages = runner.allocated_by_stage();
            stages.iter().map(|s| s.buffers as usize).collect()
        };
        let before = held(&runner);
        let tokens = vec![0; rows];
        let spans = [Span {
            start: 0,
            len: rows,
            position: 0,
            slot: 0,
            pages: 0..1,
        }];
        let ragged = Ragged {
            spans: &spans,
            page_table: &[0],
            page_size: rows,
        };
        // The second time memory has the size that it keeps.
        for _ in 0..2 {
            if let Some(blank) = &blank {
                runner.classify(blank)?;
                continue;
            }
            runner.forward(
                &Step {
                    tokens: &tokens,
                    ragged,
                    logits: &[],
                },
                &mut |_, _| {},
            )?;
        }
        let stages = fixed.into_iter().zip(before).zip(held(&runner));
        let stages = stages.map(|((fixed, before), after)| Footprint {
            buffers_per_row: (before - fixed) / rows,
            scratch_per_row: (after - before) / rows,
            fixed,
        });
        Ok(stages.collect())
    }

    /// Bytes that each row of a step takes.
    pub fn per_row(&self) -> usize {
        self.buffers_per_row + self.scratch_per_row
    }

    /// Bytes with room for `max_rows` rows, after steps of up to `rows`.
    pub fn bytes(&self, max_rows: usize, rows: usize) -> u64 {
        let rows = self.buffers_per_row * max_rows + self.scratch_per_row * rows;
        (rows + self.fixed) as u64
    }
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
        let bytes = Footprint::of(graph).unwrap().per_row();
        // gate, up and their product of 1,024 each; three or four buffers of 32.
        assert!(
            (3 * 4096 + 3 * 128..=3 * 4096 + 8 * 128).contains(&bytes),
            "{bytes}"
        );
    }
}

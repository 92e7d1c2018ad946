//! From an image to the first value.

use strata_kernels::ops::{Add, Linear};
use strata_kernels::{Ragged, Result, Span};

use super::Runner;
use super::lane::Lane;
use super::network::Input;

impl Runner {
    /// Runs one image, whose state begins in slot 0 and in the first pages. `patches` are
    /// (patches, patch width), in rows from the top. Returns the logits of its class token.
    pub fn classify(&mut self, patches: &[f32]) -> Result<Vec<f32>> {
        let network = self.network.clone();
        let Some(image) = &network.graph.image else {
            panic!("{}: no model of images", network.graph.vocab);
        };
        let (rows, place) = (image.tokens(), image.class_place());
        self.most_rows = self.most_rows.max(rows);
        let page_size = self.state.size().page_size;
        let page_table: Vec<u32> = (0..rows.div_ceil(page_size) as u32).collect();
        let spans = [Span {
            start: 0,
            len: rows,
            position: 0,
            slot: 0,
            pages: 0..page_table.len(),
        }];
        let ragged = Ragged {
            spans: &spans,
            page_table: &page_table,
            page_size,
        };
        if self.state.size().slots > 0 {
            self.state.clear_slot(0)?;
        }
        self.all(rows, None, &|lane, state, onlookers| {
            if lane.stage.input.is_some() {
                lane.patches(patches, ragged)?;
            }
            lane.nodes(ragged, rows, state, onlookers)
        })?;
        let mut logits = Vec::new();
        self.head(&[place], rows, 0, &mut |_, row| logits = row.to_vec())?;
        Ok(logits)
    }
}

impl Lane {
    /// The first value of an image.
    fn patches(&mut self, patches: &[f32], ragged: Ragged<'_>) -> Result<()> {
        let (graph, backend) = (self.stage.graph.clone(), self.stage.backend.clone());
        let (Some(Input::Image(embed)), Some(image)) = (self.stage.input.clone(), &graph.image)
        else {
            panic!("{}: no model of images", graph.vocab);
        };
        let (rows, place) = (image.tokens(), image.class_place());
        self.scratch.reset(&*backend)?;
        let mut x = self.value(0, rows);
        let cx = &mut self.without_state(&*backend, ragged);
        let mut raw = cx.take(image.patches(), image.patch_width())?;
        backend.write(patches, &mut raw)?;
        let mut projected = cx.take(image.patches(), graph.d_model)?;
        backend.linear(Linear {
            x: &raw,
            w: &embed.w,
            bias: Some(&embed.bias),
            activations: cx.activations,
            y: &mut projected,
        })?;
        let tokens = cx.take(rows, graph.d_model)?;
        let parts = [
            (projected.row_range(0..place), 0..place),
            (embed.class_token.clone(), place..place + 1),
            (projected.row_range(place..rows - 1), place + 1..rows),
        ];
        for (from, to) in parts.iter().filter(|(_, to)| !to.is_empty()) {
            backend.copy(from, &mut tokens.row_range(to.clone()))?;
        }
        backend.add(Add {
            a: &tokens,
            b: &embed.positions,
            y: &mut x,
        })
    }
}

//! Models of images: patches in, a score for every class out.

use std::sync::Arc;

use strata_kernels::{KvType, Result};
use strata_layers::Image;

use crate::estimate::Allocated;
use crate::runner::{Network, Runner};
use crate::session::EngineConfig;
use crate::state_store::{StateSize, StateStore};

/// A model of images with the memory for one image.
pub struct Classifier {
    runner: Runner,
    image: Image,
    config: EngineConfig,
}

impl Classifier {
    /// Memory for one image; none if the model reads text.
    pub fn new(network: Arc<Network>) -> Result<Option<Classifier>> {
        let Some(image) = network.graph.image.clone() else {
            return Ok(None);
        };
        let config = EngineConfig {
            token_budget: image.tokens(),
            ..EngineConfig::new(image.tokens(), 1, KvType::F32)
        };
        let size = StateSize {
            page_size: config.page_size,
            pages: config.pages(network.graph.prefix),
            slots: config.slots(),
            kv_dtype: config.kv_dtype,
        };
        let state = StateStore::new(&network, size)?;
        let runner = Runner::new(network, state, config.token_budget)?;
        Ok(Some(Classifier {
            runner,
            image,
            config,
        }))
    }

    /// The sizes of an engine that reads one image at a time.
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// What it holds now, and the rows of its largest step so far.
    pub fn allocated(&self) -> (Allocated, usize) {
        (self.runner.allocated(), self.runner.most_rows())
    }

    /// What it reads.
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// The logits of every class for (patches, patch width) numbers.
    pub fn logits(&mut self, patches: &[f32]) -> Result<Vec<f32>> {
        self.runner.classify(patches)
    }
}

/// The `top` likeliest classes with their probabilities, best first.
pub fn likeliest(logits: &[f32], top: usize) -> Vec<(usize, f64)> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let odds: Vec<f64> = logits.iter().map(|l| f64::from(l - most).exp()).collect();
    let sum: f64 = odds.iter().sum();
    let mut classes: Vec<(usize, f64)> = odds.iter().map(|o| o / sum).enumerate().collect();
    // Ties go to the lower number.
    classes.sort_by(|a, b| b.1.total_cmp(&a.1));
    classes.truncate(top);
    classes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_sum_to_one_and_ties_keep_their_order() {
        let classes = likeliest(&[1.0, 3.0, 3.0, -1e30], 9);
        let order: Vec<usize> = classes.iter().map(|c| c.0).collect();
        assert_eq!(order, [1, 2, 0, 3]);
        assert!((classes.iter().map(|c| c.1).sum::<f64>() - 1.0).abs() < 1e-12);
    }
}

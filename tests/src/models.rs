//! What the tests of models share.

use std::path::Path;

use strata::load::{LoadOptions, Model};
use strata::session::{Engine, EngineConfig, Request};
use strata_kernels::DType;

/// A model on the CPU, with two threads.
pub fn on_cpu(model: &Path) -> LoadOptions {
    LoadOptions {
        model: Some(model.display().to_string()),
        device: "cpu".into(),
        threads: Some(2),
        ..LoadOptions::default()
    }
}

/// The logits of every position: a row of the vocabulary for each token.
pub fn logits(model: &Model, tokens: &[u32]) -> Vec<f32> {
    let config = EngineConfig::new(256, 1, DType::F32);
    let mut engine = Engine::new(model.network.clone(), config).unwrap();
    let request = Request {
        prompt: tokens.to_vec(),
        prompt_logits: true,
        ..Request::default()
    };
    engine.submit(request).unwrap();
    let mut rows = Vec::new();
    let mut keep = |_, _, logits: &[f32]| rows.extend_from_slice(logits);
    while engine.step(&mut keep).unwrap() {}
    assert_eq!(rows.len(), tokens.len() * model.plan.vocab);
    rows
}

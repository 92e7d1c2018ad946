//! State files: what loads can be gone on from, what does not leaves nothing behind.

use std::path::PathBuf;
use std::sync::Arc;

use strata::document::Book;
use strata::random_weights::RandomWeights;
use strata::runner::Network;
use strata::session::{Engine, EngineConfig, Request};
use strata::state_file::{self, Fingerprint, StateFile};
use strata_kernels::DType;
use strata_kernels::reference::Reference;
use strata_layers::{Graph, Plan};

use crate::checks::folder;

const PLAN: &str = "plan: 1\nname: t\nvocab: 7\nd_model: 4\ncontext: 64\nblocks:
  b: [residual: [attention: {heads: 1, kv_heads: 1, head_dim: 2}, mamba1: {d_inner: 4, d_state: 2, d_conv: 2, dt_rank: 1}]]
stack: [b]\nhead: {norm: {eps: 1.0e-6}, tie: true}\n";

/// A small engine, and a file that its states are read from.
pub struct States {
    engine: Engine,
    fingerprint: Fingerprint,
    path: PathBuf,
    /// A file that this engine wrote.
    pub own: Vec<u8>,
}

impl States {
    /// A new engine and a state of its own.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        let plan = Plan::parse(PLAN, "plan").expect("a plan");
        let graph = Graph::lower(&plan, "plan").expect("a graph");
        let backend = Arc::new(Reference);
        let weights = RandomWeights::new(1, 0.3, DType::F32, backend.clone());
        let network = Network::build(graph, &weights, backend, DType::F32).expect("a network");
        let config = EngineConfig::new(32, 2, DType::F32);
        let engine = Engine::new(Arc::new(network), config).expect("an engine");
        let fingerprint = Fingerprint {
            plan: "p".into(),
            weights: "w".into(),
        };
        // Of its own: tests run side by side, and a file that is cut off under a map of it is fatal.
        let path = folder(&format!("state-{:?}", std::thread::current().id())).join("state");
        let mut states = States {
            engine,
            fingerprint,
            path,
            own: Vec::new(),
        };
        let sequence = states.sequence(&[1, 2, 3]);
        let id = states.engine.submit(sequence).expect("room");
        states.engine.step(&mut |_, _, _| {}).expect("a step");
        let snapshot = states.engine.snapshot(id).expect("a state");
        state_file::save(&states.engine, snapshot, &states.fingerprint, &states.path)
            .expect("a folder to write to");
        states.own = std::fs::read(&states.path).expect("just written");
        states.engine.remove(id);
        states.engine.drop_snapshot(snapshot).expect("it is there");
        states
    }

    fn sequence(&self, tokens: &[u32]) -> Request {
        Request {
            prompt: tokens.to_vec(),
            max_tokens: 2,
            ..Request::default()
        }
    }

    /// Makes a file's states known to a prefix cache; one that is there serves a sequence.
    fn attach(&mut self) {
        let Ok(file) = StateFile::open(&self.path) else {
            return;
        };
        let policy = "every=2; ends; branches; budget=1"
            .parse()
            .expect("a policy");
        self.engine.keep_states(policy, self.fingerprint.clone());
        let mut tokens = file.tokens();
        let file = Arc::new(file);
        if self.engine.attach(&file).is_ok() {
            tokens.push(0);
            if let Ok(sequence) = self.engine.submit(self.sequence(&tokens)) {
                self.engine.step(&mut |_, _, _| {}).ok();
                self.engine.remove(sequence);
            }
        }
        // The file is written anew, so nobody may hold it.
        self.engine.forget_states();
    }

    /// Loads a file; what is in it serves a sequence.
    pub fn check(&mut self, bytes: &[u8]) {
        std::fs::write(&self.path, bytes).expect("a folder to write to");
        Book::open(&self.path).ok();
        self.attach();
        let Ok(id) = state_file::load(&mut self.engine, &self.fingerprint, &self.path) else {
            return;
        };
        let mut tokens = self.engine.snapshot_tokens(id).expect("loaded").to_vec();
        tokens.push(0);
        let request = self.sequence(&tokens);
        if let Ok(sequence) = self.engine.restore(id, request) {
            // A state of NaN has no next token; that is an error, no panic.
            self.engine.step(&mut |_, _, _| {}).ok();
            self.engine.remove(sequence);
        }
        self.engine.drop_snapshot(id).expect("loaded");
    }
}

impl Drop for States {
    fn drop(&mut self) {
        if let Some(folder) = self.path.parent() {
            std::fs::remove_dir_all(folder).ok();
        }
    }
}

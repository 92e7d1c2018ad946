//! The running of models: see ARCHITECTURE.md for the map.

#![deny(unsafe_code)]

pub mod batch;
pub mod bench;
pub mod beyond;
pub mod classify;
pub mod cli;
pub mod constraint;
mod cut;
pub mod document;
pub mod estimate;
pub mod fit;
pub mod footprint;
pub mod generation;
pub mod generation_config;
pub mod hosted;
pub mod hub;
pub mod ids;
pub mod image;
pub mod importance;
pub mod load;
pub mod lookup;
pub mod pages;
pub mod perplexity;
pub mod placement;
pub mod plan_diff;
pub mod plot;
mod pools;
pub mod prefix_cache;
pub mod probe;
mod quantize;
pub mod random_weights;
pub mod recipe;
pub mod reference_run;
pub mod runner;
pub mod sampler;
pub mod scheduler;
pub mod sequence;
pub mod server;
pub mod session;
pub mod slots;
pub mod state_file;
pub mod state_store;
#[cfg(test)]
mod testing;
pub mod text;
pub mod tools;
pub mod trace;
pub mod verify;

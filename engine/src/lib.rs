//! The running of models: see ARCHITECTURE.md for the map.

#![deny(unsafe_code)]

pub mod batch;
pub mod ids;
pub mod pages;
mod pools;
pub mod random_weights;
pub mod runner;
pub mod scheduler;
pub mod sequence;
pub mod slots;
pub mod state_store;

//! The running of models: see ARCHITECTURE.md for the map.

#![deny(unsafe_code)]

pub mod random_weights;
pub mod runner;
pub mod state_store;

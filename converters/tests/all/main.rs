//! Files to plans and weights: goldens, and whatever may be wrong with files.

mod cards;
mod checkpoints;
mod common;
mod configs;
mod contradictions;
mod gguf;
mod goldens;
mod mappings;
mod writing;

//! From files to a plan and a source of weights: model cards, `config.json`, safetensors, PyTorch's files.
//!
//! A [`Card`] turns a family's `config.json` into a plan, and says which of a checkpoint's tensors
//! each weight of the plan is. Nothing is converted ahead of time: a [`Mapping`] hands out views of
//! mapped files, and computes only what differs.

#![deny(unsafe_code)]

pub mod bundled;
pub mod card;
pub mod cards;
pub mod checkpoint;
pub mod config;
pub mod error;
mod expression;
pub mod files;
pub mod gguf;
pub mod mapping;
mod nearest;
mod pattern;
mod pickle;
pub mod published;
mod pytorch;
mod quantized;
mod report;
mod safetensors;
mod selection;
pub mod solve;
mod stack;
pub mod tensor_map;
mod torch_names;
pub mod transforms;
mod view;
pub mod write;
mod zip;

pub use card::{Card, Unused};
pub use checkpoint::Checkpoint;
pub use config::Config;
pub use error::{Error, Result};
pub use files::ModelFiles;
pub use gguf::Gguf;
pub use mapping::{Mapping, Origin};

//! Numbers and devices: tensors, weight matrices, the operations that layers are made of, and the
//! backends that run them. This crate knows no model, no YAML and no file.
//!
//! Every operation is one file in [`ops`]: its formula, its argument struct, its shape checks and a
//! plain reference. The same name in [`cpu`] is the fast path.

pub mod backend;
pub mod comm;
pub mod cpu;
pub mod cuda;
mod device_memory;
pub mod error;
pub mod format;
mod formats;
pub mod kv;
pub mod matrix;
pub mod null;
pub mod ops;
pub mod random;
pub mod reference;
mod rounded;
pub mod span;
pub mod tensor;

pub use backend::{Backend, Repeat};
pub use comm::Rank;
pub use error::{Error, Result};
pub use format::Format;
pub use kv::KvType;
pub use matrix::Matrix;
pub use span::{Ragged, Span};
pub use tensor::{DType, HostBytes, HostTensor, Tensor};

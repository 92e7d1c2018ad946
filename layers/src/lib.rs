//! What a model may be made of: layer plans, the layers they name, and the weights and the state that
//! those want. This crate knows no family, no file and no thread.

#![forbid(unsafe_code)]

pub mod graph;
pub mod layer;
pub mod param;
pub mod plan;
pub mod state;
pub mod weights;
pub mod yaml;

mod attend;
mod attention;
mod conv1d;
mod differential;
mod gate;
pub mod image;
mod linear;
mod lower;
mod mamba1;
mod mamba2;
mod mamba3;
mod mlp;
mod moe;
mod norm;
mod repeat;
mod reverse;
mod rope;
mod s4d;
mod scale;
mod selective_scan;
pub mod share;
mod slice;
mod ssd_scan;
mod window;

pub use graph::{Graph, NodeId, ValueId};
pub use image::Image;
pub use layer::{Context, Layer, LayerSpec, Reach, Scratch};
pub use plan::Plan;
pub use share::{Of, Share};
pub use state::{LayerState, Pages, Part, StateSpec};
pub use weights::{Cut, Init, Role, WeightSource, WeightSpec, Weights};
pub use yaml::{Fault, Faults, Mark, Node};

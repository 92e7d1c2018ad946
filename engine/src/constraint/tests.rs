use std::path::Path;
use std::sync::OnceLock;

use serde_json::{Value, json};

use super::*;
use crate::load::{Loading, Model};
use crate::sampler::{SampleError, Sampler, SamplingParams};
use crate::text::{Bytes, Tokenizer};

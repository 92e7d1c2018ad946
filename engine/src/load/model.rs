//! A model that is ready to run.

use std::sync::{Arc, OnceLock};

use strata_converters::mapping::Mapping;
use strata_kernels::cpu::{self, Cpu};
use strata_kernels::{DType, KvType};
use strata_layers::Plan;
use xxhash_rust::xxh3::{Xxh3, xxh3_128};

use super::hashes::Hashes;
use super::stored::non_finite;
use super::{Error, Result};
use crate::constraint::{self, Vocabulary};
use crate::estimate::{self, Estimate};
use crate::footprint::Footprint;
use crate::generation;
use crate::generation_config::GenerationConfig;
use crate::perplexity;
use crate::placement::Spot;
use crate::recipe::Storage;
use crate::runner::Network;
use crate::sampler::SampleError;
use crate::session::{self, EngineConfig};
use crate::state_file::Fingerprint;
use crate::text::{Chat, ChatTemplate, Tokenizer};
use crate::tools::{self, Format, Tool};

/// A model that is ready to run.
pub struct Model {
    /// Its name.
    pub name: String,
    /// Its plan.
    pub plan: Plan,
    /// Its graph and weights.
    pub network: Arc<Network>,
    /// Its tokenizer, if it has one.
    pub tokenizer: Option<Arc<Tokenizer>>,
    /// How it asks to be sampled.
    pub generation: GenerationConfig,
    /// Compute type.
    pub dtype: DType,
    /// Type of keys and values.
    pub kv_dtype: KvType,
    /// Bytes of all weights in the form they run in.
    pub weights_bytes: u64,
    /// Bytes of activations that steps take.
    pub footprint: Footprint,
    /// What each device runs, and bytes of activations that steps take there.
    pub stages: Vec<(Spot, Footprint)>,
    /// How its weights are stored, for the most part.
    pub storage: Storage,
    /// Threads that compute.
    pub threads: usize,
    /// Names of the classes of a model of images, if its config.json has them.
    pub labels: Vec<String>,
    /// What is worth knowing.
    pub notes: Vec<String>,
    /// Fast paths in use.
    pub features: &'static str,
    /// Why a tokenizer that the files hold cannot be used.
    pub(super) no_text: Option<String>,
    pub(super) cpu: Option<Arc<Cpu>>,
    pub(super) template: Option<String>,
    pub(super) weights: Weights,
    /// What is known of the weights' hash without reading them.
    pub(super) hashes: Option<Hashes>,
    /// Made when the first constraint is.
    pub(super) vocabulary: OnceLock<std::result::Result<Arc<Vocabulary>, constraint::Error>>,
}

/// Where weights come from.
pub(super) enum Weights {
    Random(u64),
    Checkpoint(Mapping),
}

/// The type that `--dtype` calls so: the way back from [`Model::dtype_word`].
pub fn dtype_of_word(word: &str) -> Option<DType> {
    let types = [DType::F32, DType::BF16, DType::F16];
    types
        .into_iter()
        .find(|t| t.to_string().eq_ignore_ascii_case(word))
}

/// What a machine can do at most.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Limits {
    /// Bytes read from memory a second.
    pub bytes_per_second: f64,
    /// Operations a second of the kind that this model's products are.
    pub flops_per_second: f64,
}

impl Model {
    /// The tokenizer, or what to do without one.
    pub fn tokenizer(&self) -> Result<&Arc<Tokenizer>> {
        self.tokenizer.as_ref().ok_or_else(|| {
            let missing = || {
                format!(
                    "{} has no tokenizer.json; give --token-ids, or put the tokenizer's files beside its config.json",
                    self.name
                )
            };
            Error::Input(self.no_text.clone().unwrap_or_else(missing))
        })
    }

    /// Tokens that end a sequence.
    pub fn eos(&self) -> Vec<u32> {
        if !self.generation.eos_token_ids.is_empty() {
            return self.generation.eos_token_ids.clone();
        }
        self.tokenizer
            .as_ref()
            .and_then(|t| t.eos_id())
            .into_iter()
            .collect()
    }

    /// What holds its output to a form. May take seconds: not for a thread that others wait for.
    pub fn constrain(&self, source: &constraint::Source) -> Result<constraint::Constraint> {
        let tokenizer = self.tokenizer()?;
        let make = || Vocabulary::new(tokenizer, &self.eos());
        let vocabulary = self.vocabulary.get_or_init(make).as_ref();
        let compiled = vocabulary.map_err(Clone::clone)?.compile(source);
        Ok(compiled?)
    }

    /// Whether it has a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// Messages under the model's chat template.
    pub fn render_chat(
        &self,
        messages: &[serde_json::Value],
        add_generation_prompt: bool,
    ) -> Result<String> {
        self.render_chat_with(messages, &[], add_generation_prompt)
    }

    /// The same with functions that the model may call: given to the template, or described in the system message
    /// where the template knows none.
    pub fn render_chat_with(
        &self,
        messages: &[serde_json::Value],
        tools: &[Tool],
        add_generation_prompt: bool,
    ) -> Result<String> {
        let source = self.template_for(!tools.is_empty()).ok_or_else(|| {
            Error::Input(format!(
                "{} has no chat template; use `strata generate` with the whole text",
                self.name
            ))
        })?;
        let knows = tools::knows_tools(source);
        let messages = tools::prepare(messages, tools, Format::of_template(source), knows);
        let told: Vec<serde_json::Value> = tools.iter().map(Tool::json).collect();
        let special_tokens = self.tokenizer.as_ref().map(|t| t.special_tokens());
        let chat = Chat {
            messages: &messages,
            tools: (knows && !told.is_empty()).then_some(&told[..]),
            add_generation_prompt,
            special_tokens,
            ..Chat::default()
        };
        Ok(ChatTemplate::new(source)?.render(&chat)?)
    }

    /// How the model writes calls of functions.
    pub fn tool_format(&self) -> Format {
        let template = self.template_for(true);
        template.map(Format::of_template).unwrap_or_default()
    }

    fn template_for(&self, tools: bool) -> Option<&str> {
        let own = self.template.as_deref()?;
        let tokenizer = self.tokenizer.as_ref().filter(|_| tools);
        let for_tools = tokenizer.and_then(|t| t.chat_template(None, true));
        Some(for_tools.unwrap_or(own))
    }

    /// One line about the model.
    pub fn summary(&self) -> String {
        let parameters: u64 = self
            .network
            .graph
            .weights()
            .iter()
            .map(|w| w.spec.elements() as u64)
            .sum();
        format!(
            "{}: {:.2} million parameters, {:.1} MB of weights, {}, {} thread{} ({})",
            self.name,
            parameters as f64 / 1e6,
            self.weights_bytes as f64 / 1e6,
            self.types(),
            self.threads,
            if self.threads == 1 { "" } else { "s" },
            self.features,
        )
    }

    /// The compute type, and that of keys and values where it is another.
    fn types(&self) -> String {
        match self.dtype_word() {
            word if word == self.kv_dtype.name() => word.into(),
            word => format!("{word}, keys and values in {}", self.kv_dtype),
        }
    }

    /// The compute type, as `--dtype` has it.
    pub fn dtype_word(&self) -> &'static str {
        // See `dtype_of_word`.
        match self.dtype {
            DType::F32 => "f32",
            DType::BF16 => "bf16",
            DType::F16 => "f16",
            DType::I32 => "i32",
            DType::U8 => "u8",
        }
    }

    /// Hashes of the plan, less its name, and of all weights. Reads every weight, unless it is known from an earlier
    /// time that these very files have this hash.
    pub fn fingerprint(&self) -> Result<Fingerprint> {
        let plan = Plan {
            name: String::new(),
            ..self.plan.clone()
        };
        let recipe = self.storage.recipe.as_ref().map(|r| format!("{r:?}"));
        let recipe = recipe.unwrap_or_default();
        let weights = match (&self.weights, &self.hashes) {
            (Weights::Checkpoint(mapping), Some(hashes)) => {
                hashes.get_or(mapping, &recipe, || self.hash_weights(&recipe))?
            }
            _ => self.hash_weights(&recipe)?,
        };
        Ok(Fingerprint {
            plan: format!("{:032x}", xxh3_128(plan.print().as_bytes())),
            weights: format!("{weights:032x}"),
        })
    }

    fn hash_weights(&self, recipe: &str) -> Result<u128> {
        let mut hash = Xxh3::new();
        match &self.weights {
            Weights::Random(seed) => {
                hash.update(format!("random {seed} {}", self.dtype_word()).as_bytes());
            }
            Weights::Checkpoint(mapping) => {
                for row in mapping.rows() {
                    let host = mapping.load(&row.path)?;
                    hash.update(format!("{} {} {:?}", row.path, row.format, row.shape).as_bytes());
                    hash.update(host.bytes());
                }
            }
        }
        hash.update(recipe.as_bytes());
        Ok(hash.digest128())
    }

    /// Adds to an error what can be found out about its cause.
    pub fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        // Transparent errors hide what they wrap from the chain.
        let engine = match error.downcast_ref() {
            Some(generation::Error::Engine(engine)) => Some(engine),
            _ => error.downcast_ref::<session::Error>(),
        };
        let nan = matches!(
            engine,
            Some(session::Error::Sample(SampleError::Nan { .. }))
        ) || matches!(
            error.downcast_ref(),
            Some(perplexity::Error::NotFinite { .. })
        );
        let Weights::Checkpoint(mapping) = &self.weights else {
            return error;
        };
        let found = if nan {
            non_finite(mapping, usize::MAX)
        } else {
            Vec::new()
        };
        if found.is_empty() {
            error
        } else {
            anyhow::anyhow!("{error}\n{}", found.join("\n"))
        }
    }

    /// Whether the number of threads has a part in the results' speed.
    pub fn uses_threads(&self) -> bool {
        self.cpu.is_some()
    }

    /// What the machine can do at most, measured now.
    pub fn limits(&self) -> Limits {
        let Some(cpu) = &self.cpu else {
            let network = &self.network;
            // The plain loops are not there to be measured.
            if network.backend.name() != "cuda" {
                return Limits::default();
            }
            let measured = super::limits::measure(&*network.backend, network.activations);
            return measured.unwrap_or_default();
        };
        let measured = cpu::measure(cpu);
        Limits {
            bytes_per_second: measured.read_bytes_per_second,
            flops_per_second: match self.network.activations {
                DType::BF16 => measured.bf16_flops_per_second,
                _ => measured.f32_flops_per_second,
            },
        }
    }

    /// Bytes of the matrices that decoding one token reads.
    pub fn decode_bytes(&self) -> u64 {
        let graph = &self.network.graph;
        estimate::decode_bytes(graph, &graph.weights(), self.weights_bytes)
    }

    /// Floating-point operations of the matrix products that a prompt token goes through.
    pub fn flops_per_token(&self) -> f64 {
        2.0 * estimate::multiplied(&self.network.graph)
    }

    /// What an engine of these sizes is expected to hold, after steps of up to `rows` rows.
    pub fn estimate(&self, config: &EngineConfig, rows: usize) -> Estimate {
        let graph = &self.network.graph;
        let estimate = estimate::estimate(graph, config, &self.storage, &self.footprint, rows);
        let estimate = match &self.stages[..] {
            [_] => estimate,
            stages => Estimate {
                // Ranks may keep the same keys, and each stage has buffers.
                kv_bytes: config.pages(graph.prefix) as u64
                    * config.page_size as u64
                    * stages
                        .iter()
                        .map(|(s, _)| s.page_bytes(config.kv_dtype))
                        .sum::<u64>(),
                state_bytes: config.slots() as u64
                    * stages.iter().map(|(s, _)| s.slot_bytes()).sum::<u64>(),
                buffer_bytes: stages
                    .iter()
                    .map(|(_, f)| f.bytes(config.token_budget, rows))
                    .sum(),
                ..estimate
            },
        };
        Estimate {
            // Of the types that the checkpoint has, which may differ from matrix to matrix.
            weight_bytes: self.weights_bytes,
            ..estimate
        }
    }
}

//! Whether a model fits its devices: which of them holds what, what context and how many sequences there is room for,
//! and what would make it fit. Nothing is allocated to know it; the loader asks the same before it reads a weight.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use strata_kernels::{Format, KvType};
use strata_layers::Graph;

use crate::footprint::Footprint;
use crate::placement::{Parallel, SPARE, Sizes, Spot, spots};
use crate::recipe::Recipe;
use crate::session::EngineConfig;

/// What is to fit.
#[derive(Clone)]
pub struct Question<'a> {
    /// The model.
    pub graph: &'a Arc<Graph>,
    /// The format that each weight runs in, by its path.
    pub formats: &'a HashMap<String, Format>,
    /// Paths of weights that stay with the host.
    pub hosted: &'a HashSet<String>,
    /// The devices, and the bytes that each has room for; none for the host's memory without a limit.
    pub devices: &'a [(String, Option<u64>)],
    /// How they share the model.
    pub parallel: Parallel,
    /// How keys and values are kept.
    pub kv: KvType,
    /// Tokens of a sequence, and sequences.
    pub context: usize,
    /// Sequences at a time.
    pub batch: usize,
}

/// What one device holds.
#[derive(Debug, Clone, PartialEq)]
pub struct Load {
    /// Its name.
    pub device: String,
    /// Bytes that it has room for.
    pub room: Option<u64>,
    /// What it runs, in words.
    pub runs: String,
    /// Bytes of weights.
    pub weights: u64,
    /// Bytes of keys and values, for all sequences.
    pub kv: u64,
    /// Bytes of fixed-size state, for all sequences.
    pub state: u64,
    /// Bytes of activations and scratch.
    pub buffers: u64,
}

impl Load {
    /// All together.
    pub fn total(&self) -> u64 {
        self.weights + self.kv + self.state + self.buffers
    }

    /// Bytes that may be used of its room: some are left for what libraries take.
    fn usable(&self) -> Option<u64> {
        self.room.map(|room| (room as f64 * (1.0 - SPARE)) as u64)
    }

    /// Whether there is room for all of it.
    pub fn fits(&self) -> bool {
        self.usable().is_none_or(|room| self.total() <= room)
    }

    /// How much more of something there is room for, that is `now` and takes `bytes` beside `others`.
    fn most(&self, now: usize, bytes: u64, others: u64) -> usize {
        let Some(room) = self.usable().filter(|_| bytes > 0) else {
            return usize::MAX;
        };
        let each = bytes as f64 / now.max(1) as f64;
        (room.saturating_sub(others) as f64 / each) as usize
    }
}

/// The answer.
pub struct Fit {
    /// Where what runs.
    pub spots: Vec<Spot>,
    /// By device.
    pub loads: Vec<Load>,
    /// Bytes of activations, by device.
    pub footprints: Vec<Footprint>,
    /// The largest context for as many sequences, if there is a bound.
    pub context: Option<usize>,
    /// Most sequences of the context, if there is a bound.
    pub batch: Option<usize>,
}

impl Fit {
    /// Whether every device has room.
    pub fn fits(&self) -> bool {
        self.loads.iter().all(Load::fits)
    }
}

/// Rows of the steps that an engine takes on these devices.
const DEVICE_ROWS: usize = 4096;

impl Question<'_> {
    /// Bytes of a weight, or of a part of it.
    fn bytes(&self, path: &str, shape: &[usize]) -> u64 {
        if self.hosted.contains(path) {
            return 0;
        }
        let bytes = self.formats.get(path).and_then(|f| f.bytes_of(shape));
        bytes.unwrap_or(0) as u64
    }

    /// Bytes of the weights that stay with the host.
    pub fn hosted_bytes(&self) -> u64 {
        let hosted = self
            .graph
            .weights()
            .into_iter()
            .filter(|w| self.hosted.contains(&w.path));
        let bytes = |w: strata_layers::graph::GraphWeight| {
            self.formats
                .get(&w.path)
                .and_then(|f| f.bytes_of(&w.spec.shape))
        };
        hosted.filter_map(bytes).map(|b| b as u64).sum()
    }

    /// The answer; or why the devices cannot share the model so.
    pub fn answer(&self) -> std::result::Result<Fit, String> {
        let config = EngineConfig::new(self.context, self.batch, self.kv);
        let tokens = config.pages(self.graph.prefix) * config.page_size;
        let sizes = Sizes {
            weight: &|path, shape| self.bytes(path, shape),
            kv: self.kv,
            tokens: tokens as u64,
            slots: config.slots() as u64,
        };
        let rooms: Vec<_> = self.devices.iter().map(|d| d.1).collect();
        let spots = spots(self.graph, self.parallel, &rooms, &sizes)?;
        let footprints = Footprint::over(&spots).map_err(|e| e.to_string())?;
        let loads: Vec<Load> = spots
            .iter()
            .zip(self.devices)
            .zip(&footprints)
            .map(|((spot, (device, room)), footprint)| {
                let taken = spot.taken(&sizes);
                let config = match device.starts_with("cuda") {
                    true => config
                        .clone()
                        .with_most_rows(DEVICE_ROWS, footprint.per_row()),
                    false => config.clone().with_row_bytes(footprint.per_row()),
                };
                Load {
                    device: device.clone(),
                    room: *room,
                    runs: runs(spot, &spots),
                    weights: taken.weights,
                    kv: taken.kv,
                    state: taken.state,
                    buffers: footprint.bytes(config.token_budget, config.token_budget),
                }
            })
            .collect();
        let least = |most: &dyn Fn(&Load) -> usize| loads.iter().map(most).min();
        let bounded = |most: Option<usize>| most.filter(|m| *m < usize::MAX);
        let context = least(&|l| l.most(self.context, l.kv, l.weights + l.buffers + l.state));
        let batch = least(&|l| l.most(self.batch, l.kv + l.state, l.weights + l.buffers));
        Ok(Fit {
            context: bounded(context),
            batch: bounded(batch),
            spots,
            loads,
            footprints,
        })
    }

    /// What would make it fit, best first: each was tried.
    pub fn ways(&self, other: &dyn Fn(&str) -> Option<HashMap<String, Format>>) -> Vec<String> {
        let fits = |question: &Question<'_>| question.answer().is_ok_and(|fit| fit.fits());
        let mut ways = Vec::new();
        if let Ok(fit) = self.answer()
            && let Some(context) = fit.context.filter(|c| *c > 0 && *c < self.context)
        {
            ways.push(format!("--context {context}"));
        }
        // The widest that is enough.
        let narrower = match self.kv {
            KvType::F32 => &[KvType::BF16, KvType::Int8][..],
            KvType::F16 | KvType::BF16 => &[KvType::Int8],
            KvType::Int8 => &[],
        };
        let enough = narrower.iter().copied().find(|kv| {
            let kv = *kv;
            fits(&Question { kv, ..self.clone() })
        });
        match enough {
            Some(KvType::Int8) => ways.push("keys and values in 8 bits: --kv int8".into()),
            Some(kv) => ways.push(format!("keys and values in 16 bits: --kv {kv}")),
            None => {}
        }
        for recipe in ["q8_0", "q6_k", "q4_k_m"] {
            let Some(formats) = other(recipe) else {
                continue;
            };
            let question = Question {
                formats: &formats,
                ..self.clone()
            };
            if fits(&question) {
                ways.push(format!("--quantize {recipe}"));
                break;
            }
        }
        let experts = crate::placement::experts(self.graph);
        if !experts.is_empty() && self.hosted.is_empty() {
            let question = Question {
                hosted: &experts,
                ..self.clone()
            };
            if fits(&question) {
                ways.push("experts in the host's memory: --experts cpu".into());
            }
        }
        let mut devices = self.devices.to_vec();
        if let Some(last) = devices.last().cloned() {
            let name = last.0.clone();
            devices.push(last);
            let question = Question {
                devices: &devices,
                ..self.clone()
            };
            if fits(&question) {
                ways.push(format!("one device more like {name}"));
            }
        }
        ways
    }
}

/// The formats of all weights by a recipe, of those that are not in blocks already.
pub fn quantised(question: &Question<'_>, recipe: &str) -> Option<HashMap<String, Format>> {
    let recipe = Recipe::find(recipe).ok()?;
    let mut formats = question.formats.clone();
    for weight in question.graph.weights() {
        let wide = formats
            .get(&weight.path)
            .is_some_and(|f| !f.rounds_inputs());
        if let (true, Some(format)) = (wide, recipe.choose(&weight)) {
            formats.insert(weight.path, format);
        }
    }
    Some(formats)
}

/// A line for each device.
pub fn table(fit: &Fit) -> Vec<String> {
    let gb = |bytes: u64| format!("{:.2} GB", bytes as f64 / 1e9);
    let line = |load: &Load| {
        let room = match load.room {
            None => String::new(),
            Some(room) if load.fits() => format!(" of {}", gb(room)),
            Some(room) => format!(", and there are {}", gb(room)),
        };
        format!(
            "{}: {}; {}{room}: {} of weights, {} of keys and values, {} of state, {} of buffers",
            load.device,
            load.runs,
            gb(load.total()),
            gb(load.weights),
            gb(load.kv),
            gb(load.state),
            gb(load.buffers)
        )
    };
    fit.loads.iter().map(line).collect()
}

/// Why a model is not loaded, and what to do.
pub fn refusal(question: &Question<'_>, fit: &Fit) -> String {
    let ways = question.ways(&|recipe| quantised(question, recipe));
    let ways = match ways.is_empty() {
        true => "a smaller model, or more memory".into(),
        false => ways.join(", or "),
    };
    format!(
        "the model does not fit its devices\n  {}\nwhat would make it fit: {ways}",
        table(fit).join("\n  ")
    )
}

/// What a device runs, in words.
fn runs(spot: &Spot, all: &[Spot]) -> String {
    let blocks = spot.blocks();
    if let Some(rank) = spot.rank {
        let (number, count) = (rank.index + 1, rank.count);
        return format!("part {number} of {count} of all {} blocks", blocks.len());
    }
    if all.len() == 1 {
        return format!("all {} blocks", blocks.len());
    }
    let mut parts = Vec::new();
    if spot.nodes.start == 0 {
        parts.push("the embedding".to_string());
    }
    parts.push(match blocks.len() {
        1 => format!("block {}", blocks.start),
        _ => format!(
            "blocks {} to {}",
            blocks.start,
            blocks.end.saturating_sub(1)
        ),
    });
    if spot.nodes.end == spot.graph.nodes.len() {
        parts.push("the output matrix".into());
    }
    parts.join(", ")
}
